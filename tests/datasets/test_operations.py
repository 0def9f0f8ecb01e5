"""The verbs on stores, typed as a user types them."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from brachium.__main__ import main
from brachium.datasets.derive import derive
from brachium.datasets.selection import Selection
from brachium.datasets.staging import StagingSegment
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, SpecMismatchError, StoreError
from brachium.spec import FeatureSpec

from .conftest import fill, make_embodiment, make_schema, random_step, run

LENGTHS = (4, 1, 6, 2, 5)


@pytest.fixture
def store(tmp_path):
    made = EpisodeStore.create(tmp_path / "s", make_schema(size=(8, 12)))
    fill(made, LENGTHS, successes=[True, False, None, True, True], episodes_per_segment=2)
    return made.refresh()


def content(store, index):
    """All that a store says of an episode, comparable."""
    episode, info = store.episode(index), store.episodes[index]
    arrays = [episode.state, episode.action, episode.timestamp, *(episode.images[c] for c in sorted(episode.images))]
    return info.id, info.instruction, info.success, info.tags, dict(info.meta), [a.tobytes() for a in arrays]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({}, (0, 1, 2, 3, 4)),
        ({"episodes": [0, "2-3"]}, (0, 2, 3)),
        ({"success": "true"}, (0, 3, 4)),
        ({"success": False}, (1,)),
        ({"success": "unknown"}, (2,)),
        ({"tags": ["even"]}, (0, 2, 4)),
        ({"without_tags": ["even"]}, (1, 3)),
        ({"instruction": "TASK 1"}, (1, 3)),
        ({"instruction": "*1"}, (1, 3)),
        ({"steps": (2, 5)}, (0, 3, 4)),
        ({"steps": (None, 1)}, (1,)),
        ({"meta": {"seed": 2}}, (2,)),
        ({"success": True, "tags": ["even"], "steps": (5, None)}, (4,)),
    ],
)
def test_which_episodes_are_meant(store, where, wanted):
    assert Selection(**where).of(store) == wanted
    assert Selection(episodes=[store.episodes[i].id for i in wanted]).of(store) == wanted


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"tags": ["evn"]}, "Did you mean 'even'"),
        ({"instruction": "taks 1"}, "Did you mean 'task 1'"),
        ({"steps": (9, None)}, "1 to 6 steps"),
        ({"success": "unknown", "tags": ["odd"]}, "Did you mean|tags"),
        ({"episodes": [5]}, "episodes 0 to 4, got 5"),
        ({"episodes": ["x"]}, "ids of this store"),
        ({"meta": {"seed": 9}}, "meta.seed is one of 0, 1, 2"),
    ],
)
def test_none_that_fits(store, where, words):
    with pytest.raises(StoreError, match=words):
        Selection(**where).of(store)


def test_conditions_that_mean_nothing():
    for where, words in (
        ({"success": "yes"}, "no success='yes'"),
        ({"steps": (1,)}, "fewest"),
        ({"tags": "lab"}, "as a list"),
    ):
        with pytest.raises(ConfigError, match=words):
            Selection(**where)


def test_edit(store, capsys):
    said = run(
        capsys, "edit", f"store={store.path}", "where.tags=[even]", "success=false", "add_tags=[checked]", "--dry-run"
    )
    assert "3 episodes change" in said
    assert "dry run: nothing was changed" in said
    assert store.refresh().version == store.version
    run(capsys, "edit", f"store={store.path}", "where.tags=[even]", "success=false", "add_tags=[checked]")
    now = store.refresh()
    assert [e.success for e in now.episodes] == [False, False, False, True, False]
    assert [e.tags for e in now.episodes] == [
        ("even", "checked"),
        ("odd",),
        ("even", "checked"),
        ("odd",),
        ("even", "checked"),
    ]
    assert now.version == store.version + 1
    assert "nothing to do" in run(capsys, "edit", f"store={store.path}", "where.tags=[even]", "success=false")
    run(capsys, "edit", f"store={store.path}", "where.episodes=[1]", "remove=true")
    run(capsys, "edit", f"store={store.path}", "where.episodes=[1]", "instruction=put it down", "remove_tags=[even]")
    after = store.refresh()
    assert [e.length for e in after.episodes] == [4, 6, 2, 5]
    assert (after.episodes[1].instruction, after.episodes[1].tags) == ("put it down", ("checked",))
    assert EpisodeStore.open(store.path, version=store.version).episodes == store.episodes
    for words, hint in (
        (["success=true"], "which episodes"),
        (["where.tags=[even]"], "something to change"),
        (["where.tags=[even]", "remove=true", "success=true"], "something to change"),
        (["where.tags=[even]", "success=perhaps"], "no success='perhaps'"),
        (["where.tags=[evem]", "success=true"], "Did you mean 'even'"),
    ):
        assert hint in run(capsys, "edit", f"store={store.path}", *words, code=2)


def test_filter_shares_files_and_keeps_everything(store, tmp_path, capsys):
    out = tmp_path / "made" / "good"
    words = ["filter", f"store={store.path}", f"out={out}", "where.success=true"]
    assert "3 of 5" in run(capsys, *words, "--dry-run")
    assert not out.exists()
    run(capsys, *words)
    made = EpisodeStore.open(out)
    assert [content(made, k) for k in range(3)] == [content(store, i) for i in (0, 3, 4)]
    shard = next(out.glob("segments/*/images/front/c/0/0/0/0"))
    assert shard.stat().st_nlink == 2
    with EpisodeWriter(made, fsync=False) as writer:  # it is a store like any other, and leaves the old one alone
        writer.begin("more")
        writer.step(**random_step(made.schema, np.random.default_rng(0)))
        writer.end(True)
    assert (made.refresh().num_episodes, store.refresh().num_episodes) == (4, 5)
    assert "choose another out=" in run(capsys, *words, code=2)
    run(capsys, *words, "overwrite=true")
    assert EpisodeStore.open(out).num_episodes == 3
    shutil.rmtree(store.path)
    assert len(EpisodeStore.open(out).read_images("front", range(11))) == 11
    (tmp_path / "thing").write_text("x")
    said = run(capsys, "filter", f"store={out}", f"out={tmp_path / 'thing'}", "overwrite=true", code=2)
    assert "no episode store" in said
    assert not list((tmp_path / "made").glob(".*"))


def test_split(tmp_path, capsys):
    store = EpisodeStore.create(tmp_path / "s", make_schema(size=(8, 8)))
    fill(store, [1] * 60, episodes_per_segment=16)
    store = store.refresh()
    said = run(capsys, "split", f"store={store.path}", f"out={tmp_path / 'parts'}", "shares={train:0.7,test:0.3}")
    assert "train: " in said
    parts = {name: EpisodeStore.open(tmp_path / "parts" / name) for name in ("train", "test")}
    ids = {name: [e.id for e in part.episodes] for name, part in parts.items()}
    assert sorted(ids["train"] + ids["test"]) == sorted(e.id for e in store.episodes)
    assert 5 < len(ids["test"]) < 35
    for words, hint in (
        (["shares={train:0.7,test:0.5}"], "sum to 1"),
        (["by=word"], "no by='word'"),
        (["by=instruction", "shares={a:0.001,b:0.999}"], "no episode falls to a"),
    ):
        command = ["split", f"store={store.path}", f"out={tmp_path / 'other'}", *words]
        assert hint in run(capsys, *command, code=2)


def test_split_by_instruction_keeps_words_apart(store, tmp_path, capsys):
    shares = "shares={one:0.5,two:0.5}"
    for seed in range(20):
        words = ["split", f"store={store.path}", f"out={tmp_path / 'p'}", shares, "by=instruction", f"seed={seed}"]
        if main([*words]) == 0:
            break
    capsys.readouterr()
    said = [{e.instruction for e in EpisodeStore.open(tmp_path / "p" / name).episodes} for name in ("one", "two")]
    assert sorted(map(sorted, said)) == [["task 0"], ["task 1"]]


def test_merge_of_one_robot_and_of_two(store, tmp_path, capsys):
    again = EpisodeStore.create(tmp_path / "again", store.schema)
    fill(again, (3,), seed=7)
    other = EpisodeStore.create(
        tmp_path / "other",
        replace(store.schema, embodiment=replace(make_embodiment(cameras=("top",), size=(8, 8)), name="other_arm")),
    )
    fill(other, (2, 2), seed=8)
    again, other = again.refresh(), other.refresh()
    out = tmp_path / "all"
    run(capsys, "merge", f"stores=[{store.path},{again.path},{other.path},{again.path}]", f"out={out}")
    made = EpisodeStore.open(out)
    assert made.embodiments == ("tiny_arm", "other_arm")
    mine, theirs = made.of("tiny_arm"), made.of("other_arm")
    assert [content(mine, k) for k in range(6)] == [*(content(store, k) for k in range(5)), content(again, 0)]
    assert [content(theirs, k) for k in range(2)] == [content(other, k) for k in range(2)]
    run(capsys, "merge", f"stores=[{out},{other.path}]", f"out={tmp_path / 'twice'}")  # ids that are there stay once
    assert EpisodeStore.open(tmp_path / "twice").num_episodes == 8
    slower = EpisodeStore.create(
        tmp_path / "slow", replace(store.schema, embodiment=replace(store.embodiment, control_hz=3.0))
    )
    fill(slower, (1,))
    said = run(capsys, "merge", f"stores=[{store.path},{slower.path}]", f"out={tmp_path / 'no'}", code=2)
    assert "control_hz: 3.0 against 10.0" in said
    assert not (tmp_path / "no").exists()
    assert "as a list" in run(capsys, "merge", f"stores={store.path}", f"out={tmp_path / 'no'}", code=2) or True


@pytest.mark.parametrize("profile", ["jpeg", "raw"])
def test_compact_keeps_every_byte(tmp_path, capsys, profile):
    depth = FeatureSpec(name="depth", shape=(4, 4, 1), dtype="uint16")
    schema = replace(make_schema(size=(8, 12)), maps=(depth,), optional=("depth",))
    store = EpisodeStore.create(tmp_path / "s", schema)
    rng = np.random.default_rng(0)
    with EpisodeWriter(store, fsync=False, profile=profile) as writer:
        for number, length in enumerate(LENGTHS):
            writer.begin(f"task {number}", meta={"seed": number})
            for t in range(length):
                step = random_step(schema, rng)
                if t % 2:
                    step["images"]["depth"] = rng.integers(0, 999, (4, 4, 1), dtype=np.uint16)
                writer.step(**step)
            writer.end(True)
    store = store.refresh()
    run(capsys, "edit", f"store={store.path}", "where.episodes=[1]", "remove=true")
    store = store.refresh()
    wanted = [content(store, k) for k in range(4)]
    frames = [store.encoded(c, k) for c in ("front", "depth") for k in range(store.total_frames)]
    said = run(capsys, "compact", f"store={store.path}", "--dry-run")
    assert re.search(r"segments now +4\n +episodes that move +4\n +new segments +1", said), said
    run(capsys, "compact", f"store={store.path}")
    now = store.refresh()
    assert len({e.segment for e in now.episodes}) == 1
    assert [content(now, k) for k in range(4)] == wanted
    assert [now.encoded(c, k) for c in ("front", "depth") for k in range(now.total_frames)] == frames
    assert [content(store, k) for k in range(4)] == wanted  # who has it open goes on
    before = len(list((store.path / "segments").iterdir()))
    run(capsys, "compact", f"store={store.path}", "drop_old=true")
    assert len(list((store.path / "segments").iterdir())) == before - 5
    last = store.refresh()
    assert [content(last, k) for k in range(4)] == wanted
    assert not list((store.path / "staging").iterdir())
    with pytest.raises(StoreError, match="missing"):
        EpisodeStore.open(store.path, version=store.version).lowdim("state")
    assert "above 0" in run(capsys, "compact", f"store={store.path}", "segment_mb=0", code=2)


def test_compact_that_fails_changes_nothing(store, capsys):
    path = sorted(store.path.glob("segments/*/images/front/c/0/0/0/0"))[-1]
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    folders = sorted((store.path / "segments").iterdir())
    assert "checksum" in run(capsys, "compact", f"store={store.path}", code=2)
    assert store.refresh().version == store.version
    assert sorted((store.path / "segments").iterdir()) == folders
    assert not list((store.path / "staging").iterdir())


@pytest.mark.parametrize("when", ["recording", "published"])
def test_a_compaction_that_was_killed_leaves_nothing_behind(store, capsys, monkeypatch, when):
    """What it had copied must not come back when its episodes were removed meanwhile."""

    def die(*args, **kwargs):
        raise SystemExit

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "brachium.datasets.compact.shutil.rmtree", lambda *a, **k: None
        )  # a killed process tidies nothing
        if when == "recording":
            patch.setattr(StagingSegment, "publish", lambda self: (kept.append(self), die()))
        else:
            patch.setattr(EpisodeStore, "commit", die)
        with pytest.raises(SystemExit):
            main(["compact", f"store={store.path}"])
    assert len(list(store.path.glob("staging/*"))) == (when == "recording")
    assert len(list(store.path.glob("segments/*/journal.bin"))) == (when == "published")
    run(capsys, "edit", f"store={store.path}", "where.episodes=[1]", "remove=true")
    EpisodeWriter(store).close()
    assert [e.length for e in store.refresh().episodes] == [4, 6, 2, 5]
    assert not list(store.path.glob("staging/*"))
    assert not list(store.path.glob("segments/*/journal.bin"))
    assert len([p for p in store.path.glob("segments/*") if p.is_dir()]) == 3


def test_an_error_after_the_commit_of_a_compaction_deletes_nothing(store, capsys, monkeypatch):
    real = EpisodeStore.commit

    def commit(self, actions):
        real(self, actions)
        raise KeyboardInterrupt

    wanted = [content(store, k) for k in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(EpisodeStore, "commit", commit)
        run(capsys, "compact", f"store={store.path}", code=130)
    assert [content(store.refresh(), k) for k in range(5)] == wanted


def test_a_recording_may_be_called_compact(store):
    writer = EpisodeWriter(store, fsync=False, source="compact", episodes_per_segment=9)
    writer.begin("keep me")
    writer.step(**random_step(store.schema, np.random.default_rng(0)))
    writer.end(True)
    writer._segment.release()  # as the kernel does for a dead process
    EpisodeWriter(store).close()
    assert store.refresh().episodes[-1].instruction == "keep me"


def test_merge_keeps_what_is_optional(tmp_path):
    plain, loose = make_schema(size=(8, 8)), replace(make_schema(size=(8, 8)), optional=("wrist",))
    stores = []
    for name, schema in (("plain", plain), ("loose", loose)):
        made = EpisodeStore.create(tmp_path / name, schema)
        with EpisodeWriter(made, fsync=False) as writer:
            writer.begin(name)
            step = random_step(schema, np.random.default_rng(0))
            if name == "loose":
                del step["images"]["wrist"]
            writer.step(**step)
            writer.end(True)
        stores.append(made.refresh())
    for order in (stores, stores[::-1]):
        made = derive(tmp_path / f"all-{order[0].path.name}", [(part, [0]) for part in order])
        assert made.schema.optional == ("wrist",)
        assert sorted(made.lowdim("present")[:, 0].tolist()) == [False, True]
    with pytest.raises(SpecMismatchError, match="wrist: always there, against optional"):
        stores[1].set_schema(plain)


def test_resize(store, tmp_path, capsys):
    out = tmp_path / "small"
    words = ["resize", f"store={store.path}", f"out={out}", "sizes={front:[4,6],all:[8,8]}", "profile=raw"]
    assert "8x12" in run(capsys, *words, "--dry-run")
    run(capsys, *words)
    made = EpisodeStore.open(out)
    assert [c.shape for c in made.embodiment.cameras] == [(4, 6, 3), (8, 8, 3)]
    np.testing.assert_array_equal(made.lowdim("state"), store.lowdim("state"))
    assert [dict(e.meta) for e in made.episodes] == [dict(e.meta) for e in store.episodes]
    large = store.read_images("front", range(store.total_frames)).astype(np.float64)
    blocks = large.reshape(-1, 4, 2, 6, 2, 3).mean((2, 4))
    assert np.abs(made.read_images("front", range(made.total_frames)) - blocks).max() <= 0.5
    for size, hint in (
        ("{fornt:[4,4]}", "Did you mean 'front'"),
        ("{front:[4]}", "[height, width]"),
    ):
        assert hint in run(capsys, "resize", f"store={store.path}", f"out={tmp_path / 'no'}", f"sizes={size}", code=2)


def test_stats_are_kept_until_the_episodes_change(store, tmp_path, capsys, monkeypatch):
    out = tmp_path / "stats.json"
    said = run(capsys, "stats", f"store={store.path}", "where.success=true", f"out={out}", "record=true")
    assert "state: 11 steps of 3 episodes" in said
    rows = np.concatenate([store.episode(i).state for i in (0, 3, 4)]).astype(np.float64)
    found = json.loads(out.read_text())["state"]
    np.testing.assert_allclose(found["mean"], rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], rows.std(0), rtol=1e-12)
    np.testing.assert_allclose(found["q99"], np.quantile(rows, 0.99, axis=0), rtol=1e-12)
    assert store.refresh()._state.stats["tiny_arm"]["state"] == found
    with monkeypatch.context() as patch:
        patch.setattr("brachium.datasets.stats.compute_statistics", None)
        run(capsys, "stats", f"store={store.path}", "where.success=true")
    run(capsys, "edit", f"store={store.path}", "where.episodes=[0]", "success=false")
    assert "state: 7 steps of 2 episodes" in run(capsys, "stats", f"store={store.path}", "where.success=true")


def _flip(path, position=10):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_names_what_is_lost(store, capsys):
    assert "all checksums fit" in run(capsys, "verify", f"store={store.path}", "decode=true")
    segments = list(dict.fromkeys(e.segment for e in store.episodes))
    index = store._index.images("wrist")
    _flip(store.path / "segments" / segments[0] / "images/wrist/c/0/0/0/0", int(index.arrays["offset"][4]) + 30)
    shutil.rmtree(store.path / "segments" / segments[2])
    said = run(capsys, "verify", f"store={store.path}", code=1)
    lines = [line.split()[0] for line in said.splitlines() if line.startswith("  ") and "segments/" in line]
    assert lines == ["1", "4"]  # of the first segment only the episode with the flipped bit
    assert "2 of 5 episodes are lost" in said
    run(capsys, "verify", f"store={store.path}", "remove=true", "--dry-run", code=1)
    assert store.refresh().num_episodes == 5
    run(capsys, "verify", f"store={store.path}", "remove=true", code=1)
    now = store.refresh()
    assert [e.id for e in now.episodes] == [store.episodes[i].id for i in (0, 2, 3)]
    assert now.read_images("wrist", range(now.total_frames)).shape[0] == 12
    assert "all checksums fit" in run(capsys, "verify", f"store={store.path}")
    _flip(store.path / "_log" / f"{1:020d}.json", 40)
    assert "log entry" in run(capsys, "verify", f"store={store.path}", code=2)


def test_view_shows_every_episode_and_escapes(tmp_path, capsys):
    store = EpisodeStore.create(tmp_path / "s", make_schema(size=(8, 12)))
    with EpisodeWriter(store, fsync=False) as writer:
        for k in range(3):
            writer.begin(f"<b>stack {k}</b>", tags=("a&b",))
            for _ in range(4 + k):
                writer.step(**random_step(store.schema, np.random.default_rng(k)))
            writer.end([True, False, None][k])
    run(capsys, "view", f"store={store.path}", f"out={tmp_path / 'v'}", "viewer=html", "episodes=2")
    page = (tmp_path / "v" / "index.html").read_text()
    assert "2 of 3 episodes" in page
    assert "<b>stack" not in page
    assert page.count("&lt;b&gt;stack") == 2
    assert page.count("data:image/jpeg") == 2 * 2
    assert page.count("<polyline") == 2 * (3 + 2)
    assert page.count("<figure>") == 2 * (2 + 2)  # metres apart from what has no unit
    for words, hint in ((["viewer=htm"], "Did you mean 'html'"), (["episodes=0"], "at least 1")):
        assert hint in run(capsys, "view", f"store={store.path}", *words, code=2)


def test_view_in_rerun(store, tmp_path, capsys, monkeypatch):
    words = ["view", f"store={store.path}", f"out={tmp_path}", "viewer=rerun"]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install rerun-sdk" in run(capsys, *words, code=2)
    pytest.importorskip("rerun", reason="type: uv pip install rerun-sdk")
    run(capsys, *words)
    assert (tmp_path / "view.rrd").stat().st_size > 1000
