"""What planners speak of, and what the parts around them are: one loop for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from ...spec import Observation
from ...symbols import Literal, Scene, SkillCall
from .goals import AMBIGUOUS, Past, Unclear


class Outcome(StrEnum):
    """How a skill ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    TIMEOUT = "timeout"
    ABORTED = "aborted"


# -- subgoals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LanguageSubgoal:
    """Do what a text says; `call` is the skill that it is, where it is one of the library."""

    text: str
    call: SkillCall | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSubgoal:
    """Make it look like this: camera -> uint8 (height, width, 3), within `horizon` steps."""

    images: Mapping[str, np.ndarray]
    horizon: int
    text: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoSubgoal:
    """Follow these frames: camera -> uint8 (frames, height, width, 3), `steps` of control apart."""

    frames: Mapping[str, np.ndarray]
    steps: int
    text: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentSubgoal:
    """Act on this: float32 (tokens, width), made of what was seen at `stamp` [s], worth `ttl_s` [s]."""

    z: np.ndarray
    stamp: float
    ttl_s: float
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Done:
    """The planner takes the work to be finished."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The planner needs an answer of a person; the robot holds still."""

    question: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Infeasible:
    """It cannot be done, and why; the robot holds still."""

    kind: str
    reason: str


Subgoal = LanguageSubgoal | ImageSubgoal | VideoSubgoal | LatentSubgoal | Done | Ask | Infeasible


# -- proposals and their fate ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A subgoal with what speaks for it: a total and its terms, for example ``say`` and ``can`` [nats]."""

    subgoal: Subgoal
    score: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Candidates, best first, and what it cost to find them."""

    candidates: tuple[Candidate, ...]
    raw: str = ""
    latency_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Why a candidate was rejected, in a kind that is counted and a sentence that goes back to the planner.

    Kinds: ``unknown_skill``, ``unknown_object``, ``precondition``, ``affordance``, ``loop``, ``not_done``.
    """

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A candidate that the gate refused."""

    subgoal: Subgoal
    violations: tuple[Violation, ...]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A subgoal that was executed.

    Attributes:
        subgoal: What was to be done.
        outcome: How it ended, as far as the detectors know.
        steps: Of control.
        before: The scene when it began.
        note: Anything else.
    """

    subgoal: Subgoal
    outcome: Outcome
    steps: int
    before: Scene | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a detector says: whether, how likely that is, and who says so."""

    ok: bool
    p: float = 1.0
    source: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What a planner is told.

    Attributes:
        instruction: The work.
        observation: What is seen.
        scene: What is known of it; None where nobody says.
        begun: The scene when the instruction was given: what "swap" or "the others" speak of.
        history: What was executed and what was rejected, the latest last.
        past: What was done before this work began.
        step: Of control, since the work began.
        seed: Of the episode, for planners that draw.
    """

    instruction: str
    observation: Observation
    scene: Scene | None = None
    begun: Scene | None = None
    history: tuple[StepRecord | Rejection, ...] = ()
    past: Past = ()
    step: int = 0
    seed: int = 0

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """What was executed."""
        return tuple(entry for entry in self.history if isinstance(entry, StepRecord))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """What was rejected since the last execution."""
        found: list[Rejection] = []
        for entry in reversed(self.history):
            if isinstance(entry, StepRecord):
                break
            found.append(entry)
        return tuple(reversed(found))


# -- the parts ---------------------------------------------------------------------------------------------------------


class Planner(Protocol):
    """Says what to do next. It keeps nothing between calls that the context does not tell, but caches."""

    name: str

    def propose(self, context: PlanContext) -> Proposal:
        """Candidates for the next subgoal, best first."""


class SceneEstimator(Protocol):
    """Says what is there."""

    def reset(self, lane: int) -> None:
        """Forget what was seen in a lane."""

    def estimate(self, observation: Observation, lane: int) -> Scene:
        """The scene of a lane."""


class SuccessDetector(Protocol):
    """Says whether a subgoal has been reached."""

    def check(self, context: PlanContext, subgoal: Subgoal, lane: int) -> Verdict:
        """From what is seen now."""


class GoalChecker(Protocol):
    """Says whether the work is finished; knows nothing of what the planner thinks."""

    def check(self, context: PlanContext, lane: int) -> Verdict:
        """From what is seen now."""


class Affordance(Protocol):
    """Says how likely skills are to succeed now."""

    def probabilities(self, context: PlanContext, calls: Sequence[SkillCall]) -> np.ndarray:
        """Probabilities (n,), 0..1, of n skill calls."""


def unclear(error: Unclear) -> Ask | Infeasible:
    """An instruction that cannot be followed, as a question where several things may be meant."""
    if error.kind == AMBIGUOUS:
        return Ask(question=str(error), options=error.options)
    return Infeasible(kind=error.kind, reason=str(error))


def describe(subgoal: Subgoal) -> str:
    """A subgoal in a few words."""
    if isinstance(subgoal, LanguageSubgoal):
        return subgoal.text
    if isinstance(subgoal, Done):
        return "done"
    if isinstance(subgoal, Ask):
        return f"ask: {subgoal.question}"
    if isinstance(subgoal, Infeasible):
        return f"infeasible: {subgoal.reason}"
    kind = type(subgoal).__name__.removesuffix("Subgoal").lower()
    return f"{kind}: {subgoal.text}" if subgoal.text else kind


def scene_text(scene: Scene, without: Sequence[str] = ("clear", "inside", "hidden")) -> str:
    """What holds in a scene, as models read it: ``red cube on table ; drawer open``."""
    words = [_fact_text(f) for f in sorted(scene.facts) if f.pred not in without]
    return " ; ".join(words)


def _fact_text(fact: Literal) -> str:
    return f"{fact.args[0]} {fact.pred} {fact.args[1]}" if len(fact.args) == 2 else f"{fact.args[0]} {fact.pred}"


def subgoal_row(subgoal: Subgoal) -> dict[str, Any]:
    """A subgoal for a log, without its pictures."""
    row: dict[str, Any] = {"kind": type(subgoal).__name__.removesuffix("Subgoal"), "text": describe(subgoal)}
    if isinstance(subgoal, LanguageSubgoal) and subgoal.call is not None:
        row["call"] = subgoal.call.key
    return row
