"""Importer of RLDS data sets as TFDS writes them: TFRecord shards beside features.json and dataset_info.json.

Source: https://github.com/google-research/rlds and tensorflow_datasets.core.features, whose flattened names
(``steps/observation/image_0``) are the keys of the stored examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from ...errors import NotFoundError, SpecMismatchError, StoreError, did_you_mean
from ...spec import EmbodimentSpec
from .base import ImportedEpisode, ImportedStep
from .tfrecord import Value, parse_example, read_records

_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<k>\d{5})-of-(?P<n>\d{5})")


@dataclass(frozen=True, kw_only=True)
class RldsFeature:
    """One stored feature.

    Attributes:
        kind: ``image``, ``text`` or ``tensor``.
        shape: Shape of one value.
        dtype: Numpy dtype name; ``string`` for text.
        per_step: True below ``steps/``.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    per_step: bool


def read_features(path: Path) -> dict[str, RldsFeature]:
    """Parse a features.json into flattened name -> feature. Kinds that no robot data uses are left out.

    Raises:
        StoreError: A file that is no such JSON.
    """
    try:
        tree = json.loads(path.read_bytes())
        found = dict(_flatten(tree, "", False))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} describes no RLDS features: {error!r}") from error
    if not any(feature.per_step for feature in found.values()):
        raise StoreError(f"{path} describes no RLDS data: expected a sequence 'steps', got {sorted(found)}")
    return found


def _flatten(node: Mapping[str, Any], name: str, per_step: bool) -> Iterator[tuple[str, RldsFeature]]:
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from _flatten(child, f"{name}/{key}" if name else key, per_step)
    elif "sequence" in node:
        yield from _flatten(node["sequence"]["feature"], name, True)
    elif "image" in node:
        yield name, RldsFeature(kind="image", shape=_shape(node["image"]), dtype="uint8", per_step=per_step)
    elif "text" in node:
        yield name, RldsFeature(kind="text", shape=(), dtype="string", per_step=per_step)
    elif "tensor" in node:
        tensor = node["tensor"]
        yield name, RldsFeature(kind="tensor", shape=_shape(tensor), dtype=tensor["dtype"], per_step=per_step)


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in node.get("shape", {}).get("dimensions", ()))


