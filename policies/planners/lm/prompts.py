"""What planners write to language models: the plan so far, and what comes next."""

from __future__ import annotations

from typing import Protocol

from ..base import LanguageSubgoal, Outcome, PlanContext, StepRecord, describe, scene_text
from .words import ANSWER, END, NEXT, PARSE


class PlanPrompt(Protocol):
    """Puts a context into words.

    Attributes:
        done: What says that the work is finished, as an option.
    """

    done: str

    def next_step(self, context: PlanContext) -> str:
        """Up to where the next step is to be written."""

    def option(self, text: str) -> str:
        """A step as a continuation, with what ends it: else the beginning of a longer step would be a step."""


class TinyPrompt:
    """The words that the tiny language model is trained on.

    Args:
        scene: Tell what holds in the scene (Inner Monologue's passive scene description).
        feedback: Tell how each step ended (its success detection).
    """

    done = "done"

    def __init__(self, *, scene: bool = False, feedback: bool = False) -> None:
        self.scene, self.feedback = scene, feedback

    def next_step(self, context: PlanContext) -> str:
        """``<next> INSTRUCTION | SCENE | STEP ; STEP =>``"""
        scene = scene_text(context.scene) if self.scene and context.scene is not None else ""
        return next_prompt(context.instruction, scene, self._steps(context))

    def option(self, text: str) -> str:
        """The step and the end of the text."""
        return f" {text} {END}"

    def _steps(self, context: PlanContext) -> list[str]:
        past = [text for text, _ in context.past]
        return past + [record_text(record, self.feedback) for record in context.records]


class DialoguePrompt:
    """SayCan's dialogue for large models: worked examples, then the request (Ahn et al. 2022, arXiv 2204.01691).

    Args:
        examples: Pairs of a request and its steps.
        scene: Tell what holds in the scene.
        feedback: Tell how each step ended.
        rejections: Tell what was refused since the last step, and why.
    """

    done = "done"

    def __init__(
        self,
        *,
        examples: tuple[tuple[str, tuple[str, ...]], ...] = (),
        scene: bool = False,
        feedback: bool = False,
        rejections: bool = False,
    ) -> None:
        self.examples = tuple((str(request), tuple(steps)) for request, steps in examples)
        self.scene, self.feedback, self.rejections = scene, feedback, rejections

    def next_step(self, context: PlanContext) -> str:
        """Up to the number of the next step."""
        parts = []
        for request, steps in self.examples:
            written = ", ".join(f"{k}. {text}" for k, text in enumerate((*steps, self.done), start=1))
            parts.append(f"Human: {_quoted(request)}\nRobot: I would: {written}.\n")
        parts.append(f"Human: {_quoted(context.instruction)}\n")
        if self.scene and context.scene is not None:
            parts.append(f"Scene: {scene_text(context.scene)}\n")
        for rejection in context.rejections if self.rejections else ():
            why = "; ".join(violation.text for violation in rejection.violations)
            parts.append(f"Not possible now: {describe(rejection.subgoal)}: {why}\n")
        done = [record_text(record, self.feedback) for record in context.records]
        said = "".join(f" {k}. {text}," for k, text in enumerate(done, start=1))
        parts.append(f"Robot: I would:{said} {len(done) + 1}.")
        return "".join(parts)

    def option(self, text: str) -> str:
        """The step with the line end that ends it."""
        return f" {text}\n"


def parse_prompt(instruction: str) -> str:
    """Up to where the meaning of an instruction is to be written."""
    return f"{PARSE} {instruction} {ANSWER}"


def next_prompt(instruction: str, scene: str, steps: list[str]) -> str:
    """Up to where the next step is to be written."""
    return f"{NEXT} {instruction} | {scene} | {' ; '.join(steps)} {ANSWER}"


def record_text(record: StepRecord, feedback: bool) -> str:
    """A step, and how it ended."""
    text = describe(record.subgoal)
    if not feedback or not isinstance(record.subgoal, LanguageSubgoal):
        return text
    return f"{text} {'ok' if record.outcome is Outcome.SUCCESS else 'failed'}"


def _quoted(text: str) -> str:
    """A text of a person as data: no line of it may look like a part of the dialogue."""
    return " ".join(text.split())
