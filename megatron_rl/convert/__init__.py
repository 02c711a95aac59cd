"""HF <-> Megatron, declared once per family, run both ways; no process group and no model needed.

    config.json -> ModelShape -> entries -> boxes -> load | export | weight sync | verification
    (architecture/)              (tables/)           (hf/, offline/)

    architecture/   what a model's config.json says of it
    tables/         the weight tables: how each Hugging Face tensor lies in Megatron's parameters; digests of tensors
    hf/             Hugging Face checkpoints, read and written
    offline/        ``megatron-rl convert`` and ``verify``: whole checkpoints, resumable, without a model

``architecture`` and ``tables`` (but its digests) do not import torch: a config check or a plan runs without it.
"""
