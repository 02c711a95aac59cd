"""The scripts for GPUs run: here on a CPU, in small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # whole scripts

ROOT = Path(__file__).parents[2]


def last_line(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()[-1]


RUNNER = "import sys; sys.path.insert(0, 'benchmarks/gpu'); import eight_minutes as run"
"""In a process of its own: names in that folder are common ones."""


def of_runner(code: str) -> Any:
    """What an expression gives in a process of its own that has ``eight_minutes.py`` as ``run``."""
    program = f"{RUNNER}; import json; print(json.dumps({code}))"
    return json.loads(last_line("-c", program))


def output_of(program: str) -> str:
    """What a program that has our benchmarks as modules prints, however it ends."""
    program = f"import sys; sys.path.insert(0, 'benchmarks')\n{program}"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True).stdout


def test_agreement() -> None:
    found = json.loads(last_line("benchmarks/gpu/agreement.py", "--tiny"))
    assert found["first_log_ratio_local_packed"] == found["first_log_ratio_local_alone"] == 0.0
    assert found["packing_local_log_prob_abs_diff"] < 2e-3
    assert 0 < found["packing_local_gradient_rel_diff"] < 0.02


def test_updates_of_several_recipes_and_why_one_is_refused() -> None:
    recomputed = {"granularity": "full", "method": "uniform", "num_layers": 1}
    fields = [f"policy.megatron_cfg.recompute_{name}={value}" for name, value in recomputed.items()]
    recipes = ["bf16", "delayed", "tensorwise"]
    found = json.loads(last_line("benchmarks/gpu/train_step.py", "--tiny", "--recipes", *recipes, "--set", *fields))
    for recipe in ("bf16", "tensorwise"):
        assert found[f"tokens_per_s_{recipe}"] > 0 and found[f"mfu_{recipe}"] > 0
    assert found["fp8_over_bf16"] == found["tensorwise_over_bf16"]
    assert list(found["refused"]) == ["delayed"] and "scales of delayed scaling" in found["refused"]["delayed"]
    assert found["layers"] == 2 and "failed" not in found


def test_layers_leave_memory_free() -> None:
    code = (
        "[__import__('train_step').layers_that_fit(total, ['policy.train_micro_batch_tokens=16384']) for total in {}]"
    )
    few, most, all_of_a_smaller = of_runner(code.format((80_000_000_000, 150_000_000_000, 1)))
    assert 1 <= few < most < 10 and all_of_a_smaller == 1


def test_a_job_beyond_its_limit_ends_with_its_children_and_keeps_its_figures(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        """print('{"child": %d, "rate": 2.5}' % child.pid, '\\n{"rate": 3', end='', flush=True)\n"""
        "time.sleep(60)\n"
    )
    found = of_runner(f"run.run(({str(job)!r},), 3)")
    assert found["rate"] == 2.5 and found["failed"] == "not done after 3 s"
    deadline = time.monotonic() + 10
    while is_running(found["child"]):
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Not even as a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_runner_ends_its_job(tmp_path: Path) -> None:
    job, pid_file = tmp_path / "job.py", tmp_path / "pid"
    job.write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    # A shell's background jobs ignore the keyboard's interrupt, and their children inherit that.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listen}; {RUNNER}; run.run(({str(job)!r},), 60)"
    runner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(runner.pid, 2)
    assert runner.wait(timeout=30) != 0
    while is_running(int(pid_file.read_text())):
        assert time.monotonic() < deadline, "the job lives on"
        time.sleep(0.05)


def test_a_failure_is_told_with_its_status(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text("import sys\nprint('{}')\nsys.exit('out of memory')\n")
    assert of_runner(f"run.run(({str(job)!r},), 60)")["failed"] == "status 1: out of memory\n"


def test_a_second_call_of_the_day_adds_to_the_first(tmp_path: Path) -> None:
    calls = [
        ("train_step", {"mfu_bf16": 0.41}),
        ("agreement", {"te_log_prob_abs_diff": 0.001}),
        ("vs_trl", {"skipped": "needs trl"}),
        ("vs_trl", {"tokens_per_s_ratio": 2.0}),
        ("train_step", {"skipped": "no time left"}),
    ]
    code = (
        f"[run.merge(run.Path({str(tmp_path / 'day.json')!r}), {{'date': 'today'}}, *call) for call in {calls!r}][-1]"
    )
    found = of_runner(code)
    assert found == json.loads((tmp_path / "day.json").read_text())
    assert found["ran"] == {"train_step": calls[0][1], "agreement": calls[1][1], "vs_trl": calls[3][1]}
    assert found["skipped"] == {"train_step": "no time left"}
    judged = {aim["value"]: aim["met"] for aim in found["aims"].values()}
    assert judged == {0.001: True, None: None, 0.41: False, 2.0: True}


def test_all_limits_fit_into_one_run() -> None:
    assert of_runner("sum(part.seconds for part in run.PARTS.values())") <= 8 * 60


def test_kernels_that_fail_are_skipped_with_their_reason() -> None:
    lines = output_of(
        """
