"""The table as facts alone: a skill a step, which may fail. Milliseconds an episode, for comparing planners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ...errors import ConfigError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ...symbols import Facts, Literal, Scene, SkillCall, Thing
from ..tabletop import CHARSET
from .chains import draw_chain, task_of
from .domain import DRAWER, TABLE, facts_of, place_of, tabletop_skills, universe
from .families import EVERY, Errand, sample, told

WAIT = -1
"""Action that does nothing."""
SPLITS = ("train", "paraphrase")
MAX_INSTRUCTION = 256


def symbolic_spec() -> EmbodimentSpec:
    """A robot that is told the number of a skill call, in the order of the library over the universe."""
    return EmbodimentSpec(
        name="symbolic_table",
        robot="symbolic_table",
        control_hz=0.1,
        cameras=(),
        state=FeatureSpec(name="state", shape=(1,), names=("time",), units=("s",)),
        action=FeatureSpec(name="action", shape=(1,), names=("call",), units=("1",)),
    )


class SymbolicTable(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Long-horizon work as facts.

    Observations: ``state`` (the time [s]) and ``instruction``. Actions: float32 (1,), the number of a skill call, or
    `WAIT` to do nothing. An episode never ends by success: whoever acts must know when to stop; it is truncated after
    `max_steps`. ``info`` has ``success`` (the goal holds now), ``ever`` (it has held), ``goal_share`` (of its literals
    that hold, 0..1), ``invalid`` (the call was impossible), ``task`` and, on reset, ``split``.

    Args:
        families: Kinds of work; all when empty.
        split: Wordings: ``train`` or ``paraphrase``; ``reset(options={"split": ...})`` overrides it.
        failure: Probability that a possible skill fails.
        drop: Share of failures that leave the thing on the table; the others change nothing.
        disturbance: Probability that somebody interferes once, at a step drawn from the first six.
        max_steps: Of an episode.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's convention)

    def __init__(
        self,
        *,
        families: tuple[str, ...] = (),
        split: str = "train",
        failure: float = 0.2,
        drop: float = 0.3,
        disturbance: float = 0.0,
        max_steps: int = 40,
    ) -> None:
        check_families(families)
        for name, share in (("failure", failure), ("drop", drop), ("disturbance", disturbance)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"expected {name} from 0 to 1, got {share}")
        self.families, self.split = tuple(families), checked_split(split)
        self.failure, self.drop, self.disturbance, self.max_steps = failure, drop, disturbance, max_steps
        self.library = tabletop_skills()
        self.universe = universe()
        self.calls = self.library.calls(self.universe)
        self.spec_embodiment = symbolic_spec()
        self.action_space = spaces.Box(WAIT, len(self.calls) - 1, (1,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "state": spaces.Box(0.0, np.inf, (1,), np.float32),
                "instruction": spaces.Text(MAX_INSTRUCTION, min_length=0, charset=CHARSET),
            }
        )
        self.errand: Errand | None = None
        self.facts: Facts = frozenset()
        self.steps, self.ever, self.disturbed = 0, False, False

    @property
    def instructions(self) -> tuple[str, ...]:
        """What each action is called."""
        return tuple(call.instruction for call in self.calls)

    @property
    def scene(self) -> Scene:
        """The truth."""
        return Scene(things=self._errand().scene.things, facts=self.facts, stamp=self._time())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a piece of work."""
        super().reset(seed=seed)
        split = checked_split((options or {}).get("split", self.split))
        self.begin(
            sample(self.np_random, families=self.families, held_out=split == "paraphrase"),
            int(self.np_random.integers(2**63)),
        )
        return self.observe(), {**self._info(invalid=False), "split": split}

    def ask(
        self, instruction: str, names: Sequence[str] = (), *, drawer_open: bool = False, seed: int = 0
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """An episode of what somebody asks for, with the things named on the table; ``success`` is for them to say."""
        return self.begin(told(instruction, names, drawer_open=drawer_open), seed)

    def begin(self, errand: Errand, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """An episode of given work; what befalls it comes from the seed."""
        rng = np.random.default_rng(seed)
        self.errand, self.facts = errand, errand.scene.facts
        self.steps, self.ever, self.disturbed = 0, False, False
        # Drawn here, so that what befalls an episode depends neither on what is done in it nor on the probabilities.
        draw, step = rng.random(), int(rng.integers(1, 7))
        self._disturb_at = step if draw < self.disturbance else -1
        self._luck = rng
        return self.observe(), self._info(invalid=False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Try one skill."""
        self._errand()
        number = int(np.asarray(action).reshape(-1)[0])
        if not WAIT <= number < len(self.calls):
            raise ConfigError(f"expected the number of a skill call from {WAIT} to {len(self.calls) - 1}, got {number}")
        self.steps += 1
        draws = self._luck.random(3)  # the same number each step: the same luck befalls whatever is tried
        invalid = False
        if number != WAIT:
            call = self.calls[number]
            known = self.scene.names
            invalid = any(arg not in known for arg in call.args) or not call.applicable(self.facts)
            if not invalid and draws[0] >= self.failure:
                self.facts = call.apply(self.facts)
            elif not invalid and draws[1] < self.drop and call.spec.params[0].name == "x":
                self._move(call.args[0], "table")
        if self.steps == self._disturb_at:
            self._interfere(float(draws[2]))
        info = self._info(invalid=invalid)
        self.ever = info["ever"]
        return self.observe(), float(info["success"]), False, self.steps >= self.max_steps, info

    def chain(self, seed: int, length: int = 5) -> list[SkillCall]:
        """Begin an episode of tasks in a row, each possible after those before it; `say` tells one."""
        self.reset(seed=seed)
        return draw_chain(np.random.default_rng([seed, 0xCA17]), self.library, self.scene, length)

    def say(self, call: SkillCall) -> None:
        """Ask for a task of a chain: it is the instruction, and ``success`` from now on."""
        self.errand, self.ever = task_of(self._errand(), call), False

    def _interfere(self, draw: float) -> None:
        """Somebody takes a thing out of its place, or closes or opens the drawer."""
        scene = self.scene
        moved = sorted(t.name for t in scene.things if self._free(t) and place_of(scene, t.name) != "table")
        options = [*moved, *(["drawer"] if "drawer" in scene.names else [])]
        if not options:
            return
        chosen = options[int(draw * len(options))]
        self.disturbed = True
        if chosen == "drawer":
            wanted = "close" if Literal("open", ("drawer",)) in self.facts else "open"
            self.facts = self.library.call(wanted, "drawer").apply(self.facts)
        else:
            self._move(chosen, "table")

    def _free(self, thing: Thing) -> bool:
        facts = self.facts
        movable = thing.kind not in ("bowl", "zone", DRAWER.kind, TABLE.kind)
        hidden = Literal("hidden", (thing.name,)) in facts
        return movable and not hidden and Literal("clear", (thing.name,)) in facts

    def _move(self, name: str, place: str) -> None:
        scene = self.scene
        names = [f.args[0] for f in scene.facts if f.pred in ("on", "in")]
        places = {n: place_of(scene, n) for n in names} | {name: place}
        self.facts = facts_of(places, scene.things, Literal("open", ("drawer",)) in self.facts)

    def _info(self, invalid: bool) -> dict[str, Any]:
        errand, scene = self._errand(), self.scene
        left = [(len(scene.unmet(goal)), len(goal)) for goal in errand.goals]
        success = any(unmet == 0 for unmet, _ in left)
        share = max((1.0 - unmet / count for unmet, count in left), default=0.0)
        found = {"success": success, "ever": self.ever or success, "goal_share": share, "invalid": invalid}
        return {**found, "task": errand.family}

    def observe(self) -> dict[str, Any]:
        """What is told now."""
        return {"state": np.array([self._time()], np.float32), "instruction": self._errand().instruction}

    def _time(self) -> float:
        return self.steps / self.spec_embodiment.control_hz

    def _errand(self) -> Errand:
        if self.errand is None:
            raise ConfigError("step() before reset(); call env.reset(seed=...) first")
        return self.errand


def check_families(families: Sequence[str]) -> None:
    """Raise ConfigError where one is unknown."""
    for family in families:
        if family not in EVERY:
            raise ConfigError(f"no family {family!r} of work. {did_you_mean(family, EVERY)}")


def checked_split(split: str) -> str:
    """A kind of wording; ConfigError where there is none of that name."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}. {did_you_mean(str(split), SPLITS)}")
    return split
