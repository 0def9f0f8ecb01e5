"""The emergency stop: a latch that anybody may set and only a person takes back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

Hook = Callable[[], str]
"""Asked at every tick; says why to stop, or nothing. For a button on a GPIO, a light curtain, a safety PLC."""


class EmergencyStop:
    """Latched: once pressed, everything brakes and the run ends.

    Args:
        hooks: Asked at every tick; one that fails counts as pressed.
    """

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = tuple(hooks)
        self._lock = threading.Lock()
        self.why, self.time = "", 0.0

    def press(self, why: str = "pressed") -> None:
        """Stop; the first reason is kept. Safe in signal handlers and from any thread."""
        if not self.why:
            self.time = time.monotonic()
            self.why = why or "pressed"

    def poll(self) -> str:
        """Why to stop; empty while all is well."""
        if not self.why:
            for hook in self._hooks:
                try:
                    said = hook()
                except Exception as error:  # a button that cannot be read may be pressed
                    said = f"an emergency stop hook failed: {type(error).__name__}: {error}"
                if said:
                    self.press(said)
                    break
        return self.why

    def reset(self) -> None:
        """Let go: only a person who looked at the robot says so, between runs."""
        self.why, self.time = "", 0.0


class SignalStop:
    """SIGINT, SIGTERM and SIGHUP (a closed terminal) press the stop while the block runs; the second SIGINT is Python's
    own again."""

    def __init__(self, stop: EmergencyStop) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop.press("Ctrl-C" if number == signal.SIGINT else f"asked to end ({signal.Signals(number).name})")
        signal.signal(signal.SIGINT, self._before.get(signal.SIGINT, signal.default_int_handler))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
