"""Leader arms through LeRobot: a small arm that a person moves, and the robot follows joint by joint.

Written for LeRobot 0.6.1 and tested with a teleoperator plugin in memory; no hardware was used.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import RobotError, did_you_mean
from ..driver_process import Link, LinkState, ProcessRobot
from ..drivers import lerobot_make as make
from ..drivers.lerobot_units import AxisMap
from ..spec import RobotSpec
from .teleoperator import Hand, Teleoperator

SHIPPED = {"so100_leader": "so_leader", "so101_leader": "so_leader"}
"""LeRobot's type -> package below ``lerobot.teleoperators``; the others have their type's name."""
LOOK_BACK_S = 0.3
FAILURES = 5
"""Readings of a servo bus that may fail one after the other."""


class LeaderLink(Link):
    """A teleoperator of LeRobot in the child's process; it is read, never moved.

    Args:
        config: Its configuration, with ``type``.
        axes: What its keys mean.
        packages: Modules that bring teleoperators.
    """

    def __init__(self, config: Mapping[str, Any], axes: AxisMap, *, packages: Sequence[str] = ()) -> None:
        self._config, self._axes, self._packages = dict(config), axes, tuple(packages)
        self._arm: Any = None
        self._state: LinkState | None = None
        self._failed = 0

    def open(self) -> None:
        """Make it, hold it against the YAML, connect."""
        kind = self._config["type"]
        self._arm = make_teleoperator(self._config, self._packages)
        self._axes.require(dict(self._arm.action_features), f"leader {kind!r}")
        for axis in self._axes.axes:
            found = make.motor_of(self._arm, axis.motor)
            mode = getattr(found[0].motors[found[1]], "norm_mode", None) if found is not None else None
            if mode is not None:
                axis.check_mode(str(getattr(mode, "value", mode)))
        try:
            make.connect(self._arm)
            calibrated = self._arm.is_calibrated is not False
        except (ImportError, EOFError, *make.TROUBLE) as error:
            raise RobotError(f"{kind}: {make.one_line(error)}") from error
        if not calibrated:
            words = [f"--teleop.{key}={self._config[key]}" for key in ("type", "port", "id") if self._config.get(key)]
            raise RobotError(f"{kind} is not calibrated. Type: lerobot-calibrate {' '.join(words)}")

    def read(self) -> LinkState:
        """Where the person holds it."""
        now = time.monotonic()
        try:
            position = self._axes.to_axes(self._arm.get_action())
            self._failed = 0
        except (RobotError, *make.TROUBLE) as error:
            self._failed += 1
            if self._failed > FAILURES or self._state is None:
                raise RobotError(f"{self._config['type']}: {make.one_line(error)}") from error
            return self._state
        self._state = LinkState(position=position, velocity=np.zeros(len(position)), timestamp=now)
        return self._state

    def move(self, position: np.ndarray) -> None:
        """Never."""

    def stop(self) -> None:
        """A person holds it."""

    def close(self) -> None:
        """Disconnect."""
        self._arm.disconnect()


class LeRobotLeader(Teleoperator):
    """A leader arm of LeRobot.

    The robot comes to where the leader is slowly, and follows it from there on; a leader that stands still for a while
    gives a policy the robot back.

    Args:
        config: LeRobot's configuration, as ``{type: so101_leader, port: /dev/ttyACM1, id: mine}``.
        axes: As of the robot (see `LeRobot`), in the robot's order; they may be copied from its YAML.
        keys: Device whose keys say how an episode went; None for none.
        rate_hz: Rate of its readings [Hz].
        moved: Motion of an axis within 0.3 s that counts as a person's [rad, m or 1].
        packages: Modules to import that bring teleoperators, beside installed ones named ``lerobot_teleoperator_...``.
        start_s: How long connecting may take [s].
    """

    kind = "axes"

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        axes: Sequence[Mapping[str, Any]],
        keys: Teleoperator | None = None,
        rate_hz: float = 60.0,
        moved: float = 0.02,
        packages: Sequence[str] = (),
        start_s: float = 90.0,
    ) -> None:
        if not (config or {}).get("type"):
            raise RobotError("expected config with LeRobot's type, as {type: so101_leader, port: ...}, got none")
        self.name = str(config["type"])
        self.axes, self._keys, self._moved = AxisMap(axes), keys, moved
        self.feature = self.axes.feature()
        spec = RobotSpec(
            name=self.name,
            axes=self.feature,
            velocity=self.axes.limits("velocity"),
            acceleration=self.axes.limits("acceleration"),
            jerk=self.axes.limits("jerk"),
            command_hz=rate_hz,
            state_hz=rate_hz,
            watchdog_s=1.0,
        )
        link = functools.partial(LeaderLink, dict(config), self.axes, packages=tuple(packages))
        self._arm = ProcessRobot(spec, link, rate_hz=rate_hz, start_s=start_s)
        self._past: deque[tuple[float, np.ndarray]] = deque()

    def describe(self) -> list[tuple[str, str]]:
        """The arm, and the keys beside it."""
        said = [row for row in self._keys.describe() if row[1] not in _MOTIONS] if self._keys is not None else []
        return [("the arm", "the robot follows it, joint by joint"), *said]

    def connect(self) -> None:
        """Open the arm and the device with the keys."""
        self._arm.connect()
        if self._keys is not None:
            self._keys.connect()

    def read(self) -> Hand:
        """Where the arm is held."""
        reading = self._arm.read()
        now = reading.timestamp
        if time.monotonic() - now > 0.5:
            raise RobotError(f"{self.name}: its last reading is {time.monotonic() - now:.1f} s old")
        if not self._past or now > self._past[-1][0]:
            self._past.append((now, reading.position))
        while len(self._past) > 1 and self._past[0][0] < now - LOOK_BACK_S:
            self._past.popleft()
        travelled = np.ptp(np.array([position for _, position in self._past]), axis=0).max()
        hand = Hand(twist=np.zeros(6), axes=reading.position, active=bool(travelled > self._moved))
        if self._keys is None:
            return hand
        return replace(hand, keys=self._keys.read().keys)

    def disconnect(self) -> None:
        """Close both."""
        if self._keys is not None:
            self._keys.disconnect()
        self._arm.disconnect()


_MOTIONS = {f"{sign}{axis}" for sign in "+-" for axis in ("x", "y", "z", "rx", "ry", "rz")} | {"gripper open/closed"}


def make_teleoperator(config: Mapping[str, Any], packages: Sequence[str]) -> Any:
    """A teleoperator of LeRobot, not connected.

    Raises:
        RobotError: LeRobot, a vendor's package, or the type is missing, or the configuration does not fit.
    """
    with make.imports("lerobot"):
        import draccus
        import draccus.utils
        import lerobot.teleoperators
        from lerobot.teleoperators import TeleoperatorConfig, make_teleoperator_from_config

    kind = str(config["type"])
    for name in packages:
        with make.imports(name):
            importlib.import_module(name)
    shipped = {module.name for module in pkgutil.iter_modules(lerobot.teleoperators.__path__) if module.ispkg}
    own = SHIPPED.get(kind, kind)
    if own in shipped:
        with make.imports(f"lerobot.teleoperators.{own}"):
            importlib.import_module(f"lerobot.teleoperators.{own}")
    if kind not in TeleoperatorConfig.get_known_choices():
        make.import_plugins("lerobot_teleoperator_")
    if kind not in TeleoperatorConfig.get_known_choices():
        known = (shipped - set(SHIPPED.values())) | set(SHIPPED) | set(TeleoperatorConfig.get_known_choices())
        raise RobotError(f"LeRobot has no teleoperator {kind!r}. {did_you_mean(kind, known)}")
    try:
        return make_teleoperator_from_config(draccus.decode(TeleoperatorConfig, dict(config)))
    except (draccus.utils.ParsingError, ImportError, *make.TROUBLE) as error:
        raise RobotError(f"{kind} cannot be made: {make.one_line(error)}") from error
