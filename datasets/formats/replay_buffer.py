"""Replay buffers of diffusion_policy and UMI: Zarr v2 arrays of all steps, and where each episode ends."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import NotFoundError, StoreError
from .arrays import ArrayImporter, Arrays


class _Rows:
    """Some rows of an array, read as they are asked for."""

    def __init__(self, array: Any, start: int, stop: int) -> None:
        self._array, self._start, self.dtype = array, start, array.dtype
        self.shape = (stop - start, *array.shape[1:])

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, _ = key.indices(self.shape[0])
            return np.asarray(self._array[self._start + start : self._start + stop])
        return np.asarray(self._array[self._start + key])


@dataclass(frozen=True, kw_only=True)
class ReplayBufferImporter(ArrayImporter):
    """Arrays are those in ``data/``, for example ``img``; ``source`` is the folder, or a ``.zarr.zip`` of it."""

    option = "replay_buffer"

    def count(self, source: Path) -> int:
        """Return the number of episode ends."""
        return len(self._ends(_opened(source), source))

    def episodes(self, source: Path, first: int) -> Iterator[tuple[str, Arrays, Mapping[str, Any]]]:
        """Yield episodes in order of their ends."""
        group = _opened(source)
        ends = self._ends(group, source)
        arrays = dict(group["data"].arrays())
        for name, array in arrays.items():
            if len(ends) and array.shape[0] < ends[-1]:
                raise StoreError(f"{source}: data/{name} has {array.shape[0]} steps, episodes end at {ends[-1]}")
        starts = np.concatenate([[0], ends[:-1]])
        for number in range(first, len(ends)):
            rows = {name: _Rows(array, int(starts[number]), int(ends[number])) for name, array in arrays.items()}
            yield str(number), rows, dict(group.attrs)

    @staticmethod
    def _ends(group: Any, source: Path) -> np.ndarray:
        try:
            ends = np.asarray(group["meta/episode_ends"][:], np.int64)
            group["data"]
        except KeyError as error:
            raise StoreError(f"{source} has no {error}: expected data/ and meta/episode_ends") from error
        if len(ends) and (ends[0] < 1 or (np.diff(ends) < 1).any()):
            raise StoreError(f"{source}: episode ends do not rise: {ends[:8]}")
        return ends


def _opened(source: Path) -> Any:
    import zarr
    from imagecodecs.numcodecs import register_codecs

    register_codecs(verbose=False)  # UMI stores JPEG XL
    if not source.exists():
        raise NotFoundError(f"no replay buffer at {source}")
    try:
        if source.is_file():
            return zarr.open_group(zarr.storage.ZipStore(source, mode="r"), mode="r")
        return zarr.open_group(source, mode="r")
    except (FileNotFoundError, zipfile.BadZipFile, ValueError) as error:
        raise StoreError(f"{source} is no Zarr group: {error}") from error
