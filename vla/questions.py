"""Questions about images as next-token training: texts, targets, losses and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .tokenizer import LOCATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Target of a token that is not to be predicted (PyTorch's own convention)."""


class QuestionEncoder:
    """Questions and answers -> tokens and targets of one fixed length, padded on the left.

    A text is ``question <bos> answer <eos>``; only the answer and the end are targets.

    Args:
        tokenizer: With padding, begin and end tokens.
        length: Tokens a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.pad, self.begin, self.end = (int(getattr(tokenizer, f"{n}_token_id")) for n in ("pad", "bos", "eos"))

    def ids(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, question: str) -> list[int]:
        """Tokens up to where the answer begins."""
        return [*self.ids(question), self.begin]

    def __call__(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens (l,) and, at each, the token that should follow (or `IGNORE`); None where the text is too long."""
        before, after = self.prompt(question), [*self.ids(answer), self.end]
        if len(before) + len(after) > self.length:
            return None
        tokens = np.full(self.length, self.pad, np.int64)
        targets = np.full(self.length, IGNORE, np.int64)
        whole = before + after
        tokens[-len(whole) :] = whole
        targets[-len(after) - 1 : -1] = after
        return tokens, targets


def language_loss(
    logits: Float[Tensor, "t w"], targets: Int[Tensor, " t"], blurred: Float[Tensor, "w w"] | None = None
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answers' tokens; with `blurred` (`blurred_targets`) places are told apart softly."""
    if blurred is None:
        return F.cross_entropy(logits.float(), targets)
    return F.cross_entropy(logits.float(), blurred[targets])


def blurred_targets(tokenizer: PreTrainedTokenizerBase, spread: float) -> Float[Tensor, "w w"]:
    """Row t: what to learn where token t is right. Location tokens share with their neighbours, `spread` tokens wide.

    A place one token beside the right one is nearly right, which one-hot targets do not say.
    """
    target = torch.eye(len(tokenizer))
    places = location_tokens(tokenizer)
    if spread > 0 and places:
        ids, at = torch.tensor(list(places)), torch.tensor([float(p) for p in places.values()])
        near = torch.softmax(-0.5 * ((at[:, None] - at[None]) / spread) ** 2, dim=-1)
        target[ids[:, None], ids[None]] = near
    return target


def score(
    predicted: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    kinds: Sequence[str],
    locations: Mapping[int, int],
) -> dict[str, float]:
    """Share of answers that are right in every token, by kind; for places also the median error.

    Args:
        predicted: Tokens chosen for each answer, each given the right ones before it: an answer that is right in
            every token is the one that greedy decoding gives.
        wanted: Right tokens.
        kinds: Kind of each question.
        locations: Token -> place along an edge.

    Returns:
        ``accuracy/KIND``, and ``tokens_off/KIND``, the median distance in location tokens, for kinds whose answers are
        places.
    """
    right: dict[str, list[bool]] = {}
    off: dict[str, list[float]] = {}
    for found, true, kind in zip(predicted, wanted, kinds):
        right.setdefault(kind, []).append(list(found) == list(true))
        places = [k for k, token in enumerate(true) if token in locations]
        if places and len(places) >= len(true) - 1:  # all but the end
            apart = [
                abs(locations[found[k]] - locations[true[k]]) if found[k] in locations else LOCATIONS for k in places
            ]
            off.setdefault(kind, []).append(math.hypot(*apart) if len(apart) == 2 else float(max(apart)))
    result = {f"accuracy/{kind}": float(np.mean(values)) for kind, values in sorted(right.items())}
    return result | {f"tokens_off/{kind}": float(np.median(values)) for kind, values in sorted(off.items())}


def location_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Token -> place along an image edge, in order: sums over a vocabulary's own order differ from run to run."""
    vocabulary: dict[str, Any] = tokenizer.get_vocab()
    found = {i: int(t[4:-1]) for t, i in vocabulary.items() if t.startswith("<loc") and t[4:-1].isdigit()}
    return dict(sorted(found.items()))


def choices(logits: Float[Tensor, "b k l w"], targets: Int[Tensor, "b k l"]) -> tuple[list[list[int]], list[list[int]]]:
    """Likeliest and right tokens of every answer, text by text."""
    best = logits.argmax(-1)
    predicted, wanted = [], []
    for row, target in zip(best.flatten(0, 1), targets.flatten(0, 1)):
        keep = target != IGNORE
        predicted.append(row[keep].tolist())
        wanted.append(target[keep].tolist())
    return predicted, wanted
