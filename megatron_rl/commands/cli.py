"""``megatron-rl``: the verbs of the project. Every verb is one call into the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from megatron_rl.commands import convert as conversion
from megatron_rl.commands import pool as pool_tools
from megatron_rl.commands.verbs import run_verb
from megatron_rl.process import lifetime

if TYPE_CHECKING:
    from megatron_rl.config import Config

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

ConfigPath = Annotated[str, typer.Argument(help="YAML file; start from one in configs/", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="settings in place of the file's, such as trainer.max_steps=100; megatron-rl check prints all that there are",
        metavar="KEY=VALUE",
    ),
]

Endpoint = Annotated[
    str | None,
    typer.Option(
        help="Where several nodes meet: an address of node 0 that all reach, and a port that is free there (29500 if left "
        "out). Else MASTER_ADDR and MASTER_PORT; else the first host of the Slurm job, and a port from the job's number.",
        metavar="HOST:PORT",
    ),
]
NodeRank = Annotated[
    int | None,
    typer.Option(help="Which of several nodes this is, from 0. Else NODE_RANK; else SLURM_NODEID.", metavar="N"),
]


def _print_versions(is_asked: bool) -> None:
    """Print our version and those of what a run stands on, without importing any of it."""
    if not is_asked:
        return
    from megatron_rl.config.installed import version_of

    for package in ("megatron-rl", "megatron-core", "torch", "transformers", "sglang"):
        print(package, version_of(package) or "is not installed")
    raise typer.Exit


@app.callback()
def _verbs(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions and exit.", callback=_print_versions, is_eager=True)
    ] = False,
) -> None:
    """Reinforcement-learning post-training on Megatron-Core."""


@app.command()
def train(
    config: ConfigPath, overrides: Overrides = None, rdzv_endpoint: Endpoint = None, node_rank: NodeRank = None
) -> None:
    """Train, or continue the last run with this config.

    With trainer.num_nodes above 1, give the same command on each node; the options below say how they meet.
    """
    from megatron_rl.config import check_files, load_config
    from megatron_rl.launch.command import start
    from megatron_rl.launch.meeting import find_meeting

    checked = load_config(config, overrides or [])
    meeting = find_meeting(checked, rdzv_endpoint, node_rank, os.environ)
    check_files(checked, fetches=True)
    start(checked, config, overrides or [], meeting)


@app.command()
def presample(
    config: ConfigPath, overrides: Overrides = None, rdzv_endpoint: Endpoint = None, node_rank: NodeRank = None
) -> None:
    """Sample the model of a config for the runs that keep samples (DPH-RL, RLEP), or go on where that stopped.

    Takes the config of the training that follows. The pool, and what is still to be learned, go to <run>/presample/.
    """
    from megatron_rl.commands.presample import adapt
    from megatron_rl.config import check_files, load_config
    from megatron_rl.launch.command import start
    from megatron_rl.launch.meeting import find_meeting

    checked = adapt(load_config(config, overrides or []))
    meeting = find_meeting(checked, rdzv_endpoint, node_rank, os.environ)
    check_files(checked, fetches=True)
    start(checked, config, overrides or [], meeting, program="megatron_rl.commands.presample")


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="folder of a run, a checkpoint of one, a Hugging Face folder or name, or a YAML file", metavar="MODEL"
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="a set of problems; again for each further one; left out: data.validation", metavar="[NAME=]FILE"
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="of a run: last, best, or a step; left out: its hf/, else last")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="samples of each problem (8)", metavar="N")] = None,
    k: Annotated[
        str | None, typer.Option(help="of pass@k and maj@k, 1,8; left out: powers of two", metavar="K,...")
    ] = None,
    greedy: Annotated[bool, typer.Option(help="also decode greedily")] = True,
    by: Annotated[list[str] | None, typer.Option(help="give figures by this column of the problems, too")] = None,
    num_problems: Annotated[int | None, typer.Option(help="the first so many of each set", metavar="N")] = None,
    temperature: Annotated[float | None, typer.Option(help="of the samples; left out: as in the run, else 1")] = None,
    top_p: Annotated[float | None, typer.Option(help="of the samples; left out: as in the run, else 1")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="limit of a response; left out: as in the run")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers or sglang")] = None,
    devices: Annotated[int | None, typer.Option(help="processes: GPUs, or CPU ranks")] = None,
    out: Annotated[
        Path | None, typer.Option(help="where results go; left out: in evaluations/", metavar="FOLDER")
    ] = None,
) -> None:
    """Evaluate a model: pass@k, avg@n, maj@k and greedy accuracy with 95 % intervals, and all samples.

    The same command goes on after a kill. docs/evaluation.md.
    """
    from megatron_rl.commands.evaluate import adapt
    from megatron_rl.commands.evaluated import data_overrides, find_model, sampling_overrides
    from megatron_rl.config import check_files, load_config
    from megatron_rl.config.reader import quoted
    from megatron_rl.launch.command import start

    found = find_model(model, checkpoint)
    folder = (out or found.out).absolute()
    given = {
        "eval.temperature": temperature, "eval.top_p": top_p, "eval.num_problems": num_problems, "rollout.engine": engine,
        "rollout.max_new_tokens": max_new_tokens, "trainer.devices": devices,
    }  # fmt: skip
    settings = [
        *found.overrides, f"exp_manager.exp_dir={quoted(str(folder.parent))}", f"exp_manager.name={quoted(folder.name)}",
        *data_overrides(data or []), *sampling_overrides(samples, k, greedy=greedy, by=by or []),
        *(f"{field}={value}" for field, value in given.items() if value is not None), *(overrides or []),
    ]  # fmt: skip
    checked = adapt(load_config(str(found.config), settings))
    check_files(checked, fetches=True, is_trained=False)
    start(checked, str(found.config), settings, None, program="megatron_rl.commands.evaluate")


@app.command()
def view(
    run: Annotated[
        Path, typer.Argument(help="folder of a run, or a file of its rollouts/, eval/ or trees/", metavar="RUN")
    ],
    page: Annotated[
        Path | None,
        typer.Argument(help="page to write; left out: view.html in the folder, or beside the file", metavar="HTML"),
    ] = None,
    step: Annotated[int | None, typer.Option(help="show this step alone", metavar="N")] = None,
) -> None:
    """Make a page of what the model wrote, for a browser: rollouts with their tokens, rewards, groups, evaluations, trees.

    The run may be going on. What a run records: exp_manager.rollout_texts, and algorithm.save_every_n_steps of SPO.
    """
    from megatron_rl.report.view import write_page

    target = page or (run / "view.html" if run.is_dir() else run.with_suffix(".html"))
    note = write_page(run, target, step=step)
    print(f"{target}: {note}")


def _load_to_look(config: str, overrides: list[str] | None, *, fetches: bool = True) -> Config:
    """Load a config that is not run here: SGLang may be missing. Of a model of the hub config.json is downloaded."""
    from megatron_rl.config import load_config
    from megatron_rl.config.upstream import unchecked_note
    from megatron_rl.convert.architecture.hub import CONFIG, fetch_small_files

    loaded = load_config(config, overrides or [])
    if note := unchecked_note(loaded.rollout.sglang_cfg):
        print(f"note: {note}", file=sys.stderr)
    if fetches:
        fetch_small_files(loaded.policy.model_path, field="policy.model_path", only=CONFIG)
    return loaded


doctor = typer.Typer(no_args_is_help=True, help="Check a config before spending a cluster on it.")
app.add_typer(doctor, name="doctor")


@doctor.command()
def layout(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check the gradient under this config's parallel layout, on the CPU, scaled down, against float64; status 1 if wrong."""
    from megatron_rl.doctor.layout import check_layout

    if not check_layout(_load_to_look(config, overrides)):
        raise typer.Exit(1)


