"""The embedded language model: small enough to be shipped, and quick without torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ....errors import ConfigError, NotFoundError
from .base import Choices, Completion, Scored, Unreadable, Usage
from .llama import Cache, NumpyLlama, log_softmax
from .trie import TokenConstraint
from .words import WordTokenizer

SHIPPED = Path(__file__).parent / "assets" / "tiny"
"""The weights that come with brachium, made by ``brachium train-lm``."""
SPARE = 16
"""Positions that are kept for an answer."""
ROWS = 64
"""Continuations that are scored at once."""


class TinyLM:
    """A Llama of a few megabytes with a closed vocabulary of words.

    Args:
        folder: With ``config.json``, ``model.safetensors`` and ``tokenizer.json``; the shipped one when None.

    Raises:
        NotFoundError: There is no such folder.
    """

    name = "tiny"
    capabilities = frozenset({"score", "generate", "choice"})

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else SHIPPED
        if not self.folder.is_dir():
            raise NotFoundError(f"no language model at {self.folder}. Type: brachium train-lm out={self.folder}")
        self.tokenizer = WordTokenizer.load(self.folder)
        self.model = NumpyLlama.load(self.folder)
        self.usage = Usage()

    def score(self, prompt: str, continuations: Sequence[str], *, images: Sequence[np.ndarray] = ()) -> list[Scored]:
        """How likely each continuation is after the prompt.

        Raises:
            ConfigError: Words that it does not know; pictures.
        """
        _blind(images)
        begin = time.monotonic()
        logits, cache = self._read(prompt)
        first = log_softmax(logits[0, -1])
        rows = [self._encode(text) for text in continuations]
        found: list[Scored] = []
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            longest = max(len(row) for row in part)
            if longest == 0:
                raise ConfigError("expected continuations of at least one word")
            padded = np.array([row + [self.tokenizer.pad] * (longest - len(row)) for row in part])
            after, _ = self.model(padded, cache.repeated(len(part)))
            logprobs = log_softmax(after)
            for k, row in enumerate(part):
                later = logprobs[k, np.arange(len(row) - 1), row[1:]]
                found.append(Scored(logprob=float(first[row[0]] + later.sum()), tokens=len(row)))
        self.usage.note("score", prompt, len(found), sum(map(len, rows)), time.monotonic() - begin)
        return found

    def generate(
        self,
        prompt: str,
        *,
        choices: Choices | None = None,
        json_schema: dict[str, object] | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[np.ndarray] = (),
    ) -> Completion:
        """Go on from the prompt until the end of a text, or of `choices`."""
        _blind(images)
        if json_schema is not None:
            raise ConfigError("the tiny language model writes no JSON; type lm=transformers or lm=openai")
        begin, rng = time.monotonic(), np.random.default_rng(seed)
        constraint = None if choices is None else self._constraint(choices)
        state = None if constraint is None else constraint.start()
        logits, cache = self._read(prompt)
        written: list[int] = []
        total, complete = 0.0, False
        while len(written) < max_tokens and not complete:
            logprobs = log_softmax(logits[0, -1])
            if constraint is not None and state is not None:
                allowed = np.full(len(logprobs), -np.inf, np.float32)
                ids = sorted(constraint.allowed(state))
                allowed[ids] = logprobs[ids]
                logprobs = log_softmax(allowed)
            token = _draw(logprobs, temperature, rng)
            total += float(logprobs[token])
            if constraint is not None and state is not None:
                state = constraint.advance(state, token)
                complete = constraint.finished(state)
            complete = complete or token == self.tokenizer.end
            if token != self.tokenizer.end:
                written.append(token)
            if not complete:
                logits, cache = self.model(np.array([[token]]), cache)
        text = self.tokenizer.decode(written)
        self.usage.note("generate", prompt, text, len(written), time.monotonic() - begin)
        return Completion(text=text, logprob=total, tokens=len(written), complete=complete)

    def _read(self, prompt: str) -> tuple[np.ndarray, Cache]:
        tokens = [self.tokenizer.begin, *self._encode(prompt)]
        if len(tokens) + SPARE > self.model.positions:
            raise Unreadable(f"expected at most {self.model.positions - SPARE} words, got {len(tokens)}")
        return self.model(np.array([tokens]))

    def _encode(self, text: str) -> list[int]:
        unknown = self.tokenizer.unknown(text)
        if unknown:
            raise Unreadable(f"the tiny language model does not know the words {unknown}")
        return self.tokenizer.encode(text)

    def _constraint(self, choices: Choices) -> TokenConstraint:
        return TokenConstraint(self._encode, choices, self.tokenizer.end)


def _blind(images: Sequence[np.ndarray]) -> None:
    if len(images):
        raise ConfigError("the tiny language model sees no pictures; type lm=transformers or lm=openai")


def _draw(logprobs: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature <= 0.0:
        return int(np.argmax(logprobs))
    scaled = np.exp(log_softmax(logprobs / temperature))
    return int(rng.choice(len(scaled), p=scaled / scaled.sum()))
