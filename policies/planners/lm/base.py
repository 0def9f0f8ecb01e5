"""What a language model can be asked by a planner."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ....errors import ConfigError

REMEMBERED = 10_000
"""Questions that a transcript keeps, the newest."""
CAPABILITIES = ("score", "generate", "choice", "json_schema", "images", "chat")
"""``score``: log-probabilities of given continuations. ``generate``: free text. ``choice``: one text (or a sequence of
texts) out of given ones and nothing else. ``json_schema``: JSON of a given schema. ``images``: pictures in prompts.
``chat``: roles of messages are told to the model."""


class Unreadable(ConfigError):
    """A text that a model cannot read: words that it does not know, or too many."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How likely a continuation is.

    Attributes:
        logprob: Sum of the log-probabilities of its tokens [nats].
        tokens: How many there are.
        estimator: How it was found: ``exact``, or the name of what stands in where a model tells no log-probabilities.
    """

    logprob: float
    tokens: int
    estimator: str = "exact"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What may be generated: `options` separated by `separator`, at most `repeat` of them, ended by `end`.

    `end` may come after any option, and as the first word where `may_be_empty`.
    """

    options: tuple[str, ...]
    separator: str = ""
    end: str = ""
    repeat: int = 1
    may_be_empty: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: The text, without prompt and end.
        logprob: Of it all, where the model tells.
        tokens: How many were generated.
        complete: Whether it ended by itself rather than at the limit.
    """

    text: str
    logprob: float | None = None
    tokens: int = 0
    complete: bool = True


@dataclass
class Usage:
    """What asking a model has cost."""

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    transcript: deque[dict[str, object]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def note(self, kind: str, prompt: str, answer: object, tokens: int, seconds: float) -> None:
        """One question and its answer."""
        self.calls, self.tokens, self.seconds = self.calls + 1, self.tokens + tokens, self.seconds + seconds
        self.transcript.append({"kind": kind, "prompt": prompt, "answer": answer, "tokens": tokens, "seconds": seconds})


class LanguageModel(Protocol):
    """A language model.

    Attributes:
        name: For reports.
        capabilities: Those of `CAPABILITIES` that it has; asking for another is a ConfigError.
        usage: What was asked so far.
    """

    name: str
    capabilities: frozenset[str]
    usage: Usage

    def score(self, prompt: str, continuations: Sequence[str], *, images: Sequence[np.ndarray] = ()) -> list[Scored]:
        """How likely each continuation is after the prompt.

        Text is put together as it is: a continuation brings its own space or line end. `images` (height, width, 3),
        uint8, stand before the prompt.
        """

    def generate(
        self,
        prompt: str,
        *,
        choices: Choices | None = None,
        json_schema: dict[str, object] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[np.ndarray] = (),
    ) -> Completion:
        """Go on from the prompt, until the end of `choices`, the model's own end, or `max_tokens`."""


def require(lm: LanguageModel, capability: str, instead: str = "") -> None:
    """Complain where a model lacks a capability.

    Raises:
        ConfigError: It does.
    """
    if capability not in lm.capabilities:
        has = ", ".join(sorted(lm.capabilities)) or "nothing"
        raise ConfigError(
            f"expected a language model with {capability!r}, got {lm.name} with {has}. {instead}".rstrip()
        )


def check_images(images: Sequence[np.ndarray]) -> None:
    """Complain about what is no picture.

    Raises:
        ConfigError: Anything but (height, width, 3), uint8.
    """
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(f"expected images (height, width, 3) of uint8, got {image.shape} of {image.dtype}")
