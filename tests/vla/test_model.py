"""The whole model: normalisation, limits, embodiments side by side, hostile specs."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from brachium.datasets.normalize import Normalizer
from brachium.errors import CheckpointError, ConfigError, SpecMismatchError, StoreError
from brachium.spec import FeatureSpec
from brachium.vla.checkpoint import make_golden, predict
from brachium.vla.grounding import ROLES
from brachium.vla.model import stack_images
from brachium.vla.recipe import Recipe, instantiate, require_trusted, trust

from .conftest import (
    HEADS,
    WIDTH,
    backbone_node,
    make_embodiment,
    make_model,
    make_observation,
    make_recipe,
    make_statistics,
    vlm_config,
)


def encoded(model, spec, count=3, seed=0):
    observation = make_observation(spec, count, seed=seed)
    images = stack_images(observation.images, spec, model.device)
    state = torch.from_numpy(observation.state)
    with torch.no_grad():
        tokens = model.tokens(observation.instruction, state, spec.name)
        return model.encode(images, tokens, state, spec.name), state


def loss_of(model, name, spec, seed=0):
    encoding, state = encoded(model, spec, seed=seed)
    action = torch.rand(3, 4, spec.action.dim, generator=torch.Generator().manual_seed(seed))
    pad = torch.zeros(3, 4, dtype=torch.bool)
    return model.loss(encoding, state, action, pad, name, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "quantile"])
@pytest.mark.parametrize("head", list(HEADS))
def test_actions_go_in_and_come_out_by_inverse_maps(head, mode, monkeypatch):
    """The head gets what `Normalizer` gives; what it answers comes back by the inverse, without the padding."""
    spec = make_embodiment(limits=False)
    model = make_model(make_recipe(head, action_normalization=mode), {"tiny": spec})
    statistics = make_statistics(spec, seed=0, constant=(1,))
    model.set_statistics("tiny", statistics)
    encoding, state = encoded(model, spec)
    action = torch.randn(3, 4, 3)
    pad = torch.arange(4) >= torch.tensor([4, 2, 1])[:, None]
    seen = {}

    def loss(context, actions, step_mask, dim_mask, embodiment, generator):
        seen.update(actions=actions, step_mask=step_mask, dim_mask=dim_mask, embodiment=embodiment)
        return torch.zeros(3)

    monkeypatch.setattr(model.head, "loss", loss)
    model.loss(encoding, state, action, pad, "tiny", torch.Generator())
    expected = Normalizer(mode=mode, statistics=statistics["action"])
    np.testing.assert_allclose(seen["actions"].numpy(), expected.normalize(action.numpy()), atol=2e-5)
    assert torch.equal(seen["step_mask"], ~pad)
    assert seen["dim_mask"].tolist() == [True, False, True]
    assert seen["embodiment"] == "tiny"
    answer = torch.rand(3, 4, 3) - 0.5
    monkeypatch.setattr(model.head, "sample", lambda context, noise, dim_mask, embodiment: answer)
    got = model.sample(encoding, state, torch.zeros(3, 4, 3), "tiny")
    back = expected.unnormalize(answer.numpy())
    back[:, :, 1] = 0.25  # what never changed in the data keeps its constant
    np.testing.assert_allclose(got.numpy(), back, atol=2e-5)


def test_states_are_normalised(monkeypatch):
    model, spec = make_model(), make_embodiment()
    statistics = make_statistics(spec)
    got = []
    model.state_in["tiny"].register_forward_pre_hook(lambda layer, inputs: got.append(inputs[0]))
    encoding, state = encoded(model, spec)
    with torch.no_grad():
        model.sample(encoding, state, torch.zeros(3, 4, 3), "tiny")
    expected = Normalizer(mode="mean_std", statistics=statistics["state"]).normalize(state.numpy())
    np.testing.assert_allclose(got[0].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("points", [False, True])
def test_chunks_lie_inside_the_limits_and_constants_stay(head, points):
    model, spec = make_model(make_recipe(head, points=points)), make_embodiment()
    model.set_statistics("tiny", make_statistics(spec, constant=(2,)))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(5.0)
    observation = make_observation(spec, 8)
    noise = 3 * np.random.default_rng(0).standard_normal((8, 4, 3)).astype(np.float32)
    chunk = predict(model, "tiny", observation, noise)
    assert chunk.shape == (8, 4, 3)
    assert chunk.dtype == np.float32
    assert chunk.min() >= np.float32(-0.6)
    assert chunk.max() <= np.float32(0.5)
    assert (chunk[..., :2] == np.float32(0.5)).any() or (chunk[..., :2] == np.float32(-0.6)).any()
    np.testing.assert_allclose(chunk[..., 2], 0.25, atol=1e-6)
    np.testing.assert_array_equal(chunk, predict(model, "tiny", observation, noise))


@pytest.mark.parametrize("side", ["low", "high"])
def test_one_sided_limits_are_kept(side):
    from dataclasses import replace

    spec = make_embodiment(limits=False)
    spec = replace(spec, action=replace(spec.action, **{side: (0.1, 0.1, 0.1)}))
    model = make_model(embodiments={"tiny": spec})
    noise = 3 * np.random.default_rng(0).standard_normal((8, 4, 3)).astype(np.float32)
    chunk = predict(model, "tiny", make_observation(spec, 8), noise)
    beyond = chunk < 0.1 if side == "low" else chunk > np.float32(0.1)
    assert not beyond.any()
    assert len(np.unique(chunk)) > 3


@pytest.mark.parametrize("points", [False, True])
def test_words_images_and_state_reach_the_actions(points):
    from dataclasses import replace

    model, spec = make_model(make_recipe(points=points)), make_embodiment(limits=False)
    model.embodiments["tiny"] = spec
    observation = make_observation(spec)
    noise = np.zeros((3, 4, 3), np.float32)
    before = predict(model, "tiny", observation, noise)
    changes = {
        "instruction": observation.instruction[::-1],
        "state": observation.state + 0.5,
        "images": {k: 255 - v for k, v in observation.images.items()},
    }
    for name, value in changes.items():
        after = predict(model, "tiny", replace(observation, **{name: value}), noise)
        assert np.abs(after[0] - before[0]).max() > 1e-5, name


def test_a_row_does_not_depend_on_its_batch():
    model, spec = make_model(make_recipe(points=True)), make_embodiment()
    observation = make_observation(spec, 4)
    noise = np.random.default_rng(0).standard_normal((4, 4, 3)).astype(np.float32)
    whole = predict(model, "tiny", observation, noise)
    alone = make_observation(spec, 4)
    rows = type(alone)(
        images={k: v[2:3] for k, v in alone.images.items()},
        state=alone.state[2:3],
        instruction=(alone.instruction[2],),
    )
    np.testing.assert_allclose(predict(model, "tiny", rows, noise[2:3]), whole[2:3], atol=1e-5)


def test_unknown_embodiments_are_named_with_a_suggestion():
    model, spec = make_model(), make_embodiment()
    observation, noise = make_observation(spec), np.zeros((3, 4, 3), np.float32)
    encoding, state = encoded(model, spec)
    zero = torch.zeros(3, 4, 3)
    pad = torch.zeros(3, 4, dtype=torch.bool)
    calls = [
        lambda: predict(model, "tinny", observation, noise),
        lambda: make_golden(model, "tinny", observation),
        lambda: model.sample(encoding, state, zero, "tinny"),
        lambda: model.loss(encoding, state, zero, pad, "tinny", torch.Generator()),
        lambda: model.set_statistics("tinny", make_statistics(spec)),
    ]
    for call in calls:
        with pytest.raises(SpecMismatchError, match=r"no embodiment 'tinny'. Did you mean 'tiny'\?"):
            call()


@pytest.mark.parametrize("head", list(HEADS))
def test_training_one_embodiment_leaves_the_other_as_it_was(head):
    specs = {"a": make_embodiment("a"), "b": make_embodiment("b", actions=5)}
    model = make_model(make_recipe(head), specs)
    own = {k: {n: p.detach().clone() for n, p in model.named_parameters() if f".{k}." in f".{n}."} for k in ("a", "b")}
    assert len(own["a"]) == len(own["b"]) >= 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = predict(model, "b", make_observation(specs["b"]), np.zeros((3, 4, 5), np.float32))
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, "a", specs["a"], seed=step).mean().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(v, after[n]) for n, v in own["b"].items())
    assert all(not torch.equal(v, after[n]) for n, v in own["a"].items())
    model.eval()
    assert predict(model, "b", make_observation(specs["b"]), np.zeros((3, 4, 5), np.float32)).shape == before.shape


def test_pointing_needs_the_tool_position():
    spec = make_embodiment(names=("j1", "j2", "x", "y"))
    with pytest.raises(
        SpecMismatchError, match=r"needs the tool position x, y, z in the state.*set model.points=false"
    ):
        make_model(make_recipe(points=True), {"tiny": spec})
    make_model(make_recipe(points=False), {"tiny": spec})


def test_the_tool_is_found_by_name_not_by_place():
    spec = make_embodiment(names=("grip", "z", "y", "x"))
    model = make_model(make_recipe(points=True), {"tiny": spec})
    encoding, state = encoded(model, spec)
    seen = []
    model.head.pool.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].vector))
    with torch.no_grad():
        model.sample(encoding, state, torch.zeros(3, 4, 3), "tiny")
    relative = seen[0][:, -6:].reshape(3, 2, 3) * 0.1
    position = encoding.points.reshape(3, 2, -1)[..., -3:] * 0.1
    torch.testing.assert_close(relative, position - state[:, None, [3, 2, 1]], atol=1e-5, rtol=1e-5)


def test_embodiments_that_cannot_share_a_model():
    with pytest.raises(SpecMismatchError, match="same cameras and tool pose"):
        make_model(make_recipe(points=True), {"a": make_embodiment("a"), "b": make_embodiment("b", cameras=("front",))})
    with pytest.raises(SpecMismatchError, match="at least one embodiment"):
        make_recipe().build({}, make_model().tokenizer)
    for name in ("arm.v2", "a/b", "type", "keys", "", "a b"):
        with pytest.raises(SpecMismatchError, match="use letters, digits"):
            make_model(embodiments={name: make_embodiment(name)})


def test_actions_that_never_change_are_nothing_to_learn():
    model, spec = make_model(), make_embodiment()
    with pytest.raises(StoreError, match="no action ever changes"):
        model.set_statistics("tiny", make_statistics(spec, constant=(0, 1, 2)))


def test_cameras_of_different_sizes_are_resized_one_by_one_but_a_model_that_points_refuses_them():
    cameras = {"front": (48, 40), "wrist": (20, 24)}
    pictures = tuple(FeatureSpec(name=n, shape=(*size, 3), dtype="uint8") for n, size in cameras.items())
    spec = replace(make_embodiment(), cameras=pictures)
    model = make_model(embodiments={"tiny": spec})
    observation = make_observation(spec)
    stacked = stack_images(observation.images, spec, torch.device("cpu"))
    assert [image.shape for image in stacked] == [(3, 48, 40, 3), (3, 20, 24, 3)]
    together = model.encoder.backbone.normalise(stacked)
    for k, image in enumerate(stacked):
        torch.testing.assert_close(together[:, k : k + 1], model.encoder.backbone.normalise(image[:, None]))
    assert np.isfinite(make_golden(model, "tiny", observation).actions).all()
    with pytest.raises(SpecMismatchError, match="cameras of one size"):
        make_model(make_recipe(points=True), {"tiny": spec})


def test_images_are_stacked_in_the_order_of_the_spec():
    spec = make_embodiment()
    images = {"wrist": np.full((1, 32, 32, 3), 2, np.uint8), "front": np.full((1, 32, 32, 3), 1, np.uint8)}
    assert stack_images(images, spec, torch.device("cpu"))[0, :, 0, 0, 0].tolist() == [1, 2]


def test_all_tokens_reach_a_head_of_a_model_that_does_not_point():
    model, spec = make_model(), make_embodiment()
    encoding, _ = encoded(model, spec)
    length = 8 + 8  # two cameras of 4 tokens, 8 words
    prefix = encoding.prefix
    assert prefix.states.shape == (3, length, WIDTH)
    assert not prefix.keys  # this head asks for none
    assert prefix.mask.sum(1).tolist() == [
        length - (model.instructions([text]) == model.instructions.pad).sum()
        for text in make_observation(spec).instruction
    ]
    rows = encoding.rows(torch.tensor([2, 0])).prefix
    assert torch.equal(rows.states[1], prefix.states[0])
    assert torch.equal(rows.mask[0], prefix.mask[2])
    assert torch.equal(rows.next, prefix.mask.sum(1)[[2, 0]])


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = make_model(seed=1), make_model(seed=1), make_model(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


class TestRecipe:
    def test_round_trip(self):
        recipe = make_recipe(points=True)
        assert Recipe.from_dict(recipe.to_dict()) == recipe

    def test_unknown_and_missing_keys(self):
        with pytest.raises(CheckpointError, match=r"unknown keys \['horizon'\]"):
            Recipe.from_dict({**make_recipe().to_dict(), "horizon": 3})
        with pytest.raises(CheckpointError, match=r"has no \['head'\]"):
            Recipe.from_dict({k: v for k, v in make_recipe().to_dict().items() if k != "head"})
        with pytest.raises(ConfigError, match="mapping with _target_"):
            Recipe(backbone={}, head=HEADS["flow"])
        with pytest.raises(ConfigError, match="action_horizon of at least 1"):
            make_recipe(action_horizon=0)

    @pytest.mark.parametrize(
        "target", ["os.system", "builtins.dict", "brachiumx.evil.Head", "torch.nn.Linear", "subprocess.Popen"]
    )
    def test_foreign_targets_are_refused(self, target):
        for node in ({"_target_": target}, {**backbone_node(), "config": {"deep": [{"_target_": target}]}}):
            with pytest.raises(CheckpointError, match="refusing to import"):
                Recipe.from_dict({**make_recipe().to_dict(), "head": node})

    def test_foreign_classes_are_refused_through_our_own_modules_too(self):
        """`brachium.vla.checkpoint.Path` starts with a trusted name, but is somebody else's class."""
        with pytest.raises(CheckpointError, match="refusing to import"):
            require_trusted({"_target_": "brachium.vla.checkpoint.Path"})

    def test_packages_that_a_user_trusts_are_imported(self, monkeypatch):
        node = {"_target_": "fractions.Fraction", "numerator": 3}
        with pytest.raises(CheckpointError, match="type BRACHIUM_TRUST=fractions"):
            require_trusted(node)
        monkeypatch.setenv("BRACHIUM_TRUST", "other, fractions")
        require_trusted(node)
        assert float(instantiate(node, denominator=4)) == 0.75
        monkeypatch.delenv("BRACHIUM_TRUST")
        monkeypatch.setattr("brachium.vla.recipe._TRUSTED", {"brachium"})
        trust("fractions")
        require_trusted(node)

    def test_mistakes_in_a_node(self):
        with pytest.raises(ConfigError, match="there is no class"):
            instantiate({"_target_": "brachium.vla.heads.flow.FlowHeed"})
        with pytest.raises(ConfigError, match=r"takes no 'widht'. Did you mean 'width'"):
            instantiate({**HEADS["flow"], "widht": 3})

    def test_the_config_of_a_recipe_is_not_changed_by_building(self):
        node = {"_target_": backbone_node()["_target_"], "config": vlm_config()}
        instantiate(node, vocab_size=20, readouts=3)
        assert node["config"] == vlm_config()


