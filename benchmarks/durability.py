"""Kills recorders and conversions at random moments and counts what is lost, into ``results/durability.json``.

Type: .venv/bin/python benchmarks/durability.py [--kills 200] [--seconds 30]

1. A recorder that syncs nothing away is killed by SIGKILL; every episode it had reported must be in the store, every
   step of the one that broke off that it had reported too, and every frame must be what was given.
2. A conversion is killed and typed again until it is done; it must end with what an uninterrupted one ends with.
3. Two writers and a reader share a store for some seconds; every snapshot must be readable as a whole.

SIGKILL is not a power cut: what the kernel holds survives it. The tests cut files short to stand in for that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
from demo_controls import ROOT

from brachium.console import progress
from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import BrachiumError
from brachium.hardware import processor
from brachium.spec import EmbodimentSpec, FeatureSpec

TARGET = ROOT / "benchmarks" / "results" / "durability.json"
SIDE = 48
EMBODIMENT = EmbodimentSpec(
    name="bench_arm",
    robot="bench",
    control_hz=30.0,
    cameras=tuple(FeatureSpec(name=c, shape=(SIDE, SIDE, 3), dtype="uint8") for c in ("front", "wrist")),
    state=FeatureSpec(name="state", shape=(2,), names=("episode", "step"), units=("1", "1")),
    action=FeatureSpec(name="action", shape=(2,), names=("a", "b"), units=("1", "1")),
)
PROLOGUE = f"""
import random, sys, time
import numpy as np
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
def picture(episode, step):
    return np.full(({SIDE}, {SIDE}, 3), (episode * 31 + step * 7) % 256, np.uint8)
def steps(episode, draw):
    for step in range(draw.randint(2, 40)):
        image = picture(episode, step)
        yield dict(images=dict(front=image, wrist=255 - image), state=[episode, step], action=[step, episode])
"""
RECORDER = PROLOGUE + textwrap.dedent("""
    path, first, pause, per_segment = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(first)
    with EpisodeWriter(EpisodeStore.open(path), episodes_per_segment=per_segment) as writer:
        print("ready", flush=True)
        for episode in range(first, first + 100000):
            writer.begin("count", meta={"number": episode})
            for step in steps(episode, draw):
                writer.step(**step)
                print("step", episode, int(step["state"][1]), flush=True)
                time.sleep(pause * draw.random())
            writer.end(True)
            print("ended", episode, flush=True)
""")
CONVERTER = textwrap.dedent("""
    import sys
    from brachium.datasets import convert as module
    from brachium.datasets.formats.hdf5 import Hdf5Importer
    from brachium.spec import EmbodimentSpec
    import json, pathlib
    module.SEGMENT = 8
    data = Hdf5Importer(embodiment=EmbodimentSpec.from_dict(json.loads(pathlib.Path(sys.argv[3]).read_text())),
                        group="demo_*", state=["state"], action=["action"], instruction="count")
    print("ready", flush=True)
    module.convert(source=sys.argv[1], out=sys.argv[2], data=data)
""")


def start(code: str, *words: object) -> subprocess.Popen[str]:
    """A child that runs `code`; it has printed its first line."""
    command = [sys.executable, "-c", code, *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def wrong_steps(store: EpisodeStore, index: int) -> int:
    """How many steps of an episode are not what the recorder gave."""
    episode, number = store.episode(index), store.episodes[index].meta["number"]
    wrong = 0
    for t in range(len(episode)):
        value = (number * 31 + t * 7) % 256
        fits = episode.state[t].tolist() == [number, t] and episode.action[t].tolist() == [t, number]
        wrong += not (
            fits
            and np.abs(episode.images["front"][t].astype(int) - value).max() <= 2
            and np.abs(episode.images["wrist"][t].astype(int) - (255 - value)).max() <= 2
        )
    return wrong


def kill_recorders(folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill recorders, `kills` times; a fresh store every twentieth."""
    found = dict.fromkeys(
        ("kills", "reported", "lost", "unopenable", "wrong_steps", "torn", "torn_saved", "steps_lost"), 0
    )
    with progress("killing recorders", total=kills, unit="kills") as bar:
        for number in range(kills):
            if number % 20 == 0:
                store = EpisodeStore.create(folder / f"recorded{number}", StoreSchema(embodiment=EMBODIMENT))
                audited = 0
            per_segment = draw.choice((1, 1, 4))
            child = start(RECORDER, store.path, number * 1000, draw.choice((0.0, 0.002, 0.01)), per_segment)
            time.sleep(draw.random() * 0.6)
            child.send_signal(signal.SIGKILL)
            said = [line.split() for line in child.communicate()[0].splitlines()]
            found["kills"] += 1
            ended = {int(words[1]) for words in said if words[0] == "ended" and len(words) == 2}
            steps: dict[int, int] = {}
            for words in said:
                if words[0] == "step" and len(words) == 3:
                    steps[int(words[1])] = int(words[2]) + 1
            try:
                EpisodeWriter(store.refresh()).close()  # saves what is whole
                store = store.refresh()
                there = {e.meta["number"]: e for e in store.episodes}
                for index in range(audited, store.num_episodes):
                    found["wrong_steps"] += wrong_steps(store, index)
                audited = store.num_episodes
            except BrachiumError as error:
                print(error, file=sys.stderr)
                found["unopenable"] += 1
                continue
            found["reported"] += len(ended)
            found["lost"] += len([k for k in ended if k not in there])
            for episode in set(steps) - ended:
                found["torn"] += 1
                length = there[episode].length if episode in there else 0
                found["torn_saved"] += bool(length)
                found["steps_lost"] += max(0, steps[episode] - length)
            bar.update(1, lost=found["lost"])
    return found


