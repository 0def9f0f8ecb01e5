"""What an action head is: a distribution over action chunks given a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a head conditions on.

    Attributes:
        vector: Features of fixed size: words, points, proprioception; (b, c).
        tokens: Token features to attend to, or None; (b, l, d).
        mask: True at real tokens, (b, l).
    """

    vector: Float[Tensor, "b c"]
    tokens: Float[Tensor, "b l d"] | None = None
    mask: Bool[Tensor, "b l"] | None = None


class ActionHead(Protocol):
    """Loss and samples of normalised action chunks.

    Heads are built with ``context_dim`` (c), ``token_dim`` (d, or 0), ``action_horizon`` (h) and ``action_dims``
    (embodiment name -> a), beside options of their own.

    Attributes:
        discrete: Whether samples jump (tokens), so that rounding may change them where two are equally likely.
    """

    discrete: bool

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: torch.Generator,
    ) -> Float[Tensor, " b"]:
        """Loss of each chunk; steps and dimensions whose mask is False do not count."""

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """One chunk for each context; the same noise gives the same chunk."""


class ContextPool(nn.Module):
    """One vector from a context: the fixed features, and learned queries' attention over the tokens if there are any.

    Args:
        context_dim: Size of the fixed features.
        token_dim: Width of the tokens; 0 for none.
        width: Size of the result.
        queries: Learned queries over the tokens.
        heads: Attention heads of those queries.
    """

    def __init__(self, *, context_dim: int, token_dim: int, width: int, queries: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.fixed = nn.Linear(context_dim, width)
        self.width = width
        self.attention: nn.MultiheadAttention | None = None
        if token_dim:
            self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
            self.project = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, width))
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.merge = nn.Linear(queries * width, width)

    def forward(self, context: Context) -> Float[Tensor, "b w"]:
        """Pool a context."""
        pooled = self.fixed(context.vector)
        if self.attention is not None and context.tokens is not None:
            tokens = self.project(context.tokens)
            queries = self.queries.expand(len(tokens), -1, -1) + pooled[:, None]
            hidden = None if context.mask is None else ~context.mask
            seen, _ = self.attention(queries, tokens, tokens, key_padding_mask=hidden, need_weights=False)
            pooled = pooled + self.merge(seen.flatten(1))
        return pooled


def masked_mean(
    error: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"], dim_mask: Bool[Tensor, " a"]
) -> Float[Tensor, " b"]:
    """Mean over real steps and dimensions of each chunk; padding has no say."""
    weight = step_mask[:, :, None] & dim_mask
    return (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
