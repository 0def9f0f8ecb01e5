"""What is saved of a recording that broke off, wherever it did."""

import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from brachium.datasets import layout, recovery
from brachium.datasets.journal import MAGIC, read_journal
from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError
from brachium.spec import FeatureSpec

from .conftest import make_embodiment

SCHEMA = StoreSchema(
    embodiment=make_embodiment(size=(8, 8)),
    extras=(FeatureSpec(name="force", shape=(2,)),),
    maps=(FeatureSpec(name="depth", shape=(4, 4, 1), dtype="uint16"),),
    optional=("wrist", "force"),
)
LENGTHS = (3, 2, 4)
"""Steps of the episodes; the last is never finished."""


def make_step(rng):
    images = {c: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for c in ("front", "wrist")}
    images["depth"] = rng.integers(0, 9, (4, 4, 1), dtype=np.uint16)
    extras = {"force": rng.standard_normal(2).astype(np.float32)}
    if rng.random() < 0.5:
        images.pop("wrist")
        extras.pop("force")
    state, action = rng.standard_normal(3).astype(np.float32), rng.standard_normal(2).astype(np.float32)
    return {"images": images, "state": state, "action": action, "extras": extras}


@pytest.fixture
def broken_off(tmp_path, monkeypatch):
    """A store whose only writer died in its third episode, the staging folder, and the steps by episode."""
    monkeypatch.setattr(layout, "SHARD_FRAMES", 4)
    store = EpisodeStore.create(tmp_path / "s", SCHEMA)
    rng, given = np.random.default_rng(0), []
    writer = EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=100)
    for number, length in enumerate(LENGTHS):
        writer.begin(f"task {number}", tags=("lab",), meta={"seed": number})
        given.append([make_step(rng) for _ in range(length)])
        for step in given[-1]:
            writer.step(**step)
        if number < 2:
            writer.end(number == 0)
    writer._segment.release()  # as the kernel does for a dead process
    [folder] = (store.path / "staging").iterdir()
    monkeypatch.undo()
    return store, folder, given


def check(store, given, lengths):
    """The store holds the first `lengths` steps of the episodes, as they were given."""
    store = store.refresh()
    assert [e.length for e in store.episodes] == lengths
    assert [e.meta["seed"] for e in store.episodes] == list(range(len(lengths)))
    for info, steps in zip(store.episodes, given):
        episode = store.episode(info.index)
        for t, step in enumerate(steps[: info.length]):
            np.testing.assert_array_equal(episode.state[t], step["state"])
            np.testing.assert_array_equal(episode.action[t], step["action"])
            np.testing.assert_array_equal(episode.extras["force"][t], step["extras"].get("force", np.nan))
            for name in ("front", "wrist", "depth"):
                np.testing.assert_array_equal(episode.images[name][t], step["images"].get(name, 0))
    assert not list((store.path / "staging").iterdir())
    assert not list((store.path / "segments").glob("*/journal.bin"))
    assert recovery.recover(store.path) == 0


def test_all_whole_steps_are_saved(broken_off, capsys):
    store, _, given = broken_off
    assert recovery.recover(store.path) == 1
    check(store, given, [3, 2, 4])
    first, second, torn = store.refresh().episodes
    assert [e.success for e in (first, second, torn)] == [True, False, None]
    assert (first.tags, torn.tags) == (("lab",), ("lab", "torn"))
    assert "saved 3 episodes, 9 steps" in capsys.readouterr().err


@pytest.mark.parametrize(("salvage", "lengths"), [("finished", [3, 2]), ("nothing", [])])
def test_less_is_saved_where_asked(broken_off, salvage, lengths):
    store, _, given = broken_off
    EpisodeWriter(store, salvage=salvage).close()
    check(store, given, lengths)
    with pytest.raises(ConfigError, match="Did you mean 'torn'"):
        EpisodeWriter(store, salvage="tron")


