"""Conversations with a language model on file: recorded once, played back without the model.

JSON lines: the first says whose they are (`name`, `capabilities`), each other is a question with its answer. For tests
of prompts for models that cannot run where the tests do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import ConfigError, NotFoundError
from .base import Choices, Completion, LanguageModel, Scored, Usage, require


class RecordingLM:
    """A language model whose questions and answers are added to a file; a new file unless it is this model's.

    Args:
        lm: The model that answers.
        path: The file.

    Raises:
        ConfigError: The file holds what another model said.
    """

    def __init__(self, lm: LanguageModel, path: str | Path) -> None:
        self.lm, self.path = lm, Path(path).expanduser()
        self.name, self.capabilities, self.usage = lm.name, lm.capabilities, lm.usage
        head = {"name": lm.name, "capabilities": sorted(lm.capabilities)}
        if self.path.exists() and self.path.stat().st_size:
            owner = _read(self.path)[0]
            if owner != head:
                raise ConfigError(f"expected a new file or one of {lm.name}, got {self.path} of {owner.get('name')}")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._add(head)

    def score(self, prompt: str, continuations: Sequence[str], *, images: Sequence[np.ndarray] = ()) -> list[Scored]:
        """Ask the model, and note it."""
        found = self.lm.score(prompt, continuations, **({"images": images} if images else {}))
        question = _question("score", prompt, {"continuations": list(continuations)}, images)
        self._add({**question, "answer": [asdict(scored) for scored in found]})
        return found

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
        """Ask the model, and note it."""
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        seen: dict[str, Any] = {"images": images} if images else {}
        found = self.lm.generate(prompt, choices=choices, json_schema=json_schema, **options, **seen)
        options |= {"choices": None if choices is None else asdict(choices), "json_schema": json_schema}
        self._add({**_question("generate", prompt, options, images), "answer": asdict(found)})
        return found

    def _add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ReplayLM:
    """A language model that gives recorded answers, and no others.

    A question that was asked several times gets its answers in their order, then the last again. Exact scores of
    continuations are found one by one, for they do not depend on each other: a planner may ask for fewer of them.

    Args:
        path: File of a `RecordingLM`.

    Raises:
        NotFoundError: No such file.
        ConfigError: No such transcript.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise NotFoundError(f"no transcript at {path}. Record one with RecordingLM(lm, {str(path)!r})")
        head, *lines = _read(self.path)
        self.name, self.capabilities = str(head["name"]), frozenset(head["capabilities"])
        self.usage = Usage()
        self._prompts: dict[str, list[str]] = {"score": [], "generate": []}
        self._answers: dict[str, list[Any]] = {}
        self._given: dict[str, int] = {}
        for line in lines:
            if line.get("kind") not in self._prompts or "answer" not in line:
                raise ConfigError(f"expected questions and answers in {self.path}, got {json.dumps(line)[:100]}")
            self._prompts[line["kind"]].append(line["prompt"])
            self._answers.setdefault(_key(line), []).append(line["answer"])
            if line["kind"] == "score":
                for text, answer in zip(line["continuations"], line["answer"]):
                    if answer["estimator"] == "exact":
                        one = {**line, "continuations": text}
                        self._answers.setdefault(_key(one), []).append(answer)

    def score(self, prompt: str, continuations: Sequence[str], *, images: Sequence[np.ndarray] = ()) -> list[Scored]:
        """What was recorded.

        Raises:
            NotFoundError: Nothing was.
        """
        require(self, "score")
        question = _question("score", prompt, {"continuations": list(continuations)}, images)
        answer = self._answer(question)
        if answer is None:
            parts = [self._answer({**question, "continuations": text}) for text in continuations]
            missing = [text for text, part in zip(continuations, parts) if part is None]
            if missing:
                raise self._unknown(question, f"with continuation {missing[0]!r}")
            answer = parts
        found = [Scored(**part) for part in answer]
        self._note(question, {text: scored.logprob for text, scored in zip(continuations, found)}, 0)
        return found

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
        """What was recorded for the same prompt, with the same options.

        Raises:
            NotFoundError: Nothing was.
        """
        require(self, "generate")
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        options |= {"choices": None if choices is None else asdict(choices), "json_schema": json_schema}
        question = _question("generate", prompt, options, images)
        answer = self._answer(question)
        if answer is None:
            raise self._unknown(question, "with these options")
        found = Completion(**answer)
        self._note(question, found.text, found.tokens)
        return found

    def _answer(self, question: dict[str, Any]) -> Any:
        key = _key(question)
        answers = self._answers.get(key)
        if answers is None:
            return None
        turn = self._given.get(key, 0)
        self._given[key] = turn + 1
        return answers[min(turn, len(answers) - 1)]

    def _unknown(self, question: dict[str, Any], what: str) -> NotFoundError:
        prompt, known = question["prompt"], self._prompts[question["kind"]]
        if prompt in known:
            return NotFoundError(f"{self.path} holds this prompt, but not {what}: {_tail(prompt)}. Record it again")
        near = max(known, key=lambda p: difflib.SequenceMatcher(None, p, prompt).quick_ratio(), default=None)
        if near is None:
            return NotFoundError(f"{self.path} holds no question of kind {question['kind']!r}. Record it again")
        i = next((i for i, (a, b) in enumerate(zip(prompt, near)) if a != b), min(len(prompt), len(near)))
        return NotFoundError(
            f"{self.path} does not hold this question: at letter {i} it says {prompt[i : i + 60]!r}, "
            f"the nearest recorded prompt {near[i : i + 60]!r}. That one ends in {_tail(near)}. Record it again"
        )

    def _note(self, question: dict[str, Any], answer: Any, tokens: int) -> None:
        begin = time.monotonic()
        self.usage.note(question["kind"], question["prompt"], answer, tokens, time.monotonic() - begin)


def _question(kind: str, prompt: str, options: dict[str, Any], images: Sequence[np.ndarray]) -> dict[str, Any]:
    seen = [hashlib.sha256(f"{i.shape}{i.dtype}".encode() + i.tobytes()).hexdigest()[:16] for i in images]
    return {"kind": kind, "prompt": prompt, **options, "images": seen}


def _key(line: dict[str, Any]) -> str:
    """What makes a question: everything but its answer."""
    return json.dumps({name: value for name, value in line.items() if name != "answer"}, sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    """The head and the lines; a last one that was cut off is left out."""
    found: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines) > 1:
                break
            raise ConfigError(f"expected JSON in line {number} of {path}, got {line[:60]!r}") from error
        found.append(value if isinstance(value, dict) else {})
    if not found or not {"name", "capabilities"} <= set(found[0]):
        raise ConfigError(f"expected a transcript of RecordingLM, got {path}, whose first line names no model")
    return found


def _tail(text: str) -> str:
    return repr(text[-80:])
