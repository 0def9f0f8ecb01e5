"""What commands of several stages share: wall times that survive interruptions, and training that is done once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .console import log


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """JSON; empty where there is none that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


class StageClock:
    """Wall time of each stage, summed over interrupted runs; a stage that finds all done keeps what that took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path)

    def stage(self, name: str, run: Path | None = None) -> _Stage:
        """Time a stage (of one run)."""
        return _Stage(self, name if run is None else f"{run.name}/{name}")

    def forget(self, run: Path) -> None:
        """Begin anew with the training and evaluation of one run."""
        self.seconds = {key: spent for key, spent in self.seconds.items() if not key.startswith(f"{run.name}/")}

    def of(self, name: str, run: Path) -> float:
        """Seconds of a stage [s]."""
        return self.only(name, run) or self.seconds.get(name, 0.0)

    def only(self, name: str, run: Path) -> float:
        """Seconds of a stage that is a run's own [s]."""
        return self.seconds.get(f"{run.name}/{name}", 0.0)


class _Stage:
    """One stage's time; set `reused` where it found that all was there."""

    def __init__(self, clock: StageClock, key: str) -> None:
        self.clock, self.key, self.reused = clock, key, False

    def __enter__(self) -> _Stage:
        self.begin = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        spent = time.monotonic() - self.begin
        if not self.reused or self.key not in self.clock.seconds:
            self.clock.seconds[self.key] = self.clock.seconds.get(self.key, 0.0) + spent
            write_json(self.clock.path, self.clock.seconds)


def train_once(run: Path, request: Mapping[str, Any], clock: StageClock, train: Callable[[], Any]) -> bool:
    """Train unless the same request is answered by the checkpoint in `run` already; whether it did.

    A run of another request is removed; one of the same that was interrupted is left for `train` to go on from.
    """
    wanted, note = json.dumps(request, sort_keys=True, default=str), run / "request.json"
    same = note.exists() and note.read_text() == wanted
    if same and (run / "checkpoint").exists():
        log(f"{run / 'checkpoint'}: trained already on this data; reusing it")
        return False
    if not same and run.exists():
        log(f"{run}: was trained with other options or data; starting anew")
        shutil.rmtree(run)
        clock.forget(run)
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)
    train()
    return True
