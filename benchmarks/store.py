"""The episode store against its peers, on the same frames. Figures go to ``benchmarks/results/store.json``.

Type: .venv/bin/python benchmarks/store.py [random loader write memory index remote]   (all by default)

All readers of a part run in one process, on one thread unless said otherwise, in interleaved rounds; a ratio is the
median over rounds. Windows a CPU second count the time of all threads of the process; windows a second the clock's.
A window is one frame of two cameras, the state, and sixteen actions.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
from demo_controls import OUT, ROOT, brachium

from brachium.console import log, table
from brachium.datasets.store import EpisodeStore
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.hardware import processor

FOLDER = OUT / "bench-store"
TARGET = ROOT / "benchmarks" / "results" / "store.json"
SIZES = (128, 224)
CHUNK, EPISODES = 16, 24
LATENCY_S = 0.02
Reader = Callable[[np.ndarray], object]


def data(size: int) -> EpisodeStore:
    """Demonstrations with two cameras of `size` pixels."""
    path = (FOLDER / f"store-{size}").relative_to(ROOT)
    brachium("record", "env=tabletop/place", f"env.embodiment.image_size={size}", f"out={path}", f"episodes={EPISODES}")
    return EpisodeStore.open(ROOT / path)


def use_bundled_ffmpeg() -> bool:
    """Let torchcodec find the FFmpeg that comes with PyAV, where the system has none; must come before it is imported.

    Returns:
        Whether it can be loaded.
    """
    import av

    libraries = Path(av.__file__).parent.parent / "av.libs"
    links = FOLDER / "ffmpeg"
    links.mkdir(parents=True, exist_ok=True)
    for file in libraries.glob("lib*.so*"):
        name = file.name.partition("-")[0]
        version = file.name.partition(".so.")[2].partition(".")[0]
        target = links / f"{name}.so.{version}"
        if not target.exists():
            target.symlink_to(file)
    if str(links) not in os.environ.get("LD_LIBRARY_PATH", ""):
        path = f"{links}:{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_LIBRARY_PATH": path})
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def export(size: int, video: str) -> Path:
    """The same episodes as a LeRobot data set."""
    path = FOLDER / f"lerobot-{video}-{size}"
    store = (FOLDER / f"store-{size}").relative_to(ROOT)
    if not path.exists():
        brachium("export", f"store={store}", f"out={path.relative_to(ROOT)}", f"format.video={video}")
    return path


def hdf5(store: EpisodeStore, size: int) -> Path:
    """The same steps as robomimic keeps them, uncompressed."""
    import h5py

    path = FOLDER / f"plain-{size}.hdf5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            for index in range(store.num_episodes):
                episode = store.episode(index)
                group = file.create_group(f"data/demo_{index}")
                for camera in store.embodiment.camera_names:
                    group[f"obs/{camera}"] = episode.images[camera]
                group["obs/state"], group["actions"] = episode.state, episode.action
    return path


def readers(store: EpisodeStore, size: int) -> dict[str, Reader]:
    """Name -> what reads some windows by their number."""
    import h5py
    import simplejpeg
    import zarr

    cameras = store.embodiment.camera_names
    total = store.total_frames
    owners, steps = store.locate(np.arange(total))
    streams = {c: [store.jpeg_bytes(c, k) for k in range(total)] for c in cameras}
    buffers = {c: np.empty(store.embodiment.camera(c).shape, np.uint8) for c in cameras}

    def limit(chosen: np.ndarray) -> None:
        for k in chosen.tolist():
            for camera in cameras:
                simplejpeg.decode_jpeg(streams[camera][k], "RGB", buffer=buffers[camera])

    windows = WindowDataset(store, WindowSpec(action_horizon=CHUNK))

    def single(chosen: np.ndarray) -> None:
        for k in chosen.tolist():
            windows.batch([k])

    def batches(chosen: np.ndarray) -> None:
        for first in range(0, len(chosen), 64):
            windows.batch(chosen[first : first + 64])

    ring = {n: np.empty(*about) for n, about in windows.buffers(64).items()}

    def reused(chosen: np.ndarray) -> None:
        for first in range(0, len(chosen), 64):
            some = chosen[first : first + 64]
            windows.batch(some, out={n: a[: len(some)] for n, a in ring.items()})

    segments = [zarr.open_group(store.path / "segments" / e.segment, mode="r") for e in store.episodes]
    arrays = [
        {**{c: g[f"images/{c}"] for c in cameras}, "state": g["lowdim/state"], "action": g["lowdim/action"]}
        for g in segments
    ]

    def zarr_python(chosen: np.ndarray) -> None:
        for k in chosen.tolist():
            own, step = arrays[int(owners[k])], int(steps[k])
            for camera in cameras:
                own[camera][step]
            own["state"][step]
            own["action"][step : step + CHUNK]

    file = h5py.File(hdf5(store, size), "r")
    groups = [file[f"data/demo_{k}"] for k in range(store.num_episodes)]
    offsets = store.offsets

    def plain_hdf5(chosen: np.ndarray) -> None:
        for k in chosen.tolist():
            group, step = groups[int(owners[k])], k - int(offsets[owners[k]])
            for camera in cameras:
                group[f"obs/{camera}"][step]
            group["obs/state"][step]
            group["actions"][step : step + CHUNK]

    found = {"decode from memory": limit, "ours": reused, "ours, fresh memory": batches, "ours, one by one": single}
    found |= {"zarr-python, same files": zarr_python, "HDF5, uncompressed": plain_hdf5}
    return found | {f"LeRobot video, {b}": items(lerobot(size, b)) for b in backends()}


def backends() -> list[str]:
    """Video backends of LeRobot that run here."""
    return ["torchcodec", "pyav"] if use_bundled_ffmpeg() else ["pyav"]


def lerobot(size: int, backend: str) -> Any:
    """The data set as LeRobot opens it, with the same windows."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = export(size, "av1")
    deltas = {"action": [k / 10 for k in range(CHUNK)]}
    return LeRobotDataset("bench/store", root=root, delta_timestamps=deltas, video_backend=backend)


