"""Kill runs at random, start them again until they are done, and compare all that they leave with runs that nobody killed.

    python -m tests.e2e.campaign                    every case but those with servers
    python -m tests.e2e.campaign servers            runs with two SGLang servers, which make up for lost ones
    python -m tests.e2e.campaign grpo --kills 6     one case

Each case is one command. It runs to its end once; then again in another folder, where a process of it, drawn at random, is
killed by SIGKILL at a random moment. Some deaths end the run, and the same command is given again; others it survives. What
is counted: runs that did not end or end well, processes that outlive their run, differences in files, files left behind. The
last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.policy_case import CONFIG, tiny_yaml
from tests.tiny_models import make_tiny_model

MARK = "MEGATRON_RL_CAMPAIGN"
END_S = 15.0
"""Until nothing is left of a run whose trainer is gone; a second on an idle machine."""
UNSTEADY = ("time/", "checkpoint/", "memory/", "weight_sync/", "tokens_per_s", "update/", "eval/seconds")
"""Metrics that no two runs share."""
CACHES = ("torchinductor_",)
Kills = Iterator[tuple[float, str]]
"""Seconds from the start or the last kill to the next, and the kind of process that it hits."""


@dataclass(frozen=True)
class Case:
    """One command, and what there is to kill and to compare."""

    name: str
    command: Callable[[Path, str], list[str]]
    """Folder and name of a run -> program and arguments."""
    targets: tuple[str, ...]
    same: tuple[str, ...]
    """Patterns of files that must be equal to the last bit, in the run's folder."""
    limit_s: float = 300.0
    is_exact: bool = True
    """False where servers sample: they batch as requests arrive, so only the numbers of steps and rollouts are compared."""


@dataclass
class Tally:
    """The count of one case."""

    name: str
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    finished: int = 0
    failed: list[str] = field(default_factory=list)
    """Starts that ended with an error of their own, or not at all."""
    orphans: int = 0
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Return True if nothing was lost, late or different."""
        return not (self.failed or self.orphans or self.differences or self.leftovers)


class Started:
    """One start of a command. Its processes carry a mark in their environment, or descend from those that do."""

    def __init__(self, command: Sequence[str], log: Path, temporary: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._seen: dict[int, psutil.Process] = {}
        environment = {**os.environ, MARK: self._mark, "TMPDIR": str(temporary), "PYTHONWARNINGS": "ignore"}
        with log.open("a") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def processes(self) -> list[psutil.Process]:
        """Return all living processes."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark or process.ppid() in self._seen:
                    self._seen[process.pid] = process
            except psutil.Error:
                continue
        return [process for process in self._seen.values() if lives(process)]

    def victims(self, target: str) -> list[psutil.Process]:
        """Return the processes of a kind: the program itself, a rank, or a helper of one."""
        return [process for process in self.processes() if kind_of(process, self.process.pid) == target]

    def wait_until_gone(self) -> int:
        """Wait for all processes; return the number of those that had to be killed."""
        deadline = time.monotonic() + END_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.processes()
        for process in left:
            process.kill()
        return len(left)


