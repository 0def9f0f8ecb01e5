"""Heads that go on from rows that are given (training-time real-time chunking): exact, and in what they learn."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brachium.errors import ConfigError
from brachium.spec import Guidance
from brachium.vla.checkpoint import predict
from brachium.vla.heads.base import Context, HeadInputs
from brachium.vla.heads.dit import DiTHead
from brachium.vla.heads.flow import FlowHead, FlowMatching
from brachium.vla.heads.solvers import Guide

from .conftest import HEADS, make_model, make_observation, make_recipe
from .test_heads import NODES, A, B, H, chunks, context_of, inputs_of, make_backbone, make_head

FLOWS = [name for name, node in NODES.items() if "solver" in node]
DIMS = torch.ones(A, dtype=torch.bool)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


def guide(target, given, rest=0.3):
    weight = torch.full(target.shape[:2], rest)
    weight[:, :given] = 1.0
    return Guide(target=target, weight=weight, limit=5.0, gradient="vjp")


def sample(head, context, noise, led):
    with torch.no_grad():
        return head.sample(context, noise, DIMS, "tiny", led)


def test_every_flow_matching_head_of_the_group_is_here():
    assert len(FLOWS) >= 6


@pytest.mark.parametrize("name", FLOWS)
def test_rows_that_are_given_come_out_as_they_are_and_shape_the_others(backbone, name):
    head, context, noise = make_head(name, backbone, max_delay=2), context_of(backbone), torch.randn(B, H, A)
    plan = chunks(3)
    out = sample(head, context, noise, guide(plan, 2))
    torch.testing.assert_close(out[:, :2], plan[:, :2], rtol=0, atol=0)
    moved = plan.clone()
    moved[:, 1] += 1.0
    other = sample(head, context, noise, guide(moved, 2))
    assert (other[:, 2:] - out[:, 2:]).abs().max() > 1e-4, "what is given has no say in what follows"
    moved = plan.clone()
    moved[:, 2:] += 1.0
    torch.testing.assert_close(sample(head, context, noise, guide(moved, 2)), out, rtol=0, atol=0)
    again = sample(head, context, noise, guide(plan, 2, rest=0.9))
    torch.testing.assert_close(again, out, rtol=0, atol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_with_nothing_given_the_plan_has_no_say(backbone, name):
    head, context, noise = make_head(name, backbone, max_delay=2), context_of(backbone), torch.randn(B, H, A)
    free = sample(head, context, noise, None)
    torch.testing.assert_close(sample(head, context, noise, guide(chunks(3), 0)), free, rtol=1e-5, atol=1e-6)


def test_more_rows_than_it_was_trained_for_are_not_taken(backbone):
    head, context, noise = make_head("dit", backbone, max_delay=2), context_of(backbone), torch.randn(B, H, A)
    plan = chunks(3)
    most = sample(head, context, noise, guide(plan, 2))
    torch.testing.assert_close(sample(head, context, noise, guide(plan, 4)), most, rtol=0, atol=0)


def test_rows_of_a_batch_may_be_given_in_different_numbers(backbone):
    head, context, noise, plan = (
        make_head("dit", backbone, max_delay=3),
        context_of(backbone),
        torch.randn(B, H, A),
        chunks(3),
    )
    weight = torch.zeros(B, H)
    for k in range(B):
        weight[k, : k + 1] = 1.0
    out = sample(head, context, noise, Guide(target=plan, weight=weight, limit=5.0, gradient="vjp"))
    for k in range(B):
        torch.testing.assert_close(out[k, : k + 1], plan[k, : k + 1], rtol=0, atol=0)
        alone = sample(head, context, noise, guide(plan, k + 1, rest=0.0))
        torch.testing.assert_close(out[k], alone[k], rtol=1e-4, atol=1e-5)


class Spy(FlowMatching):
    """A field that notes what it is asked, is right about the rows that count, and wrong about the others."""

    def __init__(self, max_delay):
        super().__init__(steps=2, solver="euler", draws=4000, time_alpha=1.0, max_delay=max_delay)
        self.seen = []

    def prepare(self, context, draws):
        return draws

    def velocity(self, prepared, x, t, embodiment, given=None):
        self.seen.append(SimpleNamespace(x=x, t=t, given=given))
        right = (x - self.data) / t[:, None, None]
        return right if given is None else torch.where(given[:, :, None], 1e3, right)


def test_the_loss_counts_only_rows_that_are_not_given_and_they_hold_what_was_executed():
    head = Spy(2)
    data, done = torch.randn(1, H, A), torch.randn(1, H, A)
    head.data = data
    mask = torch.ones(1, H, dtype=torch.bool)
    each = head.loss(
        Context(vector=torch.zeros(1, 0)), data, mask, DIMS, "tiny", torch.Generator().manual_seed(0), done
    )
    assert each.item() < 1e-6
    (asked,) = head.seen
    counts = asked.given.sum(1)
    np.testing.assert_allclose(np.bincount(counts.numpy(), minlength=3) / 4000, 1 / 3, atol=0.03)
    assert torch.equal(asked.given, torch.arange(H) < counts[:, None]), "rows are given from the first on"
    shown = asked.given[:, :, None].expand_as(asked.x)
    torch.testing.assert_close(asked.x[shown], done.expand_as(asked.x)[shown], rtol=0, atol=0)
    assert (asked.x[~shown] - data.expand_as(asked.x)[~shown]).abs().mean() > 0.1


def test_without_a_delay_nothing_is_given_and_no_number_is_drawn():
    head, generator = Spy(0), torch.Generator().manual_seed(0)
    head.data = torch.randn(1, H, A)
    mask = torch.ones(1, H, dtype=torch.bool)
    head.loss(Context(vector=torch.zeros(1, 0)), head.data, mask, DIMS, "tiny", generator)
    assert head.seen[0].given is None
    plain = torch.Generator().manual_seed(0)
    torch.randn((4000, H, A), generator=plain), torch.rand(4000, generator=plain)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=plain))


@pytest.mark.parametrize("kind", [FlowHead, partial(DiTHead, heads=2)])
def test_a_head_learns_to_keep_to_what_was_begun(kind):
    """Chunks are all +1 or all -1, both as likely: one that goes on from -1 must be -1, whatever its noise says."""
    inputs = inputs_of(None, dims={"tiny": 1})
    torch.manual_seed(0)
    made = kind(inputs=inputs, width=48, depth=2, max_delay=2)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    generator, mask, dims = torch.Generator().manual_seed(0), torch.ones(64, H, dtype=torch.bool), DIMS[:1]
    context = Context(vector=torch.zeros(64, 6))
    for _ in range(250):
        side = torch.randint(2, (64, 1, 1), generator=generator) * 2.0 - 1.0
        loss = made.loss(context, side.expand(-1, H, 1), mask, dims, "tiny", generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(64, H, 1, generator=generator)
    with torch.no_grad():
        free = made.sample(context, noise, dims, "tiny")
        for side in (-1.0, 1.0):
            led = made.sample(context, noise, dims, "tiny", guide(torch.full((64, H, 1), side), 1))
            assert (led.mean(1).squeeze() * side > 0.8).float().mean() > 0.95
    share = (free.mean((1, 2)) > 0).float().mean()
    assert 0.2 < share < 0.8, "left free it does both"


def test_a_model_goes_on_from_a_plan_in_its_own_units():
    model, name = make_model(make_recipe({**HEADS["flow"], "max_delay": 2})), "tiny"
    assert model.max_delay == 2
    seen = make_observation(model.embodiments[name], 1)
    rng = np.random.default_rng(0)
    shape = (1, model.recipe.action_horizon, model.noise_dim(name))
    noise, other = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    plan = predict(model, name, seen, other)
    weights = np.zeros(shape[:2], np.float32)
    weights[:, :2] = 1.0
    led = predict(model, name, seen, noise, Guidance(actions=plan, weights=weights))
    np.testing.assert_allclose(led[:, :2], plan[:, :2], atol=1e-5)


def test_a_delay_as_long_as_the_chunk_is_refused():
    with pytest.raises(ConfigError, match="nothing would be left to learn"):
        make_model(make_recipe({**HEADS["flow"], "max_delay": 4}))


def test_a_negative_delay_is_refused():
    with pytest.raises(ConfigError, match="max_delay of at least 0"):
        FlowHead(inputs=HeadInputs(context_dim=2, action_horizon=3, action_dims={"tiny": 1}), max_delay=-1)
