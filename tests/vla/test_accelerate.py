"""Chunks that are made faster are the plain ones, within what is stated; and could be recorded on a GPU."""

import copy

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brachium.errors import ConfigError
from brachium.policies.vla_policy import VLAPolicy
from brachium.spec import Guidance, Observation
from brachium.vla.accelerate import Acceleration, QuickSampler
from brachium.vla.checkpoint import predict
from brachium.vla.float8 import Float8Linear, to_float8, use_float8
from brachium.vla.model import stack_images

from .conftest import make_model, make_observation, make_recipe

EXPERT = {"_target_": "brachium.vla.heads.expert.ExpertHead", "width": 32, "mlp": 32, "steps": 3}
CASES = {
    "flow": ("flow", {}),
    "pi0": (EXPERT, {"state": "vector"}),
    "pi05": ({**EXPERT, "time": "modulated", "state_token": False}, {}),
    "smolvla": (
        {**EXPERT, "joint_every": 2, "state_token": False, "two_way": False, "activation": "silu", "max_delay": 2},
        {"state": "prefix"},
    ),
    "points": (
        "flow",
        {"points": True, "words_dim": 4},
    ),
    "octo": (
        EXPERT,
        {
            "backbone": {
                "_target_": "brachium.vla.backbones.octo.OctoBackbone",
                "width": 32,
                "depth": 1,
                "heads": 2,
                "image_size": 32,
                "max_words": 40,
            },
            "state": "vector",
        },
    ),
    "diffusion": ({"_target_": "brachium.vla.heads.diffusion.DiffusionHead", "width": 32, "depth": 2, "steps": 4}, {}),
}
TOLERANCES = {"float32": 2e-6, "bf16": 0.03}
"""Of actions whose range is about 1."""


def made(case):
    head, options = CASES[case]
    return make_model(make_recipe(head, max_tokens=40, **options))


def asked(model, count=2):
    shape = (count, 4, model.noise_dim("tiny"))
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return make_observation(model.embodiments["tiny"], count), noise


