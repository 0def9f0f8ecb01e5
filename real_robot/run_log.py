"""The log of a run in an episode store: written by a thread of its own, so that a slow disk never slows the loop."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import log
from ..datasets.schema import StoreSchema
from ..datasets.store import EpisodeStore
from ..datasets.writer import EpisodeWriter
from ..errors import BrachiumError, SpecMismatchError
from ..spec import EmbodimentSpec, FeatureSpec
from .controller import HUMAN, Step
from .spec import RobotSpec
from .telemetry import SOURCES

WAITING = 500
"""Steps that may wait to be written; later ones are counted and lost, the robot goes on."""


def log_schema(embodiment: EmbodimentSpec, robot: RobotSpec) -> StoreSchema:
    """What a run's steps hold: the embodiment's fields, the axes as commanded and measured, who moved the robot, and in
    which part of the task, counted by a person's marks."""
    axes = robot.axes
    pair = (
        FeatureSpec(name=name, shape=axes.shape, dtype="float64", names=axes.names, units=axes.units)
        for name in ("commanded", "measured")
    )
    source = FeatureSpec(name="source", shape=(1,), dtype="uint8", names=("|".join(SOURCES),))
    subtask = FeatureSpec(name="subtask", shape=(1,), dtype="int32")
    return StoreSchema(embodiment=embodiment, extras=(*pair, source, subtask))


class RunLog:
    """Writes the steps of runs as episodes.

    Args:
        path: Folder of the store; made where it is missing.
        embodiment, robot: What is written.
        source: Where the episodes come from, for the store's record.
    """

    def __init__(self, path: Path, embodiment: EmbodimentSpec, robot: RobotSpec, *, source: str = "deploy") -> None:
        schema = log_schema(embodiment, robot)
        if path.exists():
            store = EpisodeStore.open(path)
            store.schema.require_same(schema, f"store {path}", f"robot {robot.name}")
            if set(store.schema.fields) != set(schema.fields):
                raise SpecMismatchError(
                    f"store {path}: expected the fields {list(schema.fields)}, got {list(store.schema.fields)}: give "
                    "another out="
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            store = EpisodeStore.create(path, schema)
        self.path = path
        self._writer = EpisodeWriter(store, source=source)
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(WAITING)
        self.lost, self.failed, self.written, self.steps = 0, "", 0, 0
        self._subtask, self._by_hand = 0, 0
        self._first: float | None = None
        self._thread = threading.Thread(target=self._work, name="run log", daemon=True)
        self._thread.start()

    # -- called by the control loop, or between runs -------------------------------------------------------------------

    def begin(self, instruction: str, meta: Mapping[str, Any], tags: Sequence[str] = ()) -> None:
        """Begin an episode."""
        self._subtask = self._by_hand = self.steps = 0
        self._queue.put(("begin", (instruction, dict(meta), tuple(tags))))

    def step(self, step: Step) -> None:
        """One step; never waits."""
        self.steps += 1
        self._by_hand += step.source == HUMAN
        try:
            self._queue.put_nowait(("step", (step, self._subtask)))
        except queue.Full:
            self.lost += 1

    def mark(self) -> int:
        """A part of the task is over; the number of the next."""
        self._subtask += 1
        return self._subtask

    def end(self, success: bool | None, tags: Sequence[str] = ()) -> None:
        """End the episode; one without steps is forgotten. One that a person took part in says so (DAgger)."""
        helped = ("corrected",) if 0 < self._by_hand < self.steps else ()
        self._queue.put(("end", (success, (*tags, *helped))))

    def discard(self) -> None:
        """Forget the episode."""
        self._queue.put(("discard", None))

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until all is on the disk; whether it is."""
        done = threading.Event()
        self._queue.put(("flush", done))
        return done.wait(timeout_s)

    def close(self) -> None:
        """Write what is left and close the store."""
        self._queue.put(("close", None))
        self._thread.join(60.0)
        if self.lost:
            log(f"{self.path}: {self.lost} steps were lost, the disk was too slow")
        if self.failed:
            log(f"{self.path}: the log broke off: {self.failed}")

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        steps = 0
        while True:
            kind, value = self._queue.get()
            if kind == "flush":
                value.set()
                continue
            if kind == "close":
                try:
                    if not self.failed:
                        self._writer.close()
                except (BrachiumError, OSError) as error:
                    self.failed = str(error)
                return
            if self.failed:
                continue
            try:
                if kind == "begin":
                    instruction, meta, tags = value
                    self._writer.begin(instruction, tags=tags, meta=meta)
                    steps, self._first = 0, None
                elif kind == "step":
                    with contextlib.suppress(SpecMismatchError):  # one step that does not fit costs that step
                        self._write(*value)
                        steps += 1
                elif kind == "end" and steps:
                    self._writer.end(*value)
                    self.written += 1
                else:
                    self._writer.discard()
            except Exception as error:  # a full disk ends the log, not the robot's run
                self.failed = str(error) or type(error).__name__

    def _write(self, step: Step, subtask: int) -> None:
        seen = step.observation
        self._first = seen.timestamp if self._first is None else self._first
        self._writer.step(
            images=dict(seen.images),
            state=seen.state,
            action=step.action,
            timestamp=seen.timestamp - self._first,
            extras={
                "commanded": step.command,
                "measured": step.measured,
                "source": np.array([step.source], np.uint8),
                "subtask": np.array([subtask], np.int32),
            },
        )
