"""HDF5 episodes: robomimic (one file, a group a demonstration) and ALOHA (a file an episode)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import NotFoundError, StoreError
from .arrays import ArrayImporter, Arrays


@dataclass(frozen=True, kw_only=True)
class Hdf5Importer(ArrayImporter):
    """Arrays are named by their path below the episode, for example ``obs/agentview_image``.

    Attributes:
        files: Pattern of the files, if `source` is a folder.
        group: Pattern of the groups that are episodes, such as ``data/demo_*``; empty where a file is one.
    """

    files: str = "*.hdf5"
    group: str = ""
    option = "hdf5"

    def count(self, source: Path) -> int:
        """Return the number of files, or of groups in all files."""
        return sum(len(groups) for _, groups in self._places(source))

    def episodes(self, source: Path, first: int) -> Iterator[tuple[str, Arrays, Mapping[str, Any]]]:
        """Yield episodes by number: ``demo_2`` comes before ``demo_10``."""
        import h5py

        passed = 0
        for path, groups in self._places(source):
            if passed + len(groups) <= first:
                passed += len(groups)
                continue
            with _opened(path) as file:
                for group in groups:
                    passed += 1
                    if passed <= first:
                        continue
                    node = file[group] if group else file
                    arrays: dict[str, Any] = {}
                    node.visititems(lambda n, v, a=arrays: a.update({n: v}) if isinstance(v, h5py.Dataset) else None)
                    attributes = {**dict(file.attrs), **dict(node.attrs)}
                    yield f"{path.name}{'/' if group else ''}{group}", arrays, attributes

    def _places(self, source: Path) -> list[tuple[Path, list[str]]]:
        if not source.exists():
            raise NotFoundError(f"no HDF5 data at {source}")
        paths = [source] if source.is_file() else sorted(source.glob(self.files), key=_natural)
        if not paths:
            raise NotFoundError(f"no file {self.files} in {source}")
        found = []
        for path in paths:
            groups = [""]
            if self.group:
                with _opened(path) as file:
                    groups = _matching(file, self.group.split("/"))
                if not groups:
                    raise NotFoundError(f"{path} has no group {self.group!r}")
            found.append((path, groups))
        return found


def _opened(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise StoreError(f"{path} is no HDF5 file, or was not closed by who wrote it: {error}") from error


def _matching(node: Any, patterns: list[str], prefix: str = "") -> list[str]:
    """Paths of the groups that fit the patterns, level by level."""
    if not patterns:
        return [prefix]
    names = sorted(fnmatch.filter(node.keys(), patterns[0]), key=_natural)
    return [p for name in names for p in _matching(node[name], patterns[1:], f"{prefix}/{name}" if prefix else name)]


def _natural(name: Any) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]
