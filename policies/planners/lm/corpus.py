"""What the tiny language model learns from: instructions with their meanings, and plans step by step with mishaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from ....console import progress
from ....symbols import Scene, SkillCall
from ..base import scene_text
from ..goals import goals_of
from ..search import search
from .prompts import next_prompt, parse_prompt

DETOUR = 0.1
"""Share of steps at which something possible is done instead of the best: plans must also be learned from there."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A prompt and its answer; `kind` is ``parse`` or ``next``."""

    kind: str
    prompt: str
    answer: str


def lessons(
    make_env: Callable[[], gymnasium.Env[Any, Any]], *, parses: int, episodes: int, seed: int = 0
) -> Iterator[Lesson]:
    """Lessons of a symbolic environment, in training wordings only.

    The answer to "what next" is the first skill of a shortest plan from where things really are, so that the model sees
    how to go on after failures (labels as in DAgger; Ross et al. 2011).

    Args:
        make_env: Makes the environment; it has `errand`, `scene`, `library` and `calls`.
        parses: Instructions with their meanings.
        episodes: Pieces of work that are done step by step.
        seed: First seed; evaluations use seeds from a million on.
    """
    env: Any = make_env().unwrapped
    for number in range(parses):
        env.reset(seed=seed + number)
        yield Lesson(kind="parse", prompt=parse_prompt(env.errand.instruction), answer=env.errand.meaning)
    numbers = {call.key: number for number, call in enumerate(env.calls)}
    with progress("planning episodes to learn from", total=episodes, unit="episodes") as bar:
        for number in range(episodes):
            yield from _episode(env, seed + number, numbers)
            bar.update(1)


def _episode(env: Any, seed: int, numbers: dict[str, int]) -> Iterator[Lesson]:
    env.reset(seed=seed, options={"split": "train"})
    errand, rng = env.errand, np.random.default_rng([seed, 0x1E55])
    goals = goals_of(errand.meaning, env.scene, errand.past)
    scene_told, feedback = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    steps = [text for text, _ in errand.past]
    plan: list[SkillCall] = []
    expected = None
    while True:
        scene: Scene = env.scene
        if scene.facts != expected or not plan:  # something went otherwise than planned
            found = search(env.library, scene, goals)
            plan = list(found.calls or ())
        answer = plan[0].instruction if plan else "done"
        prompt = next_prompt(errand.instruction, scene_text(scene) if scene_told else "", steps)
        yield Lesson(kind="next", prompt=prompt, answer=answer)
        if not plan:
            return
        call = plan.pop(0)
        if rng.random() < DETOUR:
            possible = [c for c in env.library.calls(scene.things) if c.applicable(scene.facts)]
            call, plan = possible[int(rng.integers(len(possible)))], []
        expected = call.apply(scene.facts)
        _, _, _, truncated, _ = env.step(np.array([numbers[call.key]], np.float32))
        if truncated:
            return
        ok = not env.scene.unmet(call.success)
        steps.append(f"{call.instruction} {'ok' if ok else 'failed'}" if feedback else call.instruction)