import log_probs
log_probs.on_gpu, log_probs.matmul_flops, real = lambda: True, lambda: 1e12, log_probs.in_process
def measured(**how):
    if how["path"] == "naive":
        raise RuntimeError("OutOfMemoryError")
    if how["path"].startswith(("liger", "quack")):
        return real(**how)
    return {"seconds": 1.0, "gigabytes": 2.0, "ran": "a stand-in"}
log_probs.in_process = measured
sys.argv = ["log_probs.py", "--hidden", "64", "--vocabulary", "256", "--tokens", "64"]
log_probs.main()
"""
    ).splitlines()
    found = json.loads(lines[-1])
    assert found["time_vs_chunked"] == found["time_vs_cut_cross_entropy"] == 1.0 and "matmul_share" in found
    missing = found["not_measured"]
    assert set(missing) == {"naive", "liger_triton", "liger_cute", "quack"} and missing["naive"] == "OutOfMemoryError"
    # Not installed, or not for CPUs.
    assert all("Error: " in why for name, why in missing.items() if name != "naive")
    assert found["ran"]["ours"] == "a stand-in" and len(found["seconds"]) == 3


def test_on_a_gpu_crowded_steps_ask_for_no_more_turns_and_what_is_known_is_kept() -> None:
    lines = output_of(
        """
import vs_trl
vs_trl.write_inputs, vs_trl.machine = lambda *_, **__: None, lambda _: "stand-in"
step = {"tokens": 10, "generate": 1.0, "update": 1.0, "rest": 0.5, "crowded": 0.9}
count = 0
def run_worker(side, python, work):
    global count
    count += 1
    return {"versions": {}, "steps": [step] * work.num_steps} if count < 4 else sys.exit(f"{side} failed")
