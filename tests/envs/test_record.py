"""The verb `record`: whole stores after kills, exact seeds, no duplicates, and clear refusals."""

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from brachium.datasets.store import EpisodeStore
from brachium.envs import record as module
from brachium.envs.record import record
from brachium.envs.scenes import SceneSampler
from brachium.envs.tabletop import TabletopEnv
from brachium.envs.tasks.reach import Reach
from brachium.errors import BrachiumError, ConfigError, SpecMismatchError


@pytest.fixture
def quick(make_arm):
    """A factory that other processes can be given."""
    return partial(TabletopEnv, task=Reach(), embodiment=make_arm("arm6_ee"))


@pytest.fixture
def in_process(monkeypatch):
    """Record in this process: the worker itself, without starting others."""

    def run(make, out, name, seeds, workers, keep_failures):
        messages = queue.Queue()
        before = signal.getsignal(signal.SIGINT)
        try:
            for k in range(workers):
                module._worker(make, out, seeds[k::workers], keep_failures, messages, threading.Event())
        finally:
            signal.signal(signal.SIGINT, before)
        told = [messages.get_nowait() for _ in range(messages.qsize())]
        if errors := [value for kind, value in told if kind == "error"]:
            raise BrachiumError(errors[0])
        assert len(told) == len(seeds)
        return sum(kind == "failed" for kind, _ in told)

    monkeypatch.setattr(module, "_run_workers", run)


def seeds_of(path):
    return Counter(episode.meta["seed"] for episode in EpisodeStore.open(path).episodes)


def command(out, *overrides):
    words = ["record", "env=tabletop/reach", f"out={out}", *overrides]
    return [sys.executable, "-m", "brachium", *words]


