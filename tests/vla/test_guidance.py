"""Guidance of flow-matching heads (real-time chunking) against torch.func.vjp and closed forms."""

import numpy as np
import pytest
import torch

from brachium.errors import ConfigError, SpecMismatchError
from brachium.spec import Guidance
from brachium.vla.checkpoint import predict
from brachium.vla.heads.solvers import Guide, guidance_factor, guided, integrate

from .conftest import make_model, make_observation, make_recipe

B, H, A = 3, 6, 4


def field_of(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(H * A + 1, 32), torch.nn.Tanh(), torch.nn.Linear(32, H * A))

    def field(x, t):
        return net(torch.cat([x.flatten(1), x.new_full((len(x), 1), t)], 1)).reshape(x.shape)

    return field


def guide(gradient="vjp", weight=None, limit=5.0):
    torch.manual_seed(1)
    weight = torch.rand(B, H) if weight is None else weight
    return Guide(target=torch.randn(B, H, A), weight=weight, limit=limit, gradient=gradient)


@pytest.mark.parametrize("t", [0.999, 0.8, 0.5, 0.1])
def test_the_guided_velocity_is_the_papers_formula(t):
    """Black et al. 2025, eq. 2, by torch.func.vjp; their time is 1 - t and their velocity -v."""
    field, led = field_of(), guide()
    x, mask = torch.randn(B, H, A), torch.tensor([True, True, False, True])
    with torch.no_grad():
        got = guided(field, led, mask)(x, t)
    tau = 1.0 - t

    def guess(x):
        return x + (1.0 - tau) * -field(x, t)

    clean, back = torch.func.vjp(guess, x)
    (pull,) = back((led.target - clean) * led.weight[:, :, None] * mask)
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    factor = min(led.limit, (1 - tau) / (tau * r2))
    expected = -(-field(x, t) + factor * pull)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)
    assert guidance_factor(t, led.limit) == pytest.approx(factor)
    assert not got.requires_grad


def test_identity_leaves_the_jacobian_out_and_needs_no_gradient():
    field, led = field_of(), guide("identity")
    x, mask, t = torch.randn(B, H, A), torch.ones(A, dtype=torch.bool), 0.4
    with torch.inference_mode():
        got = guided(field, led, mask)(x, t)
        v = field(x, t)
        error = (led.target - (x - t * v)) * led.weight[:, :, None]
    torch.testing.assert_close(got, v - guidance_factor(t, 5.0) * error)


def test_without_weights_nothing_changes():
    field, x = field_of(), torch.randn(B, H, A)
    led = guided(field, guide(weight=torch.zeros(B, H)), torch.ones(A, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(integrate(led, x, 5, "euler"), integrate(field, x, 5, "euler"), rtol=0, atol=0)


@pytest.mark.parametrize("gradient", ["vjp", "identity"])
@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_frozen_steps_come_out_as_the_plan_and_free_ones_do_not(gradient, solver):
    """On a field whose data are independent unit Gaussians the guided mean is known to go to the plan."""

    def field(x, t):  # data N(0, 1): E[x0 | x_t] = (1 - t) x / (t^2 + (1 - t)^2)
        clean = (1.0 - t) * x / (t * t + (1.0 - t) ** 2)
        return (x - clean) / t

    weight = torch.zeros(B, H)
    weight[:, :3] = 1.0
    led, x = guide(gradient, weight, limit=50.0), torch.randn(B, H, A)
    with torch.no_grad():
        free = integrate(field, x, 40, solver)
        got = integrate(guided(field, led, torch.ones(A, dtype=torch.bool)), x, 40, solver)
    assert (got - led.target)[:, :3].abs().max() < 0.1
    torch.testing.assert_close(got[:, 3:], free[:, 3:], rtol=1e-4, atol=1e-4)


def test_rows_are_guided_as_they_would_be_alone():
    field, led, x = field_of(), guide(), torch.randn(B, H, A)
    mask = torch.ones(A, dtype=torch.bool)
    with torch.no_grad():
        together = integrate(guided(field, led, mask), x, 4, "midpoint")
        for k in range(B):
            one = Guide(target=led.target[k : k + 1], weight=led.weight[k : k + 1], limit=5.0, gradient="vjp")
            alone = integrate(guided(field, one, mask), x[k : k + 1], 4, "midpoint")
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_model_continues_a_plan():
    """Units, masks and normalisation on the way through the whole model."""
    model, name = make_model(), "tiny"
    seen = make_observation(model.embodiments[name], 1)
    horizon, dim = model.recipe.action_horizon, model.embodiments[name].action.dim
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, horizon, model.noise_dim(name)), np.float32)
    other = rng.standard_normal((1, horizon, model.noise_dim(name)), np.float32)
    plan = predict(model, name, seen, other)
    weights = np.zeros((1, horizon), np.float32)
    free = predict(model, name, seen, noise, Guidance(actions=plan, weights=weights))
    np.testing.assert_array_equal(free, predict(model, name, seen, noise))
    weights[:] = 1.0
    led = predict(model, name, seen, noise, Guidance(actions=plan, weights=weights, limit=20.0))
    scale = model.get_buffer(f"action_scale_{name}").numpy()
    assert led.shape == (1, horizon, dim)
    assert (np.abs(led - plan) / scale).mean() < 0.5 * (np.abs(free - plan) / scale).mean()


def test_a_head_that_cannot_be_guided_says_so():
    model = make_model(make_recipe("tokenized"))
    seen = make_observation(model.embodiments["tiny"], 1)
    noise = np.zeros((1, 4, model.noise_dim("tiny")), np.float32)
    plan = Guidance(actions=np.zeros((1, 4, 3), np.float32), weights=np.ones((1, 4), np.float32))
    assert not model.takes_guidance
    with pytest.raises(ConfigError, match="cannot be guided"):
        predict(model, "tiny", seen, noise, plan)


def test_guidance_is_checked():
    with pytest.raises(SpecMismatchError, match="one weight a step"):
        Guidance(actions=np.zeros((4, 3)), weights=np.ones(3))
    with pytest.raises(SpecMismatchError, match="gradient"):
        Guidance(actions=np.zeros((4, 3)), weights=np.ones(4), gradient="maybe")
    with pytest.raises(SpecMismatchError, match="above 0"):
        Guidance(actions=np.zeros((4, 3)), weights=np.ones(4), limit=np.nan)
