"""Flow matching: a velocity field carries noise to action chunks.

Rectified flow (Liu et al. 2022; Lipman et al. 2022) with pi0's convention (Black et al. 2024): t = 1 is noise, t = 0
is data, x_t = t * noise + (1 - t) * actions, and the field learns noise - actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError, did_you_mean
from .base import Context, ContextPool, masked_mean


class FlowHead(nn.Module):
    """Flow matching with an MLP-ResNet velocity field over the whole chunk (the denoiser of Octo, Ghosh et al. 2024).

    Args:
        context_dim: Size of the fixed context features.
        token_dim: Width of the context tokens; 0 for none.
        action_horizon: Steps in a chunk.
        action_dims: Embodiment name -> action dimension; each has its own input and output layer.
        width: Width of the residual blocks.
        depth: Number of residual blocks.
        steps: Solver steps when sampling.
        solver: ``euler``, ``midpoint`` or ``heun``. Midpoint is the best of them at the same number of calls: Heun's
            last call is at t = 0, where a narrow distribution has no smooth field, and leaves noise in the actions.
        draws: Noise draws a chunk in training; the context is computed once for all.
        time_alpha: First parameter of the Beta(alpha, 1) distribution of t; more than 1 favours noise.
    """

    discrete = False

    def __init__(
        self,
        *,
        context_dim: int,
        token_dim: int,
        action_horizon: int,
        action_dims: Mapping[str, int],
        width: int = 256,
        depth: int = 3,
        steps: int = 5,
        solver: str = "midpoint",
        draws: int = 4,
        time_alpha: float = 1.5,
    ) -> None:
        super().__init__()
        if solver not in SOLVERS:
            raise ConfigError(f"unknown solver {solver!r}. {did_you_mean(solver, SOLVERS)}")
        self.action_horizon, self.steps, self.solver = action_horizon, steps, solver
        self.draws, self.time_alpha = draws, time_alpha
        self.pool = ContextPool(context_dim=context_dim, token_dim=token_dim, width=width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.action_in = nn.ModuleDict({k: nn.Linear(action_horizon * a, width) for k, a in action_dims.items()})
        self.action_out = nn.ModuleDict({k: nn.Linear(width, action_horizon * a) for k, a in action_dims.items()})
        self.blocks = nn.ModuleList([ModulatedBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        for layer in self.action_out.values():
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def velocity(
        self, pooled: Float[Tensor, "b w"], x: Float[Tensor, "b h a"], t: Float[Tensor, " b"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t` for a pooled context."""
        condition = nn.functional.silu(pooled + self.time(time_features(t)))
        hidden = self.action_in[embodiment](x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.action_out[embodiment](self.norm(hidden)).reshape(x.shape)

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: torch.Generator,
    ) -> Float[Tensor, " b"]:
        """Squared error of the velocity, averaged over `draws` of noise and time."""
        b, draws = len(actions), self.draws
        pooled = self.pool(context).repeat_interleave(draws, 0)
        # What is masked must not reach the field either: its input is the whole chunk.
        actions = torch.where(step_mask[:, :, None] & dim_mask, actions, 0.0)
        target = actions.repeat_interleave(draws, 0)
        shape, device = target.shape, actions.device
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device).to(device)
        uniform = torch.rand(b * draws, generator=generator, device=generator.device).to(device)
        # Beta(alpha, 1) by its inverse cumulative distribution; t = 0 itself is never asked for.
        t = uniform ** (1.0 / self.time_alpha) * 0.999 + 0.001
        noise = noise * dim_mask
        mixed = t[:, None, None] * noise + (1.0 - t[:, None, None]) * target
        error = (self.velocity(pooled, mixed, t, embodiment).float() - (noise - target)).square()
        each = masked_mean(error, step_mask.repeat_interleave(draws, 0), dim_mask)
        return each.reshape(b, draws).mean(1)

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """Integrate the field from t = 1 to t = 0."""
        pooled = self.pool(context)
        masked = noise * dim_mask

        def field(x: Tensor, t: float) -> Tensor:
            return self.velocity(pooled, x, x.new_full((len(x),), t), embodiment) * dim_mask

        return integrate(field, masked, self.steps, self.solver)


class ModulatedBlock(nn.Module):
    """Residual MLP whose normalised input is scaled and shifted by the condition (adaLN-Zero, Peebles & Xie 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():
            self.modulation.bias[2 * width :] = 1.0  # gates start open: the field is shallow, not a deep transformer

    def forward(self, x: Float[Tensor, "b w"], condition: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """One residual step."""
        scale, shift, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1.0 + scale) + shift)


def time_features(t: Float[Tensor, " b"], size: int = 64) -> Float[Tensor, "b f"]:
    """Sines and cosines of t with periods from 4e-3 to 4 (pi0's range)."""
    periods = torch.exp(torch.linspace(math.log(4e-3), math.log(4.0), size // 2, device=t.device))
    angle = 2.0 * math.pi * t[:, None] / periods
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def integrate(
    field: Callable[[Tensor, float], Tensor], x: Float[Tensor, "b h a"], steps: int, solver: str
) -> Float[Tensor, "b h a"]:
    """Integrate dx/dt = field(x, t) from t = 1 to t = 0 in equal steps."""
    size = 1.0 / steps
    for k in range(steps):
        x = SOLVERS[solver](field, x, 1.0 - k * size, size)
    return x


def _euler(field: Callable[[Tensor, float], Tensor], x: Tensor, t: float, size: float) -> Tensor:
    return x - size * field(x, t)


def _midpoint(field: Callable[[Tensor, float], Tensor], x: Tensor, t: float, size: float) -> Tensor:
    return x - size * field(x - 0.5 * size * field(x, t), t - 0.5 * size)


def _heun(field: Callable[[Tensor, float], Tensor], x: Tensor, t: float, size: float) -> Tensor:
    first = field(x, t)
    second = field(x - size * first, max(t - size, 0.0))
    return x - 0.5 * size * (first + second)


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}
