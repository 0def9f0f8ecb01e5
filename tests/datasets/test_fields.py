"""Maps, fields that a step may lack, several embodiments in one store, and schemas that grow."""

from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, NotFoundError, SpecMismatchError, StoreError
from brachium.spec import FeatureSpec

from .conftest import fill, make_embodiment, make_schema

DEPTH = FeatureSpec(name="depth", shape=(12, 10, 1), dtype="uint16", units=("mm",))
MASK = FeatureSpec(name="mask", shape=(24, 32, 1), dtype="uint8")
FORCE = FeatureSpec(name="force", shape=(3,), names=("x", "y", "z"), units=("N", "N", "N"))
COUNT = FeatureSpec(name="count", shape=(1,), dtype="int64")
OPTIONAL = ("wrist", "depth", "force", "count")
LENGTHS = (5, 1, 7)


def rich_schema(**options):
    kept = {"extras": (FORCE, COUNT), "maps": (DEPTH, MASK), "optional": OPTIONAL}
    return StoreSchema(embodiment=make_embodiment(size=(24, 32)), **{**kept, **options})


def rich_step(rng, lacking=()):
    images = {c: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for c in ("front", "wrist")}
    images["depth"] = rng.integers(0, 65536, DEPTH.shape, dtype=np.uint16)
    images["mask"] = np.repeat(rng.integers(0, 4, (24, 1, 1), dtype=np.uint8), 32, axis=1)
    extras = {"force": rng.standard_normal(3).astype(np.float32), "count": rng.integers(0, 9, 1)}
    return {
        "images": {name: value for name, value in images.items() if name not in lacking},
        "state": rng.standard_normal(3).astype(np.float32),
        "action": rng.standard_normal(2).astype(np.float32),
        "extras": {name: value for name, value in extras.items() if name not in lacking},
    }


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A store in which optional fields are lacking at random, and its steps by episode."""
    store = EpisodeStore.create(tmp_path_factory.mktemp("rich") / "s", rich_schema())
    rng = np.random.default_rng(0)
    given_steps = []
    with EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=2) as writer:
        for length in LENGTHS:
            writer.begin("look")
            steps = [rich_step(rng, [name for name in OPTIONAL if rng.random() < 0.5]) for _ in range(length)]
            for step in steps:
                writer.step(**step)
            writer.end(True)
            given_steps.append(steps)
    return store.refresh(), given_steps


def value_of(step, name):
    """What a step gave of a field, or None."""
    return {**step["images"], **step["extras"], "state": step["state"], "action": step["action"]}.get(name)


def test_what_is_there_comes_back_and_what_lacks_is_said(rich):
    store, episodes = rich
    steps = [step for episode in episodes for step in episode]
    present = store.lowdim("present")
    assert store.schema.field("present").names == OPTIONAL
    for k, step in enumerate(steps):
        assert present[k].tolist() == [value_of(step, name) is not None for name in OPTIONAL]
        for name in ("front", "wrist", "depth", "mask"):
            [found] = store.read_images(name, [k])
            wanted = value_of(step, name)
            np.testing.assert_array_equal(found, 0 if wanted is None else wanted)
        for name, nothing in (("force", np.nan), ("count", 0)):
            wanted = value_of(step, name)
            np.testing.assert_array_equal(store.lowdim(name)[k], nothing if wanted is None else wanted)
    assert store.read_images("depth", [0]).dtype == np.uint16
    episode = store.episode(2)
    assert set(episode.images) == {"front", "wrist", "depth", "mask"}
    assert episode.images["depth"].shape == (7, 12, 10, 1)


def test_zarr_python_reads_maps_and_gaps(rich):
    store, _ = rich
    for segment in dict.fromkeys(e.segment for e in store.episodes):
        group = zarr.open_group(store.path, mode="r")[f"segments/{segment}"]
        [first, *_] = [e for e in store.episodes if e.segment == segment]
        frames = np.arange(store.offsets[first.index], store.offsets[first.index] + first.length)
        for name in ("depth", "mask", "wrist"):
            theirs = group[f"images/{name}"][first.start : first.start + first.length]
            np.testing.assert_array_equal(theirs, store.read_images(name, frames))


def test_steps_that_lack_too_much_or_do_not_fit(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", rich_schema())
    good = rich_step(np.random.default_rng(0))
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        for change, words in (
            (
                {"images": {**good["images"], "depth": good["images"]["depth"].astype(np.float32)}},
                "map 'depth'.*uint16",
            ),
            ({"images": {k: v for k, v in good["images"].items() if k != "mask"}}, r"missing \['mask'\]"),
            ({"images": {**good["images"], "dept": 0}}, "Did you mean 'depth'"),
            ({"images": {**good["images"], "depth": b"\xff\xd8"}}, None),
        ):
            with pytest.raises(StoreError if words is None else SpecMismatchError, match=words or "JPEG streams need"):
                writer.step(**{**good, **change})
        writer.step(**good)
        writer.end(True)
    assert store.refresh().total_frames == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": [0, np.nan, 0]}, r"state\[1\] is nan: expected finite"),
        ({"action": [np.inf, 0]}, r"action\[0\] is inf"),
        ({"timestamp": np.nan}, "timestamp"),
        ({"timestamp": 0.5}, "clock that runs forward"),
        ({"timestamp": 0.4}, "clock that runs forward"),
    ],
)
def test_steps_that_are_not_sound_are_refused(tmp_path, change, words):
    store = EpisodeStore.create(tmp_path / "s", make_schema(cameras=()))
    step = {"images": {}, "state": np.zeros(3), "action": np.zeros(2)}
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        writer.step(**step, timestamp=0.5)
        with pytest.raises(SpecMismatchError, match=words):
            writer.step(**{**step, "timestamp": 1.0, **change})
        writer.step(**step, timestamp=2.0)
        writer.end(True)
        with pytest.raises(StoreError, match="no instruction"):
            writer.begin("  ")
        writer.begin("another may begin at 0 again")
        writer.step(**step, timestamp=0.0)
        writer.end(True)
    assert store.refresh().lowdim("timestamp").tolist() == [0.5, 2.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(
    offsets=st.dictionaries(
        st.sampled_from(["state", "action", "wrist", "depth", "force"]),
        st.lists(st.integers(-6, 6), min_size=1, max_size=4),
        max_size=3,
    ),
    hold=st.booleans(),
    obs_horizon=st.integers(1, 3),
)
def test_windows_with_offsets_and_gaps_are_those_of_a_plain_loop(rich, offsets, hold, obs_horizon):
    store, episodes = rich
    spec = WindowSpec(
        obs_horizon=obs_horizon,
        action_horizon=2,
        cameras=("wrist",),
        maps=("depth",),
        extras=("force",),
        offsets=offsets,
        hold=hold,
    )
    dataset = WindowDataset(store, spec)
    batch = dataset.batch(np.arange(len(dataset)))
    got = {**batch.images, **batch.extras, "state": batch.state, "action": batch.action}
    window = 0
    for steps in episodes:
        for now in range(len(steps)):
            for name, found in got.items():
                default = range(2) if name == "action" else range(1 - obs_horizon, 1)
                for k, offset in enumerate(offsets.get(name, default)):
                    place = min(max(now + offset, 0), len(steps) - 1)
                    if name in offsets:
                        assert batch.pads[name][window, k] == (place != now + offset)
                    if hold and name in OPTIONAL:
                        known = [i for i in range(place + 1) if value_of(steps[i], name) is not None]
                        place = known[-1] if known else place
                    wanted = value_of(steps[place], name)
                    if name in OPTIONAL:
                        assert batch.present[name][window, k] == (wanted is not None)
                    if wanted is not None:
                        np.testing.assert_array_equal(found[window, k], wanted)
            window += 1
    assert window == len(dataset)


def test_window_specs_that_fit_nothing(rich):
    store, _ = rich
    with pytest.raises(ConfigError, match="at least one step"):
        WindowSpec(offsets={"state": ()})
    for spec, words in (
        (WindowSpec(offsets={"stat": (0,)}), "Did you mean 'state'"),
        (WindowSpec(maps=("dept",)), "Did you mean 'depth'"),
    ):
        with pytest.raises(SpecMismatchError, match=words):
            WindowDataset(store, spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"maps": (replace(DEPTH, dtype="float32"),)}, "map 'depth': expected"),
        ({"maps": (replace(DEPTH, name="front"),)}, "differ from each other"),
        ({"optional": ("frnt",)}, "Did you mean 'front'"),
        ({"optional": ("state",)}, "each once"),
        ({"optional": ("wrist", "wrist")}, "each once"),
    ],
)
def test_schemas_that_mean_nothing(change, words):
    with pytest.raises(SpecMismatchError, match=words):
        rich_schema(**{"extras": (), "maps": (), "optional": (), **change})


def test_a_schema_grows_by_what_is_optional(tmp_path):
    small = make_schema()
    store = EpisodeStore.create(tmp_path / "s", small)
    before = fill(store, (2,), profile="raw")[0]
    with pytest.raises(SpecMismatchError, match="force: not there, and not optional"):
        store.set_schema(replace(small, extras=(FORCE,)))
    other = replace(small.embodiment, control_hz=3.0)
    with pytest.raises(SpecMismatchError, match=r"control_hz: 3\.0 against 10\.0"):
        store.set_schema(replace(small, embodiment=other))
    grown = store.set_schema(replace(small, extras=(FORCE,), maps=(DEPTH,), optional=("force", "depth")))
    with EpisodeWriter(grown, fsync=False, profile="raw") as writer:
        writer.begin("more")
        step = rich_step(np.random.default_rng(1), ("count",))
        step["images"].pop("mask")
        writer.step(**step)
        writer.end(True)
    with EpisodeWriter(store, fsync=False, profile="raw") as writer:  # who opened it before goes on as before
        writer.begin("as ever")
        writer.step(**before[0])
        writer.end(True)
    now = grown.refresh()
    assert now.lowdim("present").tolist() == [[False, False], [False, False], [True, True], [False, False]]
    np.testing.assert_array_equal(now.read_images("depth", [2])[0], step["images"]["depth"])
    assert not now.read_images("depth", [0, 1, 3]).any()
    np.testing.assert_array_equal(now.lowdim("force")[2], step["extras"]["force"])
    assert np.isnan(now.lowdim("force")[[0, 1, 3]]).all()
    np.testing.assert_array_equal(now.read_images("front", [0])[0], before[0]["images"]["front"])
    assert EpisodeStore.open(store.path, version=1).schema == small


def test_several_embodiments_share_a_store(tmp_path):
    first = make_schema()
    second = replace(first, embodiment=replace(make_embodiment(cameras=("top",), size=(8, 8)), name="other_arm"))
    store = EpisodeStore.create(tmp_path / "s", first)
    one = fill(store, (2, 3), profile="raw")
    other = store.set_schema(second)
    two = fill(other, (4,), seed=9, profile="raw")
    both = EpisodeStore.open(store.path)
    assert (both.embodiments, both.num_episodes, both.total_frames) == (("tiny_arm", "other_arm"), 3, 9)
    assert [e.length for e in both.episodes] == [2, 3, 4]
    for read in (lambda: both.embodiment, lambda: both.lowdim("state"), lambda: EpisodeWriter(both)):
        with pytest.raises(SpecMismatchError, match=r"s@tiny_arm, .*s@other_arm"):
            read()
    for name, given_steps, camera in (("tiny_arm", one, "front"), ("other_arm", two, "top")):
        steps = [step for episode in given_steps for step in episode]
        for part in (both.of(name), EpisodeStore.open(f"{store.path}@{name}"), both.of(name).refresh()):
            assert part.embodiments == (name,)
            np.testing.assert_array_equal(part.lowdim("action"), [s["action"] for s in steps])
            images = part.read_images(camera, range(part.total_frames))
            np.testing.assert_array_equal(images, [s["images"][camera] for s in steps])
            assert [e.meta["seed"] for e in part.episodes] == list(range(len(given_steps)))
    assert both.of("tiny_arm").fingerprint != both.of("other_arm").fingerprint
    with pytest.raises(NotFoundError, match="Did you mean 'other_arm'"):
        both.of("other_arn")
    with pytest.raises(SpecMismatchError):  # nobody adds a robot by accident
        EpisodeStore.create(
            store.path, replace(second, embodiment=replace(second.embodiment, control_hz=1.0)), exist_ok=True
        )
    assert EpisodeStore.create(store.path, second, exist_ok=True).embodiments == ("other_arm",)
