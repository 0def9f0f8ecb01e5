"""Cameras of robots that have none of their own: pictures and when they were taken, from a thread a camera."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RobotError
from ..spec import FeatureSpec
from .spec import Frame


class Camera(ABC):
    """A source of pictures.

    A subclass says how a picture is taken (`grab`, which may wait for it); a thread keeps the newest.

    Attributes:
        shape: Height, width and 3 of the pictures it gives.
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def open(self) -> None:
        """Open the device.

        Raises:
            RobotError: There is none, or it gives no pictures.
        """

    @abstractmethod
    def grab(self) -> Frame:
        """Wait for the next picture.

        Raises:
            RobotError: The device is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the device; may be called twice."""


class OpenCVCamera(Camera):
    """A camera that OpenCV can read: a number (``/dev/videoN``), a path or a URL; or a video file, at its own pace.

    Args:
        device: Number, path or URL.
        height, width: Size of the pictures as delivered [px].
        fps: Rate that is asked for [Hz].
        capture: Height and width that the device is asked for [px]; None for as delivered.
        crop: Cut the largest part of the picture that has the delivered shape out of the middle; otherwise the picture
            is squeezed.
    """

    def __init__(
        self,
        *,
        device: int | str,
        height: int,
        width: int,
        fps: float = 30.0,
        capture: Sequence[int] | None = None,
        crop: bool = True,
    ) -> None:
        self.shape = (height, width, 3)
        self._device, self._fps, self._crop = device, fps, crop
        self._capture = tuple(capture) if capture is not None else (height, width)
        self._video: Any = None
        self._is_file, self._next = False, 0.0

    def open(self) -> None:
        """Open the device and read one picture."""
        import cv2

        video = cv2.VideoCapture(self._device)
        if not video.isOpened():
            raise RobotError(f"no camera at {self._device!r}. See: ls /dev/video*")
        self._is_file = video.get(cv2.CAP_PROP_FRAME_COUNT) > 0
        if not self._is_file:
            video.set(cv2.CAP_PROP_FRAME_HEIGHT, self._capture[0])
            video.set(cv2.CAP_PROP_FRAME_WIDTH, self._capture[1])
            video.set(cv2.CAP_PROP_FPS, self._fps)
            video.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # an old picture is worth nothing
        self._video, self._next = video, time.monotonic()
        self.grab()

    def grab(self) -> Frame:
        """The next picture, RGB."""
        import cv2

        if self._video is None:
            raise RobotError(f"the camera at {self._device!r} is not open")
        if self._is_file:  # as a device would: one picture after another in time
            self._next = max(self._next + 1.0 / (self._video.get(cv2.CAP_PROP_FPS) or self._fps), time.monotonic())
            time.sleep(max(0.0, self._next - time.monotonic()))
        if not self._video.grab():
            raise RobotError(f"the camera at {self._device!r} gives no picture any more")
        stamp = time.monotonic()
        found, image = self._video.retrieve()
        if not found:
            raise RobotError(f"the camera at {self._device!r} gives no picture any more")
        return Frame(image=fitted(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), self.shape, crop=self._crop), timestamp=stamp)

    def close(self) -> None:
        """Close the device."""
        if self._video is not None:
            self._video.release()
            self._video = None


def fitted(image: np.ndarray, shape: tuple[int, int, int], *, crop: bool = True) -> np.ndarray:
    """A picture uint8 (H, W, 3) as one of `shape`, by averaging; its middle, or the whole of it squeezed."""
    import cv2

    height, width = image.shape[:2]
    if crop:
        scale = min(height / shape[0], width / shape[1])
        rows, columns = round(shape[0] * scale), round(shape[1] * scale)
        top, left = (height - rows) // 2, (width - columns) // 2
        image = image[top : top + rows, left : left + columns]
    if image.shape != shape:
        image = cv2.resize(image, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image)


def camera_specs(cameras: Mapping[str, Camera]) -> tuple[FeatureSpec, ...]:
    """What a robot's spec says of its cameras."""
    return tuple(FeatureSpec(name=name, shape=camera.shape, dtype="uint8") for name, camera in cameras.items())


class CameraSet:
    """Keeps the newest picture of each camera.

    Args:
        cameras: Name -> camera.
    """

    def __init__(self, cameras: Mapping[str, Camera]) -> None:
        self._cameras = dict(cameras)
        self._frames: dict[str, Frame] = {}
        self._broken: dict[str, str] = {}
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        """Open all; none stays open when one cannot.

        Raises:
            RobotError: A camera that is not there.
        """
        for name, camera in self._cameras.items():
            try:
                camera.open()
            except RobotError as error:
                self.close()
                raise RobotError(f"camera {name}: {error}") from error
        for name, camera in self._cameras.items():
            thread = threading.Thread(target=self._watch, args=(name, camera), name=f"camera {name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def frames(self) -> dict[str, Frame]:
        """The newest picture of each camera; one that broke keeps its last, which grows old."""
        return dict(self._frames)

    def broken(self) -> dict[str, str]:
        """Name -> why, of cameras that gave up: the robot's fault, for nobody would see any more what it does."""
        return dict(self._broken)

    def close(self) -> None:
        """Close all."""
        self._end.set()
        for thread in self._threads:
            thread.join(1.0)
        for camera in self._cameras.values():
            with contextlib.suppress(RobotError):
                camera.close()

    def _watch(self, name: str, camera: Camera) -> None:
        while not self._end.is_set():
            try:
                self._frames[name] = camera.grab()
            except Exception as error:  # OpenCV's own among them: a thread that dies in silence is found out too late
                self._broken[name] = str(error) if isinstance(error, RobotError) else f"{type(error).__name__}: {error}"
                return
