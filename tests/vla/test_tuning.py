"""Frozen, adapted or whole; insulated or not: what changes, what does not, and actions as tokens."""

import numpy as np
import pytest
import torch

from brachium.__main__ import main
from brachium.errors import ConfigError
from brachium.vla.checkpoint import load_checkpoint
from brachium.vla.questions import IGNORE, location_tokens
from brachium.vla.tokenizer import subword_tokenizer
from brachium.vla.tuning import ActionWriter, check_tuning

from .conftest import make_embodiment, make_model, make_recipe, make_statistics, record_scenes
from .test_pretrain import run

FEW = ["optimization.steps=3", "optimization.batch_size=4", "device=cpu", "model.action_horizon=2"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    run(record_scenes(out / "scenes", range(10), questions=True), out)
    return out / "model"


def train(demos, pretrained, out, *words):
    assert main(["train", f"store={demos.path}", f"out={out}", f"encoder={pretrained}", *FEW, *words]) == 0
    return load_checkpoint(out / "checkpoint")


@pytest.fixture(scope="module")
def frozen(demos, pretrained, tmp_path_factory):
    return train(demos, pretrained, tmp_path_factory.mktemp("frozen")).encoder.state_dict()


def changed(model, before):
    return {name for name, value in model.encoder.state_dict().items() if not torch.equal(value, before[name])}


def test_adapters_change_transformer_layers_and_nothing_else(demos, pretrained, frozen, tmp_path):
    found = changed(train(demos, pretrained, tmp_path, "tune=lora", "lora_rank=2", "optimization.lr=0.05"), frozen)
    assert found
    assert all(".layers." in name and name.endswith(".weight") for name in found)
    layer = next(name for name in found if "q_proj" in name)
    model = load_checkpoint(tmp_path / "checkpoint")
    moved = model.encoder.state_dict()[layer] - frozen[layer]
    assert int(torch.linalg.matrix_rank(moved.double(), rtol=1e-4)) <= 2


def test_all_of_it_changes_what_leads_to_the_head(demos, pretrained, frozen, tmp_path):
    found = changed(train(demos, pretrained, tmp_path, "tune=full"), frozen)
    assert any("vision_model" in name for name in found)
    assert any("text_model" in name for name in found)


def test_no_gradient_of_the_head_passes_the_insulation(pretrained, demos, tmp_path):
    """The encoder goes the same way whatever the head is like, and another way without insulation."""
    ways = {}
    for name, words in {
        "one": ["insulate=true"],
        "wider": ["insulate=true", "model.head.width=24"],
        "open": [],
        "open wider": ["model.head.width=24"],
    }.items():
        clip = "+optimization.grad_clip=1000000"  # the norm is of all gradients together
        ways[name] = train(demos, pretrained, tmp_path / name, "tune=full", clip, *words).encoder.state_dict()
    vision = next(name for name in ways["one"] if "vision_model" in name and name.endswith("q_proj.weight"))
    assert torch.equal(ways["one"][vision], ways["wider"][vision])
    assert not torch.equal(ways["open"][vision], ways["open wider"][vision])
    assert not torch.equal(ways["one"][vision], ways["open"][vision])


def test_adapters_resume_to_the_same_weights(pretrained, demos, tmp_path, monkeypatch):
    import brachium.vla.loop as module

    torch.manual_seed(1)
    whole = train(demos, pretrained, tmp_path / "whole", "tune=lora").state_dict()
    original, calls = module.TrainLoop._update_average, []

    def stop(self):
        original(self)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    torch.manual_seed(2)  # another process would begin elsewhere
    with monkeypatch.context() as patch:
        patch.setattr(module.TrainLoop, "_update_average", stop)
        words = ["train", f"store={demos.path}", f"out={tmp_path / 'halves'}", f"encoder={pretrained}", *FEW]
        assert main([*words, "tune=lora"]) == 130
    torch.manual_seed(3)
    halves = train(demos, pretrained, tmp_path / "halves", "tune=lora", "resume=true").state_dict()
    assert all(torch.equal(halves[name], value) for name, value in whole.items())


def test_actions_are_written_as_the_nearest_location_token():
    specs = {"tiny": make_embodiment()}
    tokenizer = subword_tokenizer(["go"], size=300)
    model = make_recipe(points=False).build(specs, tokenizer, seed=0)
    model.set_statistics("tiny", make_statistics(specs["tiny"], constant=(2,)))
    writer = ActionWriter(model, "tiny")
    places = location_tokens(tokenizer)
    offset, scale = model.get_buffer("action_offset_tiny"), model.get_buffer("action_scale_tiny")
    share = torch.tensor([[[-1.0, 1.0, 0.0], [0.0, 7.0, 0.0]], [[-0.5, 0.25, 0.0], [0.1, 0.1, 0.0]]])
    pad = torch.tensor([[False, False], [False, True]])
    words = torch.tensor([[0, 9], [8, 9]])
    text, targets = writer.write(words, share * scale + offset, pad)
    assert text.shape == targets.shape == (2, 2 + 6)
    assert torch.equal(text[:, :2], words)
    assert set(text[:, 2].tolist()) == {tokenizer.bos_token_id}
    expected = np.rint((share.clamp(-1, 1).numpy() * 0.5 + 0.5) * 95).reshape(2, 6)
    real = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]], bool)  # a constant dimension, a padded step
    for row in range(2):
        said = targets[row, 2:].tolist()
        assert [places[t] for t, r in zip(said, real[row]) if r] == expected[row][real[row]].tolist()
        assert all(t == IGNORE for t, r in zip(said, real[row]) if not r)
    assert [places[int(t)] for t in text[0, 3:]] == expected[0, :-1].tolist()


def test_what_cannot_be_tuned():
    model = make_model(make_recipe())
    with pytest.raises(ConfigError, match="location tokens"):
        ActionWriter(model, "tiny")
    with pytest.raises(ConfigError, match=r"unknown tune 'lorra'.*lora"):
        check_tuning("lorra", 8, insulate=False)
    with pytest.raises(ConfigError, match="lora_rank of at least 1"):
        check_tuning("lora", 0, insulate=False)
    with pytest.raises(ConfigError, match="expected tune=lora or full"):
        check_tuning("frozen", 8, insulate=True)
