"""Flow matching: a velocity field carries noise to action chunks.

Rectified flow (Liu et al. 2022; Lipman et al. 2022) with pi0's convention (Black et al. 2024): t = 1 is noise, t = 0
is data, x_t = t * noise + (1 - t) * actions, and the field learns noise - actions.

A head with a `max_delay` learns to go on from rows that are given, as training-time real-time chunking does (Black et
al. 2025, "Training-Time Action Conditioning for Efficient Real-Time Chunking"): while a chunk is computed the robot
goes on executing the last one, so what its first rows will be is known. They stand in the chunk without noise, the
field is told which they are, and only the others are learnt and drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError
from ..draws import RandomSource, integers, normal, uniform
from ..parts import part
from .base import Context, ContextPool, HeadInputs, masked_mean
from .mlp import ChunkMLP
from .solvers import Guide, check_solver, guided, integrate


class FlowMatching(nn.Module):
    """Loss and sampling of every flow-matching head; what the field is made of is the heir's.

    Args:
        steps: Solver steps when sampling.
        solver: ``euler``, ``midpoint`` or ``heun``. Midpoint is the best of them at the same number of calls: Heun's
            last call is at t = 0, where a narrow distribution has no smooth field, and leaves noise in the actions.
        draws: Noise draws a chunk in training; what was read is computed once for all.
        time_alpha: First parameter of the Beta(alpha, 1) distribution of t; more than 1 favours noise.
        max_delay: Most rows that may be given; in training as many as 0 to `max_delay`, drawn evenly. With 0, agreement
            with a plan is a matter of guidance in sampling (`solvers.guided`).
        fills: Whether masked dimensions carry noise, as pi0's padding does; they still do not count in the loss.
    """

    discrete = False
    reads = "states"

    def __init__(
        self, *, steps: int, solver: str, draws: int, time_alpha: float, max_delay: int = 0, fills: bool = False
    ) -> None:
        super().__init__()
        check_solver(solver, steps)
        if max_delay < 0:
            raise ConfigError(f"expected a max_delay of at least 0 steps, got {max_delay}")
        if draws < 1 or time_alpha <= 0:
            raise ConfigError(f"expected at least 1 draw and time_alpha above 0, got {draws} and {time_alpha}")
        self.steps, self.solver = steps, solver
        self.draws, self.time_alpha, self.max_delay, self.fills = draws, time_alpha, max_delay, fills

    def prepare(self, context: Context, draws: int) -> Any:
        """What of a context the field needs at every call, computed once, for `draws` chunks each."""
        raise NotImplementedError

    def velocity(
        self,
        prepared: Any,
        x: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        embodiment: str,
        given: Bool[Tensor, "b h"] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t`; rows where `given` is True are data, whatever `t` is."""
        raise NotImplementedError

    def steps_of(self, context: Context, embodiment: str) -> Callable[..., Float[Tensor, "b h a"]]:
        """The field of one context for sampling: (x, t as a number, rows that are given or None) -> velocity.

        An heir may compute before the first step what does not change from one to the next.
        """
        prepared = self.prepare(context, 1)

        def velocity(x: Tensor, t: float, given: Tensor | None = None) -> Tensor:
            more = {} if given is None else {"given": given}
            return self.velocity(prepared, x, x.new_full((len(x),), t), embodiment, **more)

        return velocity

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: RandomSource,
        executed: Float[Tensor, "b h a"] | None = None,
    ) -> Float[Tensor, " b"]:
        """Squared error of the velocity, averaged over `draws` of noise and time.

        Args:
            context, actions, step_mask, dim_mask, embodiment, generator: See `ActionHead`.
            executed: What was executed where demonstrations were disturbed and `actions` say what would have been
                right; it is what rows that are given hold. None where there is no difference.
        """
        shape, device = (len(actions) * self.draws, *actions.shape[1:]), actions.device
        noise = normal(generator, shape).to(device)
        # Beta(alpha, 1) by its inverse cumulative distribution; t = 0 itself is never asked for.
        t = uniform(generator, shape[:1]).to(device) ** (1.0 / self.time_alpha) * 0.999 + 0.001
        given = None
        if self.max_delay:
            delays = integers(generator, self.max_delay + 1, (shape[0], 1))
            given = torch.arange(shape[1], device=device) < delays.to(device)
        return self.loss_at(context, actions, step_mask, dim_mask, embodiment, noise, t, given, executed)

    def loss_at(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        noise: Float[Tensor, "n h a"],
        t: Float[Tensor, " n"],
        given: Bool[Tensor, "n h"] | None = None,
        executed: Float[Tensor, "b h a"] | None = None,
    ) -> Float[Tensor, " b"]:
        """The loss for some noise and times, and rows that are given; n is b times the draws."""
        draws = len(noise) // len(actions)
        # What is masked must not reach the field either: its input is the whole chunk.
        actions = torch.where(step_mask[:, :, None] & dim_mask, actions, 0.0)
        target = actions.repeat_interleave(draws, 0)
        noise = noise if self.fills else noise * dim_mask
        mixed = t[:, None, None] * noise + (1.0 - t[:, None, None]) * target
        counts = step_mask.repeat_interleave(draws, 0)
        if given is not None:
            held = target if executed is None else (executed * dim_mask).repeat_interleave(draws, 0)
            mixed, counts = torch.where(given[:, :, None], held, mixed), counts & ~given
        more = {} if given is None else {"given": given}
        found = self.velocity(self.prepare(context, draws), mixed, t, embodiment, **more).float()
        each = masked_mean((found - (noise - target)).square(), counts, dim_mask)
        return each.reshape(-1, draws).mean(1)

    def sample(
        self,
        context: Context,
        noise: Float[Tensor, "b h a"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        guide: Guide | None = None,
    ) -> Float[Tensor, "b h a"]:
        """Integrate the field from t = 1 to t = 0, led by `guide` where there is one.

        A head with a `max_delay` takes the first rows of full weight as given, up to so many; the others are free.
        """
        with part("head: context"):
            field_of = self.steps_of(context, embodiment)

        def velocity(*args: Any) -> Tensor:
            with part("head: solver step"):
                found: Tensor = field_of(*args)
                return found

        keep = torch.ones_like(dim_mask) if self.fills else dim_mask
        if guide is not None and self.max_delay:
            return self._continued(velocity, noise * keep, dim_mask, keep, guide)

        def field(x: Tensor, t: float) -> Tensor:
            return velocity(x, t).float() * keep

        led = field if guide is None else guided(field, guide, dim_mask)
        return integrate(led, noise * keep, self.steps, self.solver)

    def _continued(
        self,
        velocity: Callable[..., Tensor],
        noise: Float[Tensor, "b h a"],
        dim_mask: Bool[Tensor, " a"],
        keep: Bool[Tensor, " a"],
        guide: Guide,
    ) -> Float[Tensor, "b h a"]:
        """A chunk that goes on from its first rows."""
        given = (guide.weight >= 1.0).long().cumprod(1).bool()
        given = given & (torch.arange(given.shape[1], device=given.device) < self.max_delay)
        held, still = guide.target * dim_mask, given[:, :, None]

        def field(x: Tensor, t: float) -> Tensor:
            found = velocity(x, t, given).float() * keep
            return torch.where(still, 0.0, found)

        return integrate(field, torch.where(still, held, noise), self.steps, self.solver)


class FlowHead(FlowMatching):
    """Flow matching with an MLP-ResNet velocity field over the whole chunk (the denoiser of Octo, Ghosh et al. 2024).

    Args:
        inputs: What the head is built for.
        width: Width of the residual blocks.
        depth: Number of residual blocks.
        steps, solver, draws, time_alpha, max_delay: See `FlowMatching`.
    """

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        width: int = 256,
        depth: int = 3,
        steps: int = 5,
        solver: str = "midpoint",
        draws: int = 4,
        time_alpha: float = 1.5,
        max_delay: int = 0,
    ) -> None:
        super().__init__(steps=steps, solver=solver, draws=draws, time_alpha=time_alpha, max_delay=max_delay)
        self.pool = ContextPool(inputs, width)
        self.net = ChunkMLP(inputs, width, depth, told=max_delay > 0)

    def prepare(self, context: Context, draws: int) -> Float[Tensor, "b w"]:
        """The pooled context."""
        return self.pool(context).repeat_interleave(draws, 0)

    def velocity(
        self,
        prepared: Float[Tensor, "b w"],
        x: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        embodiment: str,
        given: Bool[Tensor, "b h"] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t` for a pooled context."""
        return self.net(prepared, x, time_features(t), embodiment, given)


def time_features(
    t: Float[Tensor, " b"], size: int = 64, *, shortest: float = 4e-3, longest: float = 4.0
) -> Float[Tensor, "b f"]:
    """Sines, then cosines of t, with periods in geometric steps (pi0's range); computed in float64."""
    exact = torch.float32 if t.device.type == "mps" else torch.float64
    share = torch.linspace(0.0, 1.0, size // 2, dtype=exact, device=t.device)
    periods = shortest * (longest / shortest) ** share
    angle = (1.0 / periods * 2.0 * math.pi)[None] * t[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(t.dtype)


def row_time(
    time: Float[Tensor, "b w"], given: Bool[Tensor, "b h"] | None, horizon: int
) -> Float[Tensor, "b h w"] | Float[Tensor, "b 1 w"]:
    """Features of the time of every row: those of t = 0 where it is given, `time` elsewhere."""
    if given is None:
        return time[:, None]
    data = time_features(time.new_zeros(1), time.shape[1])
    return torch.where(given[:, :, None], data[:, None], time[:, None].expand(-1, horizon, -1))
