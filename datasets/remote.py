"""A store on an object store (S3, GCS, Azure, HTTP, memory): what is small is fetched once, frames by ranges.

The log, and the columns that say where every frame is, make a local skeleton that opens like any store. Frames stay
where they are; `streamer.BlockStreamer` reads them in blocks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NotFoundError, StoreError
from .commitlog import CHECKPOINT_EVERY
from .layout import LOG, SEGMENTS, STAGING
from .reader import SegmentReader
from .segment_index import ABSENT, column_files
from .store import EpisodeStore

SCHEMES = ("s3://", "gs://", "az://", "http://", "https://", "file://", "memory://")
TRIES, PAUSE_S = 4, 0.2
"""How often a request is made, and the pause before the second; it doubles."""


def object_store(url: str) -> Any:
    """Open the folder at `url` of an object store, with obstore; credentials come from the environment.

    Raises:
        StoreError: obstore is not installed, or cannot open such an address.
    """
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise StoreError("object stores need obstore. Type: uv pip install obstore") from error
    plain: Any = {"client_options": {"allow_http": True}} if url.startswith("http://") else {}
    try:
        return from_url(url, **plain)
    except Exception as error:  # obstore raises what its schemes do
        raise StoreError(f"cannot open {url}: {error}") from error


class RemoteStore:
    """An episode store on an object store.

    Args:
        objects: An obstore object store (`object_store` makes one).
        local: Folder for the skeleton; what is in it is not fetched again.
        threads: Requests at once.

    Attributes:
        store: The skeleton: everything but pictures can be read from it.
        requests: Requests made so far.

    Raises:
        NotFoundError: No store there.
        StoreError: A request that fails again and again, or a store of another format.
    """

    def __init__(self, objects: Any, local: str | os.PathLike[str], *, threads: int = 16) -> None:
        self.objects, self.local = objects, Path(local)
        self.requests = 0
        self._count = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="remote")
        if self.get("zarr.json", missing_ok=True) is None:
            raise NotFoundError("no episode store there: zarr.json is missing. Type: brachium push store=PATH to=URL")
        for name in (LOG, SEGMENTS, STAGING):
            (self.local / name).mkdir(parents=True, exist_ok=True)
        self.fetch("zarr.json")
        self._fetch_log()
        self.store = EpisodeStore.open(self.local)

    def request(self, work: Callable[[], Any], what: str) -> Any:
        """Make a request, again when it fails for now; a thing that is not there is not asked for twice."""
        pause = PAUSE_S
        for attempt in range(TRIES):
            with self._count:
                self.requests += 1
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:  # of networks and of obstore
                if attempt == TRIES - 1:
                    raise StoreError(f"cannot get {what} after {TRIES} tries: {error}") from error
                time.sleep(pause)
                pause *= 2
        raise AssertionError

    def get(self, path: str, *, missing_ok: bool = False) -> bytes | None:
        """The object at `path`; None where it is missing and that is fine."""
        import obstore

        try:
            return bytes(self.request(lambda: obstore.get(self.objects, path).bytes(), path))
        except FileNotFoundError as error:
            if missing_ok:
                return None
            raise StoreError(f"damaged store: {path} is missing") from error

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of the object at `path`."""
        import obstore

        try:
            data = bytes(self.request(lambda: obstore.get_range(self.objects, path, start=start, end=stop), path))
        except FileNotFoundError as error:
            raise StoreError(f"damaged store: {path} is missing") from error
        if len(data) != stop - start:
            raise StoreError(f"damaged store: {path} is shorter than {stop} bytes")
        return data

    def exists(self, path: str) -> bool:
        """Whether there is an object at `path`."""
        import obstore

        try:
            self.request(lambda: obstore.head(self.objects, path), path)
        except FileNotFoundError:
            return False
        return True

    def fetch(self, path: str, *, missing_ok: bool = False) -> bool:
        """Copy an object into the skeleton, unless it is there; whether there is one."""
        target = self.local / path
        if target.exists():
            return True
        data = self.get(path, missing_ok=missing_ok)
        if data is None:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        temporary.write_bytes(data)
        temporary.replace(target)
        return True

    def fetch_all(self, paths: Iterable[str], *, missing_ok: bool = False) -> list[bool]:
        """`fetch` for many, at once."""
        return list(self._pool.map(lambda path: self.fetch(path, missing_ok=missing_ok), paths))

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Run `work` on items at once, in the pool of requests."""
        return list(self._pool.map(work, items))

    def _fetch_log(self) -> None:
        """The newest checkpoint and the entries after it; object stores over HTTP cannot list, so numbers are tried."""
        low = newest_entry(lambda number: self.exists(entry_path(number)))
        if low < 0:
            raise StoreError("damaged store: its log is missing")
        first = 0
        for number in range(low // CHECKPOINT_EVERY * CHECKPOINT_EVERY, 0, -CHECKPOINT_EVERY):
            if self.fetch(f"{LOG}/{number:020d}.ckpt.parquet", missing_ok=True):
                first = number
                break
        self.fetch_all(entry_path(number) for number in range(first, low + 1))

    def fetch_columns(self, part: EpisodeStore, fields: Sequence[str], images: Sequence[str]) -> None:
        """Get the columns that say what the fields are and where the frames: as a whole if they were pushed, else by
        segment."""
        index = part.steps
        wanted = [(name, ("values",)) for name in fields] + [(name, ("offset", "length")) for name in images]
        missing = []
        for name, arrays in wanted:
            paths = [f"{index.folder_of(name)}/{file}" for file in column_files(index.ids, arrays)]
            if not all(self.fetch_all(paths, missing_ok=True)):
                missing.append(name)
        if missing:
            self._fetch_segments(index.ids, [f for f in fields if f in missing], [i for i in images if i in missing])

    def _fetch_segments(self, segments: Sequence[str], fields: Sequence[str], images: Sequence[str]) -> None:
        small = [f"{SEGMENTS}/{s}/zarr.json" for s in segments]
        small += [f"{SEGMENTS}/{s}/lowdim/{f}/zarr.json" for s in segments for f in fields]
        small += [f"{SEGMENTS}/{s}/images/{i}/zarr.json" for s in segments for i in images]
        self.fetch_all(small, missing_ok=True)
        arrays = [f"{SEGMENTS}/{s}/lowdim/{f}" for s in segments for f in fields]
        chunks = [f"{path}/c/{k}/0" for path in arrays for k in range(_chunks(self.local / path))]
        self.fetch_all(chunks, missing_ok=True)
        arrays = [f"{SEGMENTS}/{s}/images/{i}" for s in segments for i in images]
        shards = [
            (f"{path}/c/{k}/0/0/0", self.local / path) for path in arrays for k in range(_chunks(self.local / path))
        ]
        self.map(lambda shard: self._fetch_footer(*shard), shards)

    def _fetch_footer(self, path: str, array: Path) -> None:
        """A file of the shard's size that holds its index and nothing else."""
        import obstore

        target = self.local / path
        if target.exists():
            return
        meta = json.loads((array / "zarr.json").read_bytes())
        shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
        tail = 16 * (shard // int(meta["codecs"][0]["configuration"]["chunk_shape"][0])) + 4
        try:
            found = self.request(lambda: obstore.get(self.objects, path, options={"range": {"suffix": tail}}), path)
        except FileNotFoundError:
            return  # the index says so of its episodes
        size, data = int(found.meta["size"]), bytes(found.bytes())
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        with open(temporary, "wb") as file:
            file.seek(size - len(data))
            file.write(data)
        temporary.replace(target)

    def pull_segment(self, segment: str) -> None:
        """Copy every file of a segment into the skeleton."""
        base = f"{SEGMENTS}/{segment}"
        self.fetch(f"{base}/zarr.json")
        schema = SegmentReader(self.local / base).schema
        arrays = [f"{base}/lowdim/{field}" for field in schema.fields]
        pictures = [f"{base}/images/{spec.name}" for spec in schema.images]
        groups = [f"{base}/{kind}" for kind in ("lowdim", "images")]
        self.fetch_all(f"{path}/zarr.json" for path in (*groups, *arrays, *pictures))
        chunks = [f"{path}/c/{k}/0" for path in arrays for k in range(_chunks(self.local / path))]
        chunks += [f"{path}/c/{k}/0/0/0" for path in pictures for k in range(_chunks(self.local / path))]
        self.fetch_all(chunks)

    def frames(self, part: EpisodeStore, image: str, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Get the stored bytes of frames, row -> uint8 (n,) with their crc; one request for each shard they lie in."""
        column = part.steps.images(image)
        offset, length = column.arrays["offset"], column.arrays["length"]
        segments = np.searchsorted(part.steps.starts, rows, side="right") - 1
        steps = rows - part.steps.starts[segments]
        shards = steps // column.arrays["layout"][segments, 1]
        found: dict[int, np.ndarray] = {}
        for segment, shard in sorted(set(zip(segments.tolist(), shards.tolist()))):
            if segment in column.broken:
                raise StoreError(column.broken[segment])
            mine = rows[(segments == segment) & (shards == shard)]
            there = mine[length[mine] != ABSENT]
            if not len(there):
                continue
            start, stop = int(offset[there].min()), int((offset[there] + length[there]).max())
            path = f"{SEGMENTS}/{part.steps.ids[segment]}/images/{image}/c/{shard}/0/0/0"
            data = np.frombuffer(self.get_range(path, start, stop), np.uint8)
            for row in there.tolist():
                begin = int(offset[row]) - start
                found[row] = data[begin : begin + int(length[row])]
        return found

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def entry_path(number: int) -> str:
    """Path of an entry of the log below a store."""
    return f"{LOG}/{number:020d}.json"


def newest_entry(exists: Callable[[int], bool]) -> int:
    """Number of the newest entry of a log that cannot be listed; -1 where there is none."""
    if not exists(0):
        return -1
    low, high = 0, 1
    while exists(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exists(middle) else (low, middle)
    return low


def _chunks(array: Path) -> int:
    """Number of chunks (or shards) along the first axis of the array in a folder; 0 where there is none."""
    try:
        meta = json.loads((array / "zarr.json").read_bytes())
        return -(-int(meta["shape"][0]) // int(meta["chunk_grid"]["configuration"]["chunk_shape"][0]))
    except (OSError, ValueError, KeyError):
        return 0
