"""The keyboard of the terminal: needs no rights and no device, works over ssh."""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import ConfigError, RobotError
from .teleoperator import KEYS, Hand, Teleoperator

DIRECTIONS = ("+x", "-x", "+y", "-y", "+z", "-z", "+rx", "-rx", "+ry", "-ry", "+rz", "-rz")
WORDS = {"\x1b": "escape", " ": "space", "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace"}
"""Names of keys that cannot be written down."""


class Keyboard(Teleoperator):
    """Keys of the terminal that the command runs in.

    A terminal tells when a key is pressed and repeats it while it is held, but not when it is let go: a direction
    counts for `hold_s` after each sign of its key.

    Args:
        directions: Key -> direction (``+x`` .. ``-rz``).
        gripper: Key that opens and closes the gripper in turn.
        keys: Key -> what it says (``success``, ``failure``, ``discard``, ``mark``, ``stop``).
        hold_s: See above [s].
    """

    name = "keyboard"

    def __init__(
        self,
        *,
        directions: Mapping[str, str],
        gripper: str = "space",
        keys: Mapping[str, str],
        hold_s: float = 0.15,
    ) -> None:
        self._directions, self._gripper, self._keys = dict(directions), gripper, dict(keys)
        self._hold_s = hold_s
        if wrong := sorted(set(self._directions.values()) - set(DIRECTIONS)):
            raise ConfigError(f"teleop keyboard: expected directions of {DIRECTIONS}, got {wrong}")
        if wrong := sorted(set(self._keys.values()) - set(KEYS)):
            raise ConfigError(f"teleop keyboard: expected keys that say one of {KEYS}, got {wrong}")
        pressed = [*self._directions, self._gripper, *self._keys]
        if twice := sorted({key for key in pressed if pressed.count(key) > 1}):
            raise ConfigError(f"teleop keyboard: {twice} mean two things")
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}
        self._said: list[str] = []
        self._grip = ""
        self._lost = ""
        self._before: Any = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._file = -1

    def describe(self) -> list[tuple[str, str]]:
        """Directions, the gripper, and what ends an episode."""
        moves = [(key, direction) for key, direction in self._directions.items()]
        return [*moves, (self._gripper, "gripper open/closed"), *self._keys.items()]

    def connect(self) -> None:
        """Take the terminal's keys as they are pressed."""
        if self._thread is not None:
            return
        if not sys.stdin.isatty():
            raise RobotError("teleop=keyboard needs a terminal: run the command in one, or take teleop=gamepad")
        import termios
        import tty

        self._file = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._file)
        tty.setcbreak(self._file)  # Ctrl-C stays what it is
        self._end.clear()
        self._lost = ""
        self._thread = threading.Thread(target=self._listen, name="keyboard", daemon=True)
        self._thread.start()

    def read(self) -> Hand:
        """The keys that are held."""
        now = time.monotonic()
        with self._lock:
            held = {key for key, end in self._until.items() if end > now}
            said, self._said = tuple(self._said), []
            grip, self._grip = self._grip, ""
        if self._lost:
            raise RobotError(f"teleop keyboard: {self._lost}")
        twist = np.zeros(6)
        for key in held:
            direction = self._directions.get(key)
            if direction is not None:
                k = DIRECTIONS.index(direction)
                twist[k // 2] += 1.0 - 2.0 * (k % 2)
        return Hand(twist=np.clip(twist, -1.0, 1.0), grip=grip, active=bool(held), keys=said)

    def disconnect(self) -> None:
        """Give the terminal back."""
        if self._thread is None:
            return
        import termios

        self._end.set()
        self._thread.join(1.0)
        self._thread = None
        termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)

    def _listen(self) -> None:
        while not self._end.is_set():
            ready, _, _ = select.select([self._file], [], [], 0.05)
            if not ready:
                continue
            try:
                data = os.read(self._file, 64)
            except OSError:
                data = b""
            if not data:
                self._lost = "the terminal is gone"
                return
            # An arrow or function key is an escape with more behind it; that is no wish to stop.
            for character in re.sub(r"\x1b[\[O][0-9;]*[A-Za-z~]", "", data.decode("utf-8", "replace")):
                self.press(WORDS.get(character, character))

    def press(self, key: str) -> None:
        """A key was pressed, or is held."""
        now = time.monotonic()
        with self._lock:
            if key in self._keys:
                self._said.append(self._keys[key])
                return
            if key == self._gripper:
                self._grip = "toggle"
            elif key not in self._directions:
                return
            self._until[key] = now + self._hold_s
