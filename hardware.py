"""What computes here, in words: results say on what they were measured (standard library only)."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware(device: str) -> str:
    """What computes on a torch device (``cpu``, ``cuda``): accelerator where there is one, cores, processor."""
    found = f"{cores()} cores ({processor()})"
    if device.startswith("cuda"):
        import torch

        found = f"{torch.cuda.get_device_name()}, {found}"
    return found


def cores() -> int:
    """Cores that this process may use, not all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """What the system calls its processor; Python's own answer is only its kind on Linux."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), platform.processor() or platform.machine())
