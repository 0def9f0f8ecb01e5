"""What heads that write tokens share: targets, their loss, and constrained decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import DecodeError
from ..action_tokens.base import ActionTokenizer

Follow = Callable[[Int[Tensor, " b"] | None, Int[Tensor, " b"]], Float[Tensor, "b size"]]
"""(last token, or None at first; values written before the next) -> logits of the next token."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """Chunks written in tokens, and what may stand at each position.

    Attributes:
        tokens: (b, l).
        real: False after the end of shorter sequences.
        counts: Whether a token counts in the loss.
        before: Values written before each token.
        allowed: Tokens that may stand there, (b, l, size).
    """

    tokens: Int[Tensor, "b l"]
    real: Bool[Tensor, "b l"]
    counts: Bool[Tensor, "b l"]
    before: Int[Tensor, "b l"]
    allowed: Bool[Tensor, "b l size"]

    @classmethod
    def of(
        cls,
        tokenizer: ActionTokenizer,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
    ) -> Written:
        """Write the dimensions that count; padded steps go on with the last real one."""
        chosen = _hold(torch.where(step_mask[..., None], actions[:, :, dim_mask], 0.0), step_mask)
        with torch.autocast(chosen.device.type, enabled=False):  # half precision would write other tokens
            tokens, real, counts = tokenizer.encode(chosen.float(), step_mask)
        grammar = tokenizer.grammar.to(tokens.device)
        before, inside = grammar.before(tokens)
        left = tokenizer.values(*chosen.shape[1:]) - before
        return cls(tokens=tokens, real=real, counts=counts & real, before=before, allowed=grammar.allowed(left, inside))


def _hold(actions: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"]) -> Float[Tensor, "b h a"]:
    """Padded steps replaced by the last real one: a transform over the whole chunk must see something there."""
    steps = torch.arange(actions.shape[1], device=actions.device)
    last = torch.where(step_mask, steps, 0).cummax(dim=1).values
    return actions.gather(1, last[..., None].expand_as(actions))


def target_loss(logits: Float[Tensor, "b l size"], written: Written, smoothing: float) -> Float[Tensor, " b"]:
    """Cross-entropy of each chunk's tokens among those allowed, averaged over the tokens that count.

    With `smoothing` the target is blurred over neighbouring tokens, by that standard deviation.
    """
    allowed = written.allowed | ~written.real[..., None]
    logs = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(-1)
    if smoothing > 0:
        distance = (torch.arange(logits.shape[-1], device=logits.device) - written.tokens[..., None]).float()
        target = torch.softmax((-0.5 * (distance / smoothing) ** 2).masked_fill(~allowed, -torch.inf), dim=-1)
        error = -(target * logs.masked_fill(~allowed, 0.0)).sum(-1)
    else:
        error = -logs.gather(-1, written.tokens[..., None])[..., 0]
    counts = written.counts
    return torch.where(counts, error, 0.0).sum(1) / counts.sum(1).clamp(min=1)


def write(
    tokenizer: ActionTokenizer, follow: Follow, shape: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"]
) -> Float[Tensor, "b h a"]:
    """Decode greedily, allowing only what can still become an action; dimensions that do not count are 0.

    Raises:
        DecodeError: No token is allowed (a vocabulary that lacks single values).
    """
    b, h, _ = shape.shape
    a = int(dim_mask.sum())
    grammar = tokenizer.grammar.to(shape.device)
    left = torch.full((b,), tokenizer.values(h, a), device=shape.device)
    inside = torch.zeros(b, dtype=torch.bool, device=shape.device)
    total, token = left.clone(), None
    tokens: list[Tensor] = []
    real: list[Tensor] = []
    while True:
        going = (left > 0) | inside
        if not bool(going.any()):
            break
        logits = follow(token, total - left)
        allowed = grammar.allowed(left, inside)
        if not bool(allowed[going].any(-1).all()):
            raise DecodeError("no action token may follow: the tokenizer has no token for a single value")
        best = logits.float().masked_fill(~allowed, -torch.inf).argmax(-1)
        token = torch.where(going, best, 0)
        tokens.append(token)
        real.append(going)
        left = torch.where(going, left - grammar.writes[token], left)
        inside = torch.where(going, grammar.leaves[token], inside)
    actions = shape.new_zeros(shape.shape)
    with torch.autocast(shape.device.type, enabled=False):
        actions[:, :, dim_mask] = tokenizer.decode(torch.stack(tokens, 1), torch.stack(real, 1), h, a).to(shape)
    return actions