def kill_conversions(folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill conversions and type them again, until `kills` were killed."""
    import h5py

    source, spec = folder / "source.hdf5", folder / "spec.json"
    data = EMBODIMENT.to_dict()
    spec.write_text(json.dumps(data))
    rng = np.random.default_rng(0)
    with h5py.File(source, "w") as file:
        for k in range(150):
            n = int(rng.integers(5, 30))
            group = file.create_group(f"demo_{k}")
            group["state"], group["action"] = rng.standard_normal((n, 2)), rng.standard_normal((n, 2))
            for camera in ("front", "wrist"):
                group[camera] = rng.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    begin = time.monotonic()
    start(CONVERTER, source, folder / "whole", spec).wait()
    took = time.monotonic() - begin
    whole = EpisodeStore.open(folder / "whole")
    found = {"kills": 0, "finished": 0, "different": 0, "leftovers": 0}
    with progress("killing conversions", total=kills, unit="kills") as bar:
        while found["kills"] < kills:
            out = folder / f"converted{found['finished']}"
            child = start(CONVERTER, source, out, spec)
            time.sleep(draw.random() * took * 0.6)
            if child.poll() is None and found["kills"] < kills:
                child.send_signal(signal.SIGKILL)
                found["kills"] += 1
                bar.update(1)
            child.communicate()
            if out.exists():
                found["finished"] += 1
                found["different"] += not same(whole, EpisodeStore.open(out))
                found["leftovers"] += len(list(folder.glob(f".{out.name}*")))
                shutil.rmtree(out)
    return found


def same(one: EpisodeStore, two: EpisodeStore) -> bool:
    """Whether two stores hold the same steps in the same order."""
    if [e.length for e in one.episodes] != [e.length for e in two.episodes]:
        return False
    frames = np.arange(one.total_frames)
    return all(np.array_equal(one.lowdim(f), two.lowdim(f)) for f in one.schema.fields) and all(
        np.array_equal(one.read_images(c, frames), two.read_images(c, frames)) for c in one.embodiment.camera_names
    )


def share(folder: Path, seconds: float) -> dict[str, Any]:
    """Two writers and a reader on one store."""
    store = EpisodeStore.create(folder / "shared", StoreSchema(embodiment=EMBODIMENT))
    writers = [start(RECORDER, store.path, first, 0.0, 1) for first in (0, 1_000_000)]
    found = {"seconds": seconds, "snapshots": 0, "torn_reads": 0, "episodes": 0}
    end = time.monotonic() + seconds
    drains = [subprocess.Popen(["cat"], stdin=w.stdout, stdout=subprocess.DEVNULL) for w in writers]
    try:
        seen = 0
        with progress("two writers, one reader", unit="snapshots") as bar:
            while time.monotonic() < end:
                try:
                    now = store.refresh()
                    found["torn_reads"] += sum(wrong_steps(now, i) > 0 for i in range(seen, now.num_episodes))
                    found["torn_reads"] += now.num_episodes < seen
                    seen = now.num_episodes
                except BrachiumError as error:
                    print(error, file=sys.stderr)
                    found["torn_reads"] += 1
                found["snapshots"] += 1
                bar.update(1)
    finally:
        for child in (*writers, *drains):
            child.kill()
            child.wait()
    found["episodes"] = seen
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all: half recorders, half conversions")
    parser.add_argument("--seconds", type=float, default=30.0, help="of two writers and a reader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="durability-") as name:
        folder = Path(name)
        results = {
            "machine": f"{os.cpu_count()} cores, {processor()}",
            "recorders": kill_recorders(folder, options.kills // 2, draw),
            "conversions": kill_conversions(folder, options.kills - options.kills // 2, draw),
            "shared": share(folder, options.seconds),
        }
    TARGET.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
