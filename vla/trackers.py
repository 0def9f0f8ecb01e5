"""Trackers of experiments beside the files of a run: Weights & Biases, and trackio, which stays on this machine.

What they get is a copy. One that fails (no network, a full disk) is left out with a warning, and training goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..console import log
from ..errors import ConfigError, did_you_mean

TRACKERS = ("wandb", "trackio")
PROJECT = "brachium"
"""Name of the project, unless the tracker's own environment variable (``WANDB_PROJECT``) says another."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for trackers that are unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"unknown tracker {name!r}. {did_you_mean(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track=[{name}]: {name} is not installed. Type: uv pip install 'brachium[tracking]'")


class Trackers:
    """The trackers of one run; a run that is resumed goes on in the same place.

    Args:
        names: Of `TRACKERS`.
        folder: Of the run; keeps its name there.
        stage: Of the training.
        config: What the run was asked for, JSON-ready.
        resumed: Whether it goes on, rather than begins.

    Attributes:
        run_id: Name of the run, for machines.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, stage: str, config: Mapping[str, Any], *, resumed: bool = False
    ) -> None:
        self.folder, self.stage, self.config, self.resumed = folder, stage, dict(config), resumed
        self.run_id = self._named()
        self._open: dict[str, Any] = {}
        for name in names:
            made = self._tried(name, partial(START[name], self))
            if made is not None:
                self._open[name] = made

    @property
    def label(self) -> str:
        """Name of the run, for people."""
        return f"{self.folder.resolve().name}-{self.stage}"

    def _named(self) -> str:
        """Name of the run, for machines: the same when it is resumed."""
        path = self.folder / "tracked.json"
        try:
            known = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or torn by a kill
            known = {}
        if self.stage not in known or not self.resumed:
            known[self.stage] = uuid.uuid4().hex[:12]
            with suppress(OSError):  # a full disk: the run goes on, and a later one has another name
                path.write_text(json.dumps(known) + "\n")
        return str(known[self.stage])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        for name, run in list(self._open.items()):
            self._tried(name, partial(run.log, dict(values), step=step))

    def close(self) -> None:
        """All is said."""
        for name, run in list(self._open.items()):
            self._tried(name, run.finish)
        self._open.clear()

    def _tried(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a tracker may raise, it is no reason to lose a training
            log(f"warning: {name} failed and is left out from here on: {type(error).__name__}: {error}")
            self._open.pop(name, None)
            return None


def _start_wandb(run: Trackers) -> Any:
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings(silent=True)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    named = {"project": project, "name": run.label, "id": run.run_id, "resume": "allow"}
    return wandb.init(dir=str(run.folder), config=run.config, settings=settings, **named)


def _start_trackio(run: Trackers) -> Any:
    trackio = importlib.import_module("trackio")
    return trackio.init(
        project=PROJECT, name=f"{run.label}-{run.run_id}", config=run.config, resume="allow", embed=False
    )


START: dict[str, Callable[[Trackers], Any]] = {"wandb": _start_wandb, "trackio": _start_trackio}
