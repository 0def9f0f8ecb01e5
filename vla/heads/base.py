"""What an action head is: a distribution over action chunks given a context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError
from ..attention import LayerShape
from ..backbones.base import Backbone, Prefix
from ..draws import RandomSource


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a head conditions on.

    Attributes:
        vector: Features of fixed size, such as the state or what the encoder points at; (b, c), c may be 0.
        prefix: What the backbone has read, or None where the vector says it all.
        backbone: What has read it, and can go on from there.
    """

    vector: Float[Tensor, "b c"]
    prefix: Prefix | None = None
    backbone: Backbone | None = None

    def detach(self) -> Context:
        """The same, cut off from the backbone: knowledge insulation (Driess et al. 2025)."""
        return replace(self, prefix=None if self.prefix is None else self.prefix.detach())


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """What a head is built for; given to every head as `inputs`, beside options of its own.

    Attributes:
        context_dim: Size c of the fixed features.
        token_dim: Width d of the prefix's states; 0 where there is no prefix.
        layers: Shape of the prefix's keys and values; None where there is no prefix.
        vocabulary: Words that the backbone can write; 0 for none.
        action_horizon: Steps h in a chunk.
        action_dims: Embodiment name -> action dimension a.
    """

    context_dim: int
    token_dim: int = 0
    layers: LayerShape | None = None
    vocabulary: int = 0
    action_horizon: int
    action_dims: Mapping[str, int]

    def require_prefix(self, head: str) -> LayerShape:
        """The shape of the layers; a ConfigError for a head that cannot do without them."""
        if self.layers is None:
            raise ConfigError(
                f"head {head} reads the backbone's tokens, and a model that points gives it none: set "
                "model.points=false, or take a head that needs none (flow, diffusion, regression, tokenized)"
            )
        return self.layers


class ActionHead(Protocol):
    """Loss and samples of normalised action chunks.

    Attributes:
        discrete: Whether samples jump (tokens), so that rounding may change them where two are equally likely.
        reads: What of the prefix it needs: ``nothing``, ``states``, ``keys`` (and values, of every layer) or ``layers``
            (all of them).
        fills: Whether dimensions that are masked carry noise, as in models whose padding did.

    A head that goes on reading with the backbone's own layers says so by an attribute ``goes_on``: it cannot be
    insulated from them.
    """

    discrete: bool
    reads: str
    fills: bool

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: RandomSource,
    ) -> Float[Tensor, " b"]:
        """Loss of each chunk; steps and dimensions whose mask is False do not count."""

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """One chunk for each context; the same noise gives the same chunk."""


class ContextPool(nn.Module):
    """One vector from a context: the fixed features, and learned queries' attention over the tokens if there are any.

    Args:
        inputs: What the head is built for.
        width: Size of the result.
        queries: Learned queries over the tokens.
        heads: Attention heads of those queries.
    """

    def __init__(self, inputs: HeadInputs, width: int, *, queries: int = 8, heads: int = 4) -> None:
        super().__init__()
        if not inputs.context_dim and not inputs.token_dim:
            raise ConfigError("this head would see nothing: give it the state (model.state=vector) or a backbone")
        self.fixed = nn.Linear(inputs.context_dim, width) if inputs.context_dim else None
        self.width = width
        self.attention: nn.MultiheadAttention | None = None
        if inputs.token_dim:
            self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
            self.project = nn.Sequential(nn.LayerNorm(inputs.token_dim), nn.Linear(inputs.token_dim, width))
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.merge = nn.Linear(queries * width, width)

    def forward(self, context: Context) -> Float[Tensor, "b w"]:
        """Pool a context."""
        pooled = context.vector.new_zeros(len(context.vector), self.width)
        if self.fixed is not None:
            pooled = self.fixed(context.vector)
        if self.attention is not None and context.prefix is not None:
            tokens = self.project(context.prefix.states)
            queries = self.queries.expand(len(tokens), -1, -1) + pooled[:, None]
            seen, _ = self.attention(queries, tokens, tokens, key_padding_mask=~context.prefix.mask, need_weights=False)
            pooled = pooled + self.merge(seen.flatten(1))
        return pooled


def masked_mean(
    error: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"], dim_mask: Bool[Tensor, " a"]
) -> Float[Tensor, " b"]:
    """Mean over real steps and dimensions of each chunk; padding has no say."""
    weight = step_mask[:, :, None] & dim_mask
    return torch.where(weight, error, 0.0).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
