"""What the steps of a store hold: the embodiment's features, lossless maps and extra low-dimensional fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SpecMismatchError, did_you_mean
from ..spec import EmbodimentSpec, FeatureSpec

TIMESTAMP = FeatureSpec(name="timestamp", shape=(1,), dtype="float64", names=("t",), units=("s",))
ALWAYS = ("state", "action", "timestamp")
PRESENT = "present"
"""Field that says which optional fields a step has; on disk where a schema has any."""
EXECUTED = "executed"
"""Extra field of demonstrations that were disturbed: what the robot did, where `action` says what would have been right
(DART, Laskey et al. 2017)."""
MAP_DTYPES = ("uint8", "uint16")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class StoreSchema:
    """Fields of every step: one image a camera, `state`, `action`, `timestamp` [s], `maps` and `extras`.

    Attributes:
        embodiment: Cameras, state and action, with names, units and limits.
        extras: More low-dimensional fields, for example simulator labels of shape ``(k, n)``. They are flattened to
            D columns on disk and get their shape back on reading.
        maps: Images stored without loss, for example depth ``(H, W, 1)`` uint16 with units ``("mm",)``, or masks in
            uint8. No policy sees them by itself.
        optional: Cameras, maps and extras that a step may lack: a camera that is slower than the control rate, a label
            that only some episodes have. What is lacking reads as zeros (NaN in floating-point extras), and the field
            `present` (k,) bool says of each of the k optional ones if it is there.

    Raises:
        SpecMismatchError: A name that repeats, is reserved, unknown or no safe file name, an extra that is an image, or
            a map that is none.
    """

    embodiment: EmbodimentSpec
    extras: tuple[FeatureSpec, ...] = ()
    maps: tuple[FeatureSpec, ...] = ()
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.embodiment, Mapping):
            object.__setattr__(self, "embodiment", EmbodimentSpec.from_dict(self.embodiment))
        for key in ("extras", "maps"):
            specs = (e if isinstance(e, FeatureSpec) else FeatureSpec.from_dict(e) for e in getattr(self, key))
            object.__setattr__(self, key, tuple(specs))
        object.__setattr__(self, "optional", tuple(self.optional))
        names = [e.name for e in (*self.extras, *self.maps)]
        reserved = {*ALWAYS, PRESENT, *self.embodiment.camera_names}
        if len(set(names)) != len(names) or set(names) & reserved:
            raise SpecMismatchError(
                f"extras and maps need names that differ from each other and from {sorted(reserved)}, got {names}"
            )
        for name in [*names, *self.embodiment.camera_names]:
            if not _SAFE_NAME.fullmatch(name):
                raise SpecMismatchError(
                    f"field {name!r} names a folder on disk: use letters, digits, '_', '-' and '.' only"
                )
        for extra in self.extras:
            if extra.is_image:
                raise SpecMismatchError(f"extra {extra.name!r} is an image: declare it as a camera of the embodiment")
            if np.dtype(extra.dtype).kind not in "biuf":
                raise SpecMismatchError(f"extra {extra.name!r}: expected a numeric dtype, got {extra.dtype}")
        for one in self.maps:
            if len(one.shape) != 3 or one.dtype not in MAP_DTYPES:
                raise SpecMismatchError(
                    f"map {one.name!r}: expected (height, width, channels) in one of {MAP_DTYPES}, got {one.shape} "
                    f"{one.dtype}"
                )
        may = [*(f.name for f in self.images), *(e.name for e in self.extras)]
        for name in self.optional:
            if name not in may or self.optional.count(name) > 1:
                raise SpecMismatchError(f"optional: expected cameras, maps and extras, each once. {_hint(name, may)}")

    @property
    def images(self) -> tuple[FeatureSpec, ...]:
        """Cameras and maps: what a step stores frame by frame."""
        return (*self.embodiment.cameras, *self.maps)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the low-dimensional fields, in disk order."""
        return (*ALWAYS, *(e.name for e in self.extras), *([PRESENT] if self.optional else []))

    def field(self, name: str) -> FeatureSpec:
        """Return the spec of the low-dimensional field `name`; `timestamp` has shape (1,) [s]."""
        known = {"state": self.embodiment.state, "action": self.embodiment.action, "timestamp": TIMESTAMP}
        known |= {extra.name: extra for extra in self.extras}
        if self.optional:
            shape = (len(self.optional),)
            known[PRESENT] = FeatureSpec(name=PRESENT, shape=shape, dtype="bool", names=self.optional)
        if name not in known:
            raise SpecMismatchError(f"no low-dimensional field {name!r}. {did_you_mean(name, self.fields)}")
        return known[name]

    def camera(self, name: str) -> FeatureSpec:
        """Return the camera `name`, or raise SpecMismatchError with a suggestion."""
        if name not in self.embodiment.camera_names:
            hint = _hint(name, self.embodiment.camera_names, "It has no cameras.")
            raise SpecMismatchError(f"embodiment {self.embodiment.name!r} has no camera {name!r}. {hint}")
        return self.embodiment.camera(name)

    def image(self, name: str) -> FeatureSpec:
        """Return the camera or map `name`, or raise SpecMismatchError with a suggestion."""
        for spec in self.images:
            if spec.name == name:
                return spec
        hint = _hint(name, [spec.name for spec in self.images], "There are none.")
        raise SpecMismatchError(f"embodiment {self.embodiment.name!r} has no camera or map {name!r}. {hint}")

    def columns(self, name: str) -> int:
        """Number of columns D of field `name` on disk, where its array is (N, D)."""
        return int(np.prod(self.field(name).shape, dtype=np.int64))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        data: dict[str, Any] = {"embodiment": self.embodiment.to_dict(), "extras": [e.to_dict() for e in self.extras]}
        if self.maps:
            data["maps"] = [m.to_dict() for m in self.maps]
        if self.optional:
            data["optional"] = list(self.optional)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StoreSchema:
        """Build from `to_dict` output or YAML; other keys are left alone."""
        parts = {key: tuple(data.get(key, ())) for key in ("extras", "maps", "optional")}
        return cls(embodiment=data["embodiment"], **parts)

    def differences(self, other: StoreSchema) -> list[str]:
        """Return one line for each place where `other` differs; empty when both mean the same."""
        lines = self.embodiment.differences(other.embodiment)
        for key in ("extras", "maps"):
            mine, theirs = ([e.to_dict() for e in getattr(schema, key)] for schema in (self, other))
            if mine != theirs:
                shown = [[(e["name"], tuple(e["shape"]), e["dtype"]) for e in some] for some in (mine, theirs)]
                lines.append(f"{key}: {shown[0]} against {shown[1]}")
        if self.optional != other.optional:
            lines.append(f"optional: {list(self.optional)} against {list(other.optional)}")
        return lines

    def require_same(self, other: StoreSchema, mine: str, theirs: str) -> None:
        """Raise SpecMismatchError unless both schemas mean the same."""
        self.embodiment.require_same(other.embodiment, mine, theirs)
        _refuse(self.differences(other), mine, theirs)

    def require_reads(self, other: StoreSchema, mine: str, theirs: str) -> None:
        """Raise SpecMismatchError unless steps of schema `other` can be read as steps of this one.

        They can if both agree on all that both have, and `other` lacks, or may lack, optional fields only.
        """
        a, b = self.embodiment, other.embodiment
        lines = [] if a.control_hz == b.control_hz else [f"control_hz: {a.control_hz} against {b.control_hz}"]
        here, there = self._by_name(), other._by_name()
        for name, spec in here.items():
            if name in there:
                one, two = spec.to_dict(), there[name].to_dict()
                lines += [f"{name}.{key}: {one[key]} against {two[key]}" for key in one if one[key] != two[key]]
                if name in other.optional and name not in self.optional:
                    lines.append(f"{name}: always there, against optional")
            elif name not in self.optional:
                lines.append(f"{name}: not there, and not optional")
        _refuse(lines, mine, theirs)

    def _by_name(self) -> dict[str, FeatureSpec]:
        body = {"state": self.embodiment.state, "action": self.embodiment.action}
        return body | {spec.name: spec for spec in (*self.images, *self.extras)}


def _refuse(lines: Iterable[str], mine: str, theirs: str) -> None:
    listing = "\n  ".join(lines)
    if listing:
        raise SpecMismatchError(f"{mine} and {theirs} do not fit, they differ in:\n  {listing}")


def _hint(name: str, known: Iterable[str], none: str = "It has none.") -> str:
    known = list(known)
    return did_you_mean(name, known) if known else none
