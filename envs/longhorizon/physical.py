"""Long-horizon work with physics: the robot's own actions, and facts that are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ...errors import ConfigError
from ...sim.embodiment import SimEmbodiment, checked_details
from ...sim.randomize import DomainRandomization
from ...sim.scene import OBJECT_KINDS
from ...sim.scene import Scene as Table
from ...sim.simulation import DOWN, Simulation
from ...sim.world import DRAWER_TRAVEL
from ...spec import EmbodimentSpec, detail_feature
from ...symbols import Facts, Literal, Scene, SkillCall, SkillLibrary
from ..tabletop import CHARSET
from ..tasks.base import OFF_TABLE, fallen
from .chains import draw_chain, task_of
from .domain import tabletop_skills, universe
from .experts import expert
from .families import Errand, sample, told
from .layout import Layout
from .measure import drawer_open, has_drawer, measured
from .skills import BOWL, LEAST, MOST, SkillTask
from .symbolic import MAX_INSTRUCTION, check_families, checked_split

START = np.array([0.24, 0.0, 0.25])
"""Where the tool begins [m]: high and back, so that the cameras see the table."""
SETTLING = 5
"""Control steps in which things come to rest before an episode begins."""
TRIES = 200
"""Pieces of work drawn before none is said to fit."""


class PhysicalTable(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Long-horizon work as a robot does it.

    Observations: ``state``, one image a camera, and ``instruction``. Actions: the robot's, as in the embodiment's spec.
    An episode never ends by success: whoever acts must know when to stop. It terminates when something falls off the
    table, and is truncated after `max_steps`. ``info`` has ``success`` (the goal holds now), ``ever`` (it has held),
    ``goal_share`` (of its literals that hold, 0..1), ``failure`` (why it is lost), ``task`` and, on reset, ``split``.

    Args:
        embodiment: Robot and cameras.
        randomization: How much looks vary.
        families: Kinds of work; all when empty.
        only: What says whether a drawn piece of work will do, for example one of so many skills; all when None.
        kinds: Movable things that may be on the table.
        split: Wordings: ``train`` or ``paraphrase``; ``reset(options={"split": ...})`` overrides it.
        disturbance: Probability that somebody interferes once, in the first `max_steps` / 4 steps.
        gap: Between things where there is room [m].
        max_steps: Of an episode.
        images: Render the cameras for observations.
        details: Cameras that are also seen in detail, as ``NAME_detail``, and the size of these pictures [px]; for
            eyes that need more than the policy sees.
        render_size: Of pictures for people [px].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's convention)

    def __init__(
        self,
        *,
        embodiment: SimEmbodiment,
        randomization: DomainRandomization | None = None,
        families: tuple[str, ...] = (),
        only: Callable[[SkillLibrary, Errand], bool] | None = None,
        kinds: tuple[str, ...] = ("cube", "cylinder"),
        split: str = "train",
        disturbance: float = 0.0,
        gap: float = 0.03,
        max_steps: int = 500,
        images: bool = True,
        details: Mapping[str, int] | None = None,
        render_size: int = 320,
    ) -> None:
        check_families(families)
        if not 0.0 <= disturbance <= 1.0:
            raise ConfigError(f"expected disturbance from 0 to 1, got {disturbance}")
        self.embodiment, self.randomization = embodiment, randomization or DomainRandomization()
        self.families, self.only, self.kinds = tuple(families), only, tuple(kinds)
        self.split, self.disturbance, self.gap = checked_split(split), disturbance, gap
        self.max_steps, self.images, self.render_size, self.render_mode = max_steps, images, render_size, "rgb_array"
        self.details = checked_details(details, embodiment.cameras)
        self.library = tabletop_skills()
        self.universe = universe()
        self.calls = self.library.calls(self.universe)
        self.instructions = tuple(call.instruction for call in self.calls)
        self.sim = Simulation(embodiment)
        spec = embodiment.spec
        self.spec_embodiment: EmbodimentSpec = spec
        low, high = (np.asarray(limit, np.float32) for limit in (spec.action.low, spec.action.high))
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        parts: dict[str, spaces.Space[Any]] = {
            "state": spaces.Box(-np.inf, np.inf, spec.state.shape, np.float32),
            "instruction": spaces.Text(MAX_INSTRUCTION, min_length=0, charset=CHARSET),
        }
        if images:
            seen = (*spec.cameras, *(detail_feature(name, size) for name, size in self.details.items()))
            parts |= {c.name: spaces.Box(0, 255, c.shape, np.uint8) for c in seen}
        self.observation_space = spaces.Dict(parts)
        self.errand: Errand | None = None
        self.layout = Layout(items=())
        self.facts: Facts = frozenset()
        self.steps, self.ever, self.disturbed = 0, False, False

    @property
    def scene(self) -> Scene:
        """The truth."""
        return Scene(things=self._errand().scene.things, facts=self.facts, stamp=self.sim.time)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a piece of work for which there is room on the table.

        Raises:
            ConfigError: None of many drawn ones fits `only`, `kinds` and the table.
        """
        super().reset(seed=seed)
        split = checked_split((options or {}).get("split", self.split))
        for _ in range(TRIES):
            errand = sample(self.np_random, families=self.families, held_out=split == "paraphrase")
            drawn = int(self.np_random.integers(2**63))
            if not self._fits(errand):
                continue
            try:
                observation, info = self.begin(errand, drawn)
            except ConfigError:  # no room for all this
                continue
            if not info["success"] and set(errand.scene.facts) == set(self.facts):
                return observation, {**info, "split": split}
        raise ConfigError(f"none of {TRIES} drawn pieces of work of {list(self.families) or 'all families'} fits")

    def ask(
        self, instruction: str, names: Sequence[str] = (), *, drawer_open: bool = False, seed: int = 0
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """An episode of what somebody asks for, with the things named on the table; ``success`` is for them to say."""
        return self.begin(told(instruction, names, drawer_open=drawer_open), seed)

    def begin(self, errand: Errand, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """An episode of given work; the table and what befalls it come from the seed.

        Raises:
            ConfigError: There is no room for all things.
        """
        rng = np.random.default_rng([seed, 0x9B7])
        self.errand = errand
        self.layout = Layout.draw(rng, errand.scene.things, gap=self.gap, least=LEAST, bowl=BOWL, lane=True)
        places = {f.args[0]: f.args[1] for f in sorted(errand.scene.facts) if f.pred in ("on", "in")}
        is_open = Literal("open", ("drawer",)) in errand.scene.facts
        items = self.layout.placed(places, DRAWER_TRAVEL * is_open)
        self.sim.load(self.randomization.apply(Table(items=items), rng), START)
        if has_drawer(self.sim):
            self.sim.data.joint("drawer").qpos[0] = DRAWER_TRAVEL * is_open
            self.sim.settle()
        still = self.sim.driver.encode(START, DOWN, 1.0)
        for _ in range(SETTLING):
            self.sim.step(still)
        self.facts = measured(self.sim, is_open)
        self.steps, self.ever, self.disturbed = 0, False, False
        self._disturb_at = (
            int(rng.integers(20, max(21, self.max_steps // 4))) if rng.random() < self.disturbance else -1
        )
        self._luck = rng
        return self.observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Apply one action for one control period."""
        self._errand()
        self.sim.step(np.asarray(action, np.float32))
        self.steps += 1
        if self.steps == self._disturb_at:
            self._interfere()
        self.facts = measured(self.sim, self._drawer_open())
        info = self._info()
        self.ever = info["ever"]
        return self.observe(), float(info["success"]), bool(info["failure"]), self.steps >= self.max_steps, info

    def expert_action(self, call: SkillCall) -> np.ndarray:
        """What the scripted expert of a skill would do now: an action (a,)."""
        position, gripper = expert(self.sim, call, SkillTask.done(self.sim, call))
        return self.sim.driver.encode(position, DOWN, gripper)

    def chain(self, seed: int, length: int = 5) -> list[SkillCall]:
        """Begin an episode of tasks in a row, each possible after those before it; `say` tells one."""
        self.reset(seed=seed)
        return draw_chain(np.random.default_rng([seed, 0xCA17]), self.library, self.scene, length)

    def say(self, call: SkillCall) -> None:
        """Ask for a task of a chain: it is the instruction, and ``success`` from now on."""
        self.errand, self.ever = task_of(self._errand(), call), False

    def render(self) -> np.ndarray:
        """The front camera, for people: uint8 (size, size, 3)."""
        return self.sim.picture(self.embodiment.cameras[0], self.render_size)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _fits(self, errand: Errand) -> bool:
        things = errand.scene.things
        if len(things) > MOST + 1 or any(t.kind in OBJECT_KINDS and t.kind not in self.kinds for t in things):
            return False
        return self.only is None or self.only(self.library, errand)

    def _drawer_open(self) -> bool:
        return drawer_open(self.sim, Literal("open", ("drawer",)) in self.facts)

    def _interfere(self) -> None:
        """Somebody takes a thing out of its place to where there is room for it, or closes or opens the drawer."""
        free = [
            f.args[0]
            for f in sorted(self.facts)
            if f.pred in ("on", "in")
            and f.args[1] != "table"
            and Literal("clear", (f.args[0],)) in self.facts
            and Literal("hidden", (f.args[0],)) not in self.facts
        ]
        options = [*free, *(["drawer"] if has_drawer(self.sim) else [])]
        if not options:
            return
        chosen = options[int(self._luck.integers(len(options)))]
        self.disturbed = True
        if chosen == "drawer":
            self.sim.data.joint("drawer").qpos[0] = 0.0 if self._drawer_open() else DRAWER_TRAVEL
        else:
            item = self.layout.item(chosen)
            self.sim.data.joint(chosen).qpos[:] = [item.x, item.y, item.height, 1.0, 0.0, 0.0, 0.0]
            self.sim.data.joint(chosen).qvel[:] = 0.0
        self.sim.settle()

    def _info(self) -> dict[str, Any]:
        errand, scene = self._errand(), self.scene
        left = [(len(scene.unmet(goal)), len(goal)) for goal in errand.goals]
        success = any(unmet == 0 for unmet, _ in left)
        share = max((1.0 - unmet / count for unmet, count in left), default=0.0)
        lost = any(fallen(self.sim, item.name) for item in self.sim.scene.items if item.kind in OBJECT_KINDS)
        found = {"success": success, "ever": self.ever or success, "goal_share": share, "invalid": False}
        return {**found, "failure": OFF_TABLE if lost else "", "task": errand.family}

    def observe(self) -> dict[str, Any]:
        """What is seen now."""
        images = {**self.sim.images(), **self.sim.details(self.details)} if self.images else {}
        return {"state": self.sim.state, "instruction": self._errand().instruction, **images}

    def _errand(self) -> Errand:
        if self.errand is None:
            raise ConfigError("step() before reset(); call env.reset(seed=...) first")
        return self.errand
