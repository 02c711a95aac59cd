"""HF <-> Megatron, declared once per family, run both ways; no process group and no model needed.

    config.json -> ModelShape -> entries (table) -> boxes (kinds) -> load | export | weight sync | verification
    (shape.py)                   (table.py, llama.py, ...)           (load.py, export.py)

``shape``, ``kinds`` and ``table`` do not import torch: a config check or a plan runs without it.
"""
