"""A robot model: an MJCF file and the meaning of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mujoco

from ..errors import ConfigError, NotFoundError

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class RobotModel:
    """An arm with a gripper, as an MJCF file plus names.

    The file needs: the arm's joints with one position actuator of the same name each, a gripper actuator whose
    control 0 is closed, a site at the tool centre point (its z axis points out of the hand) and a wrist camera.

    Attributes:
        name: For example ``arm6``.
        file: MJCF file; a bare name is looked up in the package's assets.
        joints: Arm joints from base to hand.
        gripper: Name of the gripper's actuator.
        gripper_joint: Joint that shows how far the gripper is open; empty for an arm without one, which is good for
            checking zones and not for simulating.
        gripper_stroke: Joint and actuator value of the fully open gripper [m].
        site: Tool centre point.
        home: Arm joint angles at the start of an episode [rad].
    """

    name: str
    file: str
    joints: tuple[str, ...]
    home: tuple[float, ...]
    gripper_stroke: float
    gripper: str = "gripper"
    gripper_joint: str = "finger_left"
    site: str = "grip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "joints", tuple(self.joints))
        object.__setattr__(self, "home", tuple(float(q) for q in self.home))
        if len(self.joints) != len(self.home):
            raise ConfigError(
                f"robot {self.name!r}: expected one home angle for each of {len(self.joints)} joints, "
                f"got {len(self.home)}"
            )

    @property
    def path(self) -> Path:
        """Path of the MJCF file."""
        path = Path(self.file) if "/" in self.file else ASSETS / self.file
        if not path.is_file():
            raise NotFoundError(f"robot {self.name!r}: no MJCF file at {path}; set robot.file to a path that exists")
        return path

    def spec(self) -> mujoco.MjSpec:
        """Parse the MJCF file."""
        return mujoco.MjSpec.from_file(str(self.path))
