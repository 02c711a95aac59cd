"""Each mistake is one clear error on all ranks: field, value, rule, fix; status 2; the last good checkpoint intact."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Case, run_main
from tests.forked import run_ranks


def the_error(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line for the user; other ranks say nothing on the console."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert "Fix: " in lines[0]
    return lines[0]


def fails(case: Case, capfd: pytest.CaptureFixture[str], *overrides: str, ranks: int = 2) -> str:
    capfd.readouterr()
    assert case.run(*overrides, ranks=ranks) == [2] * ranks
    return the_error(capfd)


# ---- checkpoints


def checkpoint_of(case: Case, step: int) -> Path:
    return case.root / f"tiny/checkpoints/step_{step:08d}"


def test_auto_resume_skips_to_the_last_complete_checkpoint(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.run("trainer.max_steps=6", "exp_manager.checkpoint_callback_params.keep_last=3", "exp_manager.name=whole")
    case.run("trainer.max_steps=6", "exp_manager.checkpoint_callback_params.keep_last=3")
    (checkpoint_of(case, 6) / "manifest.json").unlink()
    weights = max((checkpoint_of(case, 4) / "model").glob("*.distcp"), key=lambda p: p.stat().st_size)
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    (case.root / "tiny/checkpoints/step_00000008.tmp").mkdir()
    (case.root / "tiny/summary.json").unlink()  # which says that the run is finished
    capfd.readouterr()
    assert case.run("trainer.max_steps=6") == [0]
    output = capfd.readouterr().out
    assert "skipping step_00000008.tmp: never completed" in output
    assert "skipping step_00000006: is incomplete: it has no readable manifest.json" in output
    assert "skipping step_00000004: is damaged" in output
    assert "resuming after step 2" in output
    assert case.rows() == case.rows("whole")


@pytest.mark.parametrize("damage", ["missing", "no manifest", "cut short"])
def test_an_explicit_checkpoint_must_be_complete(case: Case, capfd: pytest.CaptureFixture[str], damage: str) -> None:
    path = checkpoint_of(case, 2)
    if damage != "missing":
        case.run("trainer.max_steps=2")
    if damage == "no manifest":
        (path / "manifest.json").unlink()
    if damage == "cut short":
        file = max(path.rglob("*.distcp"), key=lambda p: p.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    error = fails(case, capfd, f"exp_manager.resume_from_checkpoint={path}")
    assert "exp_manager.resume_from_checkpoint" in error and str(path) in error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_disk_full_on_save(
    case: Case, small_disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_foreseen: bool
) -> None:
    from megatron_rl.model import checkpoint, saving

    overrides = [f"exp_manager.exp_dir={small_disk}", "exp_manager.checkpoint_callback_params.every_n_train_steps=1"]
    if not is_foreseen:  # somebody else fills the disk between the check and the write
        for module in (checkpoint, saving):
            monkeypatch.setattr(module, "check_space", lambda _directory, _needed: None)
    error = fails(case, capfd, *overrides)
    assert "could not be written" in error and ("are free" if is_foreseen else "No space left") in error
    left = [path.name for path in (small_disk / "tiny/checkpoints").iterdir()]
    assert left == [f"step_{len(left):08d}"], left
    (small_disk / "tiny/metrics.jsonl").read_text()
    case.run(
        f"exp_manager.resume_from_checkpoint={small_disk}/tiny/checkpoints/{left[0]}", "trainer.max_steps=2", ranks=2
    )
    assert case.rows()[-1]["step"] == 2


def test_a_disk_without_room_for_a_checkpoint_is_named_before_training(
    case: Case, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filler").write_bytes(bytes(2 * 2**20))
    assert "are free" in fails(case, capfd, f"exp_manager.exp_dir={small_disk}")
    assert not (small_disk / "tiny/metrics.jsonl").exists()


def test_a_failed_export_is_named_and_loses_nothing_else(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    (case.root / "tiny").mkdir()
    (case.root / "tiny/hf.new").touch()
    assert "hf.new" in fails(case, capfd, "trainer.max_steps=1", "exp_manager.export_hf=true")
    assert json.loads((case.root / "tiny/summary.json").read_text())["steps"] == 1
    (case.root / "tiny/hf.new").unlink()
    assert case.run("trainer.max_steps=1", "exp_manager.export_hf=true") == [0]
    assert (case.root / "tiny/hf/config.json").is_file()


def main_that_loses_its_folder(arguments: list[str], folder: Path) -> int:
    from megatron_rl.run import Run

    finish_step = Run.finish_step

    def finish_and_lose(run: Run, done: int, *rest: object) -> None:
        finish_step(run, done, *rest)  # type: ignore[arg-type]
        if done == 2 and run.is_first:
            folder.rename(folder.with_name("elsewhere"))

    Run.finish_step = finish_and_lose  # type: ignore[assignment]
    return run_main(arguments)


def test_a_folder_that_vanishes_under_a_run_is_named(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    folder = case.root / "tiny"
    capfd.readouterr()
    assert run_ranks(main_that_loses_its_folder, 2, case.arguments("trainer.devices=2"), folder) == [2, 2]
    assert "is not the folder any more that this run has taken" in the_error(capfd)
    assert not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
    assert [row["step"] for row in case.rows("elsewhere")] == [1, 2]


def main_that_loses_its_lock(arguments: list[str], lock: Path) -> int:
    from megatron_rl.run import Run

    save_if_due = Run._save_if_due

    def lose_and_save(run: Run, done: int, *, is_best: bool) -> None:
        if run.is_first and done == 2:
            holder = {**json.loads(lock.read_text()), "pid": 7, "host": "node7", "user": "ann"}
            lock.with_name("new").write_text(json.dumps(holder))
            lock.with_name("new").rename(lock)
        save_if_due(run, done, is_best=is_best)

    Run._save_if_due = lose_and_save  # type: ignore[method-assign]
    return run_main(arguments)


def test_a_run_whose_folder_was_taken_over_writes_no_checkpoint(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    folder = case.root / "tiny"
    capfd.readouterr()
    assert run_ranks(main_that_loses_its_lock, 2, case.arguments("trainer.devices=2"), folder / ".lock") == [2, 2]
    assert "was taken over by process 7 of user ann on node7, since" in the_error(capfd)
    assert [row["step"] for row in case.rows()] == [1, 2] and not list(folder.glob("checkpoints/*"))


def test_metrics_that_cannot_be_opened_end_all_ranks(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    (case.root / "tiny/metrics.jsonl").mkdir(parents=True)
    assert "metrics.jsonl': could not be written" in fails(case, capfd)


def main_with_full_metrics(arguments: list[str]) -> int:
    from megatron_rl.metrics.rows import MetricsFile

    MetricsFile._open = lambda _self: Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    return run_main(arguments)


def test_a_metrics_row_that_does_not_fit_ends_all_ranks(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    (case.root / "tiny").mkdir()
    (case.root / "tiny/metrics.jsonl").touch()
    assert run_ranks(main_with_full_metrics, 2, case.arguments("trainer.devices=2")) == [2, 2]
    assert "metrics.jsonl': could not be written (No space left on device)" in the_error(capfd)


@pytest.mark.parametrize("name", ["config.yaml", "rollouts"])
def test_what_rank_0_cannot_write_ends_all_ranks(case: Case, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (case.root / "tiny").mkdir()
    (case.root / "tiny/rollouts").touch()
    if name == "config.yaml":
        (case.root / "tiny/config.yaml").mkdir()
    assert name in fails(case, capfd, "rollout.record=true")


# ---- model and data


def test_a_tokenizer_larger_than_the_vocabulary(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_models import make_tiny_model, write_tokenizer

    model = make_tiny_model(tmp_path / "small", "qwen3", tied=True, seed=1, vocab_size=60)
    write_tokenizer(model)
    error = fails(case, capfd, f"policy.model_path={model}")
    assert "has token id 98" in error and "vocabulary ends at 59" in error


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": \n', "train.jsonl:2"),
        ('{"question": "a", "answer": "#### 1"}\n\n{"question": "b"}\n', "train.jsonl:2"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "no mark"}\n', "train.jsonl:2"),
    ],
)
def test_a_bad_line_is_named(case: Case, capfd: pytest.CaptureFixture[str], content: str, where: str) -> None:
    """What a line lacks is looked at before any rank starts, its answer when the problems are read."""
    case.train.write_text(content)
    assert where in fails(case, capfd)


def test_each_rank_above_0_has_the_error_in_its_log(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    with case.train.open("a") as file:
        file.write('{"question": "b", "answer": "no mark"}\n')
    error = fails(case, capfd)
    assert error in (case.root / "tiny/logs/rank_1.log").read_text().splitlines()


def test_a_demonstration_that_exceeds_the_context(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "q", "answer": "1\n#### 1"}, {"question": "r", "answer": f"{'1 ' * 300}\n#### 1"}]
    case.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = case.root / "sft.yaml"
    config.write_text(
        "trainer: {stage: sft, precision: fp32, accelerator: cpu, max_steps: 1, threads_per_rank: 1}\n"
        f"exp_manager: {{exp_dir: {case.root}, export_hf: false}}\n"
        f"policy: {{model_path: {case.model}, train_global_batch_size: 2}}\n"
        f"algorithm: {{name: sft}}\ndata: {{task: gsm8k, train: {case.train}}}\n"
    )
    capfd.readouterr()
    assert run_ranks(run_main, 1, [str(config)]) == [2]
    assert "exceed the context of 512 tokens" in the_error(capfd)
    assert run_ranks(run_main, 1, [str(config), "data.overlong_prompts=drop"]) == [0]


def test_a_prompt_that_fills_the_context(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "short", "answer": "#### 1"}, {"question": "long " * 120, "answer": "#### 1"}]
    case.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = fails(case, capfd)
    assert "train.jsonl:2" in error and "fills the context of 512 tokens" in error
    assert case.run("data.overlong_prompts=drop", "trainer.max_steps=1") == [0]
    assert "1 of 2 problems left out" in capfd.readouterr().out
    case.train.write_text(json.dumps(rows[0]) + "\n")
    (case.root / "long.jsonl").write_text(json.dumps(rows[1]) + "\n")
    validation = [
        f"data.validation={case.root}/long.jsonl",
        "eval.before=true",
        "eval.num_samples=1",
        "eval.k_values=[1]",
    ]
    assert "data.validation: no prompt is left" in fails(case, capfd, "data.overlong_prompts=drop", *validation)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.task=chess"], "gsm8k"),
        (["trainer.accelerator=gpu"], "a build without CUDA"),
    ],
)
def test_what_a_config_points_at_must_fit(
    case: Case, capfd: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    capfd.readouterr()
    assert run_ranks(run_main, 2, case.arguments("trainer.devices=2", *overrides)) == [2, 2]
    assert words in capfd.readouterr().err


# ---- while training


def main_with_nan(arguments: list[str]) -> int:
    from megatron_rl.algorithms.grpo import GRPO

    plain = GRPO.loss

    def poisoned(self: GRPO, *args):
        terms = plain(self, *args)
        poisoned.calls += 1
        if poisoned.calls == 9:
            terms.loss = terms.loss * float("nan")
        return terms

    poisoned.calls = 0
    GRPO.loss = poisoned
    return run_main(arguments)


@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_a_loss_that_is_not_a_number(case: Case, capfd: pytest.CaptureFixture[str], layout: str) -> None:
    overrides = ["trainer.devices=2", "policy.train_micro_batch_tokens=4000", f"policy.megatron_cfg.{layout}=2"]
    overrides += ["trainer.max_steps=20"]
    capfd.readouterr()
    assert run_ranks(main_with_nan, 2, case.arguments(*overrides)) == [2, 2]
    error = the_error(capfd)
    assert "loss at optimizer update 9" in error and "not finite" in error
    assert [p.name for p in sorted(checkpoint_of(case, 2).parent.iterdir())] == ["step_00000002", "step_00000004"]
    assert [row["step"] for row in case.rows()] == [1, 2, 3, 4]


def test_dynamic_sampling_that_finds_nothing_says_so(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["algorithm.use_dynamic_sampling=true", "algorithm.max_generation_batches=2"]
    assert "algorithm.max_generation_batches = 2: gave only 0 of 4 groups" in fails(case, capfd, *overrides)


# ---- as a user sees it


def test_the_command_prints_one_error_and_leaves_nothing_behind(case: Case) -> None:
    case.train.write_text('{"question": 1}\n')
    process = case.start("trainer.devices=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.count("error: ") == 1 and "train.jsonl:1" in output and "Traceback" not in output
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(case.root) in " ".join(p.info["cmdline"] or [])]
    assert not mine