vs_trl.run_worker = run_worker
sys.argv = ["vs_trl.py", "--gpu", "--repeats", "1", "--steps", "3", "--trl-python", "python"]
vs_trl.main()
vs_trl.main()
"""
    ).splitlines()
    tables = [json.loads(line) for line in lines if line.startswith("{")]
    assert [table.get("tokens_per_s_ratio") for table in tables] == [None, 1.0, 1.0, None]  # the fourth process fails
    assert tables[-1]["settings"]["equal, 2 updates"]["megatron_rl_tokens_per_s"] == 4.0


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As if not called by another make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)


def test_make_asks_for_the_platform_of_a_machine_with_a_gpu() -> None:
    done = make("test-gpu", "PLATFORM=cpu", "NVIDIA=/dev/nvidia0")
    assert done.returncode == 2 and "make test-gpu PLATFORM=gpu" in done.stderr


def test_make_installs_from_a_folder_alone() -> None:
    lines = make("-nB", "test-gpu", "PLATFORM=gpu", "WHEELS=/wheels").stdout.splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 5 and all("--no-index --find-links /wheels" in line for line in installs)


def test_make_builds_transformer_engine_against_the_torch_that_is_there() -> None:
    lines = make("-nB", "sglang", "PLATFORM=gpu").stdout.splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert " torch==" in installs[0] and " setuptools==" in installs[0]
    bindings = next(line for line in installs if line.endswith("transformer-engine-torch"))
    assert installs.index(bindings) == 1 and "--no-build-isolation" in bindings and "--no-cache-dir" in bindings
    assert all("--constraint requirements/gpu.lock" in line for line in installs if "--editable" not in line)


@pytest.mark.parametrize(
    ("release", "expected"), [(None, "is none"), ("12.8", "is release 12.8"), ("13.0", None), ("13.2", None)]
)
def test_make_refuses_another_toolkit(tmp_path: Path, release: str | None, expected: str | None) -> None:
    """Before anything is installed: the interpreter here ends at once, with a word of its own."""
    for name, text in (
        ("python", "exit 7"),
        ("nvcc", f"echo Cuda compilation tools, release {release}, V{release}.88"),
    ):
        if name == "nvcc" and release is None:
            continue
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = make("--silent", "packages", "PLATFORM=gpu", f"VENV={tmp_path}", f"CUDA_HOME={tmp_path}")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("PLATFORM=gpu")]
    assert len(said) == (expected is not None)
    if expected is None:
        assert "Error 7" in done.stderr
    else:
        assert expected in said[0] and "CUDA 13" in said[0] and "CUDA_HOME=folder" in said[0]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_make_keeps_one_platform_to_an_environment(tmp_path: Path, platform: str) -> None:
    """Packages of one would replace those of the other, some of them only."""
    other = {"cpu": "gpu", "gpu": "cpu"}[platform]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / f".installed-packages-{other}").touch()
    done = make("--silent", "packages", f"PLATFORM={platform}", f"VENV={tmp_path}")
    assert (
        done.returncode == 2 and f"has the packages of PLATFORM={other}" in done.stderr and "Error 7" not in done.stderr
    )


def test_parts_run_in_small(tmp_path: Path) -> None:
    """Other tests run the scripts of the other parts; with TRL, which is not here, all were run by hand (docs/results)."""
    few = ["machine", "head_bits", "transfer_memory", "transfer_network"]
    command = [
        "benchmarks/gpu/eight_minutes.py",
        "--tiny",
        "--minutes",
        "6",
        "--results",
        str(tmp_path),
        "--only",
        *few,
    ]
    report = json.loads(Path(last_line(*command)).read_text())
    assert list(report["ran"]) == few and not report["skipped"]
    assert not any("failed" in found for found in report["ran"].values()), report["ran"]
    assert report["ran"]["transfer_memory"]["digests_equal"] and report["ran"]["transfer_network"]["digests_equal"]
    assert report["ran"]["head_bits"]["log_prob_error_max"] < 1e-5 < report["ran"]["head_bits"]["bf16_logits_error_max"]


def test_a_library_keeps_the_code_of_one_architecture(tmp_path: Path) -> None:
    """A library as nvcc makes one, with code for two."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    (tmp_path / "code.cu").write_text("__global__ void add(float* x) { x[threadIdx.x] += 1; }")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    library = tmp_path / "code.so"
    subprocess.run([nvcc, "-shared", "-Xcompiler", "-fPIC", *targets, "-o", library, tmp_path / "code.cu"], check=True)
    program = (
        "import sys; sys.path.insert(0, 'benchmarks/gpu'); import bundle, json; data = open({!r}, 'rb').read(); "
        "cut = bundle.keep_only(data, 90); found = [(code, any(cut[at:at + n])) for _, code, at, n in bundle.gpu_code(data)]; "
        "print(json.dumps([len(cut) == len(data), found]))"
    )
    same_size, found = json.loads(last_line("-c", program.format(str(library))))
    assert same_size and {tuple(entry) for entry in found} == {(80, False), (90, True)}


def test_without_a_gpu_nothing_is_claimed() -> None:
    assert last_line("benchmarks/gpu/eight_minutes.py") == "no GPU here: nothing was run"
