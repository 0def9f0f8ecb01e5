"""Observations from readings: what a policy sees, as of one moment, and only if it is fresh."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np

from ..spec import Observation
from .body import Body
from .spec import Frame, Reading

MEMORY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Freshness:
    """What an observation may be.

    Attributes:
        age_s: Age of the oldest camera frame [s].
        skew_s: Time between the oldest and the newest frame [s].
        frozen_s: A camera whose picture does not change by one bit for so long while the robot moves is frozen [s].
        moved: How far an axis moves for that to count [rad or m].
    """

    age_s: float = 0.25
    skew_s: float = 0.10
    frozen_s: float = 0.5
    moved: float = 0.05


@dataclass
class _Seen:
    """The picture that a camera has shown since `since`."""

    frame: Frame
    digest: int
    since: float
    position: np.ndarray
    moved: float = 0.0
    """How far an axis has been from there since: a robot that comes back has moved all the same."""


class Eyes:
    """Keeps readings of the last second, and makes observations of them.

    An observation is as of its oldest frame; the state is that of the reading nearest to it, not the newest: a picture
    is some ten milliseconds old when it arrives, and the arm has moved.

    Args:
        body: Makes states.
        freshness: What is fresh enough.
    """

    def __init__(self, body: Body, freshness: Freshness | None = None) -> None:
        self._body, self.freshness = body, freshness or Freshness()
        self._readings: deque[Reading] = deque()
        self._seen: dict[str, _Seen] = {}
        self.used = -np.inf
        """When the newest observation that was made was captured [s]."""

    def look(self, reading: Reading) -> None:
        """Take in a reading."""
        if not self._readings or reading.timestamp > self._readings[-1].timestamp:
            self._readings.append(reading)
        while self._readings and self._readings[0].timestamp < reading.timestamp - MEMORY_S:
            self._readings.popleft()
        for seen in self._seen.values():
            seen.moved = max(seen.moved, float(np.abs(reading.position - seen.position).max()))
        for name, frame in reading.frames.items():
            last = self._seen.get(name)
            if last is not None and frame.timestamp == last.frame.timestamp:
                continue
            digest = zlib.crc32(np.ascontiguousarray(frame.image).data)
            if last is None or digest != last.digest:
                self._seen[name] = _Seen(frame, digest, frame.timestamp, reading.position.copy())
            else:
                last.frame = frame

    def problem(self, now: float) -> str:
        """Why no observation can be made now; empty while one can."""
        rules, cameras = self.freshness, self._body.embodiment.camera_names
        missing = [name for name in cameras if name not in self._seen]
        if missing or not self._readings:
            return f"no frame of {', '.join(missing)}" if missing else "no reading"
        for name in cameras:
            age = now - self._seen[name].frame.timestamp
            if not -0.05 <= age <= rules.age_s:
                return f"the frame of camera {name} is {age * 1e3:.0f} ms old, {rules.age_s * 1e3:.0f} are allowed"
        stamps = [self._seen[name].frame.timestamp for name in cameras]
        if stamps and max(stamps) - min(stamps) > rules.skew_s:
            return f"the cameras are {(max(stamps) - min(stamps)) * 1e3:.0f} ms apart"
        for name in cameras:
            seen = self._seen[name]
            still = seen.frame.timestamp - seen.since
            if still > rules.frozen_s and seen.moved > rules.moved:
                return f"camera {name} shows the same picture for {still:.1f} s while the robot moves: frozen"
        return ""

    def captured(self) -> float:
        """When what can be seen now was captured: the oldest camera frame, or the newest reading without cameras."""
        stamps = [self._seen[name].frame.timestamp for name in self._body.embodiment.camera_names if name in self._seen]
        return min(stamps) if stamps else self._readings[-1].timestamp

    def observe(self, instruction: str, *, note: bool = True) -> Observation:
        """The newest observation; only while there is no `problem`. With `note`, it counts as used."""
        captured = self.captured()
        nearest = min(self._readings, key=lambda reading: abs(reading.timestamp - captured))
        if note:
            self.used = captured
        images = {name: self._seen[name].frame.image for name in self._body.embodiment.camera_names}
        return Observation(
            images=images, state=self._body.state(nearest.position), instruction=instruction, timestamp=captured
        )
