"""Makes LeRobot's robots from plain mappings: finds who brings a type, imports only that, and says what is wrong.

Runs in the child only. LeRobot knows a type when the package that brings it is imported; its own import of plugins
imports all of them, and swallows their errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import RobotError, did_you_mean

SHIPPED = {
    "so100_follower": "so_follower",
    "so101_follower": "so_follower",
    "hope_jr_hand": "hope_jr",
    "hope_jr_arm": "hope_jr",
    "lekiwi_client": "lekiwi",
}
"""LeRobot's type -> package below ``lerobot.robots``; the others have their type's name."""
TORQUE = "disable_torque_on_disconnect"
TROUBLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
"""What LeRobot's robots raise: lost connections and old pictures are OSErrors, motors' errors RuntimeErrors."""


def make_robot(config: Mapping[str, Any], packages: Sequence[str]) -> Any:
    """A robot of LeRobot, not connected, that keeps its torque when it is disconnected.

    Args:
        config: Its configuration with ``type``.
        packages: Modules to import first.

    Raises:
        RobotError: LeRobot, a vendor's package, or the type is missing, or the configuration does not fit.
    """
    with imports("lerobot"):
        import draccus
        import draccus.utils
        from lerobot.robots import RobotConfig, make_robot_from_config

    kind = str(config["type"])
    for name in packages:
        with imports(name):
            importlib.import_module(name)
    register(kind, config, RobotConfig)
    if TORQUE in text_keys(config, true_only=True):
        raise RobotError(f"expected {TORQUE}: false, as disconnecting leaves a robot where it is, got true")
    try:
        made = draccus.decode(RobotConfig, dict(config))
    except (draccus.utils.ParsingError, ValueError, TypeError) as error:
        raise RobotError(f"config of {kind!r} does not fit: {one_line(error)}") from error
    for part in parts(made):
        if hasattr(part, TORQUE):
            setattr(part, TORQUE, False)
    try:
        return make_robot_from_config(made)
    except ImportError as error:
        hint = "For Feetech servos: uv pip install 'brachium[feetech]'"
        raise RobotError(f"{kind}: {one_line(error)}. {hint}") from error
    except TROUBLE as error:
        raise RobotError(f"{kind} cannot be made: {one_line(error)}") from error


def register(kind: str, config: Mapping[str, Any], registry: Any) -> None:
    """Import who brings a type of robot and the types of cameras in its configuration.

    Raises:
        RobotError: Nobody does, or the import fails.
    """
    import lerobot.cameras
    import lerobot.robots
    from lerobot.cameras import CameraConfig

    shipped = {module.name for module in pkgutil.iter_modules(lerobot.robots.__path__) if module.ispkg}
    own = SHIPPED.get(kind, kind)
    if own in shipped:
        with imports(f"lerobot.robots.{own}"):
            importlib.import_module(f"lerobot.robots.{own}")
    if kind not in registry.get_known_choices():
        import_plugins("lerobot_robot_")
    if kind not in registry.get_known_choices():
        known = (shipped - set(SHIPPED.values())) | set(SHIPPED) | {"lekiwi"} | set(registry.get_known_choices())
        raise RobotError(
            f"LeRobot has no robot {kind!r}. {did_you_mean(kind, known)} A plugin is found when its distribution is "
            "named lerobot_robot_..., or with packages=[MODULE]"
        )
    packages = list(pkgutil.iter_modules(lerobot.cameras.__path__))
    for camera in sorted(camera_kinds(config)):
        modules = sorted((one.name != camera, one.name) for one in packages if one.ispkg)
        for _, name in modules:  # the one of its name first: each costs a second
            if camera not in CameraConfig.get_known_choices():
                with contextlib.suppress(ImportError):  # another camera's, without its vendor's package
                    importlib.import_module(f"lerobot.cameras.{name}")
        if camera not in CameraConfig.get_known_choices():
            import_plugins("lerobot_camera_")


def import_plugins(prefix: str) -> None:
    """Import every installed distribution whose name begins so."""
    names = {str(one.metadata.get("Name") or "") for one in importlib.metadata.distributions()}
    for name in sorted(name for name in names if name.startswith(prefix)):
        with imports(name):
            importlib.import_module(name)


@contextlib.contextmanager
def imports(what: str) -> Iterator[None]:
    """An import that fails is said with the package's name."""
    try:
        yield
    except ImportError as error:
        hint = "Type: uv pip install 'brachium[lerobot]'" if what == "lerobot" else "Is it installed, and all it needs?"
        raise RobotError(f"cannot import {what}: {one_line(error)}. {hint}") from error


def connect(robot: Any) -> None:
    """LeRobot's `connect` without its calibration, which asks questions; some robots' takes no such argument."""
    takes = inspect.signature(robot.connect).parameters
    robot.connect(**({"calibrate": False} if "calibrate" in takes else {}))


def buses(robot: Any) -> list[tuple[str, Any]]:
    """Prefix of the keys, and motors' bus, of a robot or of each of its two arms."""
    arms = [("", robot), ("left_", getattr(robot, "left_arm", None)), ("right_", getattr(robot, "right_arm", None))]
    found = [(prefix, getattr(arm, "bus", None)) for prefix, arm in arms]
    return [(prefix, bus) for prefix, bus in found if hasattr(bus, "motors")]


def motor_of(robot: Any, name: str) -> tuple[Any, str] | None:
    """The bus of a motor and its name there; None for robots without such a bus."""
    for prefix, bus in buses(robot):
        if name.startswith(prefix) and name.removeprefix(prefix) in bus.motors:
            return bus, name.removeprefix(prefix)
    return None


def parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from parts(value)


def camera_kinds(config: Mapping[str, Any]) -> set[str]:
    """Types of all cameras in a configuration."""
    found: set[str] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key == "cameras":
                found |= {str(one["type"]) for one in value.values() if isinstance(one, Mapping) and "type" in one}
            found |= camera_kinds(value)
    return found


def text_keys(config: Mapping[str, Any], *, true_only: bool = False) -> set[str]:
    """All keys of a configuration and those inside it; with `true_only`, those that are true."""
    found: set[str] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= text_keys(value, true_only=true_only)
        elif value is True or not true_only:
            found.add(str(key))
    return found


def one_line(error: BaseException) -> str:
    """An error's words on one line, with its kind where they alone say little."""
    words = " ".join(str(error).split())
    return words if len(words) > 20 else f"{type(error).__name__}: {words}".rstrip(": ")
