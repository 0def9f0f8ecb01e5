"""The nouns every folder speaks: features, embodiments, observations, action chunks. Numpy only.

Dimension alphabet: b batch, t observation steps, h action steps, a action dim, s state dim, n cameras.
Units are SI: lengths [m], angles [rad], times [s]. Frames are written ``world_T_camera``; quaternions are wxyz.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .errors import SpecMismatchError

ROTATIONS = ("none", "rot6d", "axis_angle", "euler_xyz", "quat_wxyz", "joint")
REFERENCES = ("absolute", "delta")
GRIPPERS = ("none", "open_is_1", "closed_is_1")
GRADIENTS = ("vjp", "identity")


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One array of an observation or action, with the meaning of each element.

    Attributes:
        name: Key, for example ``front`` or ``action``.
        shape: Shape of one time step, for example ``(96, 96, 3)`` or ``(7,)``.
        dtype: Numpy dtype name.
        names: Name of each element of the last axis; empty for images.
        units: Unit of each element, ``"1"`` for dimensionless; empty for images.
        low: Lower limit of each element, in `units`; empty when unbounded.
        high: Upper limit of each element, in `units`; empty when unbounded.
        frame: Frame the vector is expressed in, for example ``base``; empty when it has none.
        reference: ``absolute``, or ``delta`` (relative to the present commanded value).
        rotation: Form of the rotation part: one of `ROTATIONS`.
        gripper: Sign of the gripper element: one of `GRIPPERS`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    frame: str = ""
    reference: str = "absolute"
    rotation: str = "none"
    gripper: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        for key in ("names", "units"):
            object.__setattr__(self, key, tuple(str(x) for x in getattr(self, key)))
        for key in ("low", "high"):
            object.__setattr__(self, key, tuple(float(x) for x in getattr(self, key)))
        np.dtype(self.dtype)
        for key in ("names", "units", "low", "high"):
            values = getattr(self, key)
            if values and len(values) != self.shape[-1]:
                raise SpecMismatchError(
                    f"feature {self.name!r}: expected {self.shape[-1]} {key} for shape {self.shape}, got {len(values)}"
                )
        for key, allowed in (("rotation", ROTATIONS), ("reference", REFERENCES), ("gripper", GRIPPERS)):
            if getattr(self, key) not in allowed:
                raise SpecMismatchError(
                    f"feature {self.name!r}: expected {key} to be one of {allowed}, got {getattr(self, key)!r}"
                )

    @property
    def is_image(self) -> bool:
        """True for (height, width, 3) uint8 images."""
        return len(self.shape) == 3 and self.dtype == "uint8"

    @property
    def dim(self) -> int:
        """Length of the last axis."""
        return self.shape[-1]

    def check(self, value: np.ndarray, where: str = "value") -> None:
        """Raise SpecMismatchError unless `value` (…, *shape) has this feature's shape and dtype."""
        if value.shape[-len(self.shape) :] != self.shape or value.dtype != np.dtype(self.dtype):
            raise SpecMismatchError(
                f"{where}: feature {self.name!r} expects shape {self.shape} {self.dtype}, "
                f"got {value.shape} {value.dtype}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeatureSpec:
        """Build from `to_dict` output or YAML."""
        return cls(**data)


DETAIL = "_detail"
"""Ends the name of a camera's picture in more detail than policies see; it is in no spec."""


def detail_feature(camera: str, size: int) -> FeatureSpec:
    """Spec of a camera's picture in detail: the same view, `size` x `size` pixels."""
    return FeatureSpec(name=camera + DETAIL, shape=(size, size, 3), dtype="uint8")


@dataclass(frozen=True, kw_only=True)
class EmbodimentSpec:
    """What a robot sees, feels and accepts. Two specs that disagree are an error before anything runs.

    Attributes:
        name: For example ``arm6_ee``.
        robot: Name of the robot model, for example ``arm6``.
        control_hz: Rate at which actions are consumed [Hz].
        cameras: Image features in the order in which a model sees them.
        state: Proprioception.
        action: What a policy outputs.
    """

    name: str
    robot: str
    control_hz: float
    cameras: tuple[FeatureSpec, ...]
    state: FeatureSpec
    action: FeatureSpec

    def __post_init__(self) -> None:
        def build(value: FeatureSpec | Mapping[str, Any]) -> FeatureSpec:
            return value if isinstance(value, FeatureSpec) else FeatureSpec.from_dict(value)

        object.__setattr__(self, "control_hz", float(self.control_hz))
        object.__setattr__(self, "cameras", tuple(build(c) for c in self.cameras))
        object.__setattr__(self, "state", build(self.state))
        object.__setattr__(self, "action", build(self.action))
        names = [c.name for c in self.cameras]
        if len(set(names)) != len(names):
            raise SpecMismatchError(f"embodiment {self.name!r}: camera names repeat: {names}")
        for camera in self.cameras:
            if not camera.is_image:
                raise SpecMismatchError(
                    f"embodiment {self.name!r}: camera {camera.name!r} expects uint8 (height, width, 3), "
                    f"got {camera.dtype} {camera.shape}"
                )

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Camera names in model order."""
        return tuple(c.name for c in self.cameras)

    def camera(self, name: str) -> FeatureSpec:
        """Return the camera called `name`."""
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise SpecMismatchError(f"embodiment {self.name!r} has no camera {name!r}; it has {self.camera_names}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        return {
            "name": self.name,
            "robot": self.robot,
            "control_hz": self.control_hz,
            "cameras": [c.to_dict() for c in self.cameras],
            "state": self.state.to_dict(),
            "action": self.action.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EmbodimentSpec:
        """Build from `to_dict` output or YAML."""
        return cls(**data)

    @property
    def digest(self) -> str:
        """16 hex digits that change when anything in the spec changes."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: EmbodimentSpec) -> list[str]:
        """Return one line for each place where `other` differs; empty when both mean the same.

        Names of embodiments may differ; what they see, feel and accept may not.
        """
        lines = []
        if self.control_hz != other.control_hz:
            lines.append(f"control_hz: {self.control_hz} against {other.control_hz}")
        if self.camera_names != other.camera_names:
            lines.append(f"cameras: {list(self.camera_names)} against {list(other.camera_names)}")
        pairs = [(self.state, other.state), (self.action, other.action)]
        pairs += [(c, other.camera(c.name)) for c in self.cameras if c.name in other.camera_names]
        for mine, theirs in pairs:
            a, b = mine.to_dict(), theirs.to_dict()
            lines += [f"{mine.name}.{key}: {a[key]} against {b[key]}" for key in a if a[key] != b[key]]
        return lines

    def require_same(self, other: EmbodimentSpec, mine: str, theirs: str) -> None:
        """Raise SpecMismatchError that lists every difference; `mine` and `theirs` name the two owners."""
        lines = self.differences(other)
        if lines:
            listing = "\n  ".join(lines)
            raise SpecMismatchError(
                f"{mine} (embodiment {self.name!r}) and {theirs} (embodiment {other.name!r}) do not fit:\n  {listing}\n"
                "Expected both to have the same embodiment: change one of them, or train for the other."
            )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy sees at one moment, for one robot or a batch of them (leading axes are free).

    Attributes:
        images: Camera name -> uint8 (…, height, width, 3); beside the spec's cameras there may be some in detail
            (`detail_feature`), for whoever looks closely.
        state: float32 (…, s).
        instruction: What to do; a tuple with one string an element when batched.
        timestamp: Time of capture [s], monotonic.
    """

    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: np.ndarray
    instruction: str | tuple[str, ...] = ""
    timestamp: float = 0.0

    def check(self, spec: EmbodimentSpec, where: str = "observation") -> None:
        """Raise SpecMismatchError unless this observation fits `spec`."""
        missing = [name for name in spec.camera_names if name not in self.images]
        if missing:
            raise SpecMismatchError(
                f"{where}: expected cameras {list(spec.camera_names)}, got {sorted(self.images)}; missing {missing}"
            )
        for camera in spec.cameras:
            camera.check(self.images[camera.name], where)
        spec.state.check(self.state, where)

    @classmethod
    def stack(cls, observations: list[Observation]) -> Observation:
        """Batch single observations along a new leading axis b."""
        first = observations[0]
        return cls(
            images={k: np.stack([o.images[k] for o in observations]) for k in first.images},
            state=np.stack([o.state for o in observations]),
            instruction=tuple(str(o.instruction) for o in observations),
            timestamp=max(o.timestamp for o in observations),
        )

    @classmethod
    def fake(cls, spec: EmbodimentSpec, rng: np.random.Generator, instruction: str = "do something") -> Observation:
        """Random observation that fits `spec`; for warm-up and tests."""
        return cls(
            images={c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in spec.cameras},
            state=rng.standard_normal(spec.state.shape).astype(np.float32),
            instruction=instruction,
        )


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What a new chunk should agree with: the plan that is being executed while it is computed.

    Real-time chunking (Black, Galliker, Levine 2025) draws the rest of a chunk to fit its frozen beginning.

    Attributes:
        actions: float32 (…, h, a): the plan at the steps of the new chunk, in the embodiment's units.
        weights: float32 (…, h): 1 where the plan will have been executed before the chunk arrives, falling to 0 where
            the chunk is free.
        limit: Largest factor of the guidance (beta in the paper).
        gradient: ``vjp``, the vector-Jacobian product of the paper, or ``identity``, which leaves the Jacobian out and
            needs no gradient.
    """

    actions: np.ndarray
    weights: np.ndarray
    limit: float = 5.0
    gradient: str = "vjp"

    def __post_init__(self) -> None:
        if self.gradient not in GRADIENTS:
            raise SpecMismatchError(f"guidance: expected gradient to be one of {GRADIENTS}, got {self.gradient!r}")
        if not (np.isfinite(self.limit) and self.limit > 0):
            raise SpecMismatchError(f"guidance: expected a limit above 0, got {self.limit}")
        if self.actions.shape[:-1] != self.weights.shape:
            raise SpecMismatchError(
                f"guidance: expected one weight a step for actions {self.actions.shape}, got {self.weights.shape}"
            )

    @classmethod
    def stack(cls, guides: list[Guidance]) -> Guidance:
        """Batch guidances of one kind along a new leading axis."""
        actions, weights = np.stack([g.actions for g in guides]), np.stack([g.weights for g in guides])
        return cls(actions=actions, weights=weights, limit=guides[0].limit, gradient=guides[0].gradient)


@dataclass(frozen=True, kw_only=True)
class ActionChunk:
    """Consecutive actions in the embodiment's own units.

    Attributes:
        actions: float32 (…, h, a); row 0 is meant for the moment of the observation.
        control_hz: Rate the rows are meant to be executed at [Hz].
        timestamp: Time of the observation the chunk answers [s].
    """

    actions: np.ndarray
    control_hz: float
    timestamp: float = 0.0

    def __len__(self) -> int:
        return int(self.actions.shape[-2])

    def clip(self, spec: FeatureSpec) -> ActionChunk:
        """Return a copy limited to the action limits of `spec`."""
        if not spec.low and not spec.high:
            return self
        low = np.asarray(spec.low, np.float32) if spec.low else None
        high = np.asarray(spec.high, np.float32) if spec.high else None
        return replace(self, actions=np.clip(self.actions, low, high))
