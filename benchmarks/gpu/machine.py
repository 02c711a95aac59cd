"""Measure how fast the device multiplies and copies: shares of a peak in the other results refer to it.

matmul_flops          floating-point operations per second of a bfloat16 product of 8,192 x 8,192
copy_bytes_per_s      bytes read and written per second by a copy within the device
"""

from __future__ import annotations

import sys

from common import emit, matmul_flops, seconds_of


def main() -> int:
    """Print a line of JSON after each figure."""
    import torch

    from megatron_rl.model.flops import peak_flops

    is_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if is_gpu else "cpu"
    line: dict[str, object] = {"device": name, "matmul_flops": matmul_flops()}
    if peak := peak_flops(name):
        line["matmul_over_peak"] = round(float(line["matmul_flops"]) / peak, 3)  # type: ignore[arg-type]
    emit(line)
    source = torch.empty(2**30 if is_gpu else 2**22, dtype=torch.uint8, device="cuda" if is_gpu else "cpu")
    target = torch.empty_like(source)
    line["copy_bytes_per_s"] = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    emit(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
