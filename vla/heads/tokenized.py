"""Actions as tokens: 256 bins a dimension, written one after another (RT-2, Brohan et al. 2023; RT-1 binning).

Bins are uniform over the normalised range [-1, 1] and are decoded to their centres. Decoding is constrained: at every
position only the bins are allowed, never another token, so every decoded sequence is an action.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import DecodeError
from .base import Context, ContextPool

BEGIN = 0
"""Token that starts a sequence; bins follow it in the vocabulary."""


class TokenizedHead(nn.Module):
    """A causal transformer over the tokens of a chunk, conditioned on the context by prefix tokens.

    Dimensions that never change in the data (mask False) are not written.

    Args:
        context_dim: Size of the fixed context features.
        token_dim: Width of the context tokens; 0 for none.
        action_horizon: Steps in a chunk.
        action_dims: Embodiment name -> action dimension; each has its own position embedding and output layer.
        bins: Bins a dimension.
        width: Width of the transformer.
        depth: Layers.
        heads: Attention heads.
        prefix: Prefix tokens that the pooled context is turned into.
        smoothing: Standard deviation of the target's blur over neighbouring bins, in bins; 0 for one-hot.
    """

    discrete = True

    def __init__(
        self,
        *,
        context_dim: int,
        token_dim: int,
        action_horizon: int,
        action_dims: Mapping[str, int],
        bins: int = 256,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        prefix: int = 2,
        smoothing: float = 2.0,
    ) -> None:
        super().__init__()
        self.action_horizon, self.bins, self.smoothing, self.prefix = action_horizon, bins, smoothing, prefix
        self.pool = ContextPool(context_dim=context_dim, token_dim=token_dim, width=2 * width)
        self.expand = nn.Sequential(nn.GELU(), nn.Linear(2 * width, prefix * width))
        self.embedding = nn.Embedding(bins + 1, width)
        self.position = nn.ParameterDict(
            {k: nn.Parameter(torch.randn(action_horizon, a, width) * 0.02) for k, a in action_dims.items()}
        )
        self.blocks = nn.ModuleList([CausalBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.ModuleDict({k: nn.Linear(width, bins + 1) for k in action_dims})

    def encode(self, actions: Float[Tensor, "b h a"]) -> Int[Tensor, "b h a"]:
        """Bin of each normalised value, 0..bins-1; values outside [-1, 1] fall in the outermost bins."""
        return ((actions.clamp(-1.0, 1.0) + 1.0) * (0.5 * self.bins)).long().clamp(max=self.bins - 1)

    def decode(self, bins: Int[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Centre of each bin.

        Raises:
            DecodeError: An index that is no bin.
        """
        if bins.numel() and (int(bins.min()) < 0 or int(bins.max()) >= self.bins):
            raise DecodeError(
                f"expected action bins in 0..{self.bins - 1}, got {int(bins.min())}..{int(bins.max())}: not an action"
            )
        return (bins.float() + 0.5) * (2.0 / self.bins) - 1.0

    def _prefix(self, context: Context) -> Float[Tensor, "b p w"]:
        pooled = self.expand(self.pool(context))
        return pooled.reshape(len(pooled), self.prefix, -1)

    def _positions(self, embodiment: str, dim_mask: Tensor) -> Float[Tensor, "q w"]:
        return self.position[embodiment][:, dim_mask].flatten(0, 1)

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: torch.Generator,
    ) -> Float[Tensor, " b"]:
        """Cross-entropy of the next bin, with targets blurred over neighbouring bins."""
        bins = self.encode(actions)[:, :, dim_mask]
        b, h, active = bins.shape
        sequence = bins.flatten(1)
        tokens = torch.cat([sequence.new_full((b, 1), BEGIN), sequence[:, :-1] + 1], dim=1)
        hidden = self.embedding(tokens) + self._positions(embodiment, dim_mask)
        hidden = torch.cat([self._prefix(context), hidden], dim=1)
        for block in self.blocks:
            hidden, _ = block(hidden, None)
        logits = self.out[embodiment](self.norm(hidden[:, self.prefix :]))[..., 1:].float()
        distance = (torch.arange(self.bins, device=bins.device) - sequence[..., None]).float()
        if self.smoothing > 0:
            target = torch.softmax(-0.5 * (distance / self.smoothing) ** 2, dim=-1)
        else:
            target = (distance == 0).float()
        error = -(target * logits.log_softmax(-1)).sum(-1).reshape(b, h, active)
        weight = step_mask[:, :, None].expand_as(error).float()
        return (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1.0)

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """The likeliest bin at every position, greedily; `noise` gives only the shape."""
        b, h, a = noise.shape
        positions = self._positions(embodiment, dim_mask)
        caches: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        hidden = self._prefix(context)
        written: list[Tensor] = []
        token = noise.new_full((b,), BEGIN, dtype=torch.long)
        for position in positions:
            step = (self.embedding(token) + position)[:, None]
            hidden = step if written else torch.cat([hidden, step], dim=1)
            for k, block in enumerate(self.blocks):
                hidden, caches[k] = block(hidden, caches[k])
            logits = self.out[embodiment](self.norm(hidden[:, -1]))
            logits[:, BEGIN] = -torch.inf  # constrained decoding: only bins are actions
            token = logits.argmax(-1)
            written.append(token - 1)
        actions = noise.new_zeros(b, h, a)
        bins = torch.stack(written, dim=1).reshape(b, h, -1)
        actions[:, :, dim_mask] = self.decode(bins)
        return actions


class CausalBlock(nn.Module):
    """Pre-norm transformer block with a key-value cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Float[Tensor, "b q w"], cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "b q w"], tuple[Tensor, Tensor]]:
        """Attend to the past (cached) and present tokens."""
        b, q, w = x.shape
        query, key, value = self.qkv(self.norm1(x)).reshape(b, q, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        x = x + self.out(seen.transpose(1, 2).reshape(b, q, w))
        return x + self.mlp(self.norm2(x)), (key, value)
