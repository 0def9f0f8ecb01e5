"""Pictures of a suite's own MuJoCo model by our renderer, in place of the suite's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from ...sim.camera import camera_id, thread_renderer
from ...sim.thinned import thinned

LOOKS = ("geom_rgba", "geom_size", "site_rgba", "site_size", "mat_rgba", "cam_fovy")
"""What suites change of a model when an episode begins, and what is drawn by the model rather than its data."""


class SuiteCameras:
    """Cameras of a model that somebody else simulates.

    Args:
        model: What is simulated; `refresh` after it was changed.
        mesh_cell: Detail of meshes [m], as of `thinned`.
        sites: Draw sites, by which suites show goals.
        turned: Cameras that hang upside down; their pictures are turned by half a turn.
        mirrored: Cameras in whose pictures left and right are exchanged.
        hidden: Groups of geoms that are not drawn.
        free: Cameras that the model has not, by name (`looking_at`).
        follow: Camera of `free` -> site of the model that it moves along with, looking at it.
        zoom: Camera -> how much nearer it looks: 2 shows the middle half of the picture's width and height.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        *,
        mesh_cell: float,
        sites: bool = True,
        turned: tuple[str, ...] = (),
        mirrored: tuple[str, ...] = (),
        hidden: tuple[int, ...] = (),
        free: Mapping[str, mujoco.MjvCamera] | None = None,
        follow: Mapping[str, str] | None = None,
        zoom: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.sites, self.turned, self.free = model, sites, turned, dict(free or {})
        self.mirrored, self.hidden = mirrored, hidden
        self.follow = {camera: model.site(site).id for camera, site in (follow or {}).items()}
        self.zoom = {camera_id(model, name): by for name, by in (zoom or {}).items()}
        self.view = thinned(model, mesh_cell)
        self.refresh()

    def refresh(self) -> None:
        """Take over colours and sizes that the suite has changed in its model."""
        for name in LOOKS:
            getattr(self.view, name)[:] = getattr(self.model, name)
        for camera, by in self.zoom.items():
            half = np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2) / by
            self.view.cam_fovy[camera] = np.rad2deg(2 * np.arctan(half))

    def pictures(
        self, data: mujoco.MjData, sizes: Mapping[str, tuple[int, int]], names: Mapping[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        """What cameras see: uint8 (height, width, 3) each; `names` says what the model calls those it calls otherwise.

        Args:
            data: State of the model.
            sizes: Camera -> (height, width) [px].
            names: Camera -> its name in the model.
        """
        for camera, site in self.follow.items():
            self.free[camera].lookat[:] = data.site_xpos[site]
        called = {camera: (names or {}).get(camera, camera) for camera in sizes}
        found = {called[camera]: np.empty((*size, 3), np.uint8) for camera, size in sizes.items()}
        most = max(h for h, _ in sizes.values()), max(w for _, w in sizes.values())
        thread_renderer(*most).render(self.view, data, found, sites=self.sites, free=self.free, hidden=self.hidden)
        return {camera: self._turned(camera, found[name]) for camera, name in called.items()}

    def _turned(self, camera: str, picture: np.ndarray) -> np.ndarray:
        if camera in self.turned:
            return np.ascontiguousarray(picture[::-1, ::-1])
        return np.ascontiguousarray(picture[:, ::-1]) if camera in self.mirrored else picture


def looking_at(point: tuple[float, float, float], *, distance: float, azimuth: float, elevation: float) -> Any:
    """A camera that looks at a point [m] from a distance [m], turned about it by two angles [degrees]."""
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = point
    camera.distance, camera.azimuth, camera.elevation = distance, azimuth, elevation
    return camera