@dataclass(frozen=True, kw_only=True)
class RldsImporter:
    """Maps stored features to an embodiment.

    Attributes:
        embodiment: What the data means; its cameras are the keys of `images`.
        images: Camera -> feature, for example ``{front: steps/observation/image_0}``.
        state: Feature of the state.
        action: Feature of the action.
        instruction: Feature of the instruction, a step's or an episode's.
        meta: Episode features to keep in `meta`.
        split: Split to read.
        skip_first: Steps to leave out at the start of every episode.
        success: Label of every episode; None when the data does not say.
        tags: Labels of every episode.
    """

    embodiment: EmbodimentSpec
    images: Mapping[str, str]
    state: str = "steps/observation/state"
    action: str = "steps/action"
    instruction: str = "steps/language_instruction"
    meta: Sequence[str] = ()
    split: str = "train"
    skip_first: int = 0
    success: bool | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.embodiment, Mapping):
            object.__setattr__(self, "embodiment", EmbodimentSpec.from_dict(self.embodiment))
        object.__setattr__(self, "images", dict(self.images))
        if set(self.images) != set(self.embodiment.camera_names):
            raise SpecMismatchError(
                f"expected a feature for each camera {list(self.embodiment.camera_names)}, got {sorted(self.images)}"
            )

    def embodiment_of(self, source: Path) -> EmbodimentSpec:
        """Return the embodiment that was given; RLDS says nothing of what numbers mean."""
        return self.embodiment

    def count(self, source: Path) -> int | None:
        """Return the number of episodes that dataset_info.json states, or None."""
        self._folder(source)
        lengths = self._shard_lengths(source)
        return None if lengths is None else sum(lengths)

    def read(self, source: Path, first: int = 0) -> Iterator[ImportedEpisode]:
        """Yield the episodes of `source` from `first` on, in file order, with every checksum checked."""
        features = read_features(self._folder(source) / "features.json")
        self._check(features, source)
        lengths = self._shard_lengths(source)
        passed = 0
        for k, shard in enumerate(self._shards(source)):
            number = -1
            for number, record in enumerate(read_records(shard)):
                passed += 1
                if passed <= first:
                    continue
                yield self._episode(parse_example(record), features, f"{shard.name}, episode {number}")
            if lengths is not None and k < len(lengths) and number + 1 != lengths[k]:
                raise StoreError(
                    f"{shard} holds {number + 1} episodes, dataset_info.json says {lengths[k]}: get it again"
                )

    def _folder(self, source: Path) -> Path:
        if not source.is_dir():
            raise NotFoundError(f"no RLDS data at {source}: expected a folder with features.json and TFRecord files")
        if not (source / "features.json").is_file():
            below = sorted(str(p.parent) for p in source.glob("*/features.json"))
            hint = f"Did you mean source={below[-1]}?" if below else "RLDS data has it beside its TFRecord files."
            raise NotFoundError(f"no features.json in {source}. {hint}")
        return source

    def _shards(self, source: Path) -> list[Path]:
        matches = [(path, m) for path in sorted(source.iterdir()) if (m := _SHARD.fullmatch(path.name))]
        shards = [(path, int(m["n"])) for path, m in matches if m["split"] == self.split]
        if not shards:
            splits = {m["split"] for _, m in matches}
            hint = did_you_mean(self.split, splits) if splits else "There are no TFRecord files at all."
            raise NotFoundError(f"no split {self.split!r} in {source}. {hint}")
        if len(shards) != shards[0][1]:
            raise StoreError(
                f"{source} has {len(shards)} of {shards[0][1]} files of split {self.split!r}: get the rest"
            )
        return [path for path, _ in shards]

    def _shard_lengths(self, source: Path) -> list[int] | None:
        try:
            info = json.loads((source / "dataset_info.json").read_bytes())
            [split] = [s for s in info["splits"] if s["name"] == self.split]
            return [int(n) for n in split["shardLengths"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the file is a courtesy: the records themselves are checked

    def _check(self, features: Mapping[str, RldsFeature], source: Path) -> None:
        """Raise SpecMismatchError unless the mapped features are there and fit the embodiment."""
        spec = self.embodiment
        wanted = [(self.state, "tensor", spec.state.shape), (self.action, "tensor", spec.action.shape)]
        wanted += [(name, "image", spec.camera(camera).shape) for camera, name in self.images.items()]
        wanted += [(self.instruction, "text", ()), *((name, "", ()) for name in self.meta)]
        for name, kind, shape in wanted:
            if name not in features:
                raise SpecMismatchError(f"{source} has no feature {name!r}. {did_you_mean(name, features)}")
            found = features[name]
            if kind and (found.kind != kind or found.shape != shape):
                raise SpecMismatchError(
                    f"{source}: feature {name!r}: expected {kind} of shape {shape}, got {found.kind} of {found.shape}"
                )
            if kind in ("image", "tensor") and not found.per_step:
                raise SpecMismatchError(f"{source}: feature {name!r} has one value an episode, expected one a step")

    def _episode(
        self, example: Mapping[str, Value], features: Mapping[str, RldsFeature], where: str
    ) -> ImportedEpisode:
        """Build one episode; every per-step feature must have as many values as there are actions."""
        state = self._rows(example, self.state, self.embodiment.state.shape, where)
        action = self._rows(example, self.action, self.embodiment.action.shape, where)
        images = {camera: self._strings(example, name, where) for camera, name in self.images.items()}
        lengths = {len(action), len(state), *(len(values) for values in images.values())}
        if len(lengths) != 1:
            raise StoreError(f"{where}: features have different numbers of steps: {sorted(lengths)}")
        steps = [
            ImportedStep(
                images={camera: _image(values[t], f"{where}, step {t}") for camera, values in images.items()},
                state=state[t],
                action=action[t],
            )
            for t in range(self.skip_first, len(action))
        ]
        words = self._strings(example, self.instruction, where)
        meta = {name.rpartition("/")[2]: _plain(example.get(name, [])) for name in self.meta}
        return ImportedEpisode(
            instruction=words[0].decode(errors="replace") if words else "",
            steps=steps,
            success=self.success,
            tags=tuple(self.tags),
            meta=meta,
        )

    @staticmethod
    def _strings(example: Mapping[str, Value], name: str, where: str) -> list[bytes]:
        values = example.get(name)
        if not isinstance(values, list):
            raise StoreError(f"{where}: expected byte strings in {name!r}, got {type(values).__name__}")
        return values

    @staticmethod
    def _rows(example: Mapping[str, Value], name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
        values = example.get(name)
        width = int(np.prod(shape))
        if not isinstance(values, np.ndarray) or len(values) % width:
            raise StoreError(f"{where}: expected numbers in {name!r}, a multiple of {width} of them")
        return values.astype(np.float32).reshape(-1, *shape)


def _image(data: bytes, where: str) -> bytes | np.ndarray:
    """Return JPEG streams as they are and PNG decoded to uint8 (H, W, 3)."""
    if data[:2] == b"\xff\xd8":
        return data
    if data[:4] == b"\x89PNG":
        return np.ascontiguousarray(imagecodecs.png_decode(data)[..., :3])
    raise StoreError(f"{where}: expected a JPEG or PNG image, got bytes that begin with {data[:4]!r}")


def _plain(value: Value) -> Any:
    """Return a feature as JSON can hold it; a single value without its list."""
    items = [v.decode(errors="replace") for v in value] if isinstance(value, list) else value.tolist()
    return items[0] if len(items) == 1 else items
