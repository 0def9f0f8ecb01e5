"""What is computed in another way where nobody learns, against the plain way: the same numbers and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from brachium.vla import fused
from brachium.vla.backbones import hf
from brachium.vla.backbones.lean import Lean
from brachium.vla.fused import ACTIVATIONS, ROWS, joined_weight, linear
from brachium.vla.heads.expert import ExpertHead
from brachium.vla.heads.solvers import integrate

from .test_families import CONFIGS
from .test_heads import A, B, H, context_of, inputs_of, make_backbone
from .test_prefix import inputs

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.mark.parametrize("rows", [3, ROWS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("then", [*ACTIVATIONS, "times", "plus", None])
def test_a_fused_layer_is_the_layer_and_what_comes_after(rows, bias, then, monkeypatch):
    monkeypatch.setattr(fused, "PRODUCTS", 1)  # small ones too
    torch.manual_seed(0)
    layer, x, other = nn.Linear(24, 40, bias=bias), torch.randn(2, rows, 24), torch.randn(2, rows, 40)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    if then in ACTIVATIONS:
        wanted, more = ACTIVATIONS[then][0](exact), {"activation": then}
    else:
        wanted = exact * other if then == "times" else exact + other if then == "plus" else exact
        more = {then: other} if then else {}
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer, **more), wanted.float(), **CLOSE)
    x.requires_grad_(True)
    found = linear(x, layer, **more)
    torch.testing.assert_close(found, wanted.float(), **CLOSE)
    found.sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None


def as_written(self, *args, **more):
    return type(self.layer).forward(self.layer, *args, **more)


@pytest.mark.parametrize("kind", ["smolvlm", "paligemma"])
@pytest.mark.parametrize("width", [0, ROWS])
def test_lean_layers_read_what_plain_ones_read(kind, width, monkeypatch):
    """Each part of the prefix; with so many rows that layers fuse, and with fewer."""
    monkeypatch.setattr(fused, "PRODUCTS", 1)
    backbone = make_backbone(kind)
    assert any(isinstance(m.forward, Lean) for m in backbone.modules() if "forward" in vars(m))
    rows = torch.arange(max(B, width)) % 4
    read = [part[rows] for part in inputs(b=4)]
    with torch.no_grad():
        lean = backbone.read(*read)
        keys = backbone.read(*read, states=False)
        monkeypatch.setattr(Lean, "__call__", as_written)
        plain = backbone.read(*read)
    torch.testing.assert_close(lean.states, plain.states, **CLOSE)
    assert keys.states.shape[-1] == 0
    for mine, short, theirs in zip(lean.keys + lean.values, keys.keys + keys.values, plain.keys + plain.values):
        torch.testing.assert_close(mine, theirs, **CLOSE)
        assert torch.equal(mine, short)


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_without_states_are_the_same_keys_and_give_the_same_gradients(kind):
    """Every family breaks off at its last layer, in training too."""
    found = []
    for states in (True, False):
        backbone = make_backbone(kind).train()
        prefix = backbone.read(*inputs(), states=states)
        sum(t.square().sum() for t in prefix.keys + prefix.values).backward()
        assert (prefix.states.shape[-1] == 0) != states
        found.append({k: p.grad for k, p in backbone.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key]), key


def test_a_vision_tower_sees_many_images_as_it_sees_each(monkeypatch):
    backbone = make_backbone()
    pixels = torch.randn(7, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        whole = backbone._see(pixels)
        monkeypatch.setattr(hf, "LARGE", 1)
        parts = backbone._see(pixels)
    torch.testing.assert_close(parts.tokens, whole.tokens, **CLOSE)
    torch.testing.assert_close(parts.patches, whole.patches, **CLOSE)


def expert(backbone, **options):
    torch.manual_seed(3)
    made = ExpertHead(inputs=inputs_of(backbone), width=48, mlp=40, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.eval()


VARIANTS = {
    "pi0": {},
    "pi05": {"time": "modulated", "state_token": False},
    "modulated with a state": {"time": "modulated"},
    "smolvla": {"joint_every": 2, "state_token": False, "two_way": False, "norm_offset": 0.0, "activation": "silu"},
    "every second layer": {"every": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", ["smolvlm", "octo"])
@pytest.mark.parametrize("told", [False, True])
def test_steps_computed_ahead_are_the_field(kind, options, told):
    backbone = make_backbone(kind)
    head = expert(backbone, max_delay=2 if told else 0, **options)
    context = context_of(backbone)
    x = torch.randn(B, H, A)
    given = torch.arange(H) < torch.tensor([[0], [1], [2]]) if told else None
    steps, prepared = head.steps_of(context, "tiny"), head.prepare(context, 1)
    for t in (1.0, 0.3, 1.0):
        wanted = head.velocity(prepared, x, torch.full((B,), t), "tiny", given)
        torch.testing.assert_close(steps(x, t, given), wanted, **CLOSE)
    noise = torch.randn(B, H, A)
    wanted = integrate(lambda x, t: head.velocity(prepared, x, x.new_full((B,), t), "tiny"), noise, head.steps, "euler")
    torch.testing.assert_close(head.sample(context, noise, torch.ones(A, dtype=torch.bool), "tiny"), wanted, **CLOSE)


def test_the_field_can_be_differentiated_where_chunks_are_guided():
    backbone = make_backbone()
    head, context = expert(backbone), context_of(backbone)
    with torch.no_grad():
        context = replace(context, prefix=context.prefix.detach())
        steps, prepared = head.steps_of(context, "tiny"), head.prepare(context, 1)
    x, pull = torch.randn(B, H, A), torch.randn(B, H, A)
    found = torch.autograd.functional.vjp(lambda x: steps(x, 0.4), x, pull)[1]
    wanted = torch.func.vjp(lambda x: head.velocity(prepared, x, torch.full((B,), 0.4), "tiny"), x)[1](pull)[0]
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_joined_weights_share_memory_and_go_on_learning():
    torch.manual_seed(0)
    layers = [nn.Linear(6, n, bias=False) for n in (4, 2, 3)]
    before = torch.cat([layer.weight.detach().clone() for layer in layers])
    whole = joined_weight(layers)
    assert torch.equal(whole, before)
    assert joined_weight(layers).data_ptr() == whole.data_ptr()
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    sum(layer(torch.ones(1, 6)).sum() for layer in layers).backward()
    optimizer.step()
    assert torch.equal(whole, before - 0.1)
    assert torch.equal(layers[1].weight, whole[4:6])
    moved = [layer.double() for layer in layers]  # as a model that goes to another device: each weight by itself
    assert torch.equal(joined_weight(moved), (before - 0.1).double())


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_frozen_model_reads_after_the_prompt_learns_as_in_one_pass(kind, states, monkeypatch):
    """SmolVLA's state is a token of a model that is not trained: the gradient goes through that token alone."""
    found = []
    for short in (True, False):
        backbone = make_backbone(kind).train().requires_grad_(False)
        monkeypatch.setattr(
            hf.HFBackbone, "_only_extra_learns", lambda self, short=short: short and torch.is_grad_enabled()
        )
        extra = torch.randn(B, 2, backbone.width, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
        prefix = backbone.read(*inputs(), extra=extra, states=states)
        (sum(t.square().sum() for t in prefix.keys + prefix.values) + prefix.states.square().sum()).backward()
        found.append((extra.grad, prefix))
    (mine, short), (theirs, whole) = found
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert short.spans == whole.spans
    assert torch.equal(short.mask, whole.mask)
    assert torch.equal(short.next, whole.next)
    for one, other in zip((short.states, *short.keys, *short.values), (whole.states, *whole.keys, *whole.values)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
