import importlib.util
import io
import json
import math
import mmap
import resource
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_rl.config.trainer import RolloutTextsConfig
from megatron_rl.errors import UserError
from megatron_rl.metrics import (
    Display,
    MetricsFile,
    MetricsLogger,
    PhaseTimer,
    ProcessMemory,
    StepConsole,
    build_sinks,
    progress,
    read_metrics,
    use_console,
)
from megatron_rl.metrics import terminal as display_module


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Memory:
    """Peaks to be read in turn, then zeros."""

    def __init__(self, *peaks):
        self.peaks = list(peaks)

    def peak_bytes(self):
        return self.peaks.pop(0) if self.peaks else 0


class ListSink:
    name = "list"

    def __init__(self, broken_steps=()):
        self.broken_steps, self.rows, self.calls = set(broken_steps), [], []

    def log(self, step, metrics):
        self.calls.append(step)
        if step in self.broken_steps:
            raise ConnectionError("server away")
        self.rows.append((step, dict(metrics)))

    def resume_at(self, step):
        self.calls.append(f"resume {step}")

    def close(self):
        self.calls.append("close")


@pytest.fixture(autouse=True)
def _no_display_left_behind():
    yield
    use_console(None)
    display_module._display = None


@pytest.fixture
def open_logger(tmp_path):
    def make(**kwargs):
        kwargs = {"total_steps": 10, "console": Console(quiet=True)} | kwargs
        return MetricsLogger(tmp_path, **kwargs)

    return make


def exp_manager(**fields):
    off = {
        "create_tensorboard_logger": False,
        "summary_writer_kwargs": {},
        "create_wandb_logger": False,
        "wandb_logger_kwargs": {},
        "create_mlflow_logger": False,
        "mlflow_logger_kwargs": {},
        "sinks": [],
    }
    return SimpleNamespace(**off | fields)


def plain_console():
    return Console(file=io.StringIO(), width=80)


def live_console():
    return Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True)


# -- rows on disk


def test_each_step_is_one_json_line_on_disk_at_once(open_logger, tmp_path):
    log = open_logger()
    log.log(1, {"reward/mean": 0.5, "num_tokens": 7})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward/mean": 0.5, "num_tokens": 7}\n'
    log.log(2, {"reward/mean": 0.1 + 0.2})
    assert log.rows() == [{"step": 1, "reward/mean": 0.5, "num_tokens": 7}, {"step": 2, "reward/mean": 0.1 + 0.2}]


def test_not_finite_values_stay_valid_json_and_come_back(open_logger, tmp_path):
    open_logger().log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    read = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(read["a"]) and (read["b"], read["c"]) == (math.inf, -math.inf)
    assert math.isnan(float(row["a"])) and float(row["c"]) == -math.inf


def test_evaluation_joins_the_row_of_its_step(open_logger):
    log = open_logger()
    log.log_eval(0, {"greedy": 0.1})
    log.log(1, {"reward/mean": 0.5})
    log.log(2, {"reward/mean": 0.6})
    log.log_eval(2, {"eval/greedy": 0.4})
    log.log_eval(1, {"pass@8": 0.7})
    log.log_eval(2, {"greedy": 0.3})
    assert log.rows() == [
        {"step": 0, "eval/greedy": 0.1},
        {"step": 1, "reward/mean": 0.5, "eval/pass@8": 0.7},
        {"step": 2, "reward/mean": 0.6, "eval/greedy": 0.3},
    ]
    log.log(3, {"reward/mean": 0.7})
    assert log.rows()[-1] == {"step": 3, "reward/mean": 0.7}


def test_an_evaluation_does_not_hold_all_rows(open_logger):
    log = open_logger()
    for step in range(1, 501):
        log.log(step, {f"metric_{i}": i / 7 for i in range(50)})
    tracemalloc.start()
    log.log_eval(500, {"greedy": 0.5})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000  # bytes; the file has 500,000
    assert len(log.rows()) == 500 and log.rows()[-1]["eval/greedy"] == 0.5


def test_late_evaluation_without_a_row_is_put_in_order(open_logger):
    log = open_logger()
    log.log(2, {"a": 1.0})
    log.log_eval(1, {"greedy": 0.5})
    assert [row["step"] for row in log.rows()] == [1, 2]


