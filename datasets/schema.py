"""What the steps of a store hold: the embodiment's features plus extra low-dimensional fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SpecMismatchError, did_you_mean
from ..spec import EmbodimentSpec, FeatureSpec

TIMESTAMP = FeatureSpec(name="timestamp", shape=(1,), dtype="float64", names=("t",), units=("s",))
RESERVED = ("state", "action", "timestamp")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class StoreSchema:
    """Fields of every step: one image a camera, `state`, `action`, `timestamp` [s], and `extras`.

    Attributes:
        embodiment: Cameras, state and action, with names, units and limits.
        extras: More low-dimensional fields, for example simulator labels of shape ``(k, n)``. They are flattened to
            D columns on disk and get their shape back on reading.

    Raises:
        SpecMismatchError: A name that repeats, is reserved or is no safe file name, or an extra that is an image.
    """

    embodiment: EmbodimentSpec
    extras: tuple[FeatureSpec, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.embodiment, Mapping):
            object.__setattr__(self, "embodiment", EmbodimentSpec.from_dict(self.embodiment))
        extras = tuple(e if isinstance(e, FeatureSpec) else FeatureSpec.from_dict(e) for e in self.extras)
        object.__setattr__(self, "extras", extras)
        names = [e.name for e in extras]
        if len(set(names)) != len(names) or set(names) & set(RESERVED):
            raise SpecMismatchError(f"extras need names that differ from each other and from {RESERVED}, got {names}")
        for name in [*names, *self.embodiment.camera_names]:
            if not _SAFE_NAME.fullmatch(name):
                raise SpecMismatchError(
                    f"field {name!r} names a folder on disk: use letters, digits, '_', '-' and '.' only"
                )
        for extra in extras:
            if extra.is_image:
                raise SpecMismatchError(f"extra {extra.name!r} is an image: declare it as a camera of the embodiment")
            if np.dtype(extra.dtype).kind not in "biuf":
                raise SpecMismatchError(f"extra {extra.name!r}: expected a numeric dtype, got {extra.dtype}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the low-dimensional fields, in disk order."""
        return (*RESERVED, *(e.name for e in self.extras))

    def field(self, name: str) -> FeatureSpec:
        """Return the spec of the low-dimensional field `name`; `timestamp` has shape (1,) [s]."""
        if name == "state":
            return self.embodiment.state
        if name == "action":
            return self.embodiment.action
        if name == "timestamp":
            return TIMESTAMP
        for extra in self.extras:
            if extra.name == name:
                return extra
        raise SpecMismatchError(f"no low-dimensional field {name!r}. {did_you_mean(name, self.fields)}")

    def camera(self, name: str) -> FeatureSpec:
        """Return the camera `name`, or raise SpecMismatchError with a suggestion."""
        if name not in self.embodiment.camera_names:
            hint = did_you_mean(name, self.embodiment.camera_names) if self.embodiment.cameras else "It has no cameras."
            raise SpecMismatchError(f"embodiment {self.embodiment.name!r} has no camera {name!r}. {hint}")
        return self.embodiment.camera(name)

    def columns(self, name: str) -> int:
        """Number of columns D of field `name` on disk, where its array is (N, D)."""
        return int(np.prod(self.field(name).shape, dtype=np.int64))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        return {"embodiment": self.embodiment.to_dict(), "extras": [e.to_dict() for e in self.extras]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StoreSchema:
        """Build from `to_dict` output or YAML."""
        return cls(embodiment=data["embodiment"], extras=tuple(data.get("extras", ())))

    def require_same(self, other: StoreSchema, mine: str, theirs: str) -> None:
        """Raise SpecMismatchError unless both schemas mean the same."""
        self.embodiment.require_same(other.embodiment, mine, theirs)
        if [e.to_dict() for e in self.extras] != [e.to_dict() for e in other.extras]:
            raise SpecMismatchError(
                f"{mine} and {theirs} differ in extras: {[(e.name, e.shape, e.dtype) for e in self.extras]} "
                f"against {[(e.name, e.shape, e.dtype) for e in other.extras]}"
            )
