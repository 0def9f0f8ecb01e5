"""Instructions into goals by a language model: it says what was meant, literals decide what that comes to."""

from __future__ import annotations

import math

from ...errors import ConfigError
from .base import PlanContext
from .goals import NOT_UNDERSTOOD, UNKNOWN_WORDS, Unclear, goals_of
from .lm.prompts import parse_prompt
from .lm.tiny import TinyLM
from .search import Goals

KEPT = 1000
"""Meanings that are remembered."""


class GoalParser:
    """What an instruction comes to, as the tiny language model reads it.

    Words that the model does not know, and readings that it is not sure of, are no guess but an `Unclear`.

    Args:
        lm: The model.
        confidence: Least probability of a reading, 0..1.
    """

    def __init__(self, *, lm: TinyLM, confidence: float = 0.3) -> None:
        if not 0.0 <= confidence < 1.0:
            raise ConfigError(f"expected confidence from 0 to below 1, got {confidence}")
        self.lm, self.confidence = lm, confidence
        self._known: dict[str, str | Unclear] = {}

    def __call__(self, context: PlanContext) -> Goals:
        """Alternatives of literals, by the scene as it was when the instruction was given.

        Raises:
            Unclear: It cannot be followed.
        """
        scene = context.begun if context.begun is not None else context.scene
        if scene is None:
            raise ConfigError("goals of literals need to know the scene: give the runner one that estimates it")
        meaning = self.meaning(context.instruction)
        try:
            return goals_of(meaning, scene, context.past)
        except ConfigError as error:  # a sentence of its own making
            raise Unclear(NOT_UNDERSTOOD, f"is it {meaning!r} that was meant?", (meaning,)) from error

    def meaning(self, instruction: str) -> str:
        """The instruction in the language of goals.

        Raises:
            Unclear: Unknown words, or no reading that the model is sure of.
        """
        if instruction not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[instruction] = self._read(instruction)
        found = self._known[instruction]
        if isinstance(found, Unclear):
            raise Unclear(found.kind, found.why, found.options)
        return found

    def _read(self, instruction: str) -> str | Unclear:
        text = " ".join(instruction.split()).rstrip(".!? ")
        if not text:
            return Unclear(NOT_UNDERSTOOD, "there is no instruction")
        unknown = self.lm.tokenizer.unknown(text)
        if unknown:
            return Unclear(UNKNOWN_WORDS, f"unknown words: {', '.join(unknown)}")
        found = self.lm.generate(parse_prompt(text))
        sure = math.exp(found.logprob or 0.0)
        meaning = " ".join(found.text.split())
        if not found.complete or sure < self.confidence:
            return Unclear(NOT_UNDERSTOOD, f"is it {meaning!r} that was meant? ({100 * sure:.0f} % sure)", (meaning,))
        return meaning
