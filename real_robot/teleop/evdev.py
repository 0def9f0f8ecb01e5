"""Gamepads and 6-axis mice by Linux' input events, read as the kernel gives them: no package, no X server."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import ConfigError, RobotError
from .keyboard import DIRECTIONS
from .teleoperator import KEYS, Hand, Teleoperator

EVENT = struct.Struct("llHHi")
"""struct input_event of linux/input.h: seconds, microseconds, type, code, value."""
EV_KEY, EV_REL, EV_ABS = 1, 2, 3
SYN_DROPPED = (0, 3)
EVIOCGABS = 0x80184540
"""_IOR('E', 0x40 + code, struct input_absinfo): value, lowest, highest, fuzz, flat, resolution."""
CODES = {"x": 0, "y": 1, "z": 2, "rx": 3, "ry": 4, "rz": 5, "hat_x": 16, "hat_y": 17}
"""ABS_* and REL_* of linux/input-event-codes.h; the first six are the same in both."""
BUTTONS = {
    "a": 304, "b": 305, "x": 307, "y": 308, "left": 310, "right": 311, "left2": 312, "right2": 313,
    "select": 314, "start": 315, "mode": 316, "thumb_left": 317, "thumb_right": 318, "button0": 256, "button1": 257,
}  # fmt: skip
"""BTN_* of linux/input-event-codes.h by the names printed on gamepads; a 6-axis mouse has button0 and button1."""
DEVICES = Path("/proc/bus/input/devices")
FADING_S = 0.1
"""Relative axes say nothing when they are let go: what is older than this counts no more [s]."""


class EventDevice(Teleoperator):
    """A device with analogue axes and buttons.

    Args:
        name: What it is called in messages.
        device: Path (``/dev/input/event5``), or a part of the device's name as the kernel has it (``Xbox``,
            ``SpaceMouse``; empty for any): the first device of such a name that has the buttons.
        axes: Direction (``+x`` .. ``-rz``) -> axis of the device (``x``, ``y``, ``z``, ``rx``, ``ry``, ``rz``,
            ``hat_x``, ``hat_y``): the direction that the axis's positive end means.
        buttons: Button of the device -> ``open``, ``close``, ``toggle`` (the gripper) or one of `KEYS`.
        hold: Button that must be held while the robot moves (dead man's switch); None for none.
        dead: Share of the way of an axis that means nothing.
        full_scale: Largest value of an axis whose range the device does not tell.
        curve: Exponent of the deflection: above 1 small deflections move more finely.
    """

    def __init__(
        self,
        *,
        name: str,
        device: str,
        axes: Mapping[str, str],
        buttons: Mapping[str, str],
        hold: str | None = None,
        dead: float = 0.1,
        full_scale: float = 350.0,
        curve: float = 1.5,
    ) -> None:
        self.name, self._device = name, device
        if wrong := sorted({*axes} - set(DIRECTIONS)) + sorted({*axes.values()} - set(CODES)):
            raise ConfigError(
                f"teleop {name}: expected axes as {DIRECTIONS} of the robot: {tuple(CODES)} of the device, got {wrong}"
            )
        known = {*BUTTONS} | {f"code{n}" for n in range(256, 1024)}
        pressed = [*buttons, *([hold] if hold else [])]
        if wrong := [b for b in pressed if b not in known]:
            raise ConfigError(f"teleop {name}: expected buttons of {tuple(BUTTONS)} or codeN, got {wrong}")
        if wrong := sorted({*buttons.values()} - {"open", "close", "toggle", *KEYS}):
            raise ConfigError(f"teleop {name}: expected buttons that say open, close, toggle or {KEYS}, got {wrong}")
        if not 0.0 <= dead < 0.9 or not full_scale > 0 or not curve > 0:
            raise ConfigError(f"teleop {name}: expected dead from 0 to 0.9, full_scale and curve above 0")
        self._axes, self._buttons = dict(axes), {_code(b): said for b, said in buttons.items()}
        self._hold = _code(hold) if hold else None
        self._rows = [(axis, direction) for direction, axis in axes.items()] + list(buttons.items())
        self._rows += [(hold, "hold to move")] if hold else []
        self._dead, self._full, self._curve = dead, full_scale, curve
        self._ranges: dict[int, tuple[float, float]] = {}
        self._lock = threading.Lock()
        self._values: dict[int, tuple[float, float, bool]] = {}
        self._held: set[int] = set()
        self._said: list[str] = []
        self._grip = ""
        self._file, self._lost = -1, ""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def describe(self) -> list[tuple[str, str]]:
        """Axes, buttons, dead man's switch."""
        return list(self._rows)

    def connect(self) -> None:
        """Open the device and learn the ranges of its axes."""
        if self._thread is not None:
            return
        codes = [*self._buttons, *([self._hold] if self._hold is not None else [])]
        path = self._device if self._device.startswith("/") else find_device(self._device, codes)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError as error:
            raise RobotError(
                f"teleop {self.name}: no right to read {path}. Type: sudo usermod -aG input $USER, and log in again"
            ) from error
        except OSError as error:
            raise RobotError(f"teleop {self.name}: cannot open {path}: {error.strerror}") from error
        for axis in set(self._axes.values()):
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(self._file, EVIOCGABS + CODES[axis], bytes(24))
                _, low, high, *_ = struct.unpack("6i", answer)
                if high > low:
                    self._ranges[CODES[axis]] = (float(low), float(high))
        self._lost = ""
        self._end.clear()
        self._thread = threading.Thread(target=self._listen, name=self.name, daemon=True)
        self._thread.start()

    def read(self) -> Hand:
        """Deflections and buttons as they are now."""
        if self._lost or self._thread is None:
            raise RobotError(f"teleop {self.name}: {self._lost or 'not connected'}")
        now = time.monotonic()
        with self._lock:
            values, held = dict(self._values), set(self._held)
            said, self._said = tuple(self._said), []
            grip, self._grip = self._grip, ""
        twist = np.zeros(6)
        for direction, axis in self._axes.items():
            k = DIRECTIONS.index(direction)
            twist[k // 2] += (1.0 - 2.0 * (k % 2)) * self._share(CODES[axis], values, now)
        if self._hold is not None and self._hold not in held:
            return Hand(twist=np.zeros(6), active=False, keys=said)
        active = self._hold is not None or bool(np.abs(twist).max() > 0.0) or bool(grip)
        return Hand(twist=np.clip(twist, -1.0, 1.0), grip=grip, active=active, keys=said)

    def _share(self, code: int, values: Mapping[int, tuple[float, float, bool]], now: float) -> float:
        """Deflection of an axis from -1 to 1."""
        value, since, relative = values.get(code, (None, 0.0, False))
        if value is None or (relative and now - since > FADING_S):
            return 0.0
        low, high = (-self._full, self._full) if relative else self._ranges.get(code, (-self._full, self._full))
        share = float(np.clip(2.0 * (value - low) / (high - low) - 1.0, -1.0, 1.0))
        beyond = max(0.0, abs(share) - self._dead) / (1.0 - self._dead)
        return float(np.sign(share)) * beyond**self._curve

    def disconnect(self) -> None:
        """Close the device."""
        if self._thread is not None:
            self._end.set()
            self._thread.join(1.0)
            self._thread = None
            os.close(self._file)

    def _listen(self) -> None:
        while not self._end.is_set():
            ready, _, _ = select.select([self._file], [], [], 0.05)
            if not ready:
                continue
            try:
                data = os.read(self._file, 64 * EVENT.size)
            except BlockingIOError:
                continue
            except OSError as error:
                data, self._lost = b"", f"the device is gone: {error.strerror}"
            if not data:
                self._lost = self._lost or "the device is gone"
                return
            for place in range(0, len(data) - EVENT.size + 1, EVENT.size):
                _, _, kind, code, value = EVENT.unpack_from(data, place)
                self._take(kind, code, value)

    def _take(self, kind: int, code: int, value: int) -> None:
        """One event."""
        with self._lock:
            if kind in (EV_REL, EV_ABS):
                self._values[code] = (float(value), time.monotonic(), kind == EV_REL)
            elif kind == EV_KEY:
                (self._held.add if value else self._held.discard)(code)
                what = self._buttons.get(code)
                if value != 1 or what is None:  # 0 is let go, 2 is held
                    return
                if what in KEYS:
                    self._said.append(what)
                else:
                    self._grip = what
            elif (kind, code) == SYN_DROPPED:  # the kernel lost events: nobody knows what is held
                self._held.clear()
                self._values.clear()


def find_device(part: str, codes: Sequence[int] = (), listing: Path = DEVICES) -> str:
    """Path of the input device that has the buttons `codes`, and `part` in its name.

    Raises:
        RobotError: There is none, with the names of those that are there.
    """
    try:
        blocks = listing.read_text(errors="replace").split("\n\n")
    except OSError as error:
        raise RobotError(f"no input devices on this system ({error.strerror}): {listing}") from error
    names: list[str] = []
    for block in blocks:
        name = _match(r'^N: Name="(.*)"', block)
        event = _match(r"^H: Handlers=.*\b(event\d+)", block)
        if not event:
            continue
        keys = 0
        for word in _match(r"^B: KEY=(.*)$", block).split():  # the highest 64 first
            keys = keys << 64 | int(word, 16)
        names.append(name)
        if part.lower() in name.lower() and all(keys >> code & 1 for code in codes):
            return f"/dev/input/{event}"
    wanted = f"with {part!r} in its name" if part else "with these buttons"
    raise RobotError(f"no input device {wanted}: got {names or 'none at all'}. Is it plugged in?")


def _match(pattern: str, block: str) -> str:
    found = re.search(pattern, block, re.MULTILINE)
    return found[1] if found else ""


def _code(button: str) -> int:
    return BUTTONS[button] if button in BUTTONS else int(button.removeprefix("code"))
