"""Questions about images as next-token training: texts, targets, losses and scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from .tokenizer import LOCATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Target of a token that is not to be predicted (PyTorch's own convention)."""
ENOUGH = 20
"""Cases of a context from which on it says something about the next word."""


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A question with its answer, token by token.

    Attributes:
        tokens: (l,), padded on the left.
        targets: At each token the one that should follow, or `IGNORE`, (l,).
        looks: Which things to look at, a bit each, (2, l): first where a word stands for them, at its last token, then
            where the next token is about them.
        views: In the view of which camera, (2, l).
    """

    tokens: Int[np.ndarray, " l"]
    targets: Int[np.ndarray, " l"]
    looks: UInt8[np.ndarray, "2 l"]
    views: UInt8[np.ndarray, "2 l"]


class Speller:
    """Texts as tokens, and which of them write which characters; quick for many texts.

    Args:
        tokenizer: A fast tokenizer of `transformers`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer  # the wrapper spends ten times as long on a text
        self._known: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}

    def learn(self, texts: Iterable[str]) -> None:
        """Spell texts ahead, all at once, and forget those before."""
        fresh = sorted(set(texts))
        spelt = self._backend.encode_batch(fresh, add_special_tokens=False)
        self._known = {text: (made.ids, made.offsets) for text, made in zip(fresh, spelt)}

    def _spelt(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if text not in self._known:
            made = self._backend.encode(text, add_special_tokens=False)
            return made.ids, made.offsets
        return self._known[text]

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        return list(self._spelt(text)[0])

    def within(self, text: str, start: int, end: int) -> list[int]:
        """Indices of the tokens that write the characters `start` to `end`."""
        return [k for k, (first, last) in enumerate(self._spelt(text)[1]) if first < end and last > start]


def bits(things: Iterable[int]) -> int:
    """Indices up to 7 as bits."""
    return sum(1 << k for k in set(things))


class QuestionEncoder:
    """Questions and answers -> tokens and targets of one fixed length, padded on the left.

    A text is ``question <bos> answer <eos>``; only the answer and the end are targets.

    Args:
        tokenizer: With padding, begin and end tokens.
        length: Tokens a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.spell, self.length = Speller(tokenizer), length
        self.pad, self.begin, self.end = (int(getattr(tokenizer, f"{n}_token_id")) for n in ("pad", "bos", "eos"))

    def prompt(self, question: str) -> list[int]:
        """Tokens up to where the answer begins."""
        return [*self.spell(question), self.begin]

    def __call__(
        self,
        question: str,
        answer: str,
        asked: Sequence[Mapping[str, Any]] = (),
        meant: Sequence[Mapping[str, Any]] = (),
    ) -> EncodedText | None:
        """Encode one, with what its words stand for (`envs.questions.Mention`); None where the text is too long."""
        before, after = self.prompt(question), [*self.spell(answer), self.end]
        if len(before) + len(after) > self.length:
            return None
        whole = before + after
        tokens = np.full(self.length, self.pad, np.int64)
        targets = np.full(self.length, IGNORE, np.int64)
        looks, views = np.zeros((2, 2, self.length), np.uint8)
        tokens[-len(whole) :] = whole
        targets[-len(after) - 1 : -1] = after
        start = self.length - len(whole)
        for mention in asked:
            at = start + self.spell.within(question, mention["start"], mention["end"])[-1]
            looks[0, at], views[0, at] = bits(mention["things"]), mention["view"]
        for mention in meant:
            for k in self.spell.within(answer, mention["start"], mention["end"]):
                at = start + len(before) - 1 + k  # the token before says what comes next
                looks[1, at], views[1, at] = bits(mention["things"]), mention["view"]
        return EncodedText(tokens=tokens, targets=targets, looks=looks, views=views)


class NamePriors:
    """What text alone says of the next word of a name, so that training need not teach it.

    Added to the logits in training and left out afterwards (logit adjustment, Menon et al. 2021): the model learns what
    the picture adds to the text. Without this it learns that colour-shape pairs never named do not exist.

    Args:
        tokenizer: Tokenizer.
        names: Names of things, such as ``red cube``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
        split = [name.split() for name in names]
        spelt = {w: tokenizer(w, add_special_tokens=False)["input_ids"] for name in split for w in name}
        slots = ({name[0] for name in split if len(name) > 1}, {name[-1] for name in split})
        self.slots = [sorted(spelt[word][0] for word in slot if len(spelt[word]) == 1) for slot in slots]
        self.words = {token for slot in self.slots for token in slot}
        self.size = len(tokenizer)
        self.contexts: dict[tuple[str, int], int] = {}
        self.counts: list[np.ndarray] = []

    def index(self, kind: str, tokens: Sequence[int], targets: Sequence[int], *, learn: bool) -> np.ndarray:
        """Row of `table` for each target of a question of some kind, 0 for none; with `learn` it is counted."""
        found = np.zeros(len(tokens), np.int64)
        last = -1
        for k, (token, target) in enumerate(zip(tokens, targets)):
            last = int(token) if int(token) in self.words else last
            if int(target) not in self.words:
                continue
            row = self.contexts.get((kind, last))
            if learn and row is None:
                row = self.contexts[kind, last] = len(self.contexts) + 1
                self.counts.append(np.zeros(self.size))
            if row is not None:
                found[k] = row
                self.counts[row - 1][int(target)] += learn
        return found

    def table(self) -> Float[Tensor, "c w"]:
        """Log-probability of each name word after each context, over that of a fair guess; the first row is 0."""
        rows = np.zeros((len(self.counts) + 1, self.size), np.float32)
        for row, count in zip(rows[1:], self.counts):
            for slot in self.slots:
                seen = count[slot]
                if seen.sum() >= ENOUGH:
                    row[slot] = np.log(len(slot) * (seen + 0.1) / (seen + 0.1).sum())
        return torch.from_numpy(rows)


def language_loss(
    logits: Float[Tensor, "t w"], targets: Int[Tensor, " t"], blurred: Float[Tensor, "w w"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answers' tokens; places are told apart as softly as `blurred_targets` says."""
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
