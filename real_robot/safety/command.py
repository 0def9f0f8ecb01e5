"""The only thing a robot's driver accepts."""

from __future__ import annotations

import itertools

import numpy as np

from ...errors import SafetyError

_KEY = object()
_NUMBERS = itertools.count()


class SafeCommand:
    """Targets float64 (j,) of all axes that the safety layer has passed; made by `SafetyGuard` alone."""

    __slots__ = ("number", "position")

    def __init__(self, key: object, position: np.ndarray) -> None:
        if key is not _KEY:
            raise SafetyError("commands are made by a SafetyGuard: send targets through its command()")
        self.position = np.array(position, np.float64)
        self.position.flags.writeable = False
        self.number = next(_NUMBERS)
