"""Flow matching against closed forms: solvers, loss, masks, time convention, modes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import ConfigError
from brachium.vla.backbones.base import Prefix
from brachium.vla.heads.base import Context, ContextPool, HeadInputs, masked_mean
from brachium.vla.heads.flow import FlowHead, time_features
from brachium.vla.heads.solvers import integrate

MEAN, STD = 0.4, 0.3


def gaussian_velocity(x, t, std=STD):
    """E[noise - data | x_t = x] for data ~ N(MEAN, std²) and x_t = t noise + (1 - t) data."""
    variance = t**2 + (1 - t) ** 2 * std**2
    return (t - (1 - t) * std**2) / variance * (x - (1 - t) * MEAN) - MEAN


def head(steps=5, solver="midpoint", action_dims=None, horizon=4, context_dim=6, seed=0, width=32, **options):
    torch.manual_seed(seed)
    made = FlowHead(
        inputs=HeadInputs(context_dim=context_dim, action_horizon=horizon, action_dims=action_dims or {"tiny": 3}),
        width=width,
        depth=2,
        steps=steps,
        solver=solver,
        **options,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logistic_velocity(x, t):
    """dx/dt = 2 t x (1 - x), so that x / (1 - x) at 0 is 1/e of what it is at 1."""
    return 2 * t * x * (1 - x)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    start = torch.linspace(0.05, 0.95, 24, dtype=torch.float64).reshape(2, 4, 3)
    odds = start / (1 - start) / math.e
    exact = odds / (1 + odds)
    errors = [(integrate(logistic_velocity, start, n, solver) - exact).abs().max().item() for n in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_reproduce_a_gaussian(solver, order):
    """The map of the closed-form field is affine: a noise x ends at MEAN + STD x."""
    noise = torch.linspace(-2.5, 2.5, 24, dtype=torch.float64).reshape(2, 4, 3)
    exact = MEAN + STD * noise
    errors = [(integrate(gaussian_velocity, noise, n, solver) - exact).abs().max().item() for n in (64, 128)]
    assert errors[1] < (2e-2 if order == 1 else 2e-4)
    assert math.log2(errors[0] / errors[1]) > order - 0.1


@pytest.mark.parametrize(("std", "largest"), [(0.3, 0.005), (0.1, 0.03), (0.01, 0.02)])
def test_the_default_sampler_is_close_for_wide_and_narrow_distributions(std, largest):
    """Heun with 5 steps leaves noise of 0.1 in an action that has one right value; Euler with 10 is off by 0.05."""
    made = FlowHead(inputs=HeadInputs(context_dim=1, action_horizon=1, action_dims={"tiny": 1}), width=8, depth=1)
    noise = torch.randn(1000, 1, 1, dtype=torch.float64, generator=generator())
    got = integrate(lambda x, t: gaussian_velocity(x, t, std), noise, made.steps, made.solver)
    assert (got - (MEAN + std * noise)).square().mean().sqrt() < largest


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 3])
def test_integration_runs_from_noise_at_1_to_data_at_0(solver, steps):
    noise, data = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    asked = []

    def straight(x, t):
        asked.append(t)
        return noise - data

    torch.testing.assert_close(integrate(straight, noise, steps, solver), data)
    assert asked[0] == 1.0
    assert all(0.0 <= t <= 1.0 for t in asked)


def test_unknown_solver_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'heun'"):
        head(solver="huen")


def test_the_loss_of_the_true_velocity_is_zero_and_noise_is_at_time_1(monkeypatch):
    """With one possible chunk the field is known: (x - data) / t, from x = t noise + (1 - t) data."""
    made = head(draws=8)
    data = torch.randn(1, 4, 3).expand(5, -1, -1)
    times = []

    def true(pooled, x, t, embodiment, given=None):
        times.append(t)
        return (x - data[:1]) / t[:, None, None]

    monkeypatch.setattr(made, "velocity", true)
    mask = torch.ones(5, 4, dtype=torch.bool)
    active = torch.ones(3, dtype=torch.bool)
    loss = made.loss(Context(vector=torch.randn(5, 6)), data, mask, active, "tiny", generator())
    assert loss.shape == (5,)
    assert loss.max() < 1e-5
    monkeypatch.setattr(made, "velocity", lambda p, x, t, e: true(p, x, t, e) + 0.5)
    loss = made.loss(Context(vector=torch.randn(5, 6)), data, mask, active, "tiny", generator())
    torch.testing.assert_close(loss, torch.full((5,), 0.25), atol=1e-4, rtol=0)
    t = torch.cat(times)
    assert t.min() > 0
    assert t.max() <= 1


def test_times_follow_beta(monkeypatch):
    """Beta(1.5, 1) * 0.999 + 0.001: mean 0.6004, P(t > 0.9) = 0.147, P(t < 0.1) = 0.031."""
    made = head(draws=4)
    times = []

    def spy(pooled, x, t, embodiment):
        times.append(t)
        return torch.zeros_like(x)

    monkeypatch.setattr(made, "velocity", spy)
    b = 10_000
    mask, active = torch.ones(b, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    made.loss(Context(vector=torch.zeros(b, 6)), torch.zeros(b, 4, 3), mask, active, "tiny", generator())
    t = torch.cat(times).double()
    assert t.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=5e-3)
    assert (t > 0.9).double().mean().item() == pytest.approx(1 - (0.899 / 0.999) ** 1.5, abs=6e-3)
    assert (t < 0.1).double().mean().item() == pytest.approx((0.099 / 0.999) ** 1.5, abs=4e-3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masked_steps_and_dimensions_change_nothing(data):
    """Neither the loss nor any gradient depends on what stands in a masked place."""
    made = head()
    keep = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any)))
    step_mask = torch.arange(4) < torch.tensor(keep)[:, None]
    size = data.draw(st.sampled_from([1e-3, 1.0, 1e6, math.inf, math.nan]))
    actions = torch.randn(3, 4, 3, generator=generator(1))
    other = torch.where(step_mask[:, :, None] & active, actions, torch.full_like(actions, size))
    context = Context(vector=torch.randn(3, 6, generator=generator(2)))
    results = []
    for given_actions in (actions, other):
        made.zero_grad()
        loss = made.loss(context, given_actions, step_mask, active, "tiny", generator(3))
        loss.sum().backward()
        results.append((loss.detach(), [p.grad.clone() for p in made.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1]
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_real_steps_do_change_the_loss():
    """The property above could hold for a loss that looks at nothing."""
    made = head()
    mask, active = torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    context = Context(vector=torch.zeros(2, 6))
    one = made.loss(context, torch.zeros(2, 4, 3), mask, active, "tiny", generator())
    two = made.loss(context, torch.ones(2, 4, 3), mask, active, "tiny", generator())
    assert (one - two).abs().min() > 1e-3


def test_masked_mean_against_loops():
    error = torch.rand(4, 5, 3)
    step_mask = torch.rand(4, 5) < 0.5
    step_mask[0] = False
    active = torch.tensor([True, False, True])
    for b, got in enumerate(masked_mean(error, step_mask, active).tolist()):
        real = [error[b, h, a].item() for h in range(5) for a in range(3) if step_mask[b, h] and active[a]]
        assert got == pytest.approx(np.mean(real) if real else 0.0, rel=1e-5)


def test_sampling_is_a_function_of_the_noise_and_leaves_masked_dimensions_at_zero():
    made = head().eval()
    context = Context(vector=torch.randn(3, 6))
    noise = torch.randn(3, 4, 3)
    active = torch.tensor([True, False, True])
    with torch.no_grad():
        one, two = (made.sample(context, noise, active, "tiny") for _ in range(2))
        swapped = torch.where(active, noise, noise + 7.0)
        other = made.sample(context, swapped, active, "tiny")
        different = made.sample(context, noise + 0.5, active, "tiny")
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert (one[:, :, 1] == 0).all()
    assert (one - different).abs().max() > 1e-3


def test_time_features_tell_times_apart():
    features = time_features(torch.linspace(0.0, 1.0, 101))
    assert features.shape == (101, 64)
    distance = torch.cdist(features, features) + 10 * torch.eye(101)
    assert distance.min() > 0.1


def fit(made, contexts, actions, steps, lr=3e-3):
    optimizer = torch.optim.Adam(made.parameters(), lr=lr)
    mask = torch.ones(actions.shape[:2], dtype=torch.bool)
    active = torch.ones(actions.shape[2], dtype=torch.bool)
    for step in range(steps):
        loss = made.loss(Context(vector=contexts), actions, mask, active, "tiny", generator(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return active


def test_two_modes_stay_two():
    """A regression to the mean would answer 0; the flow must answer +0.8 or -0.8."""
    made = head(action_dims={"tiny": 1}, horizon=1, context_dim=2, steps=10, draws=4)
    actions = torch.where(torch.arange(256) % 2 == 0, 0.8, -0.8).reshape(256, 1, 1)
    active = fit(made, torch.zeros(256, 2), actions, 300)
    with torch.no_grad():
        noise = torch.randn(1000, 1, 1, generator=generator(9))
        samples = made.sample(Context(vector=torch.zeros(1000, 2)), noise, active, "tiny").flatten()
    assert 0.35 < (samples > 0).float().mean() < 0.65
    assert ((samples.abs() - 0.8).abs() < 0.25).float().mean() > 0.9


def test_one_batch_is_learnt():
    made = head(width=64, draws=8)
    contexts, actions = 2.0 * torch.randn(4, 6, generator=generator(1)), torch.rand(4, 4, 3, generator=generator(2))
    actions = 2.0 * actions - 1.0
    active = fit(made, contexts, actions, 500)
    with torch.no_grad():
        noise = torch.randn(4, 4, 3, generator=generator(5))
        samples = made.sample(Context(vector=contexts), noise, active, "tiny")
    assert (samples - actions).abs().mean() < 0.08  # always answering their mean gives 0.4


def test_masked_tokens_have_no_say_in_the_pooled_context():
    pool = ContextPool(HeadInputs(context_dim=5, token_dim=7, action_horizon=1, action_dims={}), 16).eval()

    def context(vector, tokens, mask):
        return Context(vector=vector, prefix=Prefix(states=tokens, mask=mask, next=mask.sum(1)))

    vector, tokens = torch.randn(2, 5), torch.randn(2, 6, 7)
    mask = torch.tensor([[True] * 6, [True, True, False, False, True, True]])
    before = pool(context(vector, tokens, mask))
    tokens[1, 2:4] = 1e4
    after = pool(context(vector, tokens, mask))
    torch.testing.assert_close(before, after)
    shorter = context(vector[1:], tokens[1:, [0, 1, 4, 5]], mask[1:, [0, 1, 4, 5]])
    torch.testing.assert_close(before[1:], pool(shorter))
