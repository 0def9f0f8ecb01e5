"""Writes a store as a LeRobot data set v3, which LeRobotDataset opens: parquet by pyarrow, videos by PyAV.

Layout of lerobot 0.6 (``codebase_version`` "v3.0"). What LeRobot has no place for (units, success, tags, ids) goes to
``meta/brachium.json``, from which `LerobotImporter` takes it back.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import ConfigError, StoreError
from ...spec import FeatureSpec
from ..schema import PRESENT
from ..store import EpisodeStore
from .lerobot import SIDECAR

CHUNK, DATA_MB, VIDEO_MB = 1000, 100, 200
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
PICTURES = 100
"""Frames of an episode that the statistics of its pictures are taken from, at most."""
CODECS = {"av1": ("libsvtav1", {"preset": "12", "crf": "30", "g": "2"}), "h264": ("libx264", {"crf": "18", "g": "2"})}


@dataclass(frozen=True, kw_only=True)
class LerobotExporter:
    """How to write it.

    Attributes:
        video: ``av1`` (as lerobot itself does), ``h264``, or ``none``: pictures in parquet, JPEG streams as they are.

    Raises:
        ConfigError: Another codec.
    """

    video: str = "av1"

    def __post_init__(self) -> None:
        if self.video not in (*CODECS, "none"):
            raise ConfigError(f"no video={self.video!r}. Choices: {', '.join([*CODECS, 'none'])}")

    def write(self, store: EpisodeStore, episodes: Sequence[int], out: Path, step: Callable[[int], None]) -> None:
        """Write `episodes` of `store` into the new folder `out`; `step` is told of every finished episode.

        Raises:
            StoreError: No episodes, pictures that a video cannot hold, or damaged data.
        """
        if not len(episodes):
            raise StoreError("no episodes to export")
        schema = store.schema
        if self.video != "none" and any(n % 2 for c in schema.embodiment.cameras for n in c.shape[:2]):
            raise StoreError("videos need even heights and widths: use video=none, or `brachium resize` first")
        (out / "meta").mkdir(parents=True)
        tasks: dict[str, int] = {}
        rows, noted, total = [], [], 0
        data = _DataFiles(out, _arrow_schema(store, self.video == "none"))
        videos = {
            c.name: _VideoFiles(out, c, schema.embodiment.control_hz, self.video) for c in schema.embodiment.cameras
        }
        if self.video == "none":
            videos = {}
        try:
            for number, index in enumerate(episodes):
                info = store.episodes[index]
                frames = np.arange(store.offsets[index], store.offsets[index + 1])
                task = tasks.setdefault(info.instruction, len(tasks))
                columns = self._columns(store, frames, number, total, task)
                row: dict[str, Any] = {"episode_index": number, "tasks": [info.instruction], "length": info.length}
                row |= data.add(columns) | {"dataset_from_index": total, "dataset_to_index": total + info.length}
                for camera, video in videos.items():
                    row |= video.add(store.read_images(camera, frames))
                row |= _flat(_statistics(store, frames, columns))
                row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
                rows.append(row)
                noted.append({"id": info.id, "success": info.success, "tags": list(info.tags), "meta": dict(info.meta)})
                total += info.length
                step(1)
        finally:
            data.close()
            for video in videos.values():
                video.close()
        _write_meta(out, store, rows, tasks, total, videos)
        told = {"embodiment": schema.embodiment.to_dict(), "episodes": noted}
        (out / "meta" / SIDECAR).write_text(json.dumps(told) + "\n")

    def _columns(self, store: EpisodeStore, frames: np.ndarray, number: int, first: int, task: int) -> dict[str, Any]:
        length = len(frames)
        columns: dict[str, Any] = {}
        if self.video == "none":
            for camera in store.embodiment.camera_names:
                columns[_key(camera)] = [{"bytes": _still(store, camera, int(f)), "path": None} for f in frames]
        for field, name in _fields(store).items():
            columns[name] = store.gather(field, frames).reshape(length, -1)
        columns["timestamp"] = np.arange(length, dtype=np.float32) / np.float32(store.embodiment.control_hz)
        columns["frame_index"] = np.arange(length)
        columns["episode_index"] = np.full(length, number)
        columns["index"] = np.arange(first, first + length)
        columns["task_index"] = np.full(length, task)
        return columns


class _DataFiles:
    """Parquet files of a hundred megabytes, one row group an episode."""

    def __init__(self, out: Path, schema: pa.Schema) -> None:
        self._out, self._schema = out, schema
        self._number, self._bytes = -1, 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, columns: dict[str, Any]) -> dict[str, int]:
        """Write the rows of one episode; returns where."""
        if self._writer is None or self._bytes > DATA_MB * 1e6:
            self.close()
            self._number, self._bytes = self._number + 1, 0
            path = self._out / DATA_PATH.format(**self._place())
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, self._schema, compression="snappy")
        table = pa.table({f.name: _column(columns[f.name], f.type) for f in self._schema}, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._bytes += table.nbytes
        return {f"data/{key}": value for key, value in self._place().items()}

    def _place(self) -> dict[str, int]:
        return {"chunk_index": self._number // CHUNK, "file_index": self._number % CHUNK}

    def close(self) -> None:
        """Finish the open file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _VideoFiles:
    """Video files of one camera of two hundred megabytes, episodes end to end."""

    def __init__(self, out: Path, camera: FeatureSpec, fps: float, codec: str) -> None:
        self._out, self._camera, self._fps, self._codec = out, camera, Fraction(fps).limit_denominator(1000), codec
        self._number, self._container, self._frames = -1, None, 0
        self._stream: Any = None
        self._path = out

    def add(self, images: np.ndarray) -> dict[str, Any]:
        """Encode the pictures of one episode; returns where they are."""
        import av

        if self._container is None or (self._path.exists() and self._path.stat().st_size > VIDEO_MB * 1e6):
            self._open()
        start = self._frames
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self._frames
            self._frames += 1
            for packet in self._stream.encode(frame):
                self._container.mux(packet)  # type: ignore[attr-defined]
        where = {"chunk_index": self._number // CHUNK, "file_index": self._number % CHUNK}
        times = {"from_timestamp": float(start / self._fps), "to_timestamp": float(self._frames / self._fps)}
        return {f"videos/{_key(self._camera.name)}/{key}": value for key, value in {**where, **times}.items()}

    def _open(self) -> None:
        import av

        self.close()
        self._number, self._frames = self._number + 1, 0
        place = {"chunk_index": self._number // CHUNK, "file_index": self._number % CHUNK}
        self._path = self._out / VIDEO_PATH.format(video_key=_key(self._camera.name), **place)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        encoder, options = CODECS[self._codec]
        container = av.open(str(self._path), "w")
        stream: Any = container.add_stream(encoder, rate=self._fps, options=dict(options))
        stream.height, stream.width = self._camera.shape[:2]
        stream.pix_fmt = "yuv420p"
        self._container, self._stream = container, stream  # type: ignore[assignment]

    def close(self) -> None:
        """Finish the open file."""
        if self._container is not None:
            for packet in self._stream.encode():
                self._container.mux(packet)
            self._container.close()
            self._container = None

    def info(self) -> dict[str, Any]:
        """What info.json says of the videos."""
        height, width, channels = self._camera.shape
        about = {"height": height, "width": width, "codec": self._codec, "pix_fmt": "yuv420p", "fps": float(self._fps)}
        about |= {"channels": channels, **{k: int(v) for k, v in CODECS[self._codec][1].items()}}
        return {f"video.{key}": value for key, value in about.items()} | {"has_audio": False, "is_depth_map": False}


def _key(camera: str) -> str:
    return f"observation.images.{camera}"


def _fields(store: EpisodeStore) -> dict[str, str]:
    """Low-dimensional field -> name of its feature."""
    names = {"state": "observation.state", "action": "action"}
    extras = [e.name for e in store.schema.extras] + ([PRESENT] if store.schema.optional else [])
    return names | {name: f"observation.{name}" for name in extras}


def _still(store: EpisodeStore, camera: str, frame: int) -> bytes:
    """One picture as a stream: JPEG as it is, anything else as PNG."""
    data = store.encoded(camera, frame)
    if data is not None and data[:2] == b"\xff\xd8":
        return data
    target = io.BytesIO()
    Image.fromarray(store.read_images(camera, [frame])[0]).save(target, "PNG", compress_level=1)
    return target.getvalue()


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    if isinstance(values, np.ndarray):
        return pa.array(values.reshape(-1), kind)
    return pa.array(values, kind)


def _arrow_schema(store: EpisodeStore, stills: bool) -> pa.Schema:
    """Columns of the data files, with what Hugging Face datasets wants to know of them."""
    columns: list[tuple[str, pa.DataType]] = []
    features: dict[str, Any] = {}
    if stills:
        for camera in store.embodiment.camera_names:
            columns.append((_key(camera), pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            features[_key(camera)] = {"_type": "Image"}
    for field, name in _fields(store).items():
        dim, dtype = store.schema.columns(field), np.dtype(store.schema.field(field).dtype)
        kind = pa.from_numpy_dtype(dtype)
        value = {"dtype": dtype.name, "_type": "Value"}
        columns.append((name, kind if dim == 1 else pa.list_(kind, dim)))
        features[name] = value if dim == 1 else {"feature": value, "length": dim, "_type": "List"}
    for name in INDEX_COLUMNS:
        dtype = np.dtype("float32" if name == "timestamp" else "int64")
        columns.append((name, pa.from_numpy_dtype(dtype)))
        features[name] = {"dtype": dtype.name, "_type": "Value"}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _statistics(store: EpisodeStore, frames: np.ndarray, columns: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Statistics of one episode, by feature."""
    found = {}
    for camera in store.embodiment.camera_names:
        some = frames[np.unique(np.linspace(0, len(frames) - 1, PICTURES).round().astype(int))]
        channels = [_stats_of_bytes(part) for part in store.read_images(camera, some).reshape(-1, 3).T]
        stats = {key: np.array([one[key] for one in channels]).reshape(3, 1, 1) for key in channels[0]}
        found[_key(camera)] = {**stats, "count": np.array([len(some)])}
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            found[name] = _stats(values.reshape(len(values), -1).astype(np.float64))
    return found


def _stats_of_bytes(x: np.ndarray) -> dict[str, float]:
    """Statistics of uint8 values as shares of 255; quantiles are the smallest value that as many do not exceed."""
    counts = np.bincount(x, minlength=256)
    values, weights = np.arange(256) / 255, counts / counts.sum()
    there, below = np.flatnonzero(counts), np.cumsum(weights)
    mean = float(values @ weights)
    found = {"min": values[there[0]], "max": values[there[-1]], "mean": mean}
    found["std"] = float(np.sqrt((values - mean) ** 2 @ weights))
    return found | {name: values[int(np.searchsorted(below, q - 1e-12))] for name, q in QUANTILES.items()}


def _stats(x: np.ndarray) -> dict[str, np.ndarray]:
    quantiles = {name: np.quantile(x, q, axis=0) for name, q in QUANTILES.items()}
    moments = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    return {**moments, "count": np.array([len(x)]), **quantiles}


def _flat(stats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"stats/{f}/{key}": np.asarray(v).tolist() for f, some in stats.items() for key, v in some.items()}


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of all episodes from those of each, as lerobot joins them: quantiles by weighted means."""
    found: dict[str, dict[str, Any]] = {}
    names = dict.fromkeys(key.split("/")[1] for key in rows[0] if key.startswith("stats/"))
    for name in names:
        get = {
            k: np.array([row[f"stats/{name}/{k}"] for row in rows], np.float64)
            for k in ("min", "max", "mean", "std", "count", *QUANTILES)
        }
        weight = get["count"] / get["count"].sum()
        weight = weight.reshape(-1, *[1] * (get["mean"].ndim - 1))
        mean = (get["mean"] * weight).sum(0)
        variance = ((get["std"] ** 2 + (get["mean"] - mean) ** 2) * weight).sum(0)
        joined = {"min": get["min"].min(0), "max": get["max"].max(0), "mean": mean, "std": np.sqrt(variance)}
        joined |= {"count": get["count"].sum(0).astype(int), **{q: (get[q] * weight).sum(0) for q in QUANTILES}}
        found[name] = {key: np.asarray(value).tolist() for key, value in joined.items()}
    return found


def _features(store: EpisodeStore, videos: dict[str, _VideoFiles]) -> Iterator[tuple[str, dict[str, Any]]]:
    for camera in store.embodiment.cameras:
        about = {"shape": list(camera.shape), "names": ["height", "width", "channels"]}
        if camera.name in videos:
            yield _key(camera.name), {"dtype": "video", **about, "info": videos[camera.name].info()}
        else:
            yield _key(camera.name), {"dtype": "image", **about}
    for field, name in _fields(store).items():
        spec, dim = store.schema.field(field), store.schema.columns(field)
        names = list(spec.names) if len(spec.names) == dim else None
        yield name, {"dtype": np.dtype(spec.dtype).name, "shape": [dim], "names": names}
    for name in INDEX_COLUMNS:
        yield name, {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}


def _write_meta(
    out: Path,
    store: EpisodeStore,
    rows: Sequence[dict[str, Any]],
    tasks: dict[str, int],
    total: int,
    videos: dict[str, _VideoFiles],
) -> None:
    hz = store.embodiment.control_hz
    info = {
        "codebase_version": "v3.0",
        "fps": int(hz) if hz == int(hz) else hz,
        "features": dict(_features(store, videos)),
        "total_episodes": len(rows),
        "total_frames": total,
        "total_tasks": len(tasks),
        "chunks_size": CHUNK,
        "data_files_size_in_mb": DATA_MB,
        "video_files_size_in_mb": VIDEO_MB,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if videos else None,
        "robot_type": store.embodiment.robot,
        "splits": {"train": f"0:{len(rows)}"},
    }
    (out / "meta" / "info.json").write_text(json.dumps(info, indent=4) + "\n")
    (out / "meta" / "stats.json").write_text(json.dumps(_joined(rows), indent=4) + "\n")
    target = out / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    target.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), target)
    about = [(name, {"task_index": "int64", "task": "unicode"}[name]) for name in ("task_index", "task")]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}],
        "columns": [
            {"name": n, "field_name": n, "pandas_type": k, "numpy_type": "int64" if k == "int64" else "object"}
            for n, k in about
        ],
        "pandas_version": "2.3.3",
    }
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), out / "meta" / "tasks.parquet")
