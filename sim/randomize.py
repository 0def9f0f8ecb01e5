"""Domain randomisation: everything that may look or stand differently, drawn from one generator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .scene import CameraView, Scene


@dataclass(frozen=True, kw_only=True)
class DomainRandomization:
    """How much a scene's looks vary. Zero everywhere switches it off.

    Attributes:
        camera_position: Half range of the fixed camera's displacement along each axis [m].
        camera_target: Half range of the displacement of the point it looks at [m].
        camera_fovy: Half range of the change of its field of view [deg].
        color: Standard deviation of the change of each item colour channel.
        table_color: Half range of the change of the table's and floor's brightness and tint.
        light_position: Half range of the light's displacement [m].
        brightness: Half range of the change of the light's strength.
    """

    camera_position: float = 0.004
    camera_target: float = 0.003
    camera_fovy: float = 0.3
    color: float = 0.04
    table_color: float = 0.12
    light_position: float = 0.4
    brightness: float = 0.2

    def apply(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Return a changed copy; the same generator state gives the same scene."""

        def box(half: float, n: int = 3) -> tuple[float, ...]:
            return tuple(float(v) for v in rng.uniform(-half, half, n))

        def tint(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
            common, each = rng.uniform(-self.table_color, self.table_color), box(self.table_color / 3)
            r, g, b = (float(np.clip(c + common + e, 0.05, 0.95)) for c, e in zip(rgb, each))
            return r, g, b

        def shade(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
            r, g, b = (float(np.clip(c + d, 0.0, 1.0)) for c, d in zip(rgb, rng.normal(0.0, self.color, 3)))
            return r, g, b

        view: CameraView = scene.view.moved(
            box(self.camera_position), box(self.camera_target), box(self.camera_fovy, 1)[0]
        )
        x, y, z = (a + b for a, b in zip(scene.light, box(self.light_position)))
        return replace(
            scene,
            items=tuple(replace(item, rgb=shade(item.rgb)) for item in scene.items),
            view=view,
            light=(x, y, z),
            brightness=float(np.clip(scene.brightness + box(self.brightness, 1)[0], 0.2, 1.0)),
            table_rgb=tint(scene.table_rgb),
            floor_rgb=tint(scene.floor_rgb),
        )
