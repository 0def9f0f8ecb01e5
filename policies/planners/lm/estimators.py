"""Likelihoods of continuations from what servers tell: a prompt's tokens, letters of multiple choice, votes."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence

from ....errors import ServerError
from .base import Scored

MAX_LETTERS = 20
"""Options of a multiple-choice question: servers tell the log-probabilities of at most that many tokens."""

Tokens = list[tuple[str, float]]
"""Tokens with their log-probabilities [nats]."""


def difference(whole: Tokens, before: Tokens) -> tuple[float, int]:
    """log p of one text less that of another, over the tokens that they do not begin with in common; and how many.

    Servers compute in half precision, a little differently each time: over a long prompt that would add up.
    """
    same = next((i for i, (a, b) in enumerate(zip(whole, before)) if a[0] != b[0]), min(len(whole), len(before)))
    total = math.fsum(p for _, p in whole[same:]) - math.fsum(p for _, p in before[same:])
    return total, len(whole) - same


def letter_questions(prompt: str, texts: Sequence[str]) -> list[str]:
    """Multiple-choice questions, one a text: in question k, the letters begin at text k and go round."""
    questions = []
    for turn in range(len(texts)):
        turned = [*texts[turn:], *texts[:turn]]
        listed = "\n".join(f"{letter}) {text.strip()}" for letter, text in zip(string.ascii_uppercase, turned))
        questions.append(f"{prompt}\n\nWhich comes next?\n{listed}\nAnswer with one letter.\nAnswer:")
    return questions


def from_letters(answers: Sequence[Tokens]) -> list[Scored]:
    """Likelihoods of the texts from the likeliest first tokens of the answers to `letter_questions`.

    A liking for letter k adds the same to the logarithm of whichever text stands there. Each text stands there once,
    so that the mean of the logarithms is free of it.

    Raises:
        ServerError: An answer that is no letter.
    """
    n = len(answers)
    means = [0.0] * n
    for turn, top in enumerate(answers):
        for place, logprob in enumerate(_letters(top, n)):
            means[(place + turn) % n] += logprob / n
    whole = _logsumexp(means)
    return [Scored(logprob=mean - whole, tokens=1, estimator=f"letters ({n} rotations)") for mean in means]


def from_votes(votes: Mapping[str, int], texts: Sequence[str]) -> list[Scored]:
    """Likelihoods of the texts from how often each was written, with one vote added to each (Laplace)."""
    samples = sum(votes.values())
    name, total = f"votes ({samples} samples)", samples + len(texts)
    return [Scored(logprob=math.log((votes.get(text, 0) + 1) / total), tokens=1, estimator=name) for text in texts]


def _letters(top: Tokens, n: int) -> list[float]:
    """log p of the first n letters among themselves (" A" and "A" are the same answer)."""
    heard: dict[str, list[float]] = {}
    for token, logprob in top:
        heard.setdefault(token.strip(" \n▁Ġ)."), []).append(logprob)
    letters = string.ascii_uppercase[:n]
    if not set(letters) & set(heard):
        said = ", ".join(repr(token) for token, _ in top[:5])
        raise ServerError(f"expected a letter from A to {letters[-1]} as answer, got {said}")
    least = min(logprob for _, logprob in top)  # what is not among the likeliest is no likelier than the last of them
    found = [_logsumexp(heard[letter]) if letter in heard else least for letter in letters]
    whole = _logsumexp(found)
    return [logprob - whole for logprob in found]


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))
