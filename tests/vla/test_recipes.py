"""The published models' recipes, made small by overrides: trained, saved and proven by the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import brachium
from brachium.__main__ import main
from brachium.errors import ConfigError
from brachium.vla.checkpoint import load_checkpoint, predict, read_goldens
from brachium.vla.model import stack_images
from brachium.vla.recipe import Recipe

from .conftest import make_embodiment, make_observation, make_statistics, record_demos
from .lerobot_models import text_tokenizer
from .test_families import CONFIGS, SIDE
from .test_prefix import make_vlm

FOLDER = Path(brachium.__file__).parent / "conf" / "model"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FAMILIES = {"smolvla": "smolvlm", "groot": "qwen3_vl", "pretrained": "smolvlm"}
SMALL = {
    "pi0": ["model.head.width=16", "model.width=16", "model.head.mlp=24", "model.head.steps=2"],
    "pi05": [
        *("model.head.width=16", "model.head.mlp=24", "model.head.steps=2"),
        *("model.speech.tokenizer.vocabulary=300", "model.speech.last=null"),
    ],
    "pi0_fast": ["model.head.last=null", "model.head.tokenizer.vocabulary=300", "model.action_horizon=4"],
    "smolvla": ["model.head.width=16", "model.head.mlp=24", "model.head.steps=2"],
    "groot": ["model.head.width=16", "model.width=16", "model.head.depth=2", "model.head.heads=2"],
    "rt2": ["model.action_horizon=2"],
    "openvla_oft": ["model.head.width=16", "model.action_horizon=4"],
    "octo": ["model.backbone.stem=[8,16]", "model.backbone.image_size=16", "model.backbone.width=24"],
    "keypoints": ["model.backbone.channels=[8,8,8]", "model.backbone.image_size=16", "model.backbone.width=24"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Family -> folder of a small model with a tokenizer that has room for action tokens."""
    made = {}

    def get(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            config = CONFIGS[family]
            text = {**config["text_config"], "vocab_size": 800}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(CONFIGS, family, {**config, "text_config": text})
                make_vlm(family).save_pretrained(path)
            text_tokenizer(800).save_pretrained(path)
            made[family] = path
        return made[family]

    return get


def words(name, folder, demos, out, *more):
    found = [f"store={demos.path}", f"model={name}", f"out={out}", "tune=full", "device=cpu"]
    name = "keypoints" if name.startswith("keypoints_") else name  # the same with other sizes
    found += SMALL.get(name, ())
    if name not in ("octo", "nano", "keypoints"):
        family = FAMILIES.get(name, "paligemma")
        found += [f"model.backbone.path={folder(family)}"]
        if family != "paligemma":
            found += [f"model.backbone.image_size={SIDE[family]}"]
        if name in ("groot", "smolvla"):
            found += ["model.backbone.layers=2"]
    return [*found, "optimization.steps=2", "optimization.batch_size=4", "optimization.precision=float32", *more]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_proves_itself(name, folder, demos, tmp_path, capsys):
    assert main(["train", *words(name, folder, demos, tmp_path)]) == 0
    checkpoint = tmp_path / "checkpoint"
    assert main(["verify", str(checkpoint)]) == 0
    assert "golden batches within" in "".join(capsys.readouterr())
    (golden,) = read_goldens(checkpoint).values()
    assert predict(load_checkpoint(checkpoint), "tiny", golden.observation, golden.noise).shape[2] == 3


def test_verify_says_what_it_cannot_find(tmp_path, capsys):
    for words, says in (
        ([str(tmp_path / "none")], "no checkpoint and no episode store at"),
        ([], "expected a checkpoint or a store to verify"),
        (["store=a", "checkpoint=b"], "one of them alone"),
    ):
        assert main(["verify", *words]) == 2
        assert says in capsys.readouterr().err


def test_the_shipped_model_is_a_backbone_for_heads_that_need_its_layers(tmp_path):
    """Its vision and language, without the pointing."""
    from brachium.vla.pretrained import Pretrained

    store = tmp_path / "store"
    assert main(["record", "env=tabletop/reach", "episodes=3", "workers=1", f"out={store}"]) == 0
    options = ["encoder=nano", "model.points=false", "model/head=pi0", "model.head.width=32", "model.head.mlp=48"]
    options += ["optimization.steps=2", "optimization.batch_size=4", f"out={tmp_path / 'run'}", "device=cpu"]
    assert main(["train", f"store={store}", *options]) == 0
    ours = load_checkpoint(tmp_path / "run" / "checkpoint").encoder.backbone
    theirs = Pretrained.load("nano").encoder.backbone
    for key, value in theirs.vlm.state_dict().items():
        assert torch.equal(ours.vlm.state_dict()[key], value), key
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean)


