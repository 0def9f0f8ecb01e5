"""How fast training is, beside what the machine could do: windows a second, share of peak arithmetic, memory."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .device_limits import peak_flops
from .roofline import ON_A_CPU

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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

        counter = FlopCounterMode(display=False, custom_mapping=dict(ON_A_CPU))
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


def forget_peak_memory(device: torch.device) -> None:
    """Have `peak_memory` begin anew; on a CPU where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif FORGET.exists():
        with suppress(OSError):
            FORGET.write_text("5")


def peak_memory(device: torch.device) -> float:
    """Most memory used so far [bytes]: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if found is not None:
            return 1024.0 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
