"""Examples in parts: killed at any moment, the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples import parts
from examples.quickstart import run as quickstart

TRAIN = """
import json, os, signal, sys
from pathlib import Path
run = Path(sys.argv[1])
if (run / "hf").is_dir():
    (run / "summary.json").write_text(json.dumps({"steps": 4}))
else:
    (run / "hf").mkdir(parents=True)
    os.kill(os.getppid(), signal.SIGKILL) if "warm" in str(run) else os.kill(os.getpid(), signal.SIGKILL)
"""
"""A training that is killed, or whose example is, after its model is written and before its summary is."""


def run_quickstart(folder: Path) -> int:
    code = f"""
import sys
from examples.quickstart import run as quickstart
def command(name, config, *overrides):
    folder = quickstart.START / "warm_start" if config.name == "warm_start.yaml" else quickstart.START
    return [sys.executable, "-c", {TRAIN!r}, str(folder)]
quickstart.verb = command
quickstart.PROBLEMS = "--help".split()
model = quickstart.START / "data" / "model"
model.mkdir(parents=True, exist_ok=True)
(model / "config.json").touch()
sys.exit(quickstart.main())
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, timeout=60, check=False).returncode


def test_quickstart_goes_on_after_a_kill_between_the_model_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    assert run_quickstart(tmp_path) == -signal.SIGKILL  # in the warm start
    assert run_quickstart(tmp_path) != 0  # in the reinforcement
    assert run_quickstart(tmp_path) == 0
    summary = json.loads((tmp_path / quickstart.START / "summary.json").read_text())
    assert summary["steps"] == 4 and set(summary["seconds_of_parts"]) == {"problems", "warm start", "reinforcement"}


def test_seconds_add_up_over_starts(tmp_path: Path) -> None:
    last = tmp_path / "summary.json"
    with pytest.raises(SystemExit) as end:
        parts.seconds_of(parts.Part("a part", [sys.executable, "-c", "raise SystemExit(4)"], last))
    assert end.value.code == 4
    (tmp_path / ".seconds_of_a_part").write_text("100.0")
    code = f"open({str(last)!r}, 'w').close()"
    assert parts.seconds_of(parts.Part("a part", [sys.executable, "-c", code], last)) >= 100.0
    assert parts.seconds_of(parts.Part("a part", ["no such command"], last)) >= 100.0
