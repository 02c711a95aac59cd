"""Offline conversion against copying the same files, and against mbridge; and how much memory it takes.

    python benchmarks/convert.py [--repeats 3] [--folder DIR] [--no-mbridge]

A random checkpoint like Qwen2.5 (745M parameters, bf16, 1.5 GB in 5 files) is converted to Megatron and back, alternating with
a plain copy of the files that are read, each synced to disk and in a process of its own; medians of the repeats. Memory
(RssAnon + RssShmem, so pages of files do not count) is sampled during the conversion, from after the imports; also for a
checkpoint of twice the size.

mbridge works between a checkpoint and a running model, so its side is: build the model on one CPU rank (ours, Megatron's local
spec), load, ``dist_checkpointing.save``; and back. It is installed into a virtual environment of its own.

import_vs_copy, export_vs_copy          time over that of the copy: at most 1.5
peak_rss_mb                             above the process after its imports, the worst of all runs: at most 700
import_vs_mbridge, export_vs_mbridge    mbridge's time over ours: at least 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MBRIDGE = "mbridge==0.15.1"
_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 5120,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "initializer_range": 0.02, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_NUM_FILES = 5
_YAML = """
trainer: {stage: sft, devices: 1, precision: bf16, max_steps: 1, accelerator: cpu}
exp_manager: {exp_dir: unused, name: unused}
policy: {model_path: "???", optim: {lr: 1.0e-3}, train_global_batch_size: 1, train_micro_batch_tokens: 64}
algorithm: {name: sft}
data: {task: gsm8k, train: unused}
"""


def main() -> None:
    """All measurements; a line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary one")
    parser.add_argument("--no-mbridge", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _child(*arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert_") as name:
        print(json.dumps(_measure(Path(name), arguments.repeats, with_mbridge=not arguments.no_mbridge)))


def _measure(folder: Path, repeats: int, *, with_mbridge: bool) -> dict[str, Any]:
    hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
    _generate(hf, layers=_CONFIG["num_hidden_layers"])
    num_bytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    print(f"{num_bytes / 1e9:.2f} GB in {len(list(hf.glob('*.safetensors')))} files")
    _run("import", hf, megatron)
    times: dict[str, list[float]] = {}
    peaks: list[float] = []

    def note(what: str, seconds: float, cpu_s: float) -> None:
        times.setdefault(what, []).append(seconds)
        speed = num_bytes / 1e9 / seconds
        print(f"{what:16} {seconds:6.2f} s  {speed:5.2f} GB/s  {cpu_s:5.2f} s of CPU", flush=True)

    for _ in range(repeats):
        for what, source in (("import", hf), ("export", megatron)):
            result = _run("copy", source, out)
            note(f"{what} copy", result["seconds"], result["cpu_s"])
            shutil.rmtree(out)
            result = _run(what, source, out)
            note(what, result["seconds"], result["cpu_s"])
            peaks.append(result["peak_mb"])
            if what == "export":
                _check_equal(hf, out)
            shutil.rmtree(out)
    python = _mbridge(folder) if with_mbridge else None
    if python is not None:
        for _ in range(repeats):
            _run("mbridge-import", hf, folder / "theirs", python)  # what its way back reads, and to warm up
            for what, source in (("import", hf), ("export", folder / "theirs")):
                result = _run(f"mbridge-{what}", source, out, python, hf)
                note(f"mbridge {what}", result["seconds"], result["cpu_s"])
                shutil.rmtree(out)
            shutil.rmtree(folder / "theirs")
    shutil.rmtree(hf)
    shutil.rmtree(megatron)
    _generate(hf, layers=2 * 24 + 17)  # twice the bytes, of which the vocabulary does not grow
    for what, source, target in (("import", hf, megatron), ("export", megatron, out)):
        result = _run(what, source, target)
        peaks.append(result["peak_mb"])
        print(f"{what} of {sum(p.stat().st_size for p in hf.glob('*.safetensors')) / 1e9:.2f} GB: {result}")
    middle = {what: statistics.median(values) for what, values in times.items()}
    return {
        "import_vs_copy": round(middle["import"] / middle["import copy"], 3),
        "export_vs_copy": round(middle["export"] / middle["export copy"], 3),
        "peak_rss_mb": round(max(peaks)),
        "import_vs_mbridge": None if python is None else round(middle["mbridge import"] / middle["import"], 2),
        "export_vs_mbridge": None if python is None else round(middle["mbridge export"] / middle["export"], 2),
    }


def _generate(directory: Path, *, layers: int) -> None:
    """A checkpoint of random normal numbers, in files of about equal size."""
    import torch
    from safetensors.torch import save_file

    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.convert.tables.table import hf_tensors

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
    tensors = hf_tensors(read_shape(directory))
    total = sum(_size(extent) for extent in tensors.values())
    source = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    held: dict[str, Any] = {}
    index: dict[str, str] = {}
    done = number = position = 0

    def write() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05d}-of-{_NUM_FILES:05d}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, file))
        held.clear()

    for name, extent in tensors.items():
        size = _size(extent)
        tensor = torch.empty(size, dtype=torch.bfloat16)
        for start in range(0, size, len(source)):  # equal numbers at other places: every tensor differs
            position = (position + 7919) % len(source)
            tensor[start : start + len(source)] = source.roll(position)[: size - start]
        held[name] = tensor.view(extent)
        done += size
        if done >= total * (number + 1) / _NUM_FILES and number + 1 < _NUM_FILES:
            write()
    write()
    fields = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(fields))


