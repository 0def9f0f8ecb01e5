"""Actions as bins: one token for every number (RT-1 and RT-2, Brohan et al. 2022 and 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from .base import Grammar, require_length, require_tokens


class BinTokenizer:
    """Uniform bins over [-1, 1], decoded to their centres; a token for every dimension of every step, step by step.

    Values outside [-1, 1] fall in the outermost bins. The largest error inside is half a bin, 1 / bins.

    Args:
        bins: Number of bins.
    """

    ordered = True

    def __init__(self, *, bins: int = 256) -> None:
        if bins < 2:
            raise ConfigError(f"expected at least 2 bins, got {bins}")
        self.size = bins
        self.grammar = Grammar.of(torch.ones(bins, dtype=torch.long))

    def values(self, h: int, a: int) -> int:
        """One for every number."""
        return h * a

    def encode(
        self, actions: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"]
    ) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Bins, step by step; those of padded steps do not count."""
        bins = ((actions.clamp(-1.0, 1.0) + 1.0) * (0.5 * self.size)).long().clamp(max=self.size - 1)
        counts = step_mask[:, :, None].expand_as(bins).flatten(1)
        return bins.flatten(1), torch.ones_like(counts), counts

    def decode(self, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], h: int, a: int) -> Float[Tensor, "b h a"]:
        """Centre of each bin.

        Raises:
            DecodeError: Too few tokens, or numbers that are no bins.
        """
        require_length(int(real.sum(1).min()) if len(real) else h * a, h * a, "tokens")
        require_tokens(tokens, self.size)
        return ((tokens.float() + 0.5) * (2.0 / self.size) - 1.0).unflatten(1, (h, a))

    def fit(self, chunks: Iterable[Tensor]) -> Mapping[str, Any] | None:
        """Nothing to learn."""
        return None