def test_a_journal_torn_anywhere(tmp_path, broken_off):
    """Cut at every 7th byte: what was noted before the cut is saved, nothing else."""
    store, folder, given = broken_off
    journal = (folder / "journal.bin").read_bytes()
    ends, position, kinds = [], len(MAGIC), []
    while position < len(journal):
        length = int(np.frombuffer(journal, "<u4", 1, position)[0])
        kinds.append(journal[position + 8 : position + 9])
        position += 8 + length
        ends.append(position)
    for cut in range(ends[0], len(journal), 7):
        copy = tmp_path / f"cut{cut}"
        shutil.copytree(store.path, copy)
        (copy / "staging" / folder.name / "journal.bin").write_bytes(journal[:cut])
        recovery.recover(copy)
        done = "".join(kind.decode() for kind, end in zip(kinds, ends) if end <= cut)
        lengths = [part.count("S") for part in done.split("B")[1:]]
        check(EpisodeStore.open(copy), given, [n for n in lengths if n])
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("image", "shard", "keep", "lengths"),
    [
        ("front", 0, 196 * 2 + 50, [2]),  # in the third frame of 192 bytes and a crc
        ("front", 1, 0, [3, 1]),
        ("front", 2, 10, [3, 2, 3]),
        ("depth", 0, 0, []),
    ],
)
def test_frames_that_never_reached_the_disk(broken_off, image, shard, keep, lengths):
    """After a power cut a file may be shorter than the journal says: steps count up to the last whole one."""
    store, folder, given = broken_off
    path = folder / f"images/{image}/c/{shard}/0/0/0.partial"
    path.write_bytes(path.read_bytes()[:keep])
    recovery.recover(store.path)
    check(store, given, lengths)
    episodes = store.refresh().episodes
    assert not episodes or episodes[-1].tags == ("lab", "torn")


def test_a_flipped_bit_in_a_torn_frame(broken_off):
    store, folder, given = broken_off
    path = folder / "images/front/c/1/0/0/0.partial"
    data = bytearray(path.read_bytes())
    data[196 + 20] ^= 4
    path.write_bytes(data)
    recovery.recover(store.path)
    check(store, given, [3, 2])


def test_dying_while_saving_does_no_harm(broken_off, monkeypatch):
    """Killed after each write of the salvage; the next one goes on, and saves all."""
    store, _, given = broken_off
    real, calls = layout.write_file, {"left": 0}

    def write(path, data, *, fsync):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt
        real(path, data, fsync=fsync)

    for after in range(100):
        calls["left"] = after
        with monkeypatch.context() as patch:
            for module in ("staging", "layout", "commitlog"):
                patch.setattr(f"brachium.datasets.{module}.write_file", write)
            try:
                recovery.recover(store.path)
            except KeyboardInterrupt:
                assert store.refresh().num_episodes == 0
                continue
        break
    assert after > 5
    check(store, given, [3, 2, 4])


def test_what_is_no_journal_is_left_alone(broken_off, tmp_path):
    store, folder, _ = broken_off
    (folder / "journal.bin").write_bytes(b"BRCHJRN9")
    assert recovery.recover(store.path) == 0
    assert folder.exists()
    assert read_journal(tmp_path / "nothing") is None


RECORDER = textwrap.dedent("""
    import sys, time, numpy as np
    from brachium.datasets.store import EpisodeStore
    from brachium.datasets.writer import EpisodeWriter
    writer = EpisodeWriter(EpisodeStore.open(sys.argv[1]))
    writer.begin("slow")
    for i in range(1000):
        images = {"front": np.full((8, 8, 3), i, np.uint8), "depth": np.full((4, 4, 1), i, np.uint16)}
        writer.step(images=images, state=[i, 0, 0], action=[i, 1])
        print(i, flush=True)
        time.sleep(0.002)
""")


def test_kill_9_in_an_episode_keeps_its_steps(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", SCHEMA)
    process = subprocess.Popen([sys.executable, "-c", RECORDER, str(store.path)], stdout=subprocess.PIPE, text=True)
    noted = 0
    while noted < 20:
        noted = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    noted = max([noted, *map(int, process.communicate()[0].split())])
    EpisodeWriter(store).close()
    [episode] = store.refresh().episodes
    assert noted + 1 <= episode.length <= noted + 2
    assert (episode.tags, episode.success) == (("torn",), None)
    data = store.refresh().episode(0)
    assert data.state[:, 0].tolist() == list(range(episode.length))
    assert data.images["depth"][:, 0, 0, 0].tolist() == list(range(episode.length))
