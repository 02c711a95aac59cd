"""What ``megatron-rl eval`` evaluates: a model, a run or a checkpoint of one, and the config for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from megatron_rl.config.installed import platform
from megatron_rl.config.reader import quoted
from megatron_rl.errors import UserError
from megatron_rl.metrics.best import read_best

BASE = Path(str(files("megatron_rl.config").joinpath("eval.yaml")))
"""The config of a model that no run here has made."""
_STEP = re.compile(r"step_\d{8}")


@dataclass(frozen=True)
class Evaluated:
    """The weights to evaluate."""

    config: Path
    """YAML with task, template, engine and layout."""
    overrides: tuple[str, ...]
    """Settings that name the weights, as on a command line."""
    out: Path
    """Folder of the results, unless another one is given."""


def find_model(model: str, checkpoint: str | None) -> Evaluated:
    """Find what a user means.

    Args:
        model: a folder of a run, a checkpoint of one, a YAML file, a Hugging Face folder, or a name on the hub.
        checkpoint: of a run: ``last``, ``best`` or the number of a step; None takes the finished run's ``hf/``, else ``last``.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return _of_run(path, checkpoint)
    if checkpoint is not None:
        raise UserError("--checkpoint", checkpoint, f"is for the folder of a run, and {model} is none", "leave it out")
    if _STEP.fullmatch(path.name) and (path.parent.parent / "config.yaml").is_file():
        return _of_checkpoint(path)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return Evaluated(path, (), Path("evaluations") / path.stem)
    name = path.name if path.exists() else model.split("@")[0].rsplit("/", 1)[-1]
    precision = () if platform() == "gpu" else ("trainer.precision=fp32",)
    return Evaluated(BASE, (f"policy.model_path={quoted(model)}", *precision), Path("evaluations") / name)


def _of_run(run: Path, checkpoint: str | None) -> Evaluated:
    if checkpoint is None and (run / "hf").is_dir():
        return _of_export(run, "hf")
    steps = sorted(path for path in (run / "checkpoints").glob("step_*") if _STEP.fullmatch(path.name))
    if checkpoint == "best":
        best, exported = read_best(run)
        if best is None:
            fix = "set exp_manager.checkpoint_callback_params.metric_name in training, or give a step"
            raise UserError("--checkpoint", "best", f"is not known of {run}: it has no best.json", fix)
        if exported == best and (run / "hf_best").is_dir():
            return _of_export(run, "hf_best")
        steps = [run / "checkpoints" / f"step_{best:08d}"]
    elif checkpoint not in (None, "last"):
        steps = [path for path in steps if str(int(path.name[5:])) == checkpoint.lstrip("0")]
    if not steps or not steps[-1].is_dir():
        there = (
            ", ".join(str(int(path.name[5:])) for path in sorted((run / "checkpoints").glob("step_????????"))) or "none"
        )
        raise UserError(
            "--checkpoint", checkpoint or "last", f"is no checkpoint of {run}, which has: {there}", "name one of those"
        )
    return _of_checkpoint(steps[-1])


def _of_export(run: Path, name: str) -> Evaluated:
    settings = (
        f"policy.model_path={quoted(str(run / name))}",
        "policy.tokenizer_path=null",
        "policy.initialization=pretrained",
    )
    return Evaluated(
        run / "config.yaml", (*settings, "exp_manager.resume_from_checkpoint=null"), run / "evaluations" / name
    )


def _of_checkpoint(path: Path) -> Evaluated:
    run = path.parent.parent
    settings = (f"exp_manager.resume_from_checkpoint={quoted(str(path))}",)
    return Evaluated(run / "config.yaml", settings, run / "evaluations" / path.name)


def data_overrides(sets: Sequence[str]) -> list[str]:
    """Return the settings for ``--data NAME=FILE`` or ``--data FILE``, given any number of times.

    Raises:
        UserError: a set without a name beside others, or one name for two.
    """
    if not sets:
        return []
    named = [re.fullmatch(r"([\w.-]+)=(.+)", text) for text in sets]
    if len(sets) == 1 and named[0] is None:
        return ["data.validation=null", f"data.validation={_files(sets[0])}"]
    found: dict[str, str] = {}
    for text, match in zip(sets, named):
        if match is None or match[1] in found:
            rule = "names no set, and there are several" if match is None else "has the name of an earlier one"
            raise UserError("--data", text, rule, "give each as NAME=FILE")
        found[match[1]] = match[2]
    pairs = ", ".join(f"{name}: {_files(path)}" for name, path in found.items())
    return ["data.validation=null", f"data.validation={{{pairs}}}"]


def sampling_overrides(samples: int | None, k: str | None, *, greedy: bool, by: Sequence[str]) -> list[str]:
    """Return the settings for ``--samples``, ``--k``, ``--greedy`` and ``--by``.

    Raises:
        UserError: ``--k`` is no list of numbers.
    """
    number = 8 if samples is None else samples
    if k is not None and not re.fullmatch(r"\d+(,\d+)*", k):
        raise UserError("--k", k, "must be numbers with commas between them", "write 1,8")
    values = k or ",".join(str(2**power) for power in range(max(1, number.bit_length())) if 2**power <= max(1, number))
    found = [f"eval.num_samples={number}", f"eval.k_values=[{values}]", f"eval.greedy={str(greedy).lower()}"]
    return [*found, f"eval.by=[{', '.join(map(quoted, by))}]"] if by else found


def _files(text: str) -> str:
    """Quote for YAML; a list, ``[a, b]``, stays one."""
    return text if text.startswith("[") else quoted(text)