def lives(process: psutil.Process) -> bool:
    """A zombie lives no more: it waits for a parent that may not reap."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kind_of(process: psutil.Process, first: int) -> str | None:
    """Return what a process is in its run; ``first`` is the one that was started."""
    try:
        line, parent = " ".join(process.cmdline()), process.parent()
        if process.pid == first:
            return "launcher" if "megatron_rl.launch" in line else "program"
        if "forkserver" in line:
            is_worker = parent is not None and "forkserver" in " ".join(parent.cmdline())
            return "scorer" if is_worker else "fork server"
        if "resource_tracker" in line:
            return None
        for name in ("scheduler", "detokenizer"):
            if line.startswith(f"sglang::{name}"):
                return name
        if "sglang_server" in line:
            return "server" if parent is not None and "sglang_server" not in " ".join(parent.cmdline()) else None
        return f"rank {process.environ()['RANK']}"
    except (psutil.Error, KeyError):
        return None


def carry_out(case: Case, root: Path, *, num_kills: int, seed: int) -> Tally:
    """Run a case unkilled, then killed until ``num_kills`` processes are dead, in as many runs as that takes."""
    tally, chance = Tally(case.name), random.Random(f"{seed}/{case.name}")
    with tempfile.TemporaryDirectory(prefix="kill", dir="/tmp") as name:  # sockets lie in it, and need a short path
        started = time.monotonic()
        run_killed(case, root, "whole", tally, chance, kills=iter(()), temporary=Path(name))
        whole_s = time.monotonic() - started
        number = 0
        while tally.kills.total() < num_kills and not tally.failed:
            number += 1
            kills = _draw(chance, case.targets, whole_s, num_kills - tally.kills.total())
            run_killed(case, root, f"killed_{number}", tally, chance, kills=kills, temporary=Path(name))
            tally.differences += differences(case, root / "whole", root / f"killed_{number}")
    return tally


def _draw(chance: random.Random, targets: Sequence[str], whole_s: float, num_kills: int) -> Kills:
    """Draw the kills of one run, at most nine, so that it comes to an end; each kind is hit equally often."""
    for number in range(min(num_kills, 9)):
        if number % len(targets) == 0:
            order = chance.sample(targets, len(targets))
        yield chance.uniform(0.0, 0.7 * whole_s), order[number % len(targets)]


def run_killed(
    case: Case,
    root: Path,
    name: str,
    tally: Tally,
    chance: random.Random,
    *,
    kills: Kills,
    temporary: Path,
) -> None:
    """Give a command until it is done, and kill a process of it at each moment."""
    log, is_done = root / f"{name}.log", False
    while not is_done and not tally.failed:
        start, is_killed = Started(case.command(root, name), log, temporary), False
        tally.starts += 1
        while not is_killed and start.process.poll() is None:
            pause_s, target = next(kills, (case.limit_s, None))
            if not _lasts(start, pause_s):
                break
            if target is None:
                tally.failed.append(f"{name}: still running after {case.limit_s:g} s")
                start.process.kill()
                break
            if _kill_one(start, target, chance):
                tally.kills[target] += 1
                is_killed = target in ("launcher", "program") or target.startswith("rank")
        ended = time.monotonic()
        try:
            status = start.process.wait(case.limit_s)
        except subprocess.TimeoutExpired:
            tally.failed.append(f"{name}: hangs after a kill")
            start.process.kill()
            break
        tally.orphans += start.wait_until_gone()
        tally.slowest_end_s = max(tally.slowest_end_s, round(time.monotonic() - ended, 2) if is_killed else 0.0)
        is_done = status == 0
        if not is_done and not is_killed:
            tally.failed.append(f"{name}: status {status}: {log.read_text().splitlines()[-1:]}")
    tally.finished += is_done
    left = [path for path in temporary.iterdir() if not path.name.startswith(CACHES)]
    left += [path for path in (root / name).rglob("*") if path.name.endswith(".tmp")]
    tally.leftovers += [f"{name}: {path}" for path in left]


def _lasts(start: Started, seconds: float) -> bool:
    """Wait; return False if the program ends meanwhile."""
    try:
        start.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill_one(start: Started, target: str, chance: random.Random) -> bool:
    """Kill a process of a kind, once there is one; return False if the program ends first."""
    while _lasts(start, 0.02):
        victims = start.victims(target)
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(victims).kill()
                return True
    return False


def differences(case: Case, whole: Path, killed: Path) -> list[str]:
    """Name the files that differ, rows of metrics without their times."""
    found = []
    if (whole / "metrics.jsonl").exists():
        one, other = (rows_of(folder, is_exact=case.is_exact) for folder in (whole, killed))
        found += [f"{killed.name}/metrics.jsonl: row {a['step']}" for a, b in zip(one, other) if a != b]
        found += [f"{killed.name}/metrics.jsonl: {len(other)} rows, not {len(one)}"] * (len(one) != len(other))
    for pattern in case.same:
        names = [{path.relative_to(folder) for path in folder.glob(pattern)} for folder in (whole, killed)]
        if names[0] != names[1] or not names[0]:
            found.append(f"{killed.name}: other files {pattern}")
        found += [
            f"{killed.name}/{name}"
            for name in sorted(names[0] & names[1])
            if (whole / name).read_bytes() != (killed / name).read_bytes()
        ]
    return found


def rows_of(folder: Path, *, is_exact: bool = True) -> list[dict[str, float]]:
    """Return the rows of a run's metrics, as far as equal runs share them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not is_exact:
        return [{key: row[key] for key in ("step", "num_rollouts") if key in row} for row in rows]
    return [{key: value for key, value in row.items() if not key.startswith(UNSTEADY)} for row in rows]


