"""What a person moves a robot with: a device that says which way, or an arm that says where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ...spec import FeatureSpec

KEYS = ("success", "failure", "discard", "mark", "stop")
"""What a person may say beside moving: how the episode went, that a subtask is done, that the session is over."""
KINDS = ("twist", "axes")


@dataclass(frozen=True, kw_only=True)
class Hand:
    """What a person does at a moment.

    Attributes:
        twist: float64 (6,) from -1 to 1: the wanted velocity along and about x, y and z of the base, as shares of the
            fastest; without a model of the arm, of its first six axes.
        axes: float64 (j,): where the robot's axes should be, gripper included; of leader arms.
        grip: What was said of the gripper since the last look: ``open``, ``close`` or ``toggle``; empty for nothing.
        active: The person moves it, or holds the dead man's switch.
        keys: What was said since the last look: of `KEYS`.
    """

    twist: np.ndarray
    axes: np.ndarray | None = None
    grip: str = ""
    active: bool = False
    keys: tuple[str, ...] = ()


class Teleoperator(ABC):
    """A device in a person's hand.

    Attributes:
        name: For example ``keyboard``.
        kind: ``twist``: says which way. ``axes``: says where each axis should be.
        feature: Names, units and gripper of the axes, where it says those; they must be the robot's.
    """

    name: str
    kind: str = "twist"
    feature: FeatureSpec | None = None

    @abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """What does what: (key or stick, meaning), for people; known before connecting."""

    @abstractmethod
    def connect(self) -> None:
        """Open the device.

        Raises:
            RobotError: There is none, with what to do about it.
        """

    @abstractmethod
    def read(self) -> Hand:
        """What the person does now; returns at once, for the control loop asks at every tick.

        Raises:
            RobotError: The device is gone.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Close the device; may be called twice."""

    def __enter__(self) -> Teleoperator:
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        self.disconnect()