@pytest.fixture(scope="module")
def insulated(folder, tmp_path_factory):
    """pi0.5's recipe trained for two steps."""
    demos = record_demos(tmp_path_factory.mktemp("demos") / "store")
    out = tmp_path_factory.mktemp("pi05")
    assert main(["train", *words("pi05", folder, demos, out)]) == 0
    return load_checkpoint(out / "checkpoint")


def gradients(model, **recipe):
    """Gradients of the whole loss, with changes to the recipe."""
    before = model.recipe
    model.recipe = replace(before, **recipe)
    model.zero_grad()
    spec = make_embodiment()
    seen = make_observation(spec)
    state, images = torch.from_numpy(seen.state), stack_images(seen.images, spec, model.device)
    encoding = model.encode(images, model.tokens(seen.instruction, state, "tiny"), state, "tiny")
    action = torch.rand(3, 50, 3, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(3, 50, dtype=torch.bool)
    model.loss(encoding, state, action, padding, "tiny", torch.Generator().manual_seed(0)).sum().backward()
    model.recipe = before
    return {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}


def test_what_the_expert_learns_never_reaches_the_language_model(insulated):
    """The gradient of the flow loss is exactly 0 there, and that of the tokens is what it is without the expert."""
    model = insulated
    both, silent = gradients(model), gradients(model, speech_weight=0.0)
    vlm = [k for k in both if k.startswith("encoder.")]
    assert all(silent[k] is None or not silent[k].any() for k in vlm)
    assert any(both[k] is not None and both[k].any() for k in vlm)
    head, model.head = model.head, _Nothing()
    alone = gradients(model)
    model.head = head
    for key in vlm:
        if both[key] is not None:
            torch.testing.assert_close(both[key], alone[key], rtol=0, atol=0)
    open_ = gradients(model, insulate=False, speech_weight=0.0)
    assert sum(float(open_[k].abs().sum()) for k in vlm if open_[k] is not None) > 0
    assert any(v is not None and v.any() for k, v in both.items() if k.startswith("head."))


class _Nothing(torch.nn.Module):
    reads = "nothing"

    def loss(self, context, actions, step_mask, dim_mask, embodiment, generator):
        return torch.zeros(len(actions))


def test_the_state_in_the_prompt_is_read(insulated):
    spec = make_embodiment()
    one = insulated.tokens(["push it"], torch.zeros(1, spec.state.dim), "tiny")
    two = insulated.tokens(["push it"], torch.ones(1, spec.state.dim), "tiny")
    assert not torch.equal(one, two)
    text = insulated.tokenizer.decode(one[0][one[0] != insulated.instructions.pad]).replace(" ", "")
    assert text.startswith("<bos>Task:pushit,State:")
    assert text.endswith("Action:")
    insulated.set_statistics("tiny", make_statistics(spec))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"state": "prompt"}, r"\{state\} with model\.state=prompt"),
        ({"prompt": "do it"}, r"\{instruction\} in it"),
        ({"state": "words"}, "unknown model.state"),
        ({"insulate": True}, "give model.speech"),
        ({"points": True, "soft_prompts": 2}, "need model.points=false"),
        ({"action_pad": -1}, "from 0"),
    ],
)
def test_recipes_that_cannot_be(options, says):
    node = {"_target_": "x"}
    with pytest.raises(ConfigError, match=says):
        Recipe(**{"backbone": node, "head": node, "points": False, **options})
