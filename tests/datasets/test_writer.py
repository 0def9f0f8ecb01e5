"""Recording: refusals, a full disk, killed writers, and several writers at once."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from brachium.datasets import recovery, staging
from brachium.datasets.image import image_profile
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import DiskSpaceError, SpecMismatchError, StoreError
from brachium.spec import FeatureSpec

from .conftest import fill, make_schema, random_step


@pytest.fixture
def store(tmp_path):
    return EpisodeStore.create(tmp_path / "s", make_schema())


@pytest.fixture
def step(store):
    return random_step(store.schema, np.random.default_rng(0))


def record(writer, step, n=3, success=True, **begin):
    writer.begin("do it", **begin)
    for _ in range(n):
        writer.step(**step)
    return writer.end(success)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": np.zeros(4)}, r"state: expected shape \(3,\) float32, got \(4,\).*elements: x, y, grip"),
        ({"action": np.array(["a", "b"])}, "action: expected"),
        ({"state": np.zeros(3, complex)}, "state: expected"),
        ({"images": {}}, r"missing \['front', 'wrist'\]"),
        ({"images": {"fornt": 0, "wrist": 0}}, "Did you mean 'front'"),
        ({"images": {"front": np.zeros((24, 32, 3)), "wrist": np.zeros((24, 32, 3), np.uint8)}}, "float64"),
        ({"images": {"front": np.zeros((32, 24, 3), np.uint8), "wrist": np.zeros((24, 32, 3), np.uint8)}}, "32, 24"),
        ({"extras": {"force": 1.0}}, "unknown extra 'force'. The schema has no extra"),
    ],
)
def test_a_step_that_does_not_fit(store, step, change, words):
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        writer.step(**step)
        with pytest.raises(SpecMismatchError, match=words):
            writer.step(**{**step, **change})
        writer.step(**step)
        writer.end(True)
    assert [e.length for e in store.refresh().episodes] == [2]


def test_jpeg_streams_that_do_not_fit(store, step):
    rest = {"state": step["state"], "action": step["action"]}
    good = image_profile("jpeg").encode(step["images"]["front"])
    wrong_size = image_profile("jpeg").encode(np.zeros((8, 8, 3), np.uint8))
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        for bad in (b"", b"no jpeg at all", good[:40], wrong_size):
            with pytest.raises(SpecMismatchError, match="camera 'wrist': expected a"):
                writer.step_jpeg(images={"front": good, "wrist": bad}, **rest)
        writer.discard()
    with EpisodeWriter(store, fsync=False, profile="raw") as writer:
        writer.begin("x")
        with pytest.raises(StoreError, match="need a camera and a JPEG profile"):
            writer.step_jpeg(images={"front": good, "wrist": good}, **rest)
        writer.discard()


def test_calls_in_the_wrong_order(store, step):
    writer = EpisodeWriter(store, fsync=False)
    for call in (writer.discard, lambda: writer.end(True), lambda: writer.step(**step)):
        with pytest.raises(StoreError, match="no episode is open"):
            call()
    writer.begin("x")
    with pytest.raises(StoreError, match="an episode is open"):
        writer.begin("y")
    with pytest.raises(StoreError, match="has no steps"):
        writer.end(True)
    with pytest.raises(StoreError, match="open"):
        writer.flush()
    writer.step(**step)
    with pytest.raises(StoreError, match="open episode, which is lost"):
        writer.close()
    with pytest.raises(StoreError, match="writer is closed"):
        writer.begin("z")
    assert store.refresh().num_episodes == 0
    assert not list((store.path / "staging").iterdir())


def test_meta_must_be_json(store):
    with EpisodeWriter(store, fsync=False) as writer:
        for bad in ({"a": {1, 2}}, {"a": float("nan")}):
            with pytest.raises(StoreError, match="JSON"):
                writer.begin("x", meta=bad)
        with pytest.raises(StoreError, match="sequence of strings"):
            writer.begin("x", tags="tag")


def test_discard_keeps_the_others(store, monkeypatch):
    monkeypatch.setattr(staging.layout, "SHARD_FRAMES", 3)
    rng = np.random.default_rng(1)
    kept = []
    with EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=4) as writer:
        for episode in range(8):
            writer.begin("x")
            steps = [random_step(store.schema, rng) for _ in range(1 + episode % 5)]
            for step in steps:
                writer.step(**step)
            if episode % 3 == 1:
                writer.discard()
            else:
                writer.end(True)
                kept += steps
    store = store.refresh()
    assert writer.committed == store.num_episodes == 5
    np.testing.assert_array_equal(store.lowdim("state"), [s["state"] for s in kept])
    np.testing.assert_array_equal(store.read_images("front", range(len(kept))), [s["images"]["front"] for s in kept])


def test_an_exception_keeps_finished_episodes(store, step):
    def run():
        with EpisodeWriter(store, fsync=False, episodes_per_segment=10) as writer:
            record(writer, step)
            writer.begin("half")
            writer.step(**step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [e.instruction for e in store.refresh().episodes] == ["do it"]
    assert not list((store.path / "staging").iterdir())


def _fill_disk(monkeypatch, after):
    """Let `after` bytes through, then half a write, then ENOSPC until the returned dict says otherwise."""
    disk = {"left": after}
    real = os.write

    def write(fd, data):
        if disk["left"] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: disk["left"]]
        disk["left"] -= len(part)
        return real(fd, part)

    monkeypatch.setattr("os.write", write)
    return disk


@pytest.mark.parametrize("after", [0, 2000, 5000, 9000])
def test_a_full_disk_while_recording(store, step, monkeypatch, after):
    with EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=10) as writer:
        record(writer, step)
        disk = _fill_disk(monkeypatch, after)
        with pytest.raises(DiskSpaceError, match="no space left"):
            record(writer, step, n=20)
        disk["left"] = 1 << 40
        record(writer, step, n=2)
    store = store.refresh()
    assert [e.length for e in store.episodes] == [3, 2]
    np.testing.assert_array_equal(store.read_images("front", range(5)), [step["images"]["front"]] * 5)
    assert not list((store.path / "staging").iterdir())


def test_a_full_disk_at_every_point_of_a_commit(tmp_path, step, monkeypatch):
    """Fail at byte 0, 200, 400 ... of the commit; nothing shows until a second flush, which completes it."""
    for after in range(0, 12000, 400):
        store = EpisodeStore.create(tmp_path / f"s{after}", make_schema())
        writer = EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=10)
        record(writer, step)
        disk = _fill_disk(monkeypatch, after)
        try:
            writer.flush()
        except DiskSpaceError:
            assert store.refresh().num_episodes == 0
            disk["left"] = 1 << 40
            writer.flush()
        else:
            assert after > 2000, "a commit writes more than that"
            monkeypatch.undo()
            return
        writer.close()
        monkeypatch.undo()
        store = store.refresh()
        assert [e.length for e in store.episodes] == [3]
        np.testing.assert_array_equal(store.read_images("wrist", range(3)), [step["images"]["wrist"]] * 3)
    pytest.fail("the commit never succeeded")


WRITER = textwrap.dedent("""
    import sys, numpy as np
    from brachium.datasets.store import EpisodeStore
    from brachium.datasets.writer import EpisodeWriter
    path, seed, count, per_segment = sys.argv[1], *map(int, sys.argv[2:])
    store = EpisodeStore.open(path)
    rng = np.random.default_rng(seed)
    with EpisodeWriter(store, fsync=False, episodes_per_segment=per_segment) as writer:
        for i in range(count):
            identity = writer.begin(f"writer {seed}", meta={"seed": seed, "number": i})
            for _ in range(1 + i % 4):
                image = np.full((24, 32, 3), rng.integers(256), np.uint8)
                writer.step(images={"front": image, "wrist": image}, state=rng.random(3), action=rng.random(2))
            writer.end(True)
            if per_segment == 1:
                print(identity, flush=True)
