"""What training says: one line on the console, the same numbers in a jsonl file and in TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..console import human_bytes, human_time, log
from .trackers import Trackers


class TrainLog:
    """Writes the log of one stage into `folder`; metrics after a resumed step replace what was logged there before.

    Args:
        folder: Gets ``log-STAGE.jsonl`` and ``tensorboard/``.
        stage: Name of the stage.
        steps: Number of steps in all.
        start: Step that training begins at.
        trackers: Makes others that are told the same; None for none.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        steps: int,
        start: int = 0,
        trackers: Callable[[], Trackers] | None = None,
    ) -> None:
        self.folder, self.stage, self.steps, self.start = folder, stage, steps, start
        self._make_trackers = trackers
        self._trackers: Trackers | None = None
        self._file: IO[str] | None = None
        self._board: Any = None

    def __enter__(self) -> TrainLog:
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"log-{self.stage}.jsonl"
        kept = []
        if self.start and path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a kill tore the last line
                if entry["step"] <= self.start:
                    kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(self.folder / "tensorboard" / self.stage), purge_step=self.start)
        self._trackers = None if self._make_trackers is None else self._make_trackers()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:
            self._trackers.close()

    def line(
        self,
        step: int,
        metrics: dict[str, float],
        internals: dict[str, float],
        *,
        rate: float,
        wait: float,
        mfu: float | None = None,
        memory: float = 0.0,
    ) -> None:
        """Log one step.

        Args:
            step: Number of steps done.
            metrics: Shown and written.
            internals: Written only.
            rate: Steps a second.
            wait: Share of the time that was spent waiting for data.
            mfu: Share of the device's peak arithmetic; None where it is not known.
            memory: Most memory used [bytes].
        """
        left = human_time((self.steps - step) / max(rate, 1e-9))
        shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        speed = f"{rate:.1f} steps/s  " + (f"MFU {100 * mfu:.0f} %  " if mfu is not None else "")
        spent = f"{speed}{human_bytes(memory)}  wait {100 * wait:.1f} %"
        log(f"{self.stage} {step}/{self.steps}  {shown}  {spent}  ETA {left}")
        more = {} if mfu is None else {"mfu": mfu}
        self._write(step, {**metrics, **internals, "steps_per_s": rate, "loader_wait": wait, "memory": memory, **more})

    def evaluation(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Log an evaluation; returns its metrics with ``eval/`` before each name."""
        named = {f"eval/{k}": v for k, v in metrics.items()}
        log(f"{self.stage} {step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in named.items()))
        self._write(step, named)
        return named

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._trackers is not None:
            self._trackers.log(step, values)
