"""What ``doctor machine`` says is what runs."""

from __future__ import annotations

import torch

from megatron_rl.doctor.machine import look


def test_a_cpu() -> None:
    found = look()
    assert found["device"] == ("CPU" if not torch.cuda.is_available() else found["device"])
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["layers"] == "Megatron's local ones" and found["adam"].endswith("AdamW")
    assert [found[f"fp8 {kind}"] for kind in ("delayed", "tensorwise", "blockwise", "mxfp8")] == ["emulated"] * 4
