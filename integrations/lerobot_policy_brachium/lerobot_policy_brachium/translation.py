"""Between LeRobot's batches and a checkpoint's observations and actions; what does not fit is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from brachium.errors import SpecMismatchError
from brachium.real_robot.cameras import fitted
from brachium.real_robot.drivers.lerobot_units import AxisMap
from brachium.spec import EmbodimentSpec, Observation

from .configuration_brachium import BrachiumConfig

CAMERA, STATE, SINGLE = "observation.images.", "observation.state", "observation.image"


class Translation:
    """What an environment or robot of LeRobot means to an embodiment.

    Args:
        config: Of the policy; LeRobot has put the environment's action into it.
        spec: Of the checkpoint.

    Raises:
        SpecMismatchError: The action has another size, or the robot's axes are not the embodiment's.
    """

    def __init__(self, config: BrachiumConfig, spec: EmbodimentSpec) -> None:
        self.spec, self._instruction = spec, config.instruction
        self._keys, self._fit = dict(config.camera_keys), dict(config.fit)
        self._axes = AxisMap(json.loads(config.axes)) if config.axes else None
        if self._axes is not None:
            self._check_axes(self._axes)
        self.state_dim = len(self._axes.names) if self._axes else spec.state.dim
        self.action_dim = len(self._axes.names) if self._axes else spec.action.dim
        wanted = tuple(config.action_feature.shape) if config.action_feature else None
        if wanted != (self.action_dim,):
            raise SpecMismatchError(
                f"the environment takes actions {wanted}, the checkpoint ({spec.name}) gives ({self.action_dim},): "
                f"{list(self._axes.keys if self._axes else spec.action.names)}. Evaluate it where it was trained for"
            )

    def _check_axes(self, axes: AxisMap) -> None:
        units = {axis.name: axis.axis_unit for axis in axes.axes}
        for feature in (self.spec.state, self.spec.action):
            apart = [f"{name} [{unit}]" for name, unit in zip(feature.names, feature.units) if units.get(name) != unit]
            if apart or not feature.names or not feature.units:
                known = [f"{name} [{unit}]" for name, unit in units.items()]
                raise SpecMismatchError(
                    f"{feature.name}: expected axes of the robot {known}, got {apart or 'no names'}"
                )
        if set(self.spec.action.names) != set(units) or self.spec.action.reference != "absolute":
            raise SpecMismatchError(
                f"expected an absolute target for every axis {list(units)}, got {self.spec.action.reference} "
                f"{list(self.spec.action.names)}"
            )

    def observations(self, batch: Mapping[str, Any]) -> list[Observation]:
        """One observation a row.

        Raises:
            SpecMismatchError: A camera, size, dimension or value that is not the embodiment's.
        """
        state = self._state(batch)
        images = {
            camera.name: self._image(camera.name, camera.shape, batch, len(state)) for camera in self.spec.cameras
        }
        texts = self._texts(batch, len(state))
        return [
            Observation(images={name: rows[k] for name, rows in images.items()}, state=state[k], instruction=texts[k])
            for k in range(len(state))
        ]

    def _state(self, batch: Mapping[str, Any]) -> np.ndarray:
        value = batch.get(STATE)
        got = tuple(value.shape) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != self.state_dim:
            raise SpecMismatchError(
                f"{STATE}: expected (batch, {self.state_dim}) as the checkpoint ({self.spec.name}) has it, got {got}"
            )
        rows = value.detach().cpu().numpy().astype(np.float32)
        if not np.isfinite(rows).all():
            raise SpecMismatchError(f"{STATE}: expected finite values, got {rows.tolist()}")
        if self._axes is None:
            return rows
        moved = [self._axes.to_axes(dict(zip(self._axes.keys, row))) for row in rows.astype(float)]
        order = [self._axes.names.index(name) for name in self.spec.state.names]
        return np.stack(moved)[:, order].astype(np.float32)

    def _image(self, name: str, shape: tuple[int, ...], batch: Mapping[str, Any], count: int) -> np.ndarray:
        """Pictures uint8 (b, height, width, 3)."""
        key = CAMERA + self._keys.get(name, name)
        if key not in batch and SINGLE in batch and len(self.spec.cameras) == 1:
            key = SINGLE
        value = batch.get(key)
        if not isinstance(value, Tensor):
            found = sorted(one for one in batch if one.startswith(SINGLE))
            raise SpecMismatchError(
                f"expected a camera {key}, got {found or 'no cameras'}. Where it has another name: "
                f'--rename_map=\'{{"{found[0] if found else CAMERA + "theirs"}": "{key}"}}\''
            )
        if value.ndim != 4 or value.shape[0] != count or value.shape[1] != 3:
            raise SpecMismatchError(f"{key}: expected ({count}, 3, height, width), got {tuple(value.shape)}")
        if name not in self._fit and tuple(value.shape[2:]) != tuple(shape[:2]):
            raise SpecMismatchError(
                f"{key}: expected {shape[0]} x {shape[1]} pixels as the checkpoint ({self.spec.name}) was trained, "
                f"got {value.shape[2]} x {value.shape[3]}. Render it so, or export with robot=NAME, which resizes"
            )
        if value.is_floating_point():
            if not (value.min() >= -1e-3 and value.max() <= 1.001):
                raise SpecMismatchError(
                    f"{key}: expected values from 0 to 1, got {value.min():.3g} to {value.max():.3g}"
                )
            value = (value * 255.0).round().clamp(0, 255).byte()
        rows = value.detach().cpu().numpy().transpose(0, 2, 3, 1)
        if name in self._fit:
            crop, size = self._fit[name] == "crop", (shape[0], shape[1], 3)
            rows = np.stack([fitted(np.ascontiguousarray(row), size, crop=crop) for row in rows])
        return np.ascontiguousarray(rows)

    def _texts(self, batch: Mapping[str, Any], count: int) -> list[str]:
        given = batch.get("task")
        texts = [given] * count if isinstance(given, str) else list(given or [""] * count)
        texts = [str(text) or self._instruction for text in texts]
        if len(texts) != count or not all(texts):
            raise SpecMismatchError(
                f"task: expected what to do for each of {count} environments, got {texts}. "
                "Type: --policy.instruction='pick up the cube'"
            )
        return texts

    def actions(self, own: np.ndarray) -> np.ndarray:
        """Actions (…, a) of the embodiment as LeRobot's, float32 (…, a)."""
        if self._axes is None:
            return np.asarray(own, np.float32)
        order = [self.spec.action.names.index(name) for name in self._axes.names]
        scale = np.array([axis.scale for axis in self._axes.axes], float)
        offset = np.array([axis.offset for axis in self._axes.axes], float)
        return ((np.asarray(own, float)[..., order] - offset) / scale).astype(np.float32)