def children(pid):
    """Ids of the living processes that `pid` started, and those they started."""
    found, parents = set(), {pid}
    stats = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            stats[int(entry.parent.name)] = int(fields[1])
    while parents:
        parents = {child for child, parent in stats.items() if parent in parents} - found
        found |= parents
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_command_killed_in_the_middle_is_typed_again_and_completes(tmp_path):
    out, episodes = tmp_path / "store", 100
    first = subprocess.Popen(command(out, f"episodes={episodes}", "seed=5", "workers=2"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while len(list(out.glob("_log/*.json"))) < 2:  # its making, and at least one commit
            assert first.poll() is None, "it ended before anything was committed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # so that it starts no process that is not on the list
        workers = children(first.pid)
    finally:
        first.kill()
        first.wait()
    while any((Path("/proc") / str(pid)).exists() for pid in workers):  # its processes end by themselves
        assert time.monotonic() < deadline, "workers of a killed command go on"
        time.sleep(0.05)
    left = None
    while left != (left := seeds_of(out)):  # nobody commits any more
        assert time.monotonic() < deadline, "somebody goes on committing"
        time.sleep(1.0)
    store = EpisodeStore.open(out)
    assert 0 < len(left) < episodes, "it was done before it was killed: ask for more episodes"
    assert set(left.values()) == {1}
    frames = store.read_images("front", np.arange(store.total_frames))
    assert frames.std() > 5
    again = subprocess.run(
        command(out, f"episodes={episodes}", "seed=5", "workers=2"), capture_output=True, text=True, check=True
    )
    said = re.search(rf"has (\d+) of {episodes} episodes", again.stdout + again.stderr)
    assert said is not None
    assert len(left) <= int(said[1]) < episodes, "and what a dead worker had recorded but not committed is saved"
    assert seeds_of(out) == Counter(range(5, 5 + episodes))


def test_each_asked_for_seed_once_however_often_it_is_typed(tmp_path, quick, in_process):
    out = tmp_path / "store"
    for first, count in ((0, 4), (0, 4), (2, 5)):
        assert record(env=quick, out=str(out), seed=first, episodes=count, workers=1) == 0
    assert seeds_of(out) == Counter(range(7))
    store = EpisodeStore.open(out)
    assert all(e.success and e.tags == ("reach", "expert") for e in store.episodes)


def test_the_number_of_workers_does_not_change_what_is_recorded(tmp_path, quick, in_process):
    stores = []
    for workers in (1, 2):
        out = tmp_path / f"store{workers}"
        record(env=quick, out=str(out), episodes=16, workers=workers)
        stores.append(EpisodeStore.open(out))
    found = [
        {e.meta["seed"]: (e.instruction, store.lowdim("action", [k]).tobytes(), store.lowdim("state", [k]).tobytes())}
        for store in stores
        for k, e in enumerate(store.episodes)
    ]
    one, two = ({k: v for d in found[i : i + 16] for k, v in d.items()} for i in (0, 16))
    assert len(one) == 16
    assert one == two


def test_what_a_killed_writer_finished_counts(tmp_path, quick, in_process, monkeypatch):
    """A segment that was published but not committed is adopted before seeds are counted, so none comes twice."""
    out = tmp_path / "store"
    record(env=quick, out=str(out), episodes=1, workers=1)
    code = (
        "import os\n"
        "from brachium.datasets import writer\n"
        "from brachium.envs import record\n"
        "writer.commitlog.commit = lambda *a, **k: os._exit(9)\n"
        "import sys, queue, threading\n"
        "from functools import partial\n"
        "from hydra import compose, initialize_config_module\n"
        "from hydra.utils import instantiate\n"
        "with initialize_config_module('brachium.conf', version_base='1.3'):\n"
        "    env = instantiate(compose('record', ['env=tabletop/reach']).env)\n"
        "options = dict(noise=0.3, noisy=0.8, drop=0.1)\n"
        "make = partial(record.make_source, env, options)\n"
        "record._worker(make, sys.argv[1], [1, 2], False, queue.Queue(), threading.Event())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert done.returncode == 9
    assert seeds_of(out) == Counter([0])  # a reader does not see it yet
    record(env=quick, out=str(out), episodes=4, workers=1)
    assert seeds_of(out) == Counter(range(4))


def test_scenes_of_one_seed_are_committed_together(tmp_path, make_arm, in_process, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 4)
    commits, flush = [], module.EpisodeWriter.flush

    def watched(self):
        flush(self)
        commits.append(dict(seeds_of(out)))

    monkeypatch.setattr(module.EpisodeWriter, "flush", watched)
    out = tmp_path / "store"
    env = partial(SceneSampler, tasks=(Reach(),), embodiment=make_arm("arm6_ee"), poses=3)
    record(env=env, out=str(out), episodes=5, workers=1)
    assert seeds_of(out) == Counter(dict.fromkeys(range(5), 3))
    assert len([c for c in commits if c]) >= 3
    for commit in commits:
        assert set(commit.values()) <= {3}, "half of a seed was committed"


def test_overwrite_starts_afresh_and_only_on_a_store(tmp_path, quick, in_process):
    out = tmp_path / "store"
    record(env=quick, out=str(out), episodes=3, workers=1)
    record(env=quick, out=str(out), episodes=2, seed=10, workers=1, overwrite=True)
    assert seeds_of(out) == Counter([10, 11])
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(BrachiumError):
        record(env=quick, out=str(precious), episodes=1, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_store_of_another_robot_is_refused_with_the_differences(tmp_path, quick, in_process, make_arm):
    out = tmp_path / "store"
    record(env=quick, out=str(out), episodes=1, workers=1)
    other = partial(TabletopEnv, task=Reach(), embodiment=make_arm("arm7_ee"))
    with pytest.raises(SpecMismatchError) as error:
        record(env=other, out=str(out), episodes=2, workers=1)
    assert str(out) in str(error.value)
    assert "state.shape" in str(error.value)
    assert seeds_of(out) == Counter([0])


def test_failures_are_left_out_unless_they_are_asked_for(tmp_path, make_arm, in_process):
    hopeless = partial(TabletopEnv, task=Reach(max_steps=1), embodiment=make_arm("arm6_ee"))
    record(env=hopeless, out=str(tmp_path / "none"), episodes=3, workers=1)
    assert EpisodeStore.open(tmp_path / "none").num_episodes == 0
    record(env=hopeless, out=str(tmp_path / "all"), episodes=3, workers=1, keep_failures=True)
    assert [e.success for e in EpisodeStore.open(tmp_path / "all").episodes] == [False] * 3


def test_an_error_in_a_worker_is_told_with_its_cause(tmp_path, quick, in_process, monkeypatch):
    monkeypatch.setattr(Reach, "expert", lambda *a: (_ for _ in ()).throw(ZeroDivisionError("no way")))
    with pytest.raises(BrachiumError, match="ZeroDivisionError: no way"):
        record(env=quick, out=str(tmp_path / "store"), episodes=1, workers=1)


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"workers": 0}, {"episodes": -3}])
def test_numbers_below_one_are_refused_before_anything_is_made(tmp_path, quick, wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        record(env=quick, out=str(tmp_path / "store"), **wrong)
    assert not (tmp_path / "store").exists()


def test_what_has_no_expert_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot record from dict"):
        record(env=dict, out=str(tmp_path / "store"))


def test_a_store_with_other_pictures_in_detail_is_gone_on_with_by_saying_so(tmp_path, make_arm, in_process):
    def make(details):
        return partial(SceneSampler, tasks=(Reach(),), embodiment=make_arm("arm6_ee"), poses=1, details=details)

    options = {"out": str(tmp_path / "s"), "episodes": 1, "workers": 1}
    record(env=make({"front": 48}), **options)
    with pytest.raises(SpecMismatchError, match=r"detail of {'front': 48}, .* of nothing. Type: env.details.front=48"):
        record(env=make({}), **{**options, "episodes": 2})
