"""What a device could do at best: arithmetic and memory traffic a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

LIMITS = {
    "B200": (2250.0, 8000.0),
    "H200": (989.0, 4800.0),
    "H100 PCIe": (756.0, 2000.0),
    "H100": (989.0, 3350.0),
    "H20": (148.0, 4000.0),
    "L40S": (362.0, 864.0),
    "L40": (181.0, 864.0),
    "L4": (121.0, 300.0),
    "A100-SXM4-80GB": (312.0, 2039.0),
    "A100": (312.0, 1555.0),
    "A800": (312.0, 1935.0),
    "A6000": (155.0, 768.0),
    "A10G": (70.0, 600.0),
    "A10": (125.0, 600.0),
    "RTX 5090": (210.0, 1792.0),
    "RTX 4090": (165.0, 1008.0),
    "RTX 3090": (71.0, 936.0),
    "Thor": (500.0, 273.0),
    "V100": (125.0, 900.0),
    "T4": (65.0, 300.0),
}
"""Part of a device's name, the first that fits -> dense bfloat16 (of older cards float16) arithmetic with float32 sums
[TFLOP/s] and memory traffic [GB/s], from the makers' data sheets."""
MEASURE_S = 0.25
"""How long each limit of a CPU is measured."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Arithmetic a second at best: of a GPU by its data sheet, of a CPU measured (0.25 s); None if unknown."""
    if device.type == "cuda":
        found = _limits(device)
        if found is None:
            return None
        return found[0] * 1e12 if precision == "bf16" else found[0] * 1e12 / 2  # TF32, which is half of it
    if device.type != "cpu":
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = nn.Linear(1024, 1024, bias=False, dtype=dtype)
    x = torch.ones(512, 1024, dtype=dtype)
    with torch.inference_mode():
        return 2 * 512 * 1024 * 1024 / _fastest(lambda: layer(x))


def bandwidth(device: torch.device) -> float | None:
    """Bytes a second that memory gives at best: of a GPU by its data sheet, of a CPU measured; None if unknown."""
    if device.type == "cuda":
        found = _limits(device)
        return None if found is None else found[1] * 1e9
    if device.type != "cpu":
        return None
    x = torch.ones(2**26)  # 256 MiB: more than caches hold
    return 4 * 2**26 / _fastest(x.sum)


def _limits(device: torch.device) -> tuple[float, float] | None:
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in LIMITS.items() if key in name), None)


def _fastest(run: Callable[[], object]) -> float:
    """Least time of a call [s]."""
    run()
    least, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < MEASURE_S:
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least
