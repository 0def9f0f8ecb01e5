"""Who sees whom, where a token stands, and attention itself: what backbones and heads share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def block_mask(
    queries: Int[Tensor, "b q"], keys: Int[Tensor, "b k"], real: Bool[Tensor, "b k"]
) -> Bool[Tensor, "b q k"]:
    """Who sees whom: a token sees the real tokens of its own block and of all earlier ones.

    One rule makes every mask used here: a causal text has a block a token, a two-way prefix one block in all, pi0's
    suffix one for the state and one for the actions (Black et al. 2024, appendix B).
    """
    return (keys[:, None, :] <= queries[:, :, None]) & real[:, None, :]


def additive(seen: Bool[Tensor, "*rest k"], dtype: torch.dtype) -> Float[Tensor, "*rest k"]:
    """The mask as what is added to scores: 0 where seen, else the lowest number there is.

    Not minus infinity: a row that sees nobody (padding) must have a finite softmax, or its gradient is NaN.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021), the two halves of a head turned against each other.

    Attributes:
        frequencies: Angle a position [rad], (c / 2,).
        scaling: Factor on the result (1 but for long-context variants).
    """

    frequencies: Float[Tensor, " half"]
    scaling: float = 1.0

    def at(self, positions: Int[Tensor, "b q"]) -> Turn:
        """What turns queries or keys to these positions; its sines are computed once for all layers."""
        angles = (positions[..., None].float() * self.frequencies.float())[:, None]
        return Turn(cos=angles.cos() * self.scaling, sin=angles.sin() * self.scaling)

    def __call__(self, x: Float[Tensor, "b g q c"], positions: Int[Tensor, "b q"]) -> Float[Tensor, "b g q c"]:
        """Turn queries or keys to their positions."""
        return self.at(positions)(x)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Turns queries and keys to some positions.

    Attributes:
        cos, sin: Of every angle, (b, 1, q, c / 2).
    """

    cos: Float[Tensor, "b 1 q half"]
    sin: Float[Tensor, "b 1 q half"]

    def __call__(self, x: Float[Tensor, "b g q c"]) -> Float[Tensor, "b g q c"]:
        """The same, turned."""
        return turned_by(x, *self.whole)

    @cached_property
    def whole(self) -> tuple[Float[Tensor, "b 1 q c"], Float[Tensor, "b 1 q c"]]:
        """Cosines and signed sines of both halves."""
        return torch.cat([self.cos, self.cos], dim=-1), torch.cat([-self.sin, self.sin], dim=-1)


def turned_by(x: Float[Tensor, "b g q c"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b g q c"]:
    """`x` turned by `Turn.whole`, in three operations."""
    exact = x.float()
    return torch.addcmul(exact * cos, exact.roll(exact.shape[-1] // 2, dims=-1), sin).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Shape of a language model's attention layers, which a head that reads their keys and values must fit.

    Attributes:
        count: Number of layers.
        heads: Query heads.
        groups: Key and value heads.
        head_dim: Size of each.
        rotary: Whether keys are turned to their positions.
    """

    count: int
    heads: int
    groups: int
    head_dim: int
    rotary: bool


def attend(
    query: Float[Tensor, "b h q c"],
    key: Float[Tensor, "b g k c"],
    value: Float[Tensor, "b g k c"],
    seen: Bool[Tensor, "b q k"] | Float[Tensor, "b q k"] | None,
) -> Float[Tensor, "b q hc"]:
    """Scaled dot-product attention; h query heads share g key heads, h a multiple of g.

    `seen` says who sees whom, or is that mask made `additive` already, where many layers share it.
    """
    share = query.shape[1] // key.shape[1]
    own = query.device.type == "cpu"  # whose kernel shares keys by itself; others would fall back to a slow one
    if share > 1 and not own:
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    if seen is not None:
        lowest = torch.finfo(query.dtype).min  # of half precision; a lower number would become minus infinity
        made = additive(seen, query.dtype) if seen.dtype == torch.bool else seen.clamp(min=lowest).to(query.dtype)
        seen = made[:, None]
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=own and share > 1)
    return found.transpose(1, 2).flatten(2)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block that gives its keys and values, and takes earlier ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x: Float[Tensor, "b q w"],
        who: Bool[Tensor, "b q k"] | None,
        rotary: Rotary | None = None,
        positions: Int[Tensor, "b q"] | None = None,
        key: Float[Tensor, "b g p c"] | None = None,
        value: Float[Tensor, "b g p c"] | None = None,
    ) -> tuple[Float[Tensor, "b q w"], Float[Tensor, "b g k c"], Float[Tensor, "b g k c"]]:
        """One step; `who` sees whom among the earlier keys and its own, None for everybody everything."""
        split = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, own, mine = split
        if rotary is not None and positions is not None:
            query, own = rotary(query, positions), rotary(own, positions)
        keys = own if key is None else torch.cat([key, own], dim=2)
        values = mine if value is None else torch.cat([value, mine], dim=2)
        x = x + self.out(attend(query, keys, values, who))
        return x + self.mlp(self.norm2(x)), keys, values
