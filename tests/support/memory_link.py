"""A link for tests of drivers in processes: axes in memory, and what vendors' packages do when they break."""

import os
import time
from pathlib import Path

import numpy as np

from brachium.errors import RobotError
from brachium.real_robot.cameras import OpenCVCamera
from brachium.real_robot.driver_process import Link, LinkState
from brachium.real_robot.spec import Frame


class MemoryLink(Link):
    """Two axes; what goes wrong is written into a file by the test, what happens is written into another.

    Args:
        folder: Where ``trouble`` and ``events`` lie.
        camera: Whether it delivers pictures of its own.
    """

    def __init__(self, folder, camera=False):
        self.folder, self.camera = Path(folder), camera
        self.position = np.zeros(2)

    def note(self, what):
        with (self.folder / "events").open("a") as file:
            file.write(f"{time.monotonic()} {what}\n")

    def open(self):
        self.note("open")
        print("vendor says hello")
        trouble = self.trouble()
        if trouble == "refuse":
            raise RobotError("nobody at 10.0.0.1. Is it switched on?")
        if trouble == "mute":
            time.sleep(60)
        if trouble == "bug":
            raise ValueError("of the package")

    def trouble(self):
        file = self.folder / "trouble"
        return file.read_text() if file.exists() else ""

    def read(self):
        trouble = self.trouble()
        if trouble == "segfault":
            os.kill(os.getpid(), 11)
        if trouble == "hang":
            time.sleep(60)
        if trouble == "lost":
            raise RobotError("the cable is out")
        frames = {}
        if self.camera:
            stamp = np.floor(time.monotonic() * 30) / 30
            frames["own"] = Frame(image=np.full((4, 4, 3), int(stamp * 30) % 256, np.uint8), timestamp=stamp)
        fault = "protective stop" if trouble == "fault" else ""
        return LinkState(
            position=self.position.copy(), velocity=np.zeros(2), timestamp=time.monotonic(), fault=fault, frames=frames
        )

    def move(self, position):
        self.note(f"move {position[0]:.6f}")
        self.position = position.copy()

    def stop(self):
        self.note("stop")

    def close(self):
        self.note("close")


class BlindCamera(OpenCVCamera):
    """Opens, and shows nothing."""

    def open(self) -> None:
        """Nothing is opened."""