def _size(extent: tuple[int, ...]) -> int:
    result = 1
    for n in extent:
        result *= n
    return result


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint and sync each."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
            _sync(target / path.name)
    _sync(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _check_equal(hf: Path, out: Path) -> None:
    """The way there and back changed no bit."""
    from safetensors import safe_open

    found = {}
    for directory in (hf, out):
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    if directory == hf:
                        found[name] = tensor
                    else:
                        assert tensor.equal(found.pop(name)), name
    assert not found, found.keys()


def _run(what: str, source: Path, target: Path, python: Path | None = None, hf: Path | None = None) -> dict[str, float]:
    """One conversion in a fresh process; its time and memory count from after the imports."""
    os.sync()
    command = [str(python or sys.executable), __file__, "--child", what, str(source), str(target)]
    environment = os.environ | {"CONVERT_HF": str(hf or source), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _mbridge(folder: Path) -> Path | None:
    """The interpreter of an environment with mbridge on top of our packages; None where it cannot be had."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # Not plain paths: those of an editable installation are found through .pth files, which only addsitedir reads.
    (site / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", MBRIDGE]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        print(f"mbridge cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        return None
    return python


# ---------------------------------------------------------------------------------------------- inside a child process


def _child(what: str, source: str, target: str) -> None:
    work = _prepare_mbridge(what, source, target) if what.startswith("mbridge") else _prepare(what, source, target)
    before, peak, stop = _memory_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], _memory_mb() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    started, used = time.perf_counter(), os.times()
    work()
    seconds, now = time.perf_counter() - started, os.times()
    stop.set()
    thread.join()
    cpu_s = now.user + now.system - used.user - used.system
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak[0]}))


def _memory_mb() -> float:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1e3


def _prepare(what: str, source: str, target: str) -> Callable[[], object]:
    from megatron_rl.convert.offline.memory import keep_freed_memory

    keep_freed_memory()  # as the commands do
    from megatron_rl.convert.offline.convert import export_hf, import_hf

    if what == "copy":
        return lambda: _copy(Path(source), Path(target))
    return lambda: (import_hf if what == "import" else export_hf)(source, target)


def _prepare_mbridge(what: str, source: str, target: str) -> Callable[[], object]:
    """Build the model, load and save; with the imports and the process group already there."""
    import torch
    import torch.distributed as dist

    from megatron_rl import patches

    patches.apply("cpu")
    from mbridge.models.qwen2 import Qwen2Bridge
    from megatron.core import dist_checkpointing
    from transformers import AutoConfig

    from megatron_rl.config import load_config
    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.model.build import build_chunks, build_groups_of
    from megatron_rl.model.torch_dist import load_torch_dist

    class LocalBridge(Qwen2Bridge):
        """Knows the names of norms that are not fused."""

        def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
            for local, hf in (("input", "input"), ("pre_mlp", "post_attention")):
                if name.endswith(f".{local}_layernorm.weight"):
                    return [f"model.layers.{name.split('.')[2]}.{hf}_layernorm.weight"]
            return super()._weight_name_mapping_mcore_to_hf(name)

    hf = os.environ["CONVERT_HF"]
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(_YAML)
    config = load_config(folder / "config.yaml", [f"policy.model_path={hf}"])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    groups = build_groups_of(config, torch.device("cpu"))

    def work() -> None:
        bridge = LocalBridge(AutoConfig.from_pretrained(hf))
        with torch.no_grad():
            chunks: Any = build_chunks(config, read_shape(hf), groups)
            Path(target).mkdir()
            if what == "mbridge-import":
                bridge.load_weights(chunks, source)
                metadata = {"dp_cp_group": groups.dp_cp_group, "singleton_local_shards": False}
                dist_checkpointing.save({"model": chunks[0].sharded_state_dict(metadata=metadata)}, target)
            else:
                load_torch_dist(chunks, groups, source)
                bridge.safetensor_io = bridge._get_safetensor_io(hf)
                bridge.save_weights(chunks, target)
        for path in Path(target).rglob("*"):
            _sync(path)
        _sync(Path(target))

    return work


if __name__ == "__main__":
    main()