def row_of(observation, k):
    images = {name: image[k] for name, image in observation.images.items()}
    return Observation(images=images, state=observation.state[k], instruction=observation.instruction[k])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_plain_ones(case, precision):
    """Prompts are cut to 16 tokens here, which are 40 in the plain model."""
    model = made(case)
    observation, noise = asked(model)
    wanted = predict(model, "tiny", observation, noise)
    assert np.ptp(wanted) > 0.5
    quick = QuickSampler(copy.deepcopy(model), "tiny", Acceleration(precision=precision))
    for _ in range(2):
        np.testing.assert_allclose(quick.predict(observation, noise), wanted, atol=TOLERANCES[precision], rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pi0", "smolvla"])
def test_compiled_chunks_are_the_plain_ones(case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes cannot be compiled
    model = made(case)
    observation, noise = asked(model)
    wanted = predict(model, "tiny", observation, noise)
    policy = VLAPolicy(copy.deepcopy(model), batch_size=2, acceleration=Acceleration(compile=True))
    rows = [row_of(observation, k) for k in range(2)]
    np.testing.assert_allclose(policy.predict(rows, noise).actions, wanted, atol=TOLERANCES["float32"], rtol=0)
    # Guided by a gradient, which what is compiled does not have, and by the identity.
    for gradient in ("vjp", "identity"):
        guide = Guidance(
            actions=np.zeros((4, 3), np.float32),
            weights=np.array([1, 0.5, 0, 0], np.float32),
            limit=5.0,
            gradient=gradient,
        )
        led = VLAPolicy(copy.deepcopy(model), batch_size=2).predict(rows, noise, [guide] * 2).actions
        found = policy.predict(rows, noise, [guide] * 2).actions
        np.testing.assert_allclose(found, led, atol=5e-6, rtol=0)
        assert np.abs(found - wanted).max() > 1e-3


@pytest.mark.slow
def test_more_shapes_are_compiled_than_torch_allows_by_itself(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    model = made("pi0")
    quick = QuickSampler(copy.deepcopy(model), "tiny", Acceleration(compile=True))
    for count in (1, 2, 3):
        observation, noise = asked(model, count)
        wanted = predict(model, "tiny", observation, noise)
        np.testing.assert_allclose(quick.predict(observation, noise), wanted, atol=2e-6, rtol=0)


def test_two_samplers_of_one_model_have_plans_of_their_own():
    model = made("pi0")
    observation, noise = asked(model)
    one, two = (QuickSampler(model, "tiny", Acceleration()) for _ in range(2))
    steps = []
    for number, sampler in enumerate((one, two)):
        step = sampler._plan.step
        sampler._plan.step = lambda *args, number=number, step=step: (steps.append(number), step(*args))[1]
    one.predict(observation, noise)
    assert set(steps) == {0}
    two.predict(observation, noise)
    assert set(steps) == {0, 1}


@pytest.mark.parametrize("case", ["points", "octo"])
def test_what_cannot_be_recorded_is_said(case, monkeypatch):
    monkeypatch.setattr(Acceleration, "check", lambda self, device: None)
    with pytest.raises(ConfigError, match="that do not point; this one takes numbers from the host"):
        QuickSampler(made(case), "tiny", Acceleration(graph=True))
    if case == "octo":
        with pytest.raises(ConfigError, match="fp8 is for language models of transformers, got OctoBackbone"):
            QuickSampler(made(case), "tiny", Acceleration(precision="fp8"))


class FromTheHost(TorchDispatchMode):
    """Notes what mixes tensors of the host with those of the device: a graph cannot be recorded of it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {t.device.type for t in tree_leaves([args, kwargs, out]) if isinstance(t, Tensor) and t.dim()}
        if len(places) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("case", sorted(set(CASES) - {"points", "octo"}))
@torch.no_grad()
def test_nothing_in_a_chunk_comes_from_the_host_or_waits_for_it(case):
    """On the meta device, where asking for a value is an error: as in the recording of a CUDA graph."""
    model = made(case).to("meta")
    observation, noise = asked(model)
    images = stack_images(observation.images, model.embodiments["tiny"], torch.device("meta"))
    state = torch.zeros(observation.state.shape, device="meta")
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    with FromTheHost() as seen:
        found = model.chunk(
            model.encode(images, tokens, state, "tiny"), state, torch.zeros(noise.shape, device="meta"), "tiny"
        )
    assert found.shape == (2, 4, 3)
    assert found.device.type == "meta"
    assert seen.found == []


@torch.no_grad()
def test_prompts_are_cut_to_what_the_longest_needs():
    model = made("pi0")
    state = torch.zeros(2, 4)
    whole = model.tokens(["reach the blue ball", "push"], state, "tiny")
    cut = model.tokens(["reach the blue ball", "push"], state, "tiny", multiple=2)
    assert whole.shape == (2, 40)
    assert cut.shape == (2, 4)
    assert torch.equal(cut, whole[:, -4:])
    assert model.tokens(["", ""], state, "tiny", multiple=16).shape[1] in (16, 40)
    assert model.tokens(["reach " * 60] * 2, state, "tiny", multiple=16).shape == (2, 40)


@torch.no_grad()
def test_cameras_that_nobody_has_are_not_looked_at(monkeypatch):
    model = made("pi0")
    backbone = model.encoder.backbone
    observation, noise = asked(model)
    images = stack_images(observation.images, model.embodiments["tiny"], torch.device("cpu"))
    state = torch.from_numpy(observation.state)
    tokens = model.tokens(observation.instruction, state, "tiny")
    draws = torch.from_numpy(noise)
    mask = torch.tensor([[True, False], [True, False]])
    seen = []
    look = backbone.family.look
    monkeypatch.setattr(backbone.family, "look", lambda pixels: seen.append(len(pixels)) or look(pixels))

    def chunk(given):
        encoding = model.encode(images, tokens, state, "tiny", image_mask=given)
        return model.chunk(encoding, state, draws, "tiny")

    short = chunk(mask)
    assert seen == [2]
    with torch.enable_grad():  # in training shapes stay
        whole = chunk(mask)
    assert seen == [2, 4]
    torch.testing.assert_close(short, whole.detach(), atol=2e-6, rtol=0)
    assert (short - chunk(None)).abs().max() > 1e-3
    assert chunk(torch.tensor([[True, False], [True, True]])).shape == short.shape
    assert seen == [2, 4, 4, 4]


@torch.no_grad()
def test_float8_rounds_to_three_bits():
    layer, x = nn.Linear(64, 48), torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, 48)[:, None])  # each row has a scale of its own
    quick = Float8Linear(layer)
    assert quick.weight.dtype == torch.float8_e4m3fn
    found, wanted = quick(x), layer(x)
    assert found.dtype == torch.bfloat16
    off = ((found.float() - wanted).square().mean((0, 1)) / wanted.square().mean((0, 1))).sqrt()
    assert 0.001 < off.max() < 0.06
    rows, scale = to_float8(x.flatten(0, 1))
    assert (rows.float().abs().amax(1) == 448.0).all()
    torch.testing.assert_close(rows.float() * scale, x.flatten(0, 1), atol=0.0, rtol=2**-4 + 1e-3, equal_nan=True)


def test_float8_takes_the_layers_that_kernels_can_do():
    parts = nn.Sequential(nn.Linear(32, 16), nn.Sequential(nn.Linear(16, 10), nn.LayerNorm(10)), nn.Linear(16, 32))
    assert use_float8(parts) == 2
    assert [type(m).__name__ for m in (parts[0], parts[1][0], parts[2])] == ["Float8Linear", "Linear", "Float8Linear"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"graph": True}, "expected device=cuda, got cpu"),
        ({"precision": "fp8"}, "compute capability 8.9"),
        ({"precision": "float16"}, "unknown precision"),
    ],
)
def test_what_a_device_cannot_do_is_said(options, says):
    with pytest.raises(ConfigError, match=says):
        VLAPolicy(made("flow"), acceleration=Acceleration(**options))


def test_warming_up_asks_for_every_size_free_and_guided(monkeypatch):
    policy = VLAPolicy(made("pi0"), batch_size=[1, 2, 4], acceleration=Acceleration(precision="bf16"))
    assert policy.accelerated
    assert not VLAPolicy(made("pi0"), acceleration=Acceleration()).accelerated
    asked, predict = [], policy._predict

    def noted(observation, noise, guidance):
        asked.append((len(noise), guidance is not None))
        return predict(observation, noise, guidance)

    monkeypatch.setattr(policy, "_predict", noted)
    policy.warm_up()
    lengths = 3  # of prompts, up to 40 tokens
    assert asked == [(size, guided) for size in (1, 2, 4) for _ in range(lengths) for guided in (False, True, True)]