""")


def start_writer(store, seed, count, per_segment=1):
    command = [sys.executable, "-c", WRITER, str(store.path), str(seed), str(count), str(per_segment)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def check_readable(store):
    for camera in store.embodiment.camera_names:
        store.read_images(camera, range(store.total_frames))
    for field in store.schema.fields:
        assert len(store.lowdim(field)) == store.total_frames


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.013])
def test_kill_9_loses_nothing_committed(store, step, delay, monkeypatch):
    monkeypatch.setattr(recovery, "GRACE_S", -1.0)
    process = start_writer(store, 0, 100_000)
    committed = [process.stdout.readline().strip() for _ in range(5)]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    committed += process.communicate()[0].split()
    reopened = store.refresh()
    ids = {e.id for e in reopened.episodes}
    assert {c for c in committed if len(c) == 26} <= ids
    check_readable(reopened)
    with EpisodeWriter(reopened, fsync=False) as writer:  # tidies up what the dead one left, and goes on
        assert not list((store.path / "staging").iterdir())
        record(writer, step)
    after = store.refresh()
    assert ids < {e.id for e in after.episodes}
    check_readable(after)
    on_disk = {p.name for p in (store.path / "segments").iterdir() if p.is_dir()}
    assert on_disk == {e.segment for e in after.episodes}
    assert not list((store.path / "segments").glob("*/journal.bin"))
    assert not list((store.path / "_log").glob(".tmp-*"))


def test_two_writers_and_a_reader(store):
    processes = [start_writer(store, seed, 25) for seed in (1, 2)]
    seen = 0
    while any(p.poll() is None for p in processes):
        now = store.refresh()
        assert now.num_episodes >= seen
        seen = now.num_episodes
        check_readable(now)
    assert [p.wait() for p in processes] == [0, 0]
    for process in processes:
        process.stdout.close()
    store = store.refresh()
    assert store.num_episodes == 50
    for seed in (1, 2):
        numbers = [e.meta["number"] for e in store.episodes if e.meta["seed"] == seed]
        assert numbers == list(range(25))
    check_readable(store)
    assert not list((store.path / "_log").glob(".tmp-*"))


def test_a_living_writer_is_left_alone(store, step):
    first = EpisodeWriter(store, fsync=False)
    first.begin("slow")
    first.step(**step)
    with EpisodeWriter(store, fsync=False) as second:
        record(second, step)
    first.step(**step)
    first.end(True)
    first.close()
    assert sorted(e.length for e in store.refresh().episodes) == [2, 3]


def test_a_finished_segment_of_a_dead_writer_is_adopted(store, step, monkeypatch):
    """Died between moving the segment and committing it."""

    def die(*args, **kwargs):
        raise ZeroDivisionError

    writer = EpisodeWriter(store, fsync=False)
    with monkeypatch.context() as patch:
        patch.setattr("brachium.datasets.commitlog.commit", die)
        with pytest.raises(ZeroDivisionError):
            record(writer, step, tags=("kept",), meta={"seed": 7})
    for segment in writer._pending:
        segment.release()  # as the kernel does for a dead process
    assert store.refresh().num_episodes == 0
    assert recovery.recover(store.path) == 1
    [episode] = store.refresh().episodes
    assert (episode.tags, episode.meta, episode.success, episode.length) == (("kept",), {"seed": 7}, True, 3)
    check_readable(store.refresh())
    assert recovery.recover(store.path) == 0


def test_staging_of_another_machine_is_left_alone(store, step, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    writer = EpisodeWriter(store, fsync=False)
    writer.begin("x")
    writer.step(**step)
    writer._segment.release()
    monkeypatch.undo()
    EpisodeWriter(store, fsync=False).close()
    assert len(list((store.path / "staging").iterdir())) == 1


def test_the_journal_tells_what_was_recorded(store, step):
    """Parsed here by hand: the format must stay as its docstring says."""
    writer = EpisodeWriter(store, fsync=False)
    writer.begin("x", meta={"seed": 1})
    writer.step(**step)
    writer.step(**step)
    [journal] = (store.path / "staging").glob("*/journal.bin")
    data, kinds, position = journal.read_bytes(), [], 8
    assert data[:8] == b"BRCHJRN1"
    while position < len(data):
        length, checksum = np.frombuffer(data, "<u4", 2, position).tolist()
        body = data[position + 8 : position + 8 + length]
        assert staging.crc32c(body) == checksum
        kinds.append(body[:1])
        position += 8 + length
    assert kinds == [b"H", b"B", b"S", b"S"]
    assert len(body) == 1 + 2 * 16 + 4 * 3 + 4 * 2 + 8
    np.testing.assert_array_equal(np.frombuffer(body, "<f4", 3, 33), step["state"])
    offset, length = np.frombuffer(body, "<u8", 1, 1)[0], np.frombuffer(body, "<u4", 1, 9)[0]
    partial = next(journal.parent.glob("images/front/**/0.partial")).read_bytes()
    frame = partial[int(offset) : int(offset) + int(length) - 4]
    assert (frame[:2], frame[-2:]) == (b"\xff\xd8", b"\xff\xd9")
    writer.discard()
    writer.close()


def test_extras_are_required(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(extras=(FeatureSpec(name="n", shape=(2,), dtype="int64"),)))
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        step = {**random_step(make_schema(), np.random.default_rng(0))}
        for extras, words in ((None, "missing"), ({"n": [1.5, 2]}, "int64"), ({"n": [1]}, r"\(2,\)")):
            with pytest.raises(SpecMismatchError, match=words):
                writer.step(**step, extras=extras)
        writer.step(**step, extras={"n": [1, 2]}, timestamp=4.5)
        writer.end(None)
    store = store.refresh()
    assert store.lowdim("n").tolist() == [[1, 2]]
    assert store.lowdim("timestamp").tolist() == [4.5]


def test_few_files_for_many_short_episodes(store):
    fill(store, [2] * 30, episodes_per_segment=64)
    assert len([p for p in (store.path / "segments").iterdir() if p.is_dir()]) == 1
    assert store.refresh().num_episodes == 30
