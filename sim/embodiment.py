"""A simulated embodiment: robot, control mode, cameras and rate, and the EmbodimentSpec they amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import ConfigError, did_you_mean
from ..spec import EmbodimentSpec, FeatureSpec
from .actuation import ControlMode, EndEffectorDelta
from .robot import RobotModel

MOST_PIXELS = 2048
"""Edge of the largest picture in detail."""


def checked_details(details: Mapping[str, int] | None, cameras: Sequence[str]) -> dict[str, int]:
    """Sizes of pictures in detail [px], by camera; without those of size 0, which are not wanted.

    Raises:
        ConfigError: Another camera, or a size that is none.
    """
    found = {str(name): size for name, size in (details or {}).items() if size != 0}
    for name, size in found.items():
        if name not in cameras:
            raise ConfigError(f"details: no camera {name!r}. {did_you_mean(name, cameras)}")
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_PIXELS:
            raise ConfigError(f"details.{name}: expected a size from 0 (none) to {MOST_PIXELS} px, got {size!r}")
    return found


@dataclass(frozen=True, kw_only=True)
class SimEmbodiment:
    """Robot + control mode + cameras + rate.

    Attributes:
        name: For example ``arm6_ee``.
        robot: The arm.
        control: What an action means.
        cameras: Camera names: ``front`` is fixed to the table, ``wrist`` is part of the robot.
        image_size: Height and width of every image [px].
        control_hz: Rate of actions [Hz].
    """

    name: str
    robot: RobotModel
    control: ControlMode = field(default_factory=EndEffectorDelta)
    cameras: tuple[str, ...] = ("front", "wrist")
    image_size: int = 96
    control_hz: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))

    @cached_property
    def spec(self) -> EmbodimentSpec:
        """The spec that stores, checkpoints and policies are held against."""
        shape = (self.image_size, self.image_size, 3)
        return EmbodimentSpec(
            name=self.name,
            robot=self.robot.name,
            control_hz=self.control_hz,
            cameras=tuple(FeatureSpec(name=name, shape=shape, dtype="uint8") for name in self.cameras),
            state=FeatureSpec(
                name="state",
                shape=(10 + len(self.robot.joints),),
                names=(
                    *("x", "y", "z"),
                    *(f"rot6d_{i}" for i in range(6)),
                    "gripper",
                    *self.robot.joints,
                ),
                units=("m",) * 3 + ("1",) * 7 + ("rad",) * len(self.robot.joints),
                frame="base",
                rotation="rot6d",
                gripper="open_is_1",
            ),
            action=self.control.action_spec(self.robot),
        )