def test_repeated_step_without_resume_is_refused(open_logger):
    log = open_logger()
    log.log(5, {"a": 1.0})
    with pytest.raises(AssertionError, match="resume_at"):
        log.log(4, {"a": 1.0})


def test_step_as_a_metric_and_text_as_a_value_are_refused(open_logger):
    log = open_logger()
    with pytest.raises(AssertionError, match="step"):
        log.log(1, {"step": 3})
    with pytest.raises(TypeError, match="'lr'"):
        log.log(1, {"lr": "0.1"})
    assert log.rows() == []


def test_resume_drops_later_rows_and_repeated_steps_replace_them(open_logger, tmp_path):
    with open_logger() as log:
        for step in range(1, 6):
            log.log(step, {"a": float(step)})
    with open_logger() as log:
        assert log.resume_at(3) == 2
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        log.log(4, {"a": 40.0})
        assert [row["a"] for row in log.rows()] == [1.0, 2.0, 3.0, 40.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_before_the_first_step_forgets_the_evaluation_too(open_logger):
    log = open_logger()
    log.log_eval(0, {"greedy": 0.1})
    log.log(1, {"a": 1.0})
    assert log.resume_at(-1) == 2 and log.rows() == []


@pytest.mark.parametrize("torn", ['{"step": 3, "rew', '{"step": 3', "{", "\0\0\0\0", '{"step": 3, "a": 1.0\n'])
def test_half_written_last_line_is_dropped_on_open(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    file = MetricsFile(path)
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n'
    file.append({"step": 3, "a": 3.0})
    assert [row["a"] for row in read_metrics(path)] == [1.0, 2.0, 3.0]


def test_complete_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": "NaN"}')
    MetricsFile(path).append({"step": 2})
    assert path.read_text() == '{"step": 1, "a": "NaN"}\n{"step": 2}\n'


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        MetricsFile(path)
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_rows_survive_a_kill(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from megatron_rl.metrics import MetricsLogger\n"
        f"log = MetricsLogger(Path({str(tmp_path)!r}), total_steps=9)\n"
        "for step in (1, 2, 3): log.log(step, {'a': step / 2})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert [row["a"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.5, 1.0, 1.5]


def test_ranks_that_do_not_write_leave_no_trace(open_logger, tmp_path):
    with open_logger(is_writer=False, console=None) as log:
        log.log(1, {"a": 1.0})
        log.log_eval(1, {"greedy": 1.0})
        assert log.resume_at(0) == 0 and log.rows() == []
    assert list(tmp_path.iterdir()) == []


def test_metrics_import_no_torch():
    code = "import sys, megatron_rl.metrics, megatron_rl.report.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- sinks


def test_sinks_receive_every_row_and_are_closed_once(open_logger):
    sink = ListSink()
    log = open_logger(sinks=[sink])
    log.resume_at(0)
    log.log(1, {"a": 1.0})
    log.log_eval(1, {"greedy": 0.5})
    log.close()
    log.close()
    assert sink.rows == [(1, {"a": 1.0}), (1, {"eval/greedy": 0.5})]
    assert sink.calls == ["resume 0", 1, 1, "close"]


def test_failing_sink_warns_once_rests_is_counted_and_recovers(open_logger, caplog):
    sink = ListSink(broken_steps={2, 4, 9})
    log = open_logger(sinks=[sink])
    for step in range(1, 12):
        log.log(step, {"a": 1.0})
    # 2 fails: rest for one row (3). 4 fails again: rest for three (5, 6, 7). 8 works, so 9 costs one row (10) again.
    assert sink.calls == [1, 2, 4, 8, 9, 11]
    (warning,) = caplog.records
    assert "server away" in warning.getMessage()
    # Each row says what was missed before it.
    assert [row.get("dropped/sink_list", 0) for row in log.rows()] == [0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8]
    log.close()
    assert "missed 8 rows" in caplog.records[-1].getMessage()


OUTSIDE = """
class Lines:
    name = "lines"

    def __init__(self, directory, run_config):
        self.path = directory / "lines.txt"
        self.path.write_text(str(run_config["trainer"]["seed"]))

    def resume_at(self, step):
        pass

    def log(self, step, metrics):
        if step == 2:
            raise OSError("away")
        self.path.write_text(self.path.read_text() + f" {step}:{metrics['a']}")

    def close(self):
        raise OSError("still away")


class NoLog:
    resume_at = close = print

    def __init__(self, directory, run_config):
        pass


class NoArguments:
    name = "no_arguments"


class Refuses:
    def __init__(self, directory, run_config):
        raise KeyError("token")


class Stuck(Lines):
    def resume_at(self, step):
        raise OSError("no such project")
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "my_sinks.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_sinks", None)


def test_a_sink_from_outside_gets_the_rows_and_cannot_end_a_run(outside, open_logger, tmp_path, caplog):
    (sink,) = build_sinks(exp_manager(sinks=["my_sinks:Lines"]), tmp_path, run_config={"trainer": {"seed": 7}})
    with open_logger(sinks=[sink]) as log:
        log.resume_at(-1)
        for step in (1, 2, 3, 4):
            log.log(step, {"a": step / 2})
        assert log.rows()[-1]["dropped/sink_lines"] == 2  # 2 failed, 3 was left out for it
    assert (tmp_path / "lines.txt").read_text() == "7 1:0.5 4:2.0"
    assert "lines failed to close" in caplog.text


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("NoLog", "is not a metric sink: it lacks log, name"),
        ("NoArguments", r"cannot be called as f\(directory, run_config\)"),
        ("Refuses", r"could not be built .* \(KeyError: 'token'\)"),
        ("Line", "did you mean Lines"),
        ("name", "has no name"),
    ],
)
def test_an_outside_class_that_is_no_sink_is_one_error(name, rule, outside, tmp_path):
    with pytest.raises(UserError, match=rule) as caught:
        build_sinks(exp_manager(sinks=[f"my_sinks:{name}"]), tmp_path, run_config={"trainer": {"seed": 7}})
    assert (caught.value.field, caught.value.value) == ("exp_manager.sinks", f"my_sinks:{name}")


def test_a_sink_that_fails_before_the_first_step_is_one_error(outside, open_logger, tmp_path):
    sinks = build_sinks(exp_manager(sinks=["my_sinks:Stuck"]), tmp_path, run_config={"trainer": {"seed": 7}})
    with pytest.raises(UserError, match="failed before the first step"):
        open_logger(sinks=sinks).resume_at(0)


def test_tensorboard_is_written_and_a_resume_replaces_the_lost_steps(open_logger, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = exp_manager(create_tensorboard_logger=True, summary_writer_kwargs={"flush_secs": 60})
    with open_logger(sinks=build_sinks(config, tmp_path)) as log:
        log.resume_at(0)
        for step in (1, 2, 3):
            log.log(step, {"reward/mean": step / 4})
    with open_logger(sinks=build_sinks(config, tmp_path)) as log:
        log.resume_at(1)
        log.log(2, {"reward/mean": 10.0})
        log.log_eval(1, {"pass@8": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 10.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/pass@8")] == [(1, 0.5)]


def test_tensorboard_rows_are_on_disk_before_the_writer_closes(open_logger, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = exp_manager(create_tensorboard_logger=True, summary_writer_kwargs={"log_dir": str(tmp_path / "tb")})
    with open_logger(sinks=build_sinks(config, tmp_path)) as log:
        log.log(1, {"a": 0.5})
        events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
        assert [e.value for e in events.Scalars("a")] == [0.5]


def test_unknown_logger_argument_names_the_key_and_the_near_one(tmp_path):
    pytest.importorskip("tensorboard")
    config = exp_manager(create_tensorboard_logger=True, summary_writer_kwargs={"flush_sec": 3})
    with pytest.raises(UserError, match=r"summary_writer_kwargs\.flush_sec: .* Fix: write flush_secs"):
        build_sinks(config, tmp_path)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_says_how_to_install_it(name, tmp_path):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"create_{name}_logger.*pip install {name}"):
        build_sinks(exp_manager(**{f"create_{name}_logger": True}), tmp_path)


ROLLOUT = {
    "origin": "rollout", "group": 0, "problem_id": "p", "prompt": "p" * 900, "response": "\x1b[2Jé \ud800\n" * 99,
    "answer": "7", "found": "", "reward": 1.0, "verdict": "right", "reason": "correct", "finish": "stop", "response_tokens": 5,
    "advantage": 0.5, "weight_version": 1,
}  # fmt: skip


def test_the_console_shows_shortened_rollouts_that_cannot_move_its_cursor(open_logger):
    console = plain_console()
    open_logger(console=console).log_rollouts(3, [ROLLOUT] * 5, RolloutTextsConfig(print=2))
    text = console.file.getvalue()
    assert text.count("step 3, rollout of group 0: reward 1 (correct), 5 tokens, stop, answer 7") == 2
    assert "\x1b" not in text and "\ud800" not in text and "[700 characters]" in text and "[80 lines]" in text
    assert len(text.splitlines()) < 60


class Texts(ListSink):
    """Takes rollouts, and fails at some steps."""

    def log_rollouts(self, step, rows):
        self.log(step, {"rows": len(rows)})


def test_rollouts_reach_the_sinks_that_take_them_and_a_failure_costs_only_a_copy(open_logger):
    plain, broken = ListSink(), Texts(broken_steps=(3,))
    log = open_logger(sinks=[plain, broken])
    for step in (2, 3):
        log.log_rollouts(step, [ROLLOUT] * 20, RolloutTextsConfig(to_sinks=4))
    assert log._sinks[1].num_missed == 1 and log._sinks[0].num_missed == 0


def test_tensorboard_takes_rollouts_as_texts(open_logger, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_logger(sinks=build_sinks(exp_manager(create_tensorboard_logger=True), tmp_path)) as log:
        log.log_rollouts(3, [ROLLOUT] * 2, RolloutTextsConfig())
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"rollouts/0/text_summary", "rollouts/1/text_summary"} <= set(events.Tags()["tensors"])


def test_no_sink_is_built_unless_asked(tmp_path):
    assert build_sinks(exp_manager(), tmp_path) == []


def test_wandb_offline_resume_keeps_the_id(open_logger, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = exp_manager(create_wandb_logger=True, wandb_logger_kwargs={"project": "test"})
    for step in (1, 2):
        with open_logger(sinks=build_sinks(config, tmp_path)) as log:
            log.log(step, {"reward/mean": 0.5, "pass@1": math.nan})
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))) >= 1


def test_mlflow_resume_continues_the_run(open_logger, tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = exp_manager(
        create_mlflow_logger=True, mlflow_logger_kwargs={"experiment_name": "test", "tracking_uri": uri}
    )
    for step in (1, 2):
        with open_logger(sinks=build_sinks(config, tmp_path, run_config={"policy": {"lr": 0.1}})) as log:
            log.log(step, {"pass@1": step / 4})
    run_id = (tmp_path / "mlflow_run_id.txt").read_text().strip()
    client = tracking.MlflowClient(tracking_uri=uri)
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "pass_at_1")] == [(1, 0.25), (2, 0.5)]
    assert client.get_run(run_id).data.params == {"policy.lr": "0.1"}
    assert client.get_run(run_id).info.status == "FINISHED"


# -- a disk that is full


@pytest.fixture
def small_files(monkeypatch):
    """Inside the block no file grows beyond so many bytes: what a full disk does, for this process alone."""

    @contextmanager
    def limit(num_bytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_a_row_that_does_not_fit_is_a_user_error_and_the_rows_before_stay(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1, "loss": 1.0})
    with small_files(path.stat().st_size + 5), pytest.raises(UserError, match="could not be written") as caught:
        file.append({"step": 2, "loss": 2.0})
    assert caught.value.field == "exp_manager.exp_dir"
    file.close()  # silent: nothing waits to be written
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsFile(path).append({"step": 2, "loss": 2.0})  # space again: the half line is dropped
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_rewrite_that_does_not_fit_is_a_user_error(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1, "loss": 1.0})
    with small_files(5), pytest.raises(UserError, match="could not be written"):
        file.rewrite([{"step": 1, "loss": 2.0}])
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="could not be written"):
        MetricsFile(tmp_path / "run/metrics.jsonl")


# -- time and memory


def test_nested_phase_is_taken_out_of_the_outer_one():
    clock = Clock()
    timer = PhaseTimer(clock=clock, memory=Memory())
    clock.now += 1  # other
    with timer("update"):
        clock.now += 2
        with timer("optimizer"):
            clock.now += 4
            with timer("update"):  # the same name again, inside: adds up
                clock.now += 8
        clock.now += 16
    with timer("optimizer"):
        clock.now += 32
    assert timer.flush() == {
        "time/update_s": 26.0,
        "time/optimizer_s": 36.0,
        "time/other_s": 1.0,
        "time/step_s": 63.0,
        "memory/update_bytes": 0,
        "memory/optimizer_bytes": 0,
    }


def test_flush_starts_anew_and_open_phases_go_on():
    clock = Clock()
    timer = PhaseTimer(clock=clock, memory=Memory())
    with timer("generation"):
        clock.now += 3
        assert timer.flush()["time/generation_s"] == 3.0
        clock.now += 5
    row = timer.flush(total_s=7.0)
    assert (row["time/generation_s"], row["time/other_s"], row["time/step_s"]) == (5.0, 2.0, 7.0)
    assert timer.flush() == {"time/other_s": 0.0, "time/step_s": 0.0}


def test_phase_that_raises_is_timed_and_closed():
    clock = Clock()
    timer = PhaseTimer(clock=clock, memory=Memory())
    with pytest.raises(KeyError), timer("a"), timer("b"):
        clock.now += 2
        raise KeyError
    clock.now += 1
    row = timer.flush()
    assert (row["time/a_s"], row["time/b_s"], row["time/other_s"]) == (0.0, 2.0, 1.0)


def test_interleaved_phases_are_refused():
    timer = PhaseTimer(clock=Clock(), memory=Memory())
    first, second = timer("a"), timer("b")
    first.__enter__()
    second.__enter__()
    with pytest.raises(AssertionError, match="interleaved"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def test_memory_peak_goes_to_the_innermost_phase_and_the_highest_stays():
    # Peaks at the borders: enter a (outside), enter b (a), leave b (b), leave a (a), flush (outside).
    timer = PhaseTimer(clock=Clock(), memory=Memory(99, 10, 70, 30, 99))
    with timer("a"), timer("b"):
        pass
    row = timer.flush()
    assert (row["memory/a_bytes"], row["memory/b_bytes"]) == (30, 70)


def test_synchronize_runs_at_every_border():
    calls = []
    timer = PhaseTimer(clock=Clock(), memory=Memory(), synchronize=lambda: calls.append(1))
    with timer("a"):
        pass
    timer.flush()
    assert len(calls) == 3


@pytest.fixture
def meter() -> ProcessMemory:
    """A meter of the resident size, which another takes the place of once CUDA is in use."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_initialized():
        pytest.skip("measures CUDA memory here")
    return ProcessMemory()


def test_resident_memory_sees_what_a_phase_allocates(meter: ProcessMemory):
    before = meter.peak_bytes()
    block = mmap.mmap(-1, 64 << 20)  # not from the heap, whose free pages may be resident already
    block.write(b"x" * (64 << 20))
    assert meter.peak_bytes() - before > 48 << 20
    block.close()
    assert meter.peak_bytes() - before > 48 << 20, "the start of a phase counts as well"
    assert meter.peak_bytes() - before < 48 << 20


def test_resident_memory_sees_what_a_phase_frees_before_its_end(meter: ProcessMemory):
    before = meter.peak_bytes()
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * (64 << 20))
    assert meter.peak_bytes() - before > 48 << 20


@pytest.mark.gpu
def test_cuda_peak_is_that_of_the_phase():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    timer = PhaseTimer()
    kept = torch.zeros(1, device="cuda")  # from here on CUDA is in use
    with timer("large"):
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda")  # freed at once: only a peak can see it
    with timer("small"):
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    row = timer.flush()
    assert row["memory/large_bytes"] >= 64 << 20
    assert row["memory/small_bytes"] < 32 << 20
    del kept


# -- terminal


def test_plain_lines_are_rate_limited_but_first_and_last_are_there():
    clock, console = Clock(), plain_console()
    steps = StepConsole(Display(console, clock=clock), total_steps=9, min_interval_s=5)
    for step in range(1, 8):
        steps.step(step, {"reward/mean": 0.5, "pass@1": 0.25, "tokens_per_s": 12345.0})
        clock.now += 2
    steps.close()
    steps.close()
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/9", "step 4/9", "step 7/9"]
    assert lines[0] == "step 1/9  reward 0.500  pass@1 25.0%  12.3k tok/s"


def test_a_supervised_step_shows_loss_gradient_and_learning_rate():
    console = plain_console()
    StepConsole(Display(console, clock=Clock()), total_steps=1).step(
        1, {"loss": 1.25, "grad_norm": 0.5, "lr": 4e-3, "entropy/mean": 0.75, "tokens_per_s": 900.0}
    )
    line = "step 1/1  loss 1.2500  grad norm 0.500  lr 0.004  entropy 0.750  900 tok/s"
    assert console.file.getvalue().splitlines() == [line]


def test_last_planned_step_is_printed_however_fast():
    console = plain_console()
    steps = StepConsole(Display(console, clock=Clock()), total_steps=3)
    for step in (1, 2, 3):
        steps.step(step, {})
    assert console.file.getvalue().splitlines() == ["step 1/3", "step 3/3"]


def test_evaluation_line_shows_percent_and_step_zero_is_no_training_step(open_logger):
    console = plain_console()
    log = open_logger(console=console)
    log.log(0, {"eval/greedy": 0.125, "eval/pass@8": 0.5, "eval/seconds": 3.0})
    assert console.file.getvalue() == "eval at step 0  greedy 12.5%  pass@8 50.0%\n"
    log.log(1, {"eval/a/greedy": 0.5, "eval/a/style/x": 0.2, "eval/b/pass@8": 0.25, "eval/seconds": 3.0})
    lines = console.file.getvalue().splitlines()
    assert lines[-2:] == ["eval at step 1  a  greedy 50.0%", "eval at step 1  b  pass@8 25.0%"]


def test_progress_off_a_terminal_is_silent_when_short_and_sparse_when_long():
    console, clock = plain_console(), Clock()
    display = use_console(console)
    display.clock = clock
    assert list(progress(range(3), "scoring")) == [0, 1, 2]
    assert console.file.getvalue() == ""
    with progress(4, "generation") as bar:
        for _ in range(4):
            clock.now += 20
            bar.advance()
    assert console.file.getvalue().splitlines() == [
        "generation: 2/4 (50%), 40 s",
        "generation: 4/4 (100%), 80 s",
        "generation: 4/4 (100%), 80 s",
    ]


def test_nested_progress_shares_one_live_area_and_it_ends():
    console = live_console()
    display = use_console(console)
    with progress(2, "outer") as outer:
        live = display._live
        for _ in progress([1, 2], "inner"):
            assert display._live is live and [task.description for task in live.tasks] == ["outer", "inner"]
        assert [task.description for task in live.tasks] == ["outer"]
        outer.advance(2)
        assert live.tasks[0].completed == 2
    assert display._live is None and console._live_stack == []


def test_progress_ends_when_the_work_raises():
    display = use_console(live_console())
    with pytest.raises(KeyError), progress(None, "export"):
        raise KeyError
    assert display._live is None


def test_live_bar_starts_at_the_resumed_step_and_leaves_its_last_line(open_logger):
    console = live_console()
    with open_logger(console=console) as log:
        log.log(7, {"reward/mean": 0.5})
        bar = log._console._display._live
        assert (bar.tasks[0].completed, bar.tasks[0].total, bar.status) == (7, 10, "reward 0.500")
    assert console.file.getvalue().rstrip().endswith("step 7/10  reward 0.500")


def test_other_ranks_are_silent_without_asking_torch(monkeypatch):
    monkeypatch.setattr(display_module, "_display", None)
    monkeypatch.setenv("RANK", "1")
    assert list(progress([1], "scoring")) == [1]
    assert display_module._display.console is None
