"""What importers of plain arrays share: which array is what, and that nothing is guessed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BrachiumError, ConfigError, SpecMismatchError, StoreError, did_you_mean
from ...spec import EmbodimentSpec
from .base import ImportedEpisode, ImportedStep
from .draft import ask_for_embodiment

Arrays = Mapping[str, Any]
"""Name -> array of one episode, (T, ...): anything with shape, dtype and slices."""


@dataclass(frozen=True, kw_only=True)
class ArrayImporter(ABC):
    """Episodes as arrays of equal length.

    Attributes:
        embodiment: What the data means. Without it the error says what to fill in.
        images: Camera -> array; by default every picture there is, called by the last part of its name.
        state: Arrays that make up the state, one after another.
        action: Arrays that make up the action.
        instruction: What is done in all of the episodes; such data seldom says.
        instruction_attribute: Attribute of an episode that says it instead.
        success: Label of every episode; None when nobody knows.
        success_from: Array that is above 0 somewhere in an episode that succeeded, such as rewards.
        bgr: Whether pictures have blue first (as OpenCV writes them).
        tags: Labels of every episode.

    Raises:
        ConfigError: Nothing that makes up the state or the action.
    """

    embodiment: EmbodimentSpec | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    state: Sequence[str] = ()
    action: Sequence[str] = ()
    instruction: str = ""
    instruction_attribute: str | None = None
    success: bool | None = None
    success_from: str | None = None
    bgr: bool = False
    tags: Sequence[str] = ()
    option = ""

    def __post_init__(self) -> None:
        if isinstance(self.embodiment, Mapping):
            object.__setattr__(self, "embodiment", EmbodimentSpec.from_dict(self.embodiment))
        for key in ("state", "action"):
            names = getattr(self, key)
            object.__setattr__(self, key, (names,) if isinstance(names, str) else tuple(names))
        if not self.state or not self.action:
            raise ConfigError("expected the arrays that make up state=[...] and action=[...]")

    @abstractmethod
    def count(self, source: Path) -> int:
        """Return the number of episodes."""

    @abstractmethod
    def episodes(self, source: Path, first: int) -> Iterator[tuple[str, Arrays, Mapping[str, Any]]]:
        """Yield (name, arrays, attributes) of every episode from `first` on."""

    def embodiment_of(self, source: Path) -> EmbodimentSpec:
        """Return the embodiment that was given; see `EpisodeImporter.embodiment_of`."""
        for name, arrays, _ in self.episodes(source, 0):
            return self._checked(arrays, f"{source}: {name}", source)
        raise StoreError(f"{source} holds no episodes")

    def read(self, source: Path, first: int = 0) -> Iterator[ImportedEpisode]:
        """Yield the episodes of `source` from `first` on; see `EpisodeImporter.read`."""
        for name, arrays, attributes in self.episodes(source, first):
            where = f"{source}: {name}"
            self._checked(arrays, where, source)
            yield ImportedEpisode(
                instruction=self._words(attributes, where),
                steps=self._steps(arrays, where),
                success=self._outcome(arrays),
                tags=tuple(self.tags),
                meta={"episode": name},
            )

    def _cameras(self, arrays: Arrays) -> dict[str, str]:
        if self.images:
            return dict(self.images)
        return {n.rpartition("/")[2]: n for n, a in arrays.items() if a.dtype == np.uint8 and len(a.shape) == 4}

    def _checked(self, arrays: Arrays, where: str, source: Path) -> EmbodimentSpec:
        """The embodiment; raises SpecMismatchError unless the arrays are there and fit it."""
        cameras = self._cameras(arrays)
        named = [*self.state, *self.action, *cameras.values(), *([self.success_from] if self.success_from else [])]
        for name in named:
            if name not in arrays:
                raise SpecMismatchError(f"{where} has no array {name!r}. {did_you_mean(name, arrays)}")
        lengths = {name: int(arrays[name].shape[0]) for name in named}
        if len(set(lengths.values())) != 1:
            raise StoreError(f"{where}: arrays have different numbers of steps: {lengths}")
        widths = {key: sum(_width(arrays[n]) for n in getattr(self, key)) for key in ("state", "action")}
        shapes = {camera: _picture_shape(arrays[name]) for camera, name in cameras.items()}
        spec = self.embodiment
        if spec is None:
            raise ask_for_embodiment(
                source,
                self.option,
                control_hz=None,
                robot=None,
                cameras={camera: shape or (0, 0, 3) for camera, shape in shapes.items()},
                state=(widths["state"], []),
                action=(widths["action"], []),
            )
        if set(cameras) != set(spec.camera_names):
            raise SpecMismatchError(
                f"{where} has cameras {sorted(cameras)}, the embodiment {sorted(spec.camera_names)}: name those that "
                "are wanted in images={CAMERA: ARRAY} and embodiment.cameras"
            )
        for key, feature in (("state", spec.state), ("action", spec.action)):
            if feature.shape != (widths[key],):
                raise SpecMismatchError(
                    f"{where}: {key} {list(getattr(self, key))} has {widths[key]} elements, expected {feature.shape}"
                )
        for camera, shape in shapes.items():
            if shape is not None and shape != spec.camera(camera).shape:
                raise SpecMismatchError(f"{where}: camera {camera!r} is {shape}, expected {spec.camera(camera).shape}")
        return spec

    def _steps(self, arrays: Arrays, where: str) -> Iterator[ImportedStep]:
        cameras = self._cameras(arrays)
        try:
            state, action = (self._joined(arrays, getattr(self, key)) for key in ("state", "action"))
            for t in range(len(state)):
                pictures = {
                    camera: self._picture(arrays[name][t], f"{where}, step {t}") for camera, name in cameras.items()
                }
                yield ImportedStep(images=pictures, state=state[t], action=action[t])
        except (OSError, ValueError, RuntimeError) as error:  # what h5py, zarr and codecs say of broken chunks
            if isinstance(error, BrachiumError):
                raise
            raise StoreError(f"{where} is damaged: {error}") from error

    @staticmethod
    def _joined(arrays: Arrays, names: Sequence[str]) -> np.ndarray:
        parts = [np.asarray(arrays[name][:], np.float32) for name in names]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def _picture(self, value: np.ndarray, where: str) -> bytes | np.ndarray:
        """A picture as it is, or a JPEG stream that was padded with zeros."""
        if value.ndim == 1:
            stream = np.asarray(value).view(np.uint8).tobytes().rstrip(b"\0")
            if stream[:2] != b"\xff\xd8":
                raise StoreError(f"{where}: expected JPEG streams, got bytes that begin with {stream[:4]!r}")
            if not self.bgr:
                return stream
            import simplejpeg

            value = simplejpeg.decode_jpeg(stream, "RGB")
        return np.ascontiguousarray(value[..., ::-1] if self.bgr else value)

    def _words(self, attributes: Mapping[str, Any], where: str) -> str:
        if self.instruction_attribute is None:
            return self.instruction
        if self.instruction_attribute not in attributes:
            hint = did_you_mean(self.instruction_attribute, attributes) if attributes else "It has none at all."
            raise SpecMismatchError(f"{where} has no attribute {self.instruction_attribute!r}. {hint}")
        value = attributes[self.instruction_attribute]
        return value.decode() if isinstance(value, bytes) else str(value)

    def _outcome(self, arrays: Arrays) -> bool | None:
        if self.success_from is None:
            return self.success
        return bool((np.asarray(arrays[self.success_from][:]) > 0).any())


def _width(array: Any) -> int:
    return int(np.prod(array.shape[1:], dtype=np.int64))


def _picture_shape(array: Any) -> tuple[int, ...] | None:
    """(H, W, C), or None for streams, which say it themselves."""
    return tuple(int(n) for n in array.shape[1:]) if len(array.shape) == 4 else None
