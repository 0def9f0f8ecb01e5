"""Instructions into goals by a language model: it says what was meant, literals decide what that comes to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ...symbols import Literal, Scene
from .base import PlanContext
from .goals import CONTRADICTORY, IMPOSSIBLE, NOT_UNDERSTOOD, NUMBERS, UNKNOWN_WORDS, Unclear, goals_of
from .lm.prompts import parse_prompt
from .lm.tiny import TinyLM
from .lm.words import SPECIAL, split_words
from .search import Goals

QUESTIONS = ("is", "are", "what", "where", "which", "how", "does", "do")
LONGEST = 120
"""Words of an instruction."""
KEPT = 1000
"""Instructions whose readings are remembered."""
SYNONYMS = {"block": "cube", "blocks": "cube", "cubes": "cube", "balls": "ball", "cylinders": "cylinder"}
SYNONYMS |= {"bowls": "bowl", "zones": "zone", "things": "thing"}
"""Words of instructions -> words of names."""


MARKS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"if", "case"}), "if "),
    (frozenset({"close", "closed", "shut"}), "not open"),
    (frozenset({"swap", "exchange"}), "swap"),
    (frozenset({"undo", "undone", "revert", "back"}), "undo"),
    (frozenset({"sort", "match"}), "sort"),
    (frozenset({"drawer"}), "drawer"),
    *((frozenset({number}), number) for number in NUMBERS),
)
"""Words, and what a reading of an instruction with one of them must hold."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an instruction may mean, in the language of goals, and its probability."""

    meaning: str
    p: float


class GoalParser:
    """What an instruction comes to, as the tiny language model reads it.

    The likeliest reading is checked: it must be a sentence of the language of goals, speak of the things that the
    instruction names by color and kind and of no others, keep its conditions, numbers and the like (`MARKS`), and not
    contradict itself. If it fails, other readings are drawn; the likeliest that passes is taken. Words that the model
    does not know, and instructions of which no reading passes or is likely enough, are `Unclear`, never a guess.

    Args:
        lm: The model.
        confidence: Least probability of a reading, 0..1.
        draws: Other readings that are drawn where the likeliest fails.
        synonyms: Words of instructions -> words of names.
    """

    def __init__(
        self,
        *,
        lm: TinyLM,
        confidence: float = 0.1,
        draws: int = 12,
        synonyms: Mapping[str, str] | None = None,
    ) -> None:
        if not 0.0 <= confidence < 1.0 or draws < 0:
            raise ConfigError(
                f"expected confidence from 0 to below 1 and draws of at least 0, got {confidence}, {draws}"
            )
        self.lm, self.confidence, self.draws = lm, confidence, draws
        self.synonyms = dict(SYNONYMS if synonyms is None else synonyms)
        self._known: dict[str, list[Reading]] = {}

    def __call__(self, context: PlanContext) -> Goals:
        """Alternatives of literals, by the scene as it was when the instruction was given.

        Raises:
            Unclear: It cannot be followed.
        """
        scene = context.begun if context.begun is not None else context.scene
        if scene is None:
            raise ConfigError("goals of literals need to know the scene: give the runner one that estimates it")
        text = self._checked(context.instruction)
        readings = self.readings(text)
        fault: Unclear | None = None
        for reading in readings:
            if reading.p < self.confidence:
                break
            try:
                self._check(reading.meaning, text, scene)
                return goals_of(reading.meaning, scene, context.past)
            except ConfigError:
                continue
            except Unclear as error:
                if error.kind not in (CONTRADICTORY, IMPOSSIBLE, NOT_UNDERSTOOD):
                    raise  # it is understood, and speaks of what is not there, or of one of several
                fault = fault if fault is not None and fault.kind != NOT_UNDERSTOOD else error
        best = readings[0]
        if fault is not None and fault.kind != NOT_UNDERSTOOD:
            raise fault
        raise Unclear(NOT_UNDERSTOOD, f"is it {best.meaning!r} that was meant?", (best.meaning,))

    def readings(self, instruction: str) -> list[Reading]:
        """What it may mean, likeliest first: the greedy reading, and where draws are asked for, others."""
        if instruction not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[instruction] = self._read(instruction)
        return self._known[instruction]

    def _read(self, text: str) -> list[Reading]:
        prompt = parse_prompt(text)
        found = [self.lm.generate(prompt)]
        if math.exp(found[0].logprob or 0.0) < 0.95:  # else all others together are hardly worth a thought
            found += [self.lm.generate(prompt, temperature=1.0, seed=seed) for seed in range(self.draws)]
        readings: dict[str, float] = {}
        for completion in found:
            if completion.complete:
                readings[" ".join(completion.text.split())] = math.exp(completion.logprob or 0.0)
        ranked = sorted(readings.items(), key=lambda item: -item[1])
        return [Reading(meaning=meaning, p=p) for meaning, p in ranked] or [Reading(meaning="", p=0.0)]

    def _checked(self, instruction: str) -> str:
        text = " ".join(instruction.split()).rstrip(".!? ")
        if not text:
            raise Unclear(NOT_UNDERSTOOD, "there is no instruction")
        words = split_words(text)
        if len(words) > LONGEST:
            raise Unclear(
                NOT_UNDERSTOOD, f"the instruction has {len(words)} words, more than {LONGEST}: ask for less at a time"
            )
        if "not" in words or any(word in SPECIAL for word in words):
            raise Unclear(NOT_UNDERSTOOD, "what shall not be done, and signs of the model's own, are not understood")
        if instruction.rstrip().endswith("?") and words[0] in QUESTIONS:
            raise Unclear(NOT_UNDERSTOOD, "that is a question; tell what shall be done")
        unknown = self.lm.tokenizer.unknown(text)
        if unknown:
            raise Unclear(UNKNOWN_WORDS, f"unknown words: {', '.join(unknown)}")
        return text

    def _check(self, meaning: str, text: str, scene: Scene) -> None:
        """Whether a reading speaks of what the instruction speaks of.

        Raises:
            Unclear: It names what is not named, or leaves out what is.
        """
        said = " ".join(self.synonyms.get(word, word) for word in split_words(text))
        attributes = {thing.color for thing in scene.things if thing.color}
        kinds = {thing.kind for thing in scene.things}
        words = said.split()
        pairs = {f"{a} {b}" for a, b in itertools.pairwise(words) if a in attributes and b in kinds}
        named = set(_names(meaning))
        left_out = sorted(pairs - named)
        made_up = sorted(n for n in named if " " in n and not n.startswith("every ") and f" {n} " not in f" {said} ")
        marks = [sorted(some & set(words))[0] for some, kept in MARKS if some & set(words) and kept not in meaning]
        if {"all", "but"} <= set(words) and "leave" not in meaning:
            marks.append("all but")
        if marks:
            raise Unclear(NOT_UNDERSTOOD, f"the reading {meaning!r} passes over {', '.join(marks)}", (meaning,))
        if left_out or made_up:
            what = f"leaves out {', '.join(left_out)}" if left_out else f"makes up {', '.join(made_up)}"
            raise Unclear(NOT_UNDERSTOOD, f"the reading {meaning!r} {what}", (meaning,))


def _names(meaning: str) -> Sequence[str]:
    """All names in a meaning."""
    clauses = meaning.replace("if ", "").replace("else", ";").replace(":", ";").split(";")
    return [arg for clause in clauses if clause.strip() for arg in Literal.parse(clause).args]
