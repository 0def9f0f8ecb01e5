"""A checkpoint of ``brachium train-visual`` or ``train-video`` as a policy: planner, runner and pursuit in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...spec import EmbodimentSpec
from ...vla.generative.system import SubgoalSystem
from ..base import Policy
from .album import Album
from .executing import holding
from .generated import GeneratedPlanner
from .pursuit import Pursuit
from .runner import HierarchicalRunner
from .video import VideoPlanner
from .visual import VisualPlanner
from .wiring import Factory, wired

PLANNERS: dict[str, Callable[..., GeneratedPlanner]] = {"visual": VisualPlanner, "video": VideoPlanner}


class SubgoalRunner(HierarchicalRunner):
    """A generator that says what it should look like, over a policy that makes it so. It never says that it is done.

    Args:
        system: Loaded checkpoint.
        executor: Turns chunks into actions.
        planner: Makes the planner from `system`; by default the one of its kind, with its defaults.

    Attributes:
        album: What subgoals looked like beside what was seen and what came.
        told: What results depend on beside the weights.
    """

    def __init__(self, system: SubgoalSystem, executor: Callable[..., Policy], planner: Factory | None = None) -> None:
        made: GeneratedPlanner = wired(planner or PLANNERS[system.kind], {"system": system})
        self.album = Album()
        self._generated = made
        pursuit = Pursuit(system, executor, self.album)
        super().__init__(planner=made, policy=pursuit, hold=holding(system.embodiment), termination="planner")
        self.told = json.dumps([_told(made), _told(pursuit.executor)], sort_keys=True)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        executor: Callable[..., Policy],
        planner: Factory | None = None,
        like: EmbodimentSpec | None = None,
    ) -> SubgoalRunner:
        """Load a checkpoint.

        Raises:
            NotFoundError, CheckpointError: See `SubgoalSystem.load`.
            SpecMismatchError: It was trained for another robot than `like`.
        """
        system = SubgoalSystem.load(path)
        if like is not None:
            system.embodiment.require_same(like, f"checkpoint {path}", "environment")
        return cls(system, executor, planner)

    @property
    def cost(self) -> dict[str, float]:
        """How many subgoals were made, and what one took [ms]."""
        return self._generated.cost


def _told(part: Any) -> dict[str, Any]:
    """The settings of a part, by their values."""
    shown = (int, float, str, bool)
    found: dict[str, Any] = {"type": type(part).__name__}
    for name, value in vars(part).items():
        if name.startswith("_"):
            continue
        if isinstance(value, shown) or value is None:
            found[name] = value
        elif name == "imaginer":
            found[name] = _told(value)
        elif name == "guidance":
            found[name] = repr(value)
    return found
