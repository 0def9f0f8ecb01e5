"""Numerical integration of a velocity field from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError, did_you_mean

Field = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Guidance of normalised chunks; see `brachium.spec.Guidance`.

    Attributes:
        target: What the chunks should agree with.
        weight: How much, 0 to 1, at each step.
        limit: Largest factor of the guidance.
        gradient: ``vjp`` or ``identity``.
    """

    target: Float[Tensor, "b h a"]
    weight: Float[Tensor, "b h"]
    limit: float
    gradient: str


def guided(field: Field, guide: Guide, dim_mask: Bool[Tensor, " a"]) -> Field:
    """A field that leads to chunks which agree with `guide`.

    Pseudoinverse guidance (Song et al. 2023) as in real-time chunking (Black et al. 2025, eq. 2 to 4), here with t = 1
    for noise: the field's guess of the data is x - t v, and v changes by the gradient of its weighted squared distance
    to the target. Where a guess is compared, the Jacobian of the guess is what ``identity`` leaves out.
    """
    weight = guide.weight[:, :, None] * dim_mask

    def corrected(x: Tensor, t: float) -> Tensor:
        if guide.gradient == "identity":
            velocity = field(x, t)
            pull = weight * (guide.target - (x - t * velocity))
        else:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                velocity = field(leaf, t)
                guess = leaf - t * velocity
                error = (weight * (guide.target - guess)).detach()
                (pull,) = torch.autograd.grad(guess, leaf, error)
            velocity = velocity.detach()
        return velocity - guidance_factor(t, guide.limit) * pull

    return corrected


def guidance_factor(t: float, limit: float) -> float:
    """min(limit, (1 - s) / (s r^2)) with s = 1 - t and r^2 = t^2 / (s^2 + t^2): Black et al. 2025, eq. 2 and 4."""
    s = 1.0 - t
    if s <= 0.0 or t <= 0.0:
        return limit
    return min(limit, (s * s + t * t) / (s * t))


def check_solver(solver: str, steps: int) -> None:
    """Raise ConfigError unless a field can be integrated so."""
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}. {did_you_mean(solver, SOLVERS)}")
    if steps < 1:
        raise ConfigError(f"expected at least 1 solver step, got {steps}")


def integrate(field: Field, x: Tensor, steps: int, solver: str) -> Tensor:
    """Integrate dx/dt = field(x, t) from t = 1 to t = 0 in equal steps."""
    size = 1.0 / steps
    for k in range(steps):
        x = SOLVERS[solver](field, x, 1.0 - k * size, size)
    return x


def _euler(field: Field, x: Tensor, t: float, size: float) -> Tensor:
    return x - size * field(x, t)


def _midpoint(field: Field, x: Tensor, t: float, size: float) -> Tensor:
    return x - size * field(x - 0.5 * size * field(x, t), t - 0.5 * size)


def _heun(field: Field, x: Tensor, t: float, size: float) -> Tensor:
    first = field(x, t)
    second = field(x - size * first, max(t - size, 0.0))
    return x - 0.5 * size * (first + second)


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}
