"""Where the time of a pass goes: its parts, its kinds of operations, and how long each part must take at least."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .parts import listening
from .roofline import REST, Counted, counting

KINDS = {
    "attention": r"scaled_dot_product|flash|fmha|attention|softmax|sdpa",
    "matrix products": r"(^|::)(add)?(b)?mm$|::linear|::matmul|_linear_pointwise|_scaled_mm|mkldnn_linear|packed_linear"
    r"|mkl_linear|gemm|cutlass|cublas|nvjet|wgmma|conv",
    "norms": r"rms_norm|layer_norm|LayerNorm|native_norm",
    "optimizer": r"_foreach|_fused_adam|Optimizer|multi_tensor",
    "copies": r"copy|::cat$|::clone|::contiguous|gather|::index|scatter|::stack|::roll|Memcpy|::_to_copy|repeat|"
    r"CatArray|embedding",
    "elementwise": r"::(add|sub|mul|div|gelu|silu|sigmoid|tanh|exp|pow|sqrt|rsqrt|sin|cos|addcmul|where|masked_fill"
    r"|clamp|maximum|minimum|lerp|sum|mean|neg|square|fill|zero)_?$|elementwise|reduce_kernel|triton|graph_\d|cpp_fused"
    r"|_backward$",
}
"""Kinds of operations, by names of torch's operations and CUDA's kernels; the first that fits."""
OTHER, BETWEEN = "other operations", "between operations"
"""`BETWEEN` is what Python and launching take, and on a GPU waiting for both."""
KINDS_OF_TIME = (*KINDS, OTHER, BETWEEN)


@dataclass
class Part:
    """A part of a pass, all its calls together.

    Attributes:
        calls: How often it runs.
        ms: Median time.
        flops, bytes: What it computes, and what traffic with memory cannot be left out (`roofline`).
        floor_ms: Least time at the device's limits; None where they are unknown.
        bound: What that is for, ``arithmetic`` or ``memory``.
    """

    calls: int
    ms: float
    flops: float = 0.0
    bytes: float = 0.0
    floor_ms: float | None = None
    bound: str = ""

    @property
    def far(self) -> float | None:
        """How many times the floor it takes; None where the floor is unknown, or too low to mean anything."""
        if self.floor_ms is None or self.floor_ms < 0.01 * self.ms:
            return None
        return self.ms / self.floor_ms if self.floor_ms else None


@dataclass
class Profile:
    """Where the time of a pass goes.

    Attributes:
        ms: Times of the whole pass, one a repetition.
        parts: Name -> part, in the order in which they first run.
        kinds: Kind of operations -> median time [ms]; together as long as the pass.
        operations: (name, calls, time [ms]) of those that take longest.
    """

    ms: list[float]
    parts: dict[str, Part] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    operations: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Median time of the pass."""
        return statistics.median(self.ms)

    @property
    def p99_ms(self) -> float:
        """The time that 99 % of the passes stay below."""
        return sorted(self.ms)[min(len(self.ms) - 1, int(0.99 * len(self.ms)))]

    @property
    def floor_ms(self) -> float | None:
        """Least time of all parts together, one after the other."""
        floors = [part.floor_ms for part in self.parts.values()]
        known = [floor for floor in floors if floor is not None]
        return sum(known) if len(known) == len(floors) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        noted = {"median_ms": self.median_ms, "p99_ms": self.p99_ms, "floor_ms": self.floor_ms}
        return {**noted, **asdict(self)}


