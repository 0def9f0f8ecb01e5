"""Actions as tokens that a small decoder of the head's own writes one after another.

Any action tokenizer will do. Decoding is constrained: at every position only tokens are allowed after which the
sequence can still become an action, so every decoded sequence is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention import TransformerBlock
from ..draws import RandomSource
from ..recipe import instantiate
from .base import Context, ContextPool, HeadInputs
from .written import Written, target_loss, write


class TokenizedHead(nn.Module):
    """A causal transformer over the tokens of a chunk, conditioned on the context by prefix tokens.

    Dimensions that never change in the data (mask False) are not written.

    Args:
        inputs: What the head is built for; each embodiment has its own position embedding and output layer.
        tokenizer: Action tokenizer: class and arguments.
        width: Width of the transformer.
        depth: Layers.
        heads: Attention heads.
        prefix: Prefix tokens that the pooled context is turned into.
        smoothing: Standard deviation of the target's blur over neighbouring tokens, where neighbours are alike, in
            tokens; 0 for one-hot.
    """

    discrete = True
    reads = "states"
    fills = False

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        tokenizer: Mapping[str, Any],
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        prefix: int = 2,
        smoothing: float = 2.0,
    ) -> None:
        super().__init__()
        self.tokenizer = instantiate(tokenizer)
        self.smoothing, self.prefix = smoothing, prefix
        self.pool = ContextPool(inputs, 2 * width)
        self.expand = nn.Sequential(nn.GELU(), nn.Linear(2 * width, prefix * width))
        size, h = self.tokenizer.size, inputs.action_horizon
        self.begin = nn.Parameter(torch.randn(width) * 0.02)
        self.embedding = nn.Embedding(size, width)
        self.position = nn.ParameterDict(
            {
                k: nn.Parameter(torch.randn(self.tokenizer.values(h, a), width) * 0.02)
                for k, a in inputs.action_dims.items()
            }
        )
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.ModuleDict({k: nn.Linear(width, size) for k in inputs.action_dims})

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: RandomSource,
    ) -> Float[Tensor, " b"]:
        """Cross-entropy of the next token among those allowed, targets blurred where tokens have an order."""
        written = Written.of(self.tokenizer, actions, step_mask, dim_mask)
        start = self.begin.expand(len(actions), 1, -1)
        hidden = torch.cat([start, self.embedding(written.tokens[:, :-1])], dim=1)
        hidden = hidden + self._place(written.before, embodiment)
        hidden = torch.cat([self._prefix(context), hidden], dim=1)
        causal = _causal(hidden)
        for block in self.blocks:
            hidden, *_ = block(hidden, causal)
        logits = self.out[embodiment](self.norm(hidden[:, self.prefix :])).float()
        return target_loss(logits, written, self.smoothing if self.tokenizer.ordered else 0.0)

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """The likeliest allowed token at every position, greedily; `noise` gives only the shape."""
        caches: list[tuple[Tensor, Tensor] | tuple[None, None]] = [(None, None)] * len(self.blocks)
        prefix = self._prefix(context)

        def follow(token: Int[Tensor, " b"] | None, before: Int[Tensor, " b"]) -> Float[Tensor, "b size"]:
            entered = self.begin.expand(len(noise), -1) if token is None else self.embedding(token)
            hidden = (entered + self._place(before, embodiment))[:, None]
            if token is None:
                hidden = torch.cat([prefix, hidden], dim=1)
            who = _causal(hidden) if token is None else None
            for k, block in enumerate(self.blocks):
                hidden, *kept = block(hidden, who, None, None, *caches[k])
                caches[k] = kept[0], kept[1]
            logits: Tensor = self.out[embodiment](self.norm(hidden[:, -1]))
            return logits

        return write(self.tokenizer, follow, noise, dim_mask)

    def _prefix(self, context: Context) -> Float[Tensor, "b p w"]:
        pooled = self.expand(self.pool(context))
        return pooled.reshape(len(pooled), self.prefix, -1)

    def _place(self, before: Int[Tensor, "*b"], embodiment: str) -> Float[Tensor, "*b w"]:
        """Which value a token is about: how many are written before it."""
        table = self.position[embodiment]
        return table[before.clamp(max=len(table) - 1)]


def _causal(x: Float[Tensor, "b q w"]) -> Bool[Tensor, "b q q"]:
    b, q = x.shape[:2]
    return torch.ones(q, q, dtype=torch.bool, device=x.device).tril().expand(b, -1, -1)