def test_the_models_are_imported_without_transformers_and_its_like():
    """They cost ten seconds; a backbone of theirs brings them when it is built."""
    modules = ("train", "heads.expert", "heads.vocabulary", "backbones.octo", "exchange.lerobot", "verify")
    heavy = ("transformers", "lerobot", "torchvision", "scipy", "peft", "matplotlib", "tensorboard", "mujoco")
    code = f"import sys, {', '.join(f'brachium.vla.{name}' for name in modules)}\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_is_around_points_reaches_the_head_only_if_asked_for():
    """A change around the points, where they stay, moves the context of a model with `surround` and of no other."""
    for surround in (0, 8):
        model = make_model(make_recipe(points=True, surround=surround)).eval()
        name = next(iter(model.embodiments))
        spec = model.embodiments[name]
        images = torch.randint(0, 255, (2, len(spec.cameras), *spec.cameras[0].shape), dtype=torch.uint8)
        state = torch.zeros(2, spec.state.dim)
        with torch.no_grad():
            encoding = model.encode(images, model.tokens(["reach the red cube"] * 2, state, name), state, name)
            before = model.context(encoding, state, name).vector
            assert before.shape[1] == model._head_inputs().context_dim
            if encoding.around is None:
                assert surround == 0
                continue
            patches = len(ROLES) * len(spec.cameras) * 9
            assert encoding.around.shape == (2, patches * model.encoder.backbone.vision_width)
            changed = replace(encoding, around=encoding.around + torch.randn_like(encoding.around))
            moved = (model.context(changed, state, name).vector - before).abs().max(0).values
        assert moved[:-surround].max() == 0.0
        assert moved[-surround:].min() > 0.0
    with pytest.raises(ConfigError, match="needs a model that points"):
        make_recipe(points=False, surround=4)
