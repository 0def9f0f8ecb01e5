"""What inspect reports, and the problems it must find."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from brachium.datasets.health import find_problems
from brachium.datasets.inspect import inspect_store
from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, NotFoundError
from brachium.spec import FeatureSpec

from .conftest import fill, make_embodiment, make_schema, random_step


def test_summary_and_files(filled, tmp_path, capsys):
    store, _ = filled
    summary = inspect_store(store=str(store.path), out=str(tmp_path / "o"), html=True, pictures=2)
    assert (summary["episodes"], summary["frames"]) == (3, 11)
    assert summary["hours"] == pytest.approx(1.1 / 3600)
    assert summary["success"] == {"True": 1, "False": 1, "None": 1}
    assert summary["instructions"] == {"task 0": 2, "task 1": 1}
    assert (summary["lengths"]["min"], summary["lengths"]["median"], summary["lengths"]["max"]) == (1, 4, 6)
    [x] = [r for r in summary["fields"] if r["name"] == "x"]
    assert (x["unit"], x["limits"]) == ("m", [-1, 1])
    assert x["mean"] == pytest.approx(store.lowdim("state")[:, 0].mean())
    json.dumps(summary)
    with Image.open(summary["files"]["contact_sheet"]) as sheet:
        assert sheet.width > 6 * 128
        assert np.asarray(sheet).std() > 10
    page = (tmp_path / "o" / "index.html").read_text()
    assert "data:image/png;base64," in page
    printed = capsys.readouterr().out
    assert "state[0]" in printed
    assert "contact_sheet.png" in printed
    assert "episodes have fewer than 2 steps: episodes 1" in printed


def test_texts_of_a_store_are_escaped(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema())
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("<script>alert(1)</script> [bold]")
        writer.step(**random_step(store.schema, np.random.default_rng(0)))
        writer.end(None)
    inspect_store(store=str(store.path), out=str(tmp_path / "o"), html=True)
    assert "<script>" not in (tmp_path / "o" / "index.html").read_text()


def test_an_empty_store_and_bad_arguments(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema())
    summary = inspect_store(store=str(store.path), out=str(tmp_path / "o"))
    assert summary["warnings"] == ["the store is empty"]
    assert summary["files"] == {}
    with pytest.raises(NotFoundError, match="brachium record"):
        inspect_store(store=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="pictures"):
        inspect_store(store=str(store.path), pictures=-1)


def test_a_sound_store_has_no_warnings(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema())
    rng = np.random.default_rng(0)
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("fine")
        for _ in range(20):
            step = random_step(store.schema, rng)
            writer.step(**{**step, "state": rng.uniform([-0.9, -0.9, 0], [0.9, 0.9, 1])})
        writer.end(True)
    assert find_problems(store.refresh()) == []


def test_every_planted_problem_is_found(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(cameras=("black", "frozen", "fine")))
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    with EpisodeWriter(store, fsync=False, checked=False) as writer:
        writer.begin(None)
        for i in range(20):
            step = random_step(store.schema, rng)
            images = {"black": np.zeros_like(still), "frozen": still, "fine": step["images"]["fine"]}
            state = [1.0 if i % 2 else 3.0, np.nan if i == 7 else 0.0, i % 2]
            writer.step(images=images, state=state, action=[0.5, i % 2], timestamp=i * 0.5)
        writer.end(True)
        writer.begin("back in time")
        for t in (1.0, 0.5):
            writer.step(images=images, state=[0.0, 0.0, 0], action=[0.5, 0], timestamp=t)
        writer.end(True)
    found = "\n".join(find_problems(store.refresh()))
    for words in (
        "1 of 2 episodes have no instruction",
        "timestamps do not increase in 1 episodes: episodes 1",
        "1 of 1 episodes were not recorded at 10 Hz but at 2 to 2 Hz",
        "state[0] (x) is outside its limits -1..1 in 10 of 22 steps",
        "state[0] (x) is saturated",
        "state[1] (y) is not finite in 1 of 22 steps",
        "action[0] (dx) is constant at 0.5",
        "camera 'black' is black in 2 of 2",
        "camera 'frozen' shows one frozen picture in 2 of 2",
    ):
        assert words in found
    assert "grip" not in found
    assert found.count("'fine'") <= 1  # the second episode repeats one picture


def test_many_instructions_are_summed_up(tmp_path, capsys):
    store = EpisodeStore.create(tmp_path / "s", make_schema(size=(8, 8)))
    fill(store, [1], episodes_per_segment=64)
    with EpisodeWriter(store, fsync=False, episodes_per_segment=64) as writer:
        for i in range(30):
            writer.begin(f"words {i}", meta={"task": "talk"})
            writer.step(**random_step(store.schema, np.random.default_rng(i)))
            writer.end(True)
    summary = inspect_store(store=str(store.path), pictures=0)
    assert summary["tasks"] == {"talk": 30, "": 1}
    printed = capsys.readouterr().out
    assert "... 11 more" in printed
    assert "(none)" in printed


def test_each_embodiment_by_itself(tmp_path, capsys):
    first = make_schema(size=(8, 8))
    store = EpisodeStore.create(tmp_path / "s", first)
    fill(store, (3, 4))
    depth = FeatureSpec(name="depth", shape=(4, 6, 1), dtype="uint16")
    other = StoreSchema(
        embodiment=replace(make_embodiment(cameras=("top",), size=(8, 8)), name="other_arm"),
        maps=(depth,),
        optional=("depth",),
    )
    part = store.set_schema(other)
    with EpisodeWriter(part, fsync=False) as writer:
        writer.begin("look")
        for t in range(4):
            step = random_step(other, np.random.default_rng(t))
            if t == 2:
                step["images"]["depth"] = np.ones((4, 6, 1), np.uint16)
            writer.step(**step)
        writer.end(True)
    found = inspect_store(store=str(store.path), out=str(tmp_path / "o"))["embodiments"]
    assert {name: one["episodes"] for name, one in found.items()} == {"tiny_arm": 2, "other_arm": 1}
    assert found["other_arm"]["maps"] == {"depth": [4, 6, 1, "uint16"]}
    [share] = [row["mean"] for row in found["other_arm"]["fields"] if row["field"] == "present"]
    assert share == 0.25
    assert (tmp_path / "o" / "other_arm" / "contact_sheet.png").exists()
    assert "depth 4x6 uint16" in capsys.readouterr().out


def test_gaps_jitter_and_copies_are_found(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(cameras=()))
    rng = np.random.default_rng(0)
    steps = [random_step(store.schema, rng) for _ in range(12)]
    even = np.arange(12) / 10
    clocks = {"even": even, "gap": even + 0.7 * (np.arange(12) > 5), "jitter": even + 0.06 * (np.arange(12) % 2)}
    with EpisodeWriter(store, fsync=False) as writer:
        for name, clock in (*clocks.items(), ("even", even)):
            writer.begin(name)
            for step, time in zip(steps, clock):
                writer.step(**step, timestamp=float(time))
            writer.end(True)
    found = "\n".join(find_problems(store.refresh()))
    assert "1 episodes have gaps of more than 2.5 steps in time: episodes 1" in found
    assert "jitters by more than 25 % of a step in 1 episodes: episodes 2" in found
    assert "1 episodes are the same as an earlier one, word for word and step for step: episodes 3" in found