def profile_pass(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = 20,
    flops_per_s: float | None = None,
    bytes_per_s: float | None = None,
    parted: Callable[[], object] | None = None,
    counted: Callable[[], object] | None = None,
    trace: Path | None = None,
) -> Profile:
    """Time a pass that has run before, count what it does, and see which operations it is made of.

    Args:
        run: The pass.
        device: Where it runs.
        repeats: How often it is timed.
        flops_per_s, bytes_per_s: Limits of the device; None where they are unknown.
        parted: The same pass for timing its parts, where `run` plays a recording, which has none.
        counted: The same pass for counting, where `run` is compiled: nobody can look inside.
        trace: Where to write torch's trace, for Perfetto or chrome://tracing; None for nowhere.
    """
    found = Profile(ms=[])
    times: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = {}
    for _ in range(repeats):
        watch = Stopwatch(device)
        with listening(watch):
            watch.start()
            (parted or run)()
            spent, calls = watch.stop()
        for name, ms in spent.items():
            times[name].append(ms)
        found.ms.append(sum(spent.values()) if parted is None else _timed(run, device))
    _see_operations(found, run, device, repeats, trace)
    with counting() as does:  # last: what is compiled is not run any more once it was looked into
        (counted or run)()
    for name in dict.fromkeys([*does, *times]):
        part = Part(calls=calls.get(name, 0), ms=statistics.median(times.get(name, [0.0])))
        _add_floor(part, does.get(name, Counted()), flops_per_s, bytes_per_s)
        found.parts[name] = part
    found.parts |= {REST: found.parts.pop(REST)} if REST in found.parts else {}  # last
    return found


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Time of a pass [ms]."""
    watch = Stopwatch(device)
    watch.start()
    run()
    spent, _ = watch.stop()
    return sum(spent.values())


def _add_floor(part: Part, does: Counted, flops_per_s: float | None, bytes_per_s: float | None) -> None:
    part.flops, part.bytes = does.flops, does.bytes
    if flops_per_s and bytes_per_s:
        part.floor_ms = 1e3 * does.floor_s(flops_per_s, bytes_per_s)
        part.bound = "arithmetic" if does.flops / flops_per_s > does.bytes / bytes_per_s else "memory"


class Stopwatch:
    """Times parts, each without those inside it; told by `parts.listening`.

    Args:
        device: Where they run: a GPU is asked by events, for it works behind the program.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []
        self._open = [REST]
        self._calls: dict[str, int] = {}

    def start(self) -> None:
        """The pass begins."""
        self._wait()
        self._mark(REST)

    def stop(self) -> tuple[dict[str, float], dict[str, int]]:
        """The pass has ended: time [ms] and number of calls of each part."""
        self._mark("")
        self._wait()
        spent: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:]):
            spent[name] += begin.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - begin)
        return dict(spent), self._calls

    def enter(self, name: str) -> None:
        """A part begins."""
        self._open.append(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        self._mark(name)

    def leave(self) -> None:
        """The innermost part ends."""
        self._open.pop()
        self._mark(self._open[-1])

    def _mark(self, name: str) -> None:
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _see_operations(
    found: Profile, run: Callable[[], object], device: torch.device, repeats: int, trace: Path | None
) -> None:
    """Fill in the kinds of operations; the profiler slows Python down, so that shares of what is left are scaled."""
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # which would complain of GPUs that are not there
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    passes = max(1, min(repeats, 5))
    with profile(activities=activities, acc_events=True) as seen:
        for _ in range(passes):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    kinds: dict[str, float] = dict.fromkeys(KINDS_OF_TIME, 0.0)
    rows = []
    for event in seen.key_averages():
        if cuda and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / passes
        if ms > 0.0:
            rows.append((event.key, round(event.count / passes), ms))
            kinds[kind_of(event.key)] += ms
    busy = sum(kinds.values())
    if busy > found.median_ms:  # profiled operations take a little longer
        kinds = {name: ms * found.median_ms / busy for name, ms in kinds.items()}
    kinds[BETWEEN] += max(0.0, found.median_ms - busy)
    found.kinds = kinds
    found.operations = sorted(rows, key=lambda row: -row[2])[:20]


def kind_of(operation: str) -> str:
    """The kind of an operation, by its name."""
    if operation.startswith("triton_"):  # several in one, and its name says all of them
        return "elementwise"
    return next((kind for kind, names in KINDS.items() if re.search(names, operation)), OTHER)