@doctor.command()
def machine() -> None:
    """Show what this machine will use: layers, attention, optimizer, recipes of eight bits."""
    from megatron_rl.doctor.machine import print_machine

    print_machine()


plan = typer.Typer(no_args_is_help=True, help="Work out what a config will do, for any size, on a laptop.")
app.add_typer(plan, name="plan")


@plan.command()
def weights(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show what each weight sync moves: bytes of every rank and between machines, messages and partners."""
    from megatron_rl.doctor.weight_traffic import print_report, report

    print_report(report(_load_to_look(config, overrides)))


@plan.command()
def memory(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_gb: Annotated[float, typer.Option(help="memory of one GPU: 80 (H100), 141 (H200)", metavar="GB")] = 80.0,
) -> None:
    """Estimate the memory of one GPU of each pipeline stage; status 1, and overrides with which it fits, if it does not."""
    from megatron_rl.doctor.memory import GB, estimate, print_estimate
    from megatron_rl.doctor.memory_advice import advise

    checked = _load_to_look(config, overrides)
    if not print_estimate(estimate(checked), gpu_gb=gpu_gb):
        print(advise(checked, gpu_gb * GB))
        raise typer.Exit(1)


convert = typer.Typer(no_args_is_help=True, help="Checkpoints from Hugging Face to Megatron and back, verified.")
app.add_typer(convert, name="convert")
convert.command("import")(conversion.convert_hf_to_megatron)
convert.command("export")(conversion.convert_megatron_to_hf)
convert.command("verify")(conversion.verify_checkpoint)

app.add_typer(pool_tools.app, name="pool")


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    no_files: Annotated[
        bool,
        typer.Option(
            "--no-files", help="Look at no model and no data: for a config whose files are on another machine."
        ),
    ] = False,
) -> None:
    """Check a config, its model, tokenizer, problem files, task and reward without loading torch, and print it.

    Every default is filled in. SGLang may be missing; of a model of the hub all but the weights is downloaded.
    """
    from megatron_rl.config import check_files, check_names, to_yaml

    checked = _load_to_look(config, overrides, fetches=False)
    if no_files:
        check_names(checked)
    else:
        check_files(checked, fetches=True, starts=False, say=lambda text: print(text, file=sys.stderr))
    print(to_yaml(checked), end="")


def main() -> NoReturn:
    """Run the console command."""
    lifetime.run(lambda: run_verb(app))


if __name__ == "__main__":
    main()
