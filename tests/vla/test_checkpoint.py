"""Checkpoints: what is saved acts as before, and every damage is refused with a reason."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import brachium.vla.checkpoint as checkpoint_module
from brachium.errors import BrachiumError, CheckpointError, NotFoundError
from brachium.vla.checkpoint import (
    FILES,
    load_checkpoint,
    make_golden,
    predict,
    read_goldens,
    read_meta,
    save_checkpoint,
    verify_golden,
)

from .conftest import HEADS, backbone_node, make_embodiment, make_model, make_observation, make_recipe, vlm_config


def save(path, model, meta=None):
    goldens = [make_golden(model, name, make_observation(spec, 4)) for name, spec in model.embodiments.items()]
    return save_checkpoint(path, model, goldens, meta or {"note": "made by a test"})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model = make_model(make_recipe(points=True))
    model.encoder.backbone.fit_pixels(torch.randint(0, 256, (8, 2, 32, 32, 3), dtype=torch.uint8))
    return save(tmp_path_factory.mktemp("checkpoint") / "checkpoint", model), model


@pytest.fixture
def copy(original, tmp_path):
    return Path(shutil.copytree(original[0], tmp_path / "checkpoint"))


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(path, change, file="model.safetensors"):
    with safe_open(path / file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(path / file)
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, path / file, metadata)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("model_type", ["smolvlm", "idefics3"])
def test_a_loaded_model_acts_as_the_saved_one(tmp_path, head, points, model_type):
    node = {**backbone_node(), "config": vlm_config(model_type)}
    specs = {"a": make_embodiment("a"), "b": make_embodiment("b", actions=5)}
    model = make_model(make_recipe(head, points=points, backbone=node), specs)
    loaded = load_checkpoint(save(tmp_path / "c", model))
    assert not loaded.training
    assert loaded.embodiments == model.embodiments
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items())
    for name, spec in specs.items():
        noise = np.random.default_rng(0).standard_normal((3, 4, spec.action.dim)).astype(np.float32)
        observation = make_observation(spec, seed=8)
        np.testing.assert_array_equal(
            predict(model, name, observation, noise), predict(loaded, name, observation, noise)
        )


def test_saved_again_it_is_the_same(original, tmp_path):
    again = save(tmp_path / "again", load_checkpoint(original[0]))
    for name in ("recipe.json", "embodiments.json", "model.safetensors", "golden/tiny.safetensors"):
        one, two = (folder / name for folder in (original[0], again))
        if name.endswith("json"):
            assert json.loads(one.read_text()) == json.loads(two.read_text())
        else:
            a, b = load_file(one), load_file(two)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_it_where_the_umask_lets_them(original, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = save(tmp_path / "shared", load_checkpoint(original[0]))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()} == {mode}
    folders = [path, *(folder for folder in path.iterdir() if folder.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o777 & ~umask}
    assert len(folders) > 1


def test_a_pretrained_backbone_is_not_asked_for_again(tmp_path):
    source = tmp_path / "source"
    make_model().encoder.backbone.vlm.save_pretrained(source)
    node = {"_target_": backbone_node()["_target_"], "path": str(source)}
    model = make_model(make_recipe(backbone=node))
    path = save(tmp_path / "c", model)
    shutil.rmtree(source)
    loaded = load_checkpoint(path)
    assert loaded.recipe.backbone["path"] is None


@pytest.mark.parametrize("where", ["top", "text"])
def test_tied_embeddings_can_be_saved(tmp_path, where):
    config = vlm_config(tie_word_embeddings=True) if where == "text" else vlm_config()
    config |= {"tie_word_embeddings": where == "top"}
    model = make_model(make_recipe(backbone={**backbone_node(), "config": config}))
    loaded = load_checkpoint(save(tmp_path / "c", model))
    vlm = loaded.encoder.backbone.vlm
    if where == "top":
        assert vlm.lm_head.weight is vlm.model.text_model.embed_tokens.weight


def test_meta_and_golden_come_back(original):
    path, model = original
    meta = read_meta(path)
    assert meta["note"] == "made by a test"
    assert meta["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    golden = read_goldens(path)["tiny"]
    assert golden.embodiment == "tiny"
    np.testing.assert_array_equal(golden.actions, predict(model, "tiny", golden.observation, golden.noise))
    assert verify_golden(load_checkpoint(path), path)["tiny"] < 1e-5


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(NotFoundError, match=r"no checkpoint at .*brachium train"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"missing \['{name}'\]"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "golden/tiny.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_truncated_tensors_are_damage(copy, name, share):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["meta.json", "recipe.json", "embodiments.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "null", "\x00\xff"])
def test_torn_descriptions_are_damage(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(copy)


def nudge(pattern, factor=1.05, add=0.05):
    def change(weights):
        names = [k for k in weights if pattern in k]
        assert names
        weights[names[0]] = weights[names[0]] * factor + add

    return change


@pytest.mark.parametrize(
    "pattern",
    [
        "text_model.layers.1.mlp.up_proj.weight",
        "backbone.readouts",
        "pixel_mean",
        "point_readout.query.0.weight",
        "head.net.action_out.tiny.bias",
        "state_in.tiny.weight",
        "state_offset_tiny",
        "state_scale_tiny",
        "action_offset_tiny",
        "action_scale_tiny",
    ],
)
def test_an_edited_weight_or_statistic_shows_in_the_golden_batch(copy, pattern):
    edit_weights(copy, nudge(pattern))
    with pytest.raises(CheckpointError, match=r"the golden batch comes out differently.*saved with .*torch"):
        load_checkpoint(copy)
    load_checkpoint(copy, verify=False)


def test_a_tie_between_tokens_is_no_reason_to_refuse_but_another_head_is(tmp_path, monkeypatch):
    """Greedy decoding may flip between equally likely bins on another machine; the losses of the actions do not."""
    path = save(tmp_path / "checkpoint", make_model(make_recipe("tokenized", points=True)))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "predict", lambda *args: read_goldens(path)["tiny"].actions + 0.05)
        load_checkpoint(path)
    edit_weights(path, lambda w: next(v for k, v in w.items() if k.endswith("head.out.tiny.weight")).mul_(3.0))
    with pytest.raises(CheckpointError, match="golden batch comes out differently"):
        load_checkpoint(path)


def test_a_continuous_head_must_give_the_same_actions(copy, monkeypatch):
    golden = read_goldens(copy)["tiny"]
    monkeypatch.setattr(checkpoint_module, "predict", lambda *args: golden.actions + 0.05)
    with pytest.raises(CheckpointError, match="golden batch comes out differently"):
        load_checkpoint(copy)


def test_losses_that_are_no_numbers_are_refused(copy):
    edit_weights(copy, lambda w: w["losses"].fill_(float("nan")), "golden/tiny.safetensors")
    with pytest.raises(CheckpointError, match="golden batch comes out differently"):
        load_checkpoint(copy)


def test_an_edit_too_small_for_the_golden_batch_shows_in_the_checksum(copy):
    edit_weights(copy, nudge("embed_tokens", factor=1.0, add=1e-6))
    with pytest.raises(CheckpointError, match=r"\['model.safetensors'\] are not the files that were saved"):
        load_checkpoint(copy)
    load_checkpoint(copy, verify=False)


def test_a_changed_control_rate_shows_in_the_checksum(copy):
    """No input and output of the model depends on it, yet the robot would move at another speed."""
    edit_json(copy / "embodiments.json", lambda d: d["tiny"].update(control_hz=100.0))
    with pytest.raises(CheckpointError, match=r"\['embodiments.json'\] are not the files that were saved"):
        load_checkpoint(copy)


def test_notes_beside_a_checkpoint_do_no_harm(copy):
    (copy / "README.md").write_text("good one")
    edit_json(copy / "meta.json", lambda d: d.update(note="used on Tuesday"))
    load_checkpoint(copy)


def test_weights_that_are_not_finite_are_refused(copy):
    edit_weights(copy, nudge("head.net.action_out.tiny.bias", add=float("nan")))
    with pytest.raises(CheckpointError, match="golden batch"):
        load_checkpoint(copy)


def test_swapped_cameras_are_noticed(copy):
    edit_json(copy / "embodiments.json", lambda d: d["tiny"]["cameras"].reverse())
    with pytest.raises(CheckpointError, match="golden batch"):
        load_checkpoint(copy)


def test_swapped_tool_axes_are_noticed(copy):
    edit_json(copy / "embodiments.json", lambda d: d["tiny"]["state"].update(names=["y", "x", "z", "grip"]))
    with pytest.raises(CheckpointError, match="golden batch"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("recipe.json", lambda d: d["head"].update(_target_="os.system"), r"refusing to import 'os.system'"),
        ("recipe.json", lambda d: d["backbone"].update(x=[{"_target_": "evil.X"}]), r"refusing to import 'evil.X'"),
        ("recipe.json", lambda d: d["head"].update(_target_="brachium.vla.heads.flow.Old"), "there is no class"),
        ("recipe.json", lambda d: d["head"].update(layers=3), "takes no 'layers'"),
        ("recipe.json", lambda d: d["head"].update(width=48), "weights do not fit the recipe"),
        ("recipe.json", lambda d: d.update(colour="red"), r"unknown keys \['colour'\]"),
        ("recipe.json", lambda d: d.pop("head"), r"has no \['head'\]"),
        ("recipe.json", lambda d: d.update(action_horizon=8), "weights do not fit the recipe"),
        ("recipe.json", lambda d: d["backbone"]["config"].update(model_type="nothing"), "no model type 'nothing'"),
        ("meta.json", lambda d: d.update(format=99), "expected checkpoint format 2, got 99"),
        ("meta.json", lambda d: d.pop("format"), "expected checkpoint format 2, got None"),
        ("embodiments.json", lambda d: d.update(other=d.pop("tiny")), "weights do not fit|golden batch"),
        ("embodiments.json", lambda d: d["tiny"].update(colour=1), "cannot build the model"),
        ("embodiments.json", lambda d: d["tiny"]["action"].update(shape=[4]), "cannot build the model"),
        ("embodiments.json", lambda d: d.clear(), "at least one embodiment"),
    ],
)
def test_edited_descriptions_are_refused_with_a_reason(copy, file, change, complaint):
    edit_json(copy / file, change)
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(copy)


def test_loading_is_strict(copy):
    edit_weights(copy, lambda w: w.pop("state_in.tiny.weight"))
    with pytest.raises(CheckpointError, match=r"(?s)do not fit the recipe.*state_in.tiny.weight"):
        load_checkpoint(copy)


def test_surplus_weights_are_refused(copy):
    edit_weights(copy, lambda w: w.update(extra=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"(?s)do not fit the recipe.*extra"):
        load_checkpoint(copy)


def test_a_golden_batch_of_something_else_is_refused(copy):
    edit_weights(copy, lambda w: w.pop("image/wrist"), "golden/tiny.safetensors")
    with pytest.raises(CheckpointError, match="golden batch does not fit the model"):
        load_checkpoint(copy)


def test_another_tokenizer_is_noticed(copy):
    """Same size, other ids: every weight loads, and every word means something else."""
    path = copy / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    words = [w for w, k in vocabulary.items() if k > 3]
    data["model"]["vocab"] = vocabulary | dict(zip(words, [vocabulary[w] for w in reversed(words)]))
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="golden batch"):
        load_checkpoint(copy)


class Crash(Exception):
    pass


def test_a_crash_while_writing_leaves_the_old_checkpoint(original, tmp_path, monkeypatch):
    path = save(tmp_path / "c", original[1], {"note": "old"})

    def crash(*args, **kwargs):
        raise Crash

    monkeypatch.setattr("brachium.vla.checkpoint.save_file", crash)
    with pytest.raises(Crash):
        save(path, original[1], {"note": "new"})
    load_checkpoint(path)
    assert read_meta(path)["note"] == "old"
    monkeypatch.undo()
    save(path, original[1], {"note": "new"})
    assert read_meta(path)["note"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_between_the_renames_loses_nothing(original, tmp_path, monkeypatch, at):
    """The folder cannot be exchanged in one move; in between, the old one is still found."""
    path = save(tmp_path / "c", original[1], {"note": "old"})
    rename, count = Path.rename, []

    def crash(self, target):
        count.append(target)
        if len(count) == at:
            raise Crash
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(Crash):
        save(path, original[1], {"note": "new"})
    monkeypatch.undo()
    load_checkpoint(path)
    save(path, original[1], {"note": "newer"})
    assert read_meta(path)["note"] == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_every_error_is_for_users(copy):
    (copy / "recipe.json").write_text("{}")
    with pytest.raises(BrachiumError):
        load_checkpoint(copy)
