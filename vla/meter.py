"""How fast training is, beside what the machine could do: windows a second, share of peak arithmetic, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "H20": 148.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A100": 312.0,
    "A800": 312.0,
    "A6000": 155.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 5090": 210.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "Thor": 500.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Dense bfloat16 (of older cards float16) arithmetic with float32 sums, from the makers' data sheets; a part of the
device's name decides, the first that fits."""


class Meter:
    """Measures a training loop.

    Args:
        device: Where it runs.
        precision: ``bf16`` or ``float32``.
        checkpointing: Whether activations are computed twice, which is no progress.
    """

    def __init__(self, device: torch.device, precision: str, *, checkpointing: bool) -> None:
        self.device, self.precision, self.checkpointing = device, precision, checkpointing
        self.flops: float | None = None
        self._peak: float | None = None

    def count(self, forward: Callable[[], Tensor], parts: int) -> None:
        """Count the arithmetic of a pass that nothing is learnt from: counting takes operations apart, which rounds
        otherwise. A step has so many `parts`."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            loss = forward()
            first = counter.get_total_flops()
            loss.backward()
        self.flops = parts * float(counter.get_total_flops() - (first if self.checkpointing else 0))

    def mfu(self, steps_per_s: float) -> float | None:
        """Share of the device's peak arithmetic that went into the model's (Chowdhery et al. 2022); None if unknown."""
        if self.flops is None:
            return None
        if self._peak is None:
            self._peak = peak_flops(self.device, self.precision) or 0.0
        return self.flops * steps_per_s / self._peak if self._peak else None

    def memory(self) -> float:
        """Most memory used so far [bytes]: of the device, or of the process on a CPU."""
        return peak_memory(self.device)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far [bytes]: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Arithmetic a second at best: of a GPU by its data sheet, of a CPU measured (0.25 s); None if unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
        if found is None:
            return None
        return found * 1e12 if precision == "bf16" else found * 1e12 / 2  # TF32, which is half of it
    if device.type != "cpu":
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = nn.Linear(1024, 1024, bias=False, dtype=dtype)
    x, best = torch.ones(512, 1024, dtype=dtype), 0.0
    with torch.inference_mode():
        layer(x)
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.25:
            start = time.perf_counter()
            layer(x)
            best = max(best, 2 * 512 * 1024 * 1024 / (time.perf_counter() - start))
    return best