# ---------------------------------------------------------------------------------------------------------------- cases


TRAINED = ("hf/*.safetensors", "checkpoints/step_*/model/*.distcp")
HELPERS = ("launcher", "rank 0", "rank 1", "scorer", "fork server")
LONG = (
    "trainer.devices=2", "trainer.max_steps=20", "data.num_scoring_workers=2", "policy.optim.lr=1.0e-4",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
)  # fmt: skip


def verb(name: str, root: Path, run: str, *overrides: str, config: Path = CONFIG) -> list[str]:
    """Return a verb of ``megatron-rl`` on the tiny config."""
    return [
        sys.executable, "-P", "-m", "megatron_rl.commands", name, str(config), f"policy.model_path={root}/model",
        f"data.train={root}/train.jsonl", f"exp_manager.exp_dir={root}", f"exp_manager.name={run}", *overrides,
    ]  # fmt: skip


def grpo(root: Path, run: str) -> list[str]:
    """GRPO with a KL term, evaluation and recorded rollouts on two data-parallel ranks."""
    evaluated = (f"data.validation={root}/held_out.jsonl", "eval.every_n_steps=4", "eval.num_problems=8")
    return verb("train", root, run, *LONG, *evaluated, "rollout.record=true")


def rlep(root: Path, run: str) -> list[str]:
    """RLEP that replays its own successes, on two data-parallel ranks, with evaluation."""
    replay = ("data.task=tests.e2e.parity_task:TASK", "algorithm.name=rlep", "algorithm.replay.source=online")
    sizes = ("algorithm.kl.coef=0", "algorithm.overlong.buffer=0", "policy.train_micro_batch_tokens=320")
    evaluated = (f"data.validation={root}/held_out.jsonl", "eval.every_n_steps=4", "eval.num_problems=8")
    return verb("train", root, run, *LONG, *replay, *sizes, *evaluated)


def spo_tree(root: Path, run: str) -> list[str]:
    """SPO-tree whose edges wait for later steps, on two tensor- and sequence-parallel ranks."""
    layout = ("tensor_model_parallel_size=2", "sequence_parallel=true")
    longer = ("rollout.max_new_tokens=30", "algorithm.overlong.buffer=30", "algorithm.save_every_n_steps=4")
    config = root / "spo_tree.yaml"
    config.write_text(
        tiny_yaml(
            "{name: spo_tree, num_prompts_per_step: 2, branch_factors: [3, 3], tokens_per_level: 4, "
            "num_edges_per_step: 8, overlong: {buffer: 12}}"
        )
    )
    return verb("train", root, run, *LONG, *longer, *(f"policy.megatron_cfg.{key}" for key in layout), config=config)


def presample(root: Path, run: str) -> list[str]:
    """The split of DPH-RL, sampled chunk by chunk on two ranks."""
    split = ("num_samples=3", "min_correct=3", "chunk_size=2", f"problems={root}/train.jsonl")
    sizes = ("rollout.max_new_tokens=12", "policy.train_micro_batch_tokens=320", "algorithm.overlong.buffer=0")
    task = ("data.task=tests.e2e.parity_task:TASK", "trainer.devices=2", "algorithm.kl.coef=0")
    return verb("presample", root, run, *(f"presample.{key}" for key in split), *sizes, *task)


def convert(way: str, source: str) -> Callable[[Path, str], list[str]]:
    """Return the conversion of a model of some hundred megabytes, from Hugging Face or back."""

    def command(root: Path, run: str) -> list[str]:
        begin = [sys.executable, "-P", "-m", "megatron_rl.commands", "convert", way, "--threads", "1"]
        return [*begin, str(root / source), str(root / run)]

    return command


