"""What an action tokenizer is, and which sequences of its tokens are actions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import DecodeError


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Which token may follow: each writes some values, and a chunk has a fixed number of them.

    A sequence is an action if its tokens write exactly that many values. Constrained decoding allows at each position
    the tokens that do not write too many, so whatever a model prefers, the result decodes.

    Attributes:
        writes: Values that each token writes (or begins to write), (size,).
        inside: Whether a token begins inside a value (byte-level vocabularies cut values in two), (size,).
        leaves: Whether it ends inside one, (size,).
    """

    writes: Int[Tensor, " size"]
    inside: Bool[Tensor, " size"]
    leaves: Bool[Tensor, " size"]

    @classmethod
    def of(cls, writes: Int[Tensor, " size"]) -> Grammar:
        """Of tokens that write whole values."""
        no = torch.zeros(len(writes), dtype=torch.bool)
        return cls(writes=writes, inside=no, leaves=no)

    def to(self, device: torch.device) -> Grammar:
        """The same on a device."""
        return Grammar(writes=self.writes.to(device), inside=self.inside.to(device), leaves=self.leaves.to(device))

    def allowed(self, left: Int[Tensor, "*b"], inside: Bool[Tensor, "*b"]) -> Bool[Tensor, "*b size"]:
        """Tokens that may follow where `left` values are still to be begun, and one is unfinished where `inside`."""
        fits = self.writes <= left[..., None]
        return fits & (self.inside == inside[..., None])

    def before(self, tokens: Int[Tensor, "b l"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """How many values stand before each token, and whether it follows an unfinished one."""
        written = self.writes[tokens]
        leaves = self.leaves[tokens]
        start = torch.zeros_like(leaves[:, :1])
        return written.cumsum(1) - written, torch.cat([start, leaves[:, :-1]], dim=1)


class ActionTokenizer(Protocol):
    """Chunks of normalised actions to tokens and back.

    Attributes:
        size: Number of tokens.
        ordered: Whether neighbouring tokens mean neighbouring values.
        grammar: Which sequences are actions.
    """

    size: int
    ordered: bool
    grammar: Grammar

    def values(self, h: int, a: int) -> int:
        """Values that a chunk of h steps and a dimensions is written with."""

    def encode(
        self, actions: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"]
    ) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Tokens; which of them are real (sequences may differ in length); and which of those count in a loss.

        Every action is a number, at padded steps too (`heads.written` holds the last real one there).
        """

    def decode(self, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], h: int, a: int) -> Float[Tensor, "b h a"]:
        """The actions; DecodeError for what is none."""

    def fit(self, chunks: Iterable[Tensor]) -> Mapping[str, Any] | None:
        """Constructor arguments learnt from normalised chunks of each embodiment, or None for nothing to learn."""


def require_tokens(tokens: Tensor, size: int) -> None:
    """Raise DecodeError unless all are numbers of tokens."""
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
        raise DecodeError(
            f"expected action tokens in 0..{size - 1}, got {int(tokens.min())}..{int(tokens.max())}: not an action"
        )


def require_length(got: int, expected: int, what: str) -> None:
    """Raise DecodeError unless a sequence is as long as an action."""
    if got != expected:
        raise DecodeError(f"expected {expected} {what} of an action, got {got}: cut short, or of another chunk")
