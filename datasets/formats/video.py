"""Frames of a video file in order, without seeking: an import wants all of them anyway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import StoreError


class VideoFrames:
    """Frames by number, cheap when numbers rise.

    Args:
        path: Video file.
        fps: Frames a second; frame number n is the one shown at n / fps.

    Raises:
        StoreError: A file that is missing or no video.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._frames: Iterator[tuple[int, np.ndarray]] | None = None
        self._last: tuple[int, np.ndarray] | None = None

    def __getitem__(self, number: int) -> np.ndarray:
        """Frame `number`: uint8 (H, W, 3)."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        if self._frames is None or (self._last is not None and self._last[0] > number):
            self._frames = self._decode()
        for found, image in self._frames:
            self._last = found, image
            if found == number:
                return image
            if found > number:
                break
        raise StoreError(f"{self.path} has no frame {number}, at {number / self.fps:.3f} s: get it again")

    def _decode(self) -> Iterator[tuple[int, np.ndarray]]:
        import av

        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    if frame.time is None:
                        raise StoreError(f"{self.path} holds a frame without a time")
                    yield round(frame.time * self.fps), frame.to_ndarray(format="rgb24")
        except (OSError, av.error.FFmpegError, IndexError) as error:
            raise StoreError(f"{self.path} is missing, or no video that can be decoded: {error}") from error
