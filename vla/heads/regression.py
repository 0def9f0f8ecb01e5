"""Regression: one chunk for each context, no distribution (OpenVLA-OFT, Kim et al. 2025).

It cannot say "either way": where two actions are right it answers what lies between them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError, did_you_mean
from ..draws import RandomSource
from .base import Context, ContextPool, HeadInputs, masked_mean

DECODES = ("pooled", "parallel")
LOSSES = {"l1": lambda error: error.abs(), "mse": lambda error: error.square()}


class RegressionHead(nn.Module):
    """L1 regression of the whole chunk at once.

    Args:
        inputs: What the head is built for.
        decode: ``pooled`` answers from one vector. ``parallel`` lets the language model itself go on after the prompt
            with a place for every number of the chunk, all seeing each other, and reads the actions off its states:
            one pass for the chunk, with all of the model's layers (OpenVLA-OFT's parallel decoding).
        width: Width of the residual network.
        depth: Number of residual blocks.
        error: ``l1`` or ``mse``.
    """

    discrete = False
    fills = False

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        decode: str = "pooled",
        width: int = 256,
        depth: int = 2,
        error: str = "l1",
    ) -> None:
        super().__init__()
        for name, value, choices in (("decode", decode, DECODES), ("error", error, LOSSES)):
            if value not in choices:
                raise ConfigError(f"unknown {name} {value!r}. {did_you_mean(value, choices)}")
        self.error, self.horizon = error, inputs.action_horizon
        self.goes_on = decode == "parallel"
        self.reads = "layers" if self.goes_on else "states"
        h, dims = inputs.action_horizon, inputs.action_dims
        self.pool: ContextPool | None = None
        self.places = nn.ParameterDict()
        if decode == "parallel":
            inputs.require_prefix("regression with decode=parallel")
            d = inputs.token_dim
            self.places.update({k: nn.Parameter(torch.randn(h, a, d) * 0.02) for k, a in dims.items()})
            self.vector_in = nn.Linear(inputs.context_dim, width) if inputs.context_dim else None
            self.enter = nn.ModuleDict({k: nn.Linear(a * d, width) for k, a in dims.items()})
            self.leave = nn.ModuleDict({k: nn.Linear(width, a) for k, a in dims.items()})
        else:
            self.pool = ContextPool(inputs, width)
            self.leave = nn.ModuleDict({k: nn.Linear(width, h * a) for k, a in dims.items()})
        self.blocks = nn.ModuleList([_Residual(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Context, embodiment: str, dims: int) -> Float[Tensor, "b h a"]:
        """The chunk."""
        if self.pool is not None:
            hidden = self.pool(context)
        else:
            hidden = self.enter[embodiment](self._states(context, embodiment).flatten(2))
            if self.vector_in is not None:
                hidden = hidden + self.vector_in(context.vector)[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.leave[embodiment](self.norm(hidden)).reshape(len(context.vector), self.horizon, dims)

    def _states(self, context: Context, embodiment: str) -> Float[Tensor, "b h a d"]:
        if context.backbone is None or context.prefix is None or not context.prefix.keys:
            raise ConfigError("regression: expected a backbone that can go on reading, got none")
        places = self.places[embodiment]
        h, a, _ = places.shape
        entered = places.flatten(0, 1).expand(len(context.vector), -1, -1)
        real = torch.ones(entered.shape[:2], dtype=torch.bool, device=entered.device)
        after = context.backbone.extend(context.prefix, entered, real, two_way=True)
        return after.states[:, -h * a :].unflatten(1, (h, a))

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: RandomSource,
    ) -> Float[Tensor, " b"]:
        """Error of the chunk."""
        target = torch.where(step_mask[:, :, None] & dim_mask, actions, 0.0)
        error = LOSSES[self.error](self(context, embodiment, actions.shape[2]).float() - target)
        return masked_mean(error, step_mask, dim_mask)

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """The chunk; `noise` gives only the shape."""
        return self(context, embodiment, noise.shape[2]).float() * dim_mask


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        return x + self.net(x)