def servers(root: Path, run: str) -> list[str]:
    """Rollouts from two servers of our own."""
    sizes = ("rollout.max_new_tokens=150", "policy.train_micro_batch_tokens=1024", "algorithm.overlong.buffer=150")
    served = ("rollout.engine=sglang", "rollout.sglang_cfg.max_total_tokens=8192", "rollout.servers.num_per_node=2")
    health = ("rollout.servers.health_interval_s=1", "rollout.servers.health_timeout_s=12")
    unlimited = (
        "rollout.servers.max_restarts=100",
        "trainer.max_steps=16",
        "trainer.devices=2",
        "policy.optim.lr=1.0e-4",
    )
    return verb("train", root, run, *sizes, *served, *health, *unlimited)


def short(root: Path, run: str) -> list[str]:
    """The smallest run that evaluates, records and saves."""
    evaluated = (f"data.validation={root}/held_out.jsonl", "eval.every_n_steps=4", "eval.num_problems=4")
    return verb("train", root, run, "trainer.max_steps=8", "policy.optim.lr=1.0e-4", *evaluated, "rollout.record=true")


CASES = (
    Case("grpo", grpo, HELPERS, (*TRAINED, "eval/*.json*", "rollouts/**/*.*")),
    Case("rlep", rlep, HELPERS, (*TRAINED, "eval/*.json*")),
    Case("spo_tree", spo_tree, HELPERS, (*TRAINED, "trees/*.json")),
    Case("presample", presample, HELPERS, ("presample/summary.json", "presample/*.jsonl", "presample/pool/**/*.bin")),
    Case("import", convert("import", "large"), ("program",), ("**/*.distcp", "**/digests.json")),
    Case("export", convert("export", "large_megatron"), ("program",), ("*.safetensors",)),
)
SERVERS = Case(
    "servers", servers, ("server", "scheduler", "detokenizer", "launcher", "rank 0", "rank 1"), (),
    limit_s=600.0, is_exact=False,
)  # fmt: skip
SHORT = Case(
    "short", short, ("launcher", "rank 0", "scorer", "fork server"), (*TRAINED, "eval/*.json*", "rollouts/**/*.*")
)


def prepare(root: Path) -> None:
    """Write problems, and a tiny model that ends its responses now and then."""
    root.mkdir(parents=True, exist_ok=True)
    make_tiny_model(root / "model", "qwen3", tied=True, seed=3, tokenizer=True, max_position_embeddings=512)
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(json.dumps(config | {"eos_token_id": list(range(0, 120, 3))}))
    rows = [
        {"question": f"What is {n} plus {n % 7}?", "answer": f"{n} + {n % 7} = {n + n % 7}\n#### {n + n % 7}"}
        for n in range(24)
    ]
    for name in ("train", "held_out"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_large(root: Path) -> None:
    """Write a model that takes seconds to convert, in both formats."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    make_tiny_model(root / "large", "qwen3", tied=True, seed=3, tokenizer=True, **sizes)
    subprocess.run(convert("import", "large")(root, "large_megatron"), check=True, stderr=subprocess.DEVNULL)


def table(tallies: Sequence[Tally]) -> str:
    """Return the tallies as a table in Markdown."""
    lines = ["| run | kills | targets | finished | failed | orphans | slowest end | different | left behind |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in tallies:
        targets = ", ".join(f"{name} {count}" for name, count in sorted(each.kills.items()))
        cells = (each.name, each.kills.total(), targets, each.finished, len(each.failed), each.orphans)
        cells += (f"{each.slowest_end_s:g} s", len(each.differences), len(each.leftovers))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases that are named; return 1 if anything was lost, late or different."""
    known = {case.name: case for case in (*CASES, SERVERS, SHORT)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}; left out: all without servers"
    )
    parser.add_argument("--kills", type=int, default=9, help="of each case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/campaign"), help="is emptied first")
    arguments = parser.parse_args()
    names = arguments.cases or [case.name for case in CASES]
    if unknown := set(names) - set(known):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    tallies = []
    for name in names:
        root = arguments.folder.resolve() / name
        shutil.rmtree(root, ignore_errors=True)
        prepare(root)
        if name in ("import", "export"):
            prepare_large(root)
        tallies.append(carry_out(known[name], root, num_kills=arguments.kills, seed=arguments.seed))
        print(table(tallies[-1:]), flush=True)
        for problem in (*tallies[-1].failed, *tallies[-1].differences, *tallies[-1].leftovers):
            print(f"  {problem}", flush=True)
    print(table(tallies))
    print(json.dumps([vars(tally) for tally in tallies]))
    return 0 if all(tally.is_clean for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