def items(dataset: Any) -> Reader:
    """A reader of single items."""

    def read(chosen: np.ndarray) -> None:
        for k in chosen.tolist():
            dataset[k]

    return read


def timed(read: Reader, chosen: np.ndarray) -> tuple[float, float]:
    """Windows a CPU second and a second."""
    cpu, wall = time.process_time(), time.perf_counter()
    read(chosen)
    return len(chosen) / (time.process_time() - cpu), len(chosen) / (time.perf_counter() - wall)


def compare(found: dict[str, Reader], total: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Interleaved rounds; every reader reads for about `seconds` a round, other windows each time."""
    rng = np.random.default_rng(0)
    counts = {}
    for name, read in found.items():
        timed(read, rng.integers(0, total, 8))
        counts[name] = int(max(8, min(20000, seconds * timed(read, rng.integers(0, total, 32))[1])))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for number in range(rounds):
        for name, read in found.items():
            rates[name].append(timed(read, rng.integers(0, total, counts[name])))
        log(f"round {number + 1} of {rounds}")
    result = {}
    for name, some in rates.items():
        ours = [(a / c, b / d) for (a, b), (c, d) in zip(rates["ours"], some)]
        result[name] = {
            "per_cpu_s": statistics.median(r[0] for r in some),
            "per_s": statistics.median(r[1] for r in some),
            "ours_x_cpu": statistics.median(r[0] for r in ours),
            "ours_x": statistics.median(r[1] for r in ours),
        }
    return result


def show(title: str, result: dict[str, Any]) -> None:
    """Print one table of readers."""
    rows = [
        [n, f"{r['per_cpu_s']:.0f}", f"{r['per_s']:.0f}", f"{r['ours_x_cpu']:.2f}", f"{r['ours_x']:.2f}"]
        for n, r in result.items()
    ]
    table(title, ["reader", "windows a CPU second", "windows a second", "ours is x (CPU)", "ours is x"], rows)


def random_windows(options: argparse.Namespace) -> dict[str, Any]:
    """Random windows, reader by reader, and what they take on the disk."""
    result: dict[str, Any] = {}
    for size in SIZES:
        store = data(size)
        found = compare(readers(store, size), store.total_frames, options.rounds, options.seconds)
        show(f"random windows, {size} px", found)
        disk = {"ours": store.path / "segments", "LeRobot video": export(size, "av1"), "HDF5": hdf5(store, size)}
        bytes_ = {name: _bytes(path) for name, path in disk.items()}
        result[str(size)] = {"readers": found, "bytes": bytes_, "disk_x_av1": bytes_["ours"] / bytes_["LeRobot video"]}
    return result


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())


def loader(options: argparse.Namespace) -> dict[str, Any]:
    """Shuffled batches of 64, normalised, as float32 tensors: two threads of ours, two processes of LeRobot."""
    import torch

    from brachium.datasets.batch_reader import BatchReader, PixelScale
    from brachium.datasets.normalize import Normalizer
    from brachium.datasets.sampler import ShuffledSampler
    from brachium.datasets.statistics import compute_statistics

    size = SIZES[-1]
    store = data(size)
    windows = WindowDataset(store, WindowSpec(action_horizon=CHUNK))
    stats = compute_statistics(store)
    scale = {f: Normalizer(mode="mean_std", statistics=stats[f]) for f in ("state", "action")}
    sampler = ShuffledSampler(len(windows), 64, 0)

    def ours(count: int) -> None:
        pixels = PixelScale(0.5, 0.25)
        with BatchReader(windows, sampler.batch, steps=count, threads=2, scale=pixels) as batches:
            for batch in batches:
                arrays = [scale["state"].normalize(batch.state), scale["action"].normalize(batch.action)]
                for array in (*arrays, *batch.images.values()):
                    torch.from_numpy(array)

    dataset, epoch = lerobot(size, backends()[0]), 14
    draws = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=64 * epoch)
    theirs = torch.utils.data.DataLoader(  # forked workers would share the parent's open video files
        dataset, batch_size=64, sampler=draws, num_workers=2, persistent_workers=True, multiprocessing_context="spawn"
    )

    def lerobots(count: int) -> None:
        """One epoch of `count` batches, begun anew: nothing was fetched before the clock started."""
        seen = 0
        for batch in theirs:
            for key in ("observation.images.front", "observation.images.wrist"):
                batch[key].sub_(0.5).div_(0.25)
            seen += 1
        assert seen == count

    lerobots(epoch)  # the workers import and open for the first time
    ours(20)
    rates: dict[str, list[float]] = {"ours": [], "LeRobot": []}
    for _ in range(options.rounds):
        for name, run, count in (("ours", ours, 100), ("LeRobot", lerobots, epoch)):
            begin = time.perf_counter()
            run(count)
            rates[name].append(64 * count / (time.perf_counter() - begin))
    found = {name: statistics.median(some) for name, some in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["LeRobot"]))
    table(f"loader, {size} px", ["loader", "windows a second"], [[n, f"{v:.0f}"] for n, v in found.items()])
    print(f"ours is {ratio:.1f} x")
    return {"size": size, "windows_per_s": found, "ours_x": ratio, "lerobot_backend": backends()[0]}


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Recording the same frames, encoding included: frames of two cameras a CPU second."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from brachium.datasets.writer import EpisodeWriter

    result = {}
    for size in SIZES:
        store = data(size)
        episodes = [store.episode(k) for k in range(6)]
        pictures = [{c: e.images[c] for c in store.embodiment.camera_names} for e in episodes]
        total = sum(len(e) for e in episodes)
        features = {
            **{
                f"observation.images.{c}": {"dtype": "video", "shape": (size, size, 3), "names": ["h", "w", "c"]}
                for c in pictures[0]
            },
            "observation.state": {"dtype": "float32", "shape": store.embodiment.state.shape, "names": None},
            "action": {"dtype": "float32", "shape": store.embodiment.action.shape, "names": None},
        }

        def ours(folder: Path) -> None:
            made = EpisodeStore.create(folder, store.schema)  # noqa: B023
            with EpisodeWriter(made) as writer:
                for episode, shown in zip(episodes, pictures):  # noqa: B023
                    writer.begin("x")
                    for t in range(len(episode)):
                        writer.step({c: v[t] for c, v in shown.items()}, episode.state[t], episode.action[t])
                    writer.end(True)

        def theirs(folder: Path) -> None:
            made = LeRobotDataset.create("b/x", fps=10, features=features, root=folder, use_videos=True)  # noqa: B023
            for episode, shown in zip(episodes, pictures):  # noqa: B023
                for t in range(len(episode)):
                    frame = {f"observation.images.{c}": v[t] for c, v in shown.items()}
                    made.add_frame(
                        {**frame, "observation.state": episode.state[t], "action": episode.action[t], "task": "x"}
                    )
                made.save_episode()
            made.finalize()

        rates: dict[str, list[float]] = {"ours": [], "LeRobot video": []}
        for _ in range(options.rounds):
            for name, run in (("ours", ours), ("LeRobot video", theirs)):
                with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                    before = _cpu()
                    run(Path(folder) / "made")
                    rates[name].append(2 * total / (_cpu() - before))
        found = {name: statistics.median(some) for name, some in rates.items()}
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["LeRobot video"]))
        table(f"writing, {size} px", ["writer", "frames a CPU second"], [[n, f"{v:.0f}"] for n, v in found.items()])
        print(f"ours is {ratio:.1f} x")
        result[str(size)] = {"frames_per_cpu_s": found, "ours_x": ratio}
    return result


def _cpu() -> float:
    """CPU time of this process and of the children it has waited for [s]."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


MEMORY = textwrap.dedent("""
    import sys, psutil
    me = psutil.Process()
    base = me.memory_info().rss
    {imports}
    imported = me.memory_info().rss
    {work}
    print(base, imported, me.memory_info().rss)
""")


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of a fresh process: after the imports, and after a thousand windows."""
    size = SIZES[-1]
    store, theirs = data(size).path, export(size, "av1")
    ours = (
        "from brachium.datasets.store import EpisodeStore\n"
        "from brachium.datasets.window import WindowDataset, WindowSpec",
        f"w = WindowDataset(EpisodeStore.open({str(store)!r}), WindowSpec(action_horizon=16))\n"
        "for k in range(1000): w.batch([k * 7 % len(w)])",
    )
    other = (
        "from lerobot.datasets.lerobot_dataset import LeRobotDataset",
        f"d = LeRobotDataset('b/x', root={str(theirs)!r}, video_backend='pyav')\n"
        "for k in range(200): d[k * 7 % len(d)]",
    )
    result = {}
    for name, (imports, work) in (("ours", ours), ("LeRobot", other)):
        code = MEMORY.format(imports=imports, work=work)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        base, imported, steady = (int(n) / 1e6 for n in done.stdout.split()[-3:])
        result[name] = {"import_mb": imported - base, "steady_mb": steady - base}
    table(
        "memory",
        ["library", "after import [MB]", "after reading [MB]"],
        [[n, f"{r['import_mb']:.0f}", f"{r['steady_mb']:.0f}"] for n, r in result.items()],
    )
    return result


INDEX = textwrap.dedent("""
    import sys, time, numpy as np
    from brachium.datasets.store import EpisodeStore

    def memory():
        with open("/proc/self/smaps_rollup") as file:
            kb = {line.split(":")[0]: int(line.split()[1]) for line in file if line.endswith("kB\\n")}
        return kb["Anonymous"] / 1e3, kb["Rss"] / 1e3

    base, begin = memory(), time.perf_counter()
    store = EpisodeStore.open(sys.argv[1])
    opened = time.perf_counter() - begin
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    frames = rng.integers(0, store.total_frames, 64)
    store.gather("state", frames)
    for camera in store.embodiment.camera_names:
        store.steps.images(camera).arrays["offset"][store.rows(frames)]
    first = time.perf_counter() - begin
    for _ in range(200):
        frames = rng.integers(0, store.total_frames, 64)
        store.gather("state", frames)
        store.steps.images("front").arrays["offset"][store.rows(frames)]
    now = memory()
    print(opened, first, now[0] - base[0], now[1] - base[1], store.total_frames, store.num_episodes)
""")


def index(options: argparse.Namespace) -> dict[str, Any]:
    """Ten million frames in fifty thousand episodes: opening, the first batch, and memory; the segments are made up."""
    from brachium.datasets import commitlog, segment_index
    from brachium.datasets.schema import StoreSchema

    path = FOLDER / "ten-million"
    episodes, length = 50_000, 200
    shutil.rmtree(path, ignore_errors=True)
    schema = StoreSchema(embodiment=data(SIZES[0]).embodiment)
    EpisodeStore.create(path, schema)
    for commit in range(1, 65):
        actions: list[dict[str, Any]] = []
        for k in range((commit - 1) * episodes // 64, commit * episodes // 64):
            about = {"frames": length, "digest": schema.embodiment.digest, "embodiment": schema.embodiment.name}
            actions.append({"action": "add_segment", "id": f"S{k:025d}", **about})
            record = {"id": f"E{k:025d}", "start": 0, "length": length, "instruction": f"task {k % 100}"}
            record |= {"success": True, "tags": ["bench"]}
            actions.append({"action": "add_episodes", "segment": f"S{k:025d}", "episodes": [record]})
        commitlog.commit(path, actions, after=commit - 1, fsync=False)
    store = EpisodeStore.open(path)
    rows = store.total_frames
    for name, arrays in {
        "state": {"values": np.zeros((rows, *schema.embodiment.state.shape), np.float32)},
        **{
            c: {"offset": np.arange(rows, dtype=np.uint64), "length": np.full(rows, 9000, np.uint32)}
            for c in schema.embodiment.camera_names
        },
    }.items():
        folder = path / "cache" / schema.embodiment.digest / name
        layouts = ["" if name == "state" else "jpeg 200"] * episodes
        segment_index._ColumnCache(folder, store.steps.ids).save(arrays, layouts)
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", INDEX, str(path)], capture_output=True, text=True, check=True)
        runs.append([float(x) for x in done.stdout.split()])
    opened, first, own, resident, frames, count = (min(some) for some in zip(*runs))
    found = {"open_s": opened, "first_batch_s": first, "own_mb": own, "resident_mb": resident}
    found |= {"frames": frames, "episodes": count}
    print(json.dumps(found, indent=1))
    shutil.rmtree(path)
    return found


class SlowFiles(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, each request after a pause, on connections that stay open."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        """Serve a file, or a part of it."""
        time.sleep(LATENCY_S)
        self.server.requests += 1  # type: ignore[attr-defined]
        try:
            with open(self.translate_path(self.path), "rb") as file:
                total, wanted = os.fstat(file.fileno()).st_size, self.headers.get("Range")
                first, last = 0, total - 1
                if wanted:
                    start, _, stop = wanted.removeprefix("bytes=").partition("-")
                    first = int(start) if start else max(0, total - int(stop))
                    last = min(int(stop), total - 1) if start and stop else total - 1
                file.seek(first)
                data = file.read(last - first + 1)
        except OSError:
            self.send_error(404)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(data)


def remote(options: argparse.Namespace) -> dict[str, Any]:
    """Windows of 128 px over HTTP with 20 ms a request: blocks against zarr-python with sixteen threads."""
    from concurrent.futures import ThreadPoolExecutor

    import zarr
    from zarr.storage import ObjectStore

    from brachium.datasets.remote import RemoteStore, object_store
    from brachium.datasets.streamer import BlockStreamer

    store = data(SIZES[0])
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *a, **k: SlowFiles(*a, directory=str(store.path), **k),  # type: ignore[arg-type]
    )
    server.requests = 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    spec = WindowSpec(action_horizon=CHUNK)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        far = RemoteStore(object_store(url), folder)
        with BlockStreamer(far, spec, batch_size=64, buffer=1024) as stream:
            next(stream)
            before, begin, count = server.requests, time.perf_counter(), 3000 // 64  # type: ignore[attr-defined]
            for _ in range(count):
                next(stream)
            taken = time.perf_counter() - begin
            made = server.requests - before  # type: ignore[attr-defined]
            result["blocks"] = {"per_s": 64 * count / taken, "requests_per_window": made / (64 * count)}
        far.close()
    owners, steps = store.locate(np.arange(store.total_frames))
    group = zarr.open_group(ObjectStore(object_store(url), read_only=True), mode="r")
    arrays = []
    for episode in store.episodes:
        own = group[f"segments/{episode.segment}"]
        names = {c: own[f"images/{c}"] for c in store.embodiment.camera_names}
        arrays.append({**names, "state": own["lowdim/state"], "action": own["lowdim/action"]})

    def window(k: int) -> None:
        own, step = arrays[int(owners[k])], int(steps[k])
        for camera in store.embodiment.camera_names:
            own[camera][step]
        own["state"][step]
        own["action"][step : step + CHUNK]

    chosen = np.random.default_rng(0).integers(0, store.total_frames, 300).tolist()
    before, begin = server.requests, time.perf_counter()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(window, chosen))
    taken, made = time.perf_counter() - begin, server.requests - before  # type: ignore[attr-defined]
    result["zarr-python, 16 threads"] = {"per_s": len(chosen) / taken, "requests_per_window": made / len(chosen)}
    result["ours_x"] = result["blocks"]["per_s"] / result["zarr-python, 16 threads"]["per_s"]
    server.shutdown()
    print(json.dumps(result, indent=1))
    return result


PARTS = {"random": random_windows, "loader": loader, "write": write, "memory": memory, "index": index, "remote": remote}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="a reader a round")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    os.chdir(ROOT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    use_bundled_ffmpeg()
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    results["machine"] = f"{os.cpu_count()} cores, {processor()}"
    for part in options.parts:
        results[part] = PARTS[part](options)
        TARGET.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
