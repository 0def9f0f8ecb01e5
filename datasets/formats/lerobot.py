"""LeRobot data sets, v2.1 and v3, read without lerobot: parquet by pyarrow, videos by PyAV, from front to back.

The layout is that of lerobot 0.6 (``codebase_version`` "v3.0": many episodes a file) and of its predecessor ("v2.1": a
file an episode). Frames of a video come back as LeRobotDataset decodes them with its ``pyav`` backend, bit for bit.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import NotFoundError, SpecMismatchError, StoreError, did_you_mean
from ...spec import EmbodimentSpec
from .base import ImportedEpisode, ImportedStep
from .draft import ask_for_embodiment
from .video import VideoFrames

VERSIONS = ("v2.1", "v3.0")
PREFIX = "observation.images."
SIDECAR = "brachium.json"
"""File in ``meta/`` for what LeRobot has no place for."""


@dataclass(frozen=True, kw_only=True)
class LerobotImporter:
    """Maps features of a LeRobot data set to an embodiment.

    Attributes:
        embodiment: What the data means. Without it the error says what to fill in.
        images: Camera -> feature; by default camera ``front`` is ``observation.images.front``.
        state: Feature of the state.
        action: Feature of the action.
        success: Label of every episode; None when the data does not say.
        tags: Labels of every episode.
        recorded_hz: Steps a second in truth, where the data set's own ``fps`` is known to be wrong; None to believe it.
    """

    embodiment: EmbodimentSpec | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    state: str = "observation.state"
    action: str = "action"
    success: bool | None = None
    tags: Sequence[str] = ()
    recorded_hz: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.embodiment, Mapping):
            object.__setattr__(self, "embodiment", EmbodimentSpec.from_dict(self.embodiment))

    def embodiment_of(self, source: Path) -> EmbodimentSpec:
        """Return the embodiment that was given, or that `LerobotExporter` noted."""
        return self._checked(_read_info(source), source)

    def count(self, source: Path) -> int | None:
        """Return the number of episodes that meta/info.json states."""
        return int(_read_info(source)["total_episodes"])

    def read(self, source: Path, first: int = 0) -> Iterator[ImportedEpisode]:
        """Yield the episodes from `first` on, in order of their number; see `EpisodeImporter.read`."""
        info = _read_info(source)
        self._checked(info, source)
        videos: dict[Path, VideoFrames] = {}
        tables: dict[Path, pa.Table] = {}
        texts, noted = _tasks(source, info), _noted(source).get("episodes", [])
        for position, about in enumerate(_episodes(source, info)):  # numbers may have gaps
            if position >= first:
                episode = self._episode(source, info, about, texts, videos, tables)
                if len(noted) == info["total_episodes"]:  # what was exported comes back with its labels
                    labels = noted[position]
                    tags, meta = tuple(labels["tags"]), {**labels["meta"], **episode.meta}
                    episode = replace(episode, success=labels["success"], tags=(*tags, *episode.tags), meta=meta)
                yield episode

    def _cameras(self, info: Mapping[str, Any]) -> dict[str, str]:
        if self.images:
            return dict(self.images)
        names = [name for name, f in info["features"].items() if _is_picture(f)]
        return {name.removeprefix(PREFIX).rpartition(".")[2]: name for name in names}

    def _checked(self, info: Mapping[str, Any], source: Path) -> EmbodimentSpec:
        """The embodiment; raises SpecMismatchError unless the mapped features are there and fit it."""
        features = info["features"]
        cameras = self._cameras(info)
        for name in (self.state, self.action, *cameras.values()):
            if name not in features:
                raise SpecMismatchError(f"{source} has no feature {name!r}. {did_you_mean(name, features)}")
        spec = self.embodiment
        if spec is None and "embodiment" in (noted := _noted(source)):
            spec = EmbodimentSpec.from_dict(noted["embodiment"])
        if spec is None:
            raise ask_for_embodiment(
                source,
                "lerobot",
                control_hz=float(info["fps"]),
                robot=info.get("robot_type"),
                cameras={camera: features[name]["shape"] for camera, name in cameras.items()},
                state=_elements(features[self.state]),
                action=_elements(features[self.action]),
            )
        if set(cameras) != set(spec.camera_names):
            raise SpecMismatchError(
                f"{source} has cameras {sorted(cameras)}, the embodiment {sorted(spec.camera_names)}: name those that "
                "are wanted in images={CAMERA: FEATURE} and embodiment.cameras"
            )
        wanted = [(self.state, spec.state.shape), (self.action, spec.action.shape)]
        wanted += [(name, spec.camera(camera).shape) for camera, name in cameras.items()]
        for name, shape in wanted:
            if tuple(features[name]["shape"]) != shape:
                raise SpecMismatchError(
                    f"{source}: feature {name!r} has shape {features[name]['shape']}, expected {shape}"
                )
        hz = self.recorded_hz or float(info["fps"])
        if hz != spec.control_hz:
            raise SpecMismatchError(
                f"{source} was recorded at {hz:g} Hz, embodiment.control_hz={spec.control_hz}. Where the data "
                f"set is wrong about that, type: data.recorded_hz={spec.control_hz:g}"
            )
        return spec

    def _episode(
        self,
        source: Path,
        info: Mapping[str, Any],
        about: Mapping[str, Any],
        texts: Mapping[int, str],
        videos: dict[Path, VideoFrames],
        tables: dict[Path, pa.Table],
    ) -> ImportedEpisode:
        number, path = int(about["episode_index"]), source / about["data"]
        if path not in tables:
            tables.clear()  # one file at a time: they hold a hundred megabytes
            tables[path] = _read_table(path)
        table = tables[path].filter(pa.compute.equal(tables[path]["episode_index"], number))
        if table.num_rows != about["length"]:
            raise StoreError(f"{path} has {table.num_rows} steps of episode {number}, expected {about['length']}")
        wanted = {source / file for file, _ in about["videos"].values()}
        for file in [file for file in videos if file not in wanted]:
            del videos[file]
        for file in wanted - set(videos):
            videos[file] = VideoFrames(file, float(info["fps"]))
        tasks = table["task_index"].to_pylist()
        said = list(dict.fromkeys(texts.get(index, "") for index in tasks))
        meta: dict[str, Any] = {"episode_index": number}
        if len(said) > 1:
            meta["tasks"] = said
        subtasks = _subtasks(source, table)
        if subtasks:
            meta["subtasks"] = [[round(time * self._stretch(info), 4), words] for time, words in subtasks]
        return ImportedEpisode(
            instruction=said[0] if said else "",
            steps=self._steps(source, info, about, table, videos),
            success=self.success,
            tags=tuple(self.tags),
            meta=meta,
        )

    def _steps(
        self,
        source: Path,
        info: Mapping[str, Any],
        about: Mapping[str, Any],
        table: pa.Table,
        videos: Mapping[Path, VideoFrames],
    ) -> Iterator[ImportedStep]:
        state, action = _matrix(table, self.state), _matrix(table, self.action)
        times = np.asarray(table["timestamp"].to_numpy(), np.float64)
        cameras = self._cameras(info)
        pictures = {c: table[name].to_pylist() for c, name in cameras.items() if name not in about["videos"]}
        for t in range(table.num_rows):
            images: dict[str, Any] = {}
            for camera, name in cameras.items():
                if camera in pictures:
                    images[camera] = _still(pictures[camera][t], source)
                else:
                    file, start = about["videos"][name]
                    images[camera] = videos[source / file][round(start * float(info["fps"])) + t]
            time = float(times[t] - times[0]) * self._stretch(info)
            yield ImportedStep(images=images, state=state[t], action=action[t], timestamp=time)

    def _stretch(self, info: Mapping[str, Any]) -> float:
        """Seconds that passed for each second of the data set's own."""
        return float(info["fps"]) / self.recorded_hz if self.recorded_hz else 1.0


