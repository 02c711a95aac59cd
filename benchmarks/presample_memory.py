"""Memory of one rank that samples only: a model with an optimizer against one without, of the same random weights.

    python benchmarks/presample_memory.py

Each is built in a process of its own, on a CPU, and runs one forward pass that fills log-probs, as presampling does.
The last line is one line of JSON with the figures of both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path


def main() -> None:
    """Print a line of each kind, and a line of JSON last."""
    figures = {}
    for kind in ("with optimizer", "without optimizer"):
        found = subprocess.run([sys.executable, __file__, kind], check=True, capture_output=True, text=True).stdout
        figures[kind] = json.loads(found.splitlines()[-1])
        print(f"{kind}: {figures[kind]}", flush=True)
    print(json.dumps(figures))


def measure(*, with_optimizer: bool) -> dict[str, float]:
    """Return megabytes (10^6 bytes) that the rank holds, by part, and the growth of its resident memory at the end."""
    import megatron_rl.patches

    megatron_rl.patches.apply()
    import psutil
    import torch
    import torch.distributed as dist

    from megatron_rl.config import load_config
    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.convert.hf.random_weights import RandomReader
    from megatron_rl.model.policy import Policy
    from megatron_rl.model.trainable import Trainable
    from megatron_rl.model.weights import load_hf_weights
    from megatron_rl.parallel.groups import build_groups
    from megatron_rl.tasks.word_problems import generate, write_rows
    from megatron_rl.tasks.word_tokenizer import ModelSize, save_model
    from megatron_rl.types import RowKind, TrainingSample

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    save_model(root / "model", ModelSize(1024, num_layers=16, num_heads=16, num_kv_heads=4, intermediate_size=2048))
    write_rows(root / "rows.jsonl", generate(1, seed=1))
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 1), rank=0, world_size=1)
    groups = build_groups(tensor_parallel_size=1, pipeline_parallel_size=1, device=torch.device("cpu"), seed=1)
    overrides = [f"policy.model_path={root}/model", f"data.train={root}/rows.jsonl", "trainer.devices=1"]
    config_file = Path(__file__).parent.parent / "examples/quickstart/warm_start.yaml"
    config = load_config(config_file, [*overrides, "trainer.precision=bf16"])
    shape = read_shape(root / "model")
    before = psutil.Process().memory_info().rss
    trainable = Trainable(
        config,
        shape,
        groups,
        optim=config.policy.optim if with_optimizer else None,
        fill_weights=lambda chunks: load_hf_weights(chunks, shape, groups, lambda: RandomReader(shape, seed=1)),
        timer=lambda _phase: nullcontext(),
    )
    row = TrainingSample(torch.arange(8), torch.arange(24), RowKind.REHEARSAL)
    Policy(trainable).fill_log_probs([row], [[0]], "ref_log_probs")
    megabytes = {
        "parameters_m": sum(p.numel() for p in trainable.parameters()),
        "weights": sum(p.nbytes for p in trainable.parameters()),
        "gradient_buffers": sum(buffer.grad_data.nbytes for buffer in trainable.gradient_buffers()),
        "main_weights_and_moments": sum(tensor.nbytes for tensor in trainable.update_memory._state()),
        "resident_growth": psutil.Process().memory_info().rss - before,
    }
    return {name: round(value / 1e6) for name, value in megabytes.items()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(with_optimizer=sys.argv[1] == "with optimizer")))
    else:
        main()
