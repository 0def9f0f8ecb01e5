"""The training verbs: to the bit the same after a kill, what they leave behind, and folders that are not whole."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from brachium.errors import BrachiumError, CheckpointError, ConfigError, NotFoundError, SpecMismatchError
from brachium.vla.generative.folder import kind_of
from brachium.vla.generative.frames import FrameData
from brachium.vla.generative.generator import Guidance
from brachium.vla.generative.others import Others
from brachium.vla.generative.reading import Reading
from brachium.vla.generative.stages import Augmentation, Stages
from brachium.vla.generative.system import SubgoalSystem
from brachium.vla.generative.train import train_video, train_visual
from brachium.vla.heads.regression import RegressionHead
from brachium.vla.optim import Optimization

SHORT = Optimization(steps=6, batch_size=8, warmup=2, ema=0.9, precision="float32", log_every=2, save_every=3, seed=1)
COMMON = {
    "head": partial(RegressionHead, width=32),
    "augmentation": Augmentation(),
    "guidance": Guidance(steps=2),
    "progress": SHORT,
    "size": 16,
    "widths": [16, 32],
    "patch": 2,
    "width": 16,
    "samples": 2,
    "heldout": 0.3,
}


def visual(store, out, **options):
    return train_visual(
        store=str(store.path), out=str(out), **{**COMMON, "editor": SHORT, "policy": SHORT, "ahead": 3, **options}
    )


@pytest.fixture(scope="module")
def trained(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("visual")
    assert visual(slides, out) == 0
    return out


def weights(out):
    return load_file(out / "checkpoint" / "model.safetensors")


class Killed(Exception):
    """In place of SIGKILL."""


@pytest.mark.parametrize("part", ["generator", "policy", "progress"])
def test_training_that_was_killed_goes_on_to_the_same_weights(slides, trained, tmp_path, monkeypatch, part):
    from brachium.vla.generative.stages import Stages

    whole = getattr(Stages, f"{part}_loss")
    calls = []

    def dies(self, batch, generator):
        calls.append(part)
        if len(calls) == 5:
            raise Killed
        return whole(self, batch, generator)

    monkeypatch.setattr(Stages, f"{part}_loss", dies)
    with pytest.raises(Killed):
        visual(slides, tmp_path)
    assert not (tmp_path / "checkpoint").exists()
    monkeypatch.setattr(Stages, f"{part}_loss", whole)
    assert not (tmp_path / "vision.npy").exists(), "what is large does not stay"
    (tmp_path / "vision.npy").write_bytes(b"of a run that could not clean up")
    visual(slides, tmp_path, resume=True)
    assert not (tmp_path / "vision.npy").exists()
    before, after = weights(trained), weights(tmp_path)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frames_look_to_the_policy_as_they_do_when_it_acts(trained, slides, tmp_path):
    system = SubgoalSystem.load(trained / "checkpoint")
    data = FrameData.open(str(slides.path), 16, 0.0, ["front"])
    nothing = Reading(words=torch.zeros(0, 1), uv=torch.zeros(0, 1, 2, 2), visible=torch.zeros(0, 1, 2))
    options = {"augmentation": Augmentation(), "goals": 2, "spread": 0}
    stages = Stages(system=system, data=data, own=nothing, other=nothing, **options)
    rows = np.array([5, 0, len(data.owner) - 1])
    fresh = stages.looks(rows)
    stages.see(tmp_path / "vision.npy")
    torch.testing.assert_close(stages.looks(rows), fresh, rtol=2e-3, atol=2e-3)


def test_weights_that_see_otherwise_are_not_gone_on_with(slides, trained, tmp_path):
    shutil.copytree(trained / "checkpoint" / "encoder", tmp_path / "encoder")
    path = tmp_path / "encoder" / "pointing.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=r"another pretrained model. Type: encoder=.*encoder"):
        visual(slides, tmp_path / "out", init=str(trained / "checkpoint"), encoder=str(tmp_path / "encoder"))


def test_a_finished_part_is_reused_only_with_the_same_options(slides, trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run")
    visual(slides, tmp_path / "run", resume=True, policy=replace(SHORT, steps=4))
    said = capfd.readouterr()
    said = said.out + said.err
    assert "generator: finished before" in said
    assert "policy: finished before" not in said


def test_what_training_leaves_behind(slides, trained):
    folder = trained / "checkpoint"
    system = SubgoalSystem.load(folder)
    assert kind_of(folder) == system.kind == "visual"
    assert system.cameras == ("front",)
    meta = json.loads((folder / "meta.json").read_text())
    assert set(meta["seconds"]) == {"generator", "policy", "progress", "round_trips", "total"}
    assert meta["process_cpu_seconds"] > 0
    assert 0.0 <= meta["metrics"]["progress"]["eval/accuracy"] <= 1.0
    assert (folder / "samples.png").stat().st_size > 500
    assert system.others is not None
    assert len(system.others.texts) == len(system.others.frames["front"])
    lines = [json.loads(line) for line in (trained / "log-policy.jsonl").read_text().splitlines()]
    assert "eval/shuffled_error" in lines[-1]
    assert torch.is_tensor(weights(trained)["policy.action_mean"])


def test_a_video_system_makes_several_frames_and_loads(slides, tmp_path):
    options = {**COMMON, "video": SHORT, "inverse": SHORT, "frames": 3, "steps": 2, "cameras": ["front", "wrist"]}
    assert train_video(store=str(slides.path), out=str(tmp_path), **options) == 0
    system = SubgoalSystem.load(tmp_path / "checkpoint")
    assert (system.kind, system.generator.frames, system.generator.steps) == ("video", 3, 2)
    assert system.policy.goals == ("front", "wrist")


def test_a_video_system_begins_with_a_visual_one(slides, trained, tmp_path, capfd):
    options = {**COMMON, "video": SHORT, "inverse": SHORT, "frames": 2, "steps": 2}
    train_video(store=str(slides.path), out=str(tmp_path), init=str(trained / "checkpoint"), **options)
    said = capfd.readouterr()
    assert "policy: begins with" in said.out + said.err
    meta = json.loads((tmp_path / "checkpoint" / "meta.json").read_text())
    earlier = json.loads((trained / "checkpoint" / "meta.json").read_text())["seconds"]["total"]
    assert meta["seconds"]["init"] == pytest.approx(earlier, abs=0.3)  # its training counts too
    assert meta["seconds"]["total"] >= earlier - 0.3


def damage(folder, how):
    if how == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "config":
        (folder / "config.json").write_text("{")
    elif how == "other":
        config = json.loads((folder / "config.json").read_text())
        config["generator"]["widths"] = [16, 48]
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "edited":
        path = folder / "encoder" / "brachium.json"
        path.write_text(path.read_text() + "\n")
    else:
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged"),
        ("config", "cannot build the model"),
        ("other", "cannot build the model"),
        ("edited", "not the files that were saved"),
        ("missing", r"missing \['model.safetensors'\]"),
    ],
)
def test_folders_that_are_not_whole_are_refused(trained, tmp_path, how, message):
    shutil.copytree(trained / "checkpoint", tmp_path / "c")
    damage(tmp_path / "c", how)
    with pytest.raises(CheckpointError, match=message):
        SubgoalSystem.load(tmp_path / "c")
    with pytest.raises(NotFoundError, match="train-visual"):
        SubgoalSystem.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 18}, ConfigError, "multiple of 4"),
        ({"spread": 3}, ConfigError, "below ahead=3"),
        ({"goals": 0}, ConfigError, "goals from 1"),
        ({"cameras": ["side"]}, SpecMismatchError, "no camera 'side'"),
        ({"cameras": []}, BrachiumError, "at least one camera"),
        ({"encoder": "micro"}, NotFoundError, "no pretrained model"),
    ],
)
def test_options_that_cannot_be_are_refused_before_training(slides, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        visual(slides, tmp_path, **options)
    assert not list(tmp_path.glob("log-*"))


def test_others_are_strangers(tmp_path):
    frames = {"front": np.zeros((3, 4, 4, 3), np.uint8)}
    others = Others(frames=frames, texts=("a", "b", "a"))
    for seed in range(10):
        assert others.texts[others.pick(seed, "a")] == "b"
        assert others.pick(seed, "c") == others.pick(seed, "c")
    others.save(tmp_path)
    again = Others.load(tmp_path)
    assert again is not None
    assert again.texts == others.texts
    assert Others.load(tmp_path / "nowhere") is None
