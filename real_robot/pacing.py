"""When the loop's ticks come: its rates, waiting for deadlines, and keeping the system from disturbing them."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError

LOOP_PRIORITY = 10
TASKS = "/proc/self/task"
SPIN_S = 2e-4
"""The end of a wait that is not slept: the kernel wakes a thread a little late."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The loop's rates and patience.

    Attributes:
        control_hz: Rate of commands [Hz].
        hold_s: How long the robot holds without a plan before the run ends [s].
        first_s: How long it may wait for the first plan [s].
        silent_s: A loop that hangs for so long has its robot halted [s].
        realtime: Ask the system for real-time scheduling of the loop, where it lets us.
    """

    control_hz: float = 50.0
    hold_s: float = 1.0
    first_s: float = 10.0
    silent_s: float = 0.2
    realtime: bool = True

    def __post_init__(self) -> None:
        for key in ("control_hz", "hold_s", "first_s", "silent_s"):
            value = getattr(self, key)
            if not (isinstance(value, (int, float)) and np.isfinite(value) and value > 0):
                raise ConfigError(f"timing: expected {key} above 0, got {value!r}")


def wait_until(deadline: float) -> float:
    """Sleep until a moment, and say when it is over [s]."""
    while (left := deadline - time.monotonic()) > 0.0:
        if left > SPIN_S:
            time.sleep(left - SPIN_S)
    return time.monotonic()


@contextlib.contextmanager
def undisturbed(realtime: bool) -> Iterator[Callable[[], None]]:
    """Keep from the loop what Python and the system would do to it: garbage collection, long turns of other threads,
    and other processes, where the system lets us.

    The other threads of this process are raised too, below the loop: one that waits for a processor while it holds
    Python's lock would make the loop wait with it. Yields what raises those that were started since.
    """
    collecting, interval = gc.isenabled(), sys.getswitchinterval()
    raised: dict[int, tuple[int, Any]] = {}

    def raise_threads() -> None:
        if not realtime or not hasattr(os, "sched_setscheduler"):
            return
        own = threading.get_native_id()
        for name in os.listdir(TASKS) if os.path.isdir(TASKS) else [str(own)]:
            thread = int(name)
            if thread in raised:
                continue
            with contextlib.suppress(OSError):  # only root may, or who has the right; or the thread has ended
                before = os.sched_getscheduler(thread), os.sched_getparam(thread)
                priority = LOOP_PRIORITY if thread == own else LOOP_PRIORITY - 1
                os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
                raised[thread] = before

    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(5e-4)
    raise_threads()
    try:
        yield raise_threads
    finally:
        for thread, before in raised.items():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread, *before)
        sys.setswitchinterval(interval)
        gc.unfreeze()
        if collecting:
            gc.enable()