def _read_info(source: Path) -> dict[str, Any]:
    path = source / "meta" / "info.json"
    if not path.is_file():
        raise NotFoundError(f"no LeRobot data set at {source}: expected a folder with meta/info.json")
    try:
        info: dict[str, Any] = json.loads(path.read_bytes())
        version = info["codebase_version"]
        for key in ("fps", "features", "total_episodes", "data_path", "chunks_size"):
            info[key]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error!r}") from error
    if version not in VERSIONS:
        raise StoreError(f"{source} has version {version!r}; {' and '.join(VERSIONS)} are read")
    return info


def _noted(source: Path) -> dict[str, Any]:
    """What `LerobotExporter` wrote beside what LeRobot has a place for."""
    try:
        noted: dict[str, Any] = json.loads((source / "meta" / SIDECAR).read_bytes())
        return noted
    except (OSError, ValueError):
        return {}


def _is_picture(feature: Mapping[str, Any]) -> bool:
    depth = feature.get("info", {}).get("is_depth_map") or feature.get("info", {}).get("video.is_depth_map")
    return feature["dtype"] in ("video", "image") and not depth


def _elements(feature: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Number of elements, and their names where they are said (as a list, or under a heading)."""
    names = feature.get("names") or []
    if isinstance(names, Mapping):
        names = [name for some in names.values() for name in (some if isinstance(some, list) else [some])]
    return int(feature["shape"][0]), [str(name) for name in names]


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} is missing, or no parquet file: {error}") from error


def _tasks(source: Path, info: Mapping[str, Any]) -> dict[int, str]:
    """Number of a task -> its words."""
    if info["codebase_version"] == "v2.1":
        rows = _json_lines(source / "meta" / "tasks.jsonl")
        return {int(row["task_index"]): str(row["task"]) for row in rows}
    table = _read_table(source / "meta" / "tasks.parquet")
    words = "task" if "task" in table.column_names else "__index_level_0__"
    return dict(zip(table["task_index"].to_pylist(), table[words].to_pylist()))


def _subtasks(source: Path, table: pa.Table) -> list[list[Any]]:
    """[seconds since the episode began, words] of every subtask, in either way that lerobot keeps them."""
    times = table["timestamp"].to_pylist()
    if "language_persistent" in table.column_names:  # 0.6: the same list of styled texts in every row
        rows = table["language_persistent"][0].as_py() or []
        found = [(row["timestamp"] - times[0], row["content"]) for row in rows if row["style"] == "subtask"]
        return [[round(time, 4), words] for time, words in sorted(found)]
    if "subtask_index" not in table.column_names:
        return []
    texts = _read_table(source / "meta" / "subtasks.parquet")
    column = "subtask" if "subtask" in texts.column_names else "__index_level_0__"
    words = dict(zip(texts["subtask_index"].to_pylist(), texts[column].to_pylist()))
    numbers = table["subtask_index"].to_pylist()
    changes = [t for t in range(len(numbers)) if t == 0 or numbers[t] != numbers[t - 1]]
    return [[round(times[t] - times[0], 4), words.get(numbers[t], "")] for t in changes]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is missing or damaged: {error}") from error


def _episodes(source: Path, info: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Episode after episode: number, length, data file, and (video file, start [s]) a feature."""
    features = [name for name, f in info["features"].items() if f["dtype"] == "video"]
    if info["codebase_version"] == "v2.1":
        for row in sorted(_json_lines(source / "meta" / "episodes.jsonl"), key=lambda row: row["episode_index"]):
            number = int(row["episode_index"])
            place = {"episode_chunk": number // int(info["chunks_size"]), "episode_index": number}
            videos = {name: (Path(info["video_path"].format(video_key=name, **place)), 0.0) for name in features}
            data = info["data_path"].format(**place)
            yield {"episode_index": number, "length": int(row["length"]), "data": data, "videos": videos}
        return
    files = sorted((source / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise StoreError(f"{source} has no meta/episodes: it was never finalized, or is not whole. Get it again")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for name in features:
        columns += [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
    for file in files:
        for row in sorted(_read_table(file).select(columns).to_pylist(), key=lambda row: row["episode_index"]):
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            videos = {}
            for name in features:
                where = {key: row[f"videos/{name}/{key}"] for key in ("chunk_index", "file_index")}
                path = Path(info["video_path"].format(video_key=name, **where))
                videos[name] = path, float(row[f"videos/{name}/from_timestamp"])
            data = info["data_path"].format(**place)
            yield {"episode_index": row["episode_index"], "length": row["length"], "data": data, "videos": videos}


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of vectors, or of numbers, as float32 (n, d)."""
    values = np.asarray(table[name].to_pylist(), np.float32)
    return values.reshape(len(values), -1)


def _still(value: Mapping[str, Any], source: Path) -> bytes | np.ndarray:
    """A picture of an image feature: JPEG as it is, anything else decoded."""
    data = value["bytes"]
    if data is None:
        data = (source / value["path"]).read_bytes()
    if data[:2] == b"\xff\xd8":
        return bytes(data)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
