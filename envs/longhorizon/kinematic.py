"""Long-horizon work with pictures: skills succeed or fail as among facts, the arm and the things are moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from ...errors import ConfigError
from ...sim.embodiment import SimEmbodiment
from ...sim.kinematics import ArmKinematics
from ...sim.randomize import DomainRandomization
from ...sim.scene import Scene as Table
from ...sim.simulation import DOWN, Simulation
from ...sim.world import DRAWER_TRAVEL
from ...spec import EmbodimentSpec
from ...symbols import Literal, SkillCall
from .families import Errand
from .layout import Layout
from .symbolic import SymbolicTable, symbolic_spec

REST = np.array([0.26, 0.0, 0.30])
"""Where the tool waits [m]: the camera sees the table then."""
OVER = 0.14
"""Height of the tool for moving above things [m]."""


class KinematicTable(SymbolicTable):
    """The symbolic table, shown.

    Actions, luck and ``info`` are those of `SymbolicTable` with the same seed; observations also hold one image a
    camera. While a skill runs the arm is moved by inverse kinematics and the thing between its fingers along with it;
    nothing is simulated. With `record` on, pictures of the motion are kept in `frames`.

    Args:
        embodiment: Robot and cameras.
        randomization: How much looks vary.
        families, split, failure, drop, disturbance, max_steps: As of `SymbolicTable`.
        images: Render the cameras for observations.
        record: Keep pictures of the motion.
        moves: Pictures of each part of a motion.
        render_size: Of these pictures [px].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 (Gymnasium's convention)

    def __init__(
        self,
        *,
        embodiment: SimEmbodiment,
        randomization: DomainRandomization | None = None,
        families: tuple[str, ...] = (),
        split: str = "train",
        failure: float = 0.2,
        drop: float = 0.3,
        disturbance: float = 0.0,
        max_steps: int = 40,
        images: bool = True,
        record: bool = False,
        moves: int = 5,
        render_size: int = 320,
    ) -> None:
        super().__init__(
            families=families,
            split=split,
            failure=failure,
            drop=drop,
            disturbance=disturbance,
            max_steps=max_steps,
        )
        if moves < 1:
            raise ConfigError(f"expected at least one picture of each part of a motion, got moves={moves}")
        self.embodiment, self.images, self.record = embodiment, images, record
        self.randomization = randomization or DomainRandomization()
        self.moves, self.render_size, self.render_mode = moves, render_size, "rgb_array"
        self.sim, self._kinematics = Simulation(embodiment), ArmKinematics(embodiment.robot, iterations=40)
        self.spec_embodiment = _shown(symbolic_spec(), embodiment)
        if images:
            cameras = {c.name: spaces.Box(0, 255, c.shape, np.uint8) for c in self.spec_embodiment.cameras}
            known: Any = self.observation_space
            self.observation_space = spaces.Dict({**known.spaces, **cameras})
        self.frames: list[np.ndarray] = []
        self._tool, self._opening = REST.copy(), 1.0
        self.layout = Layout(items=())

    def begin(self, errand: Errand, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """An episode of given work, on a table that is laid anew."""
        super().begin(errand, seed)
        self._lay(np.random.default_rng([seed, 0x1A7]))
        return self.observe(), self._info(invalid=False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Try one skill, and show it."""
        before, number = self._places(), int(np.asarray(action).reshape(-1)[0])
        was_open = self._drawer_open()
        _, reward, terminated, truncated, info = super().step(action)
        if number >= 0 and not info["invalid"]:
            self._move_through(self.calls[number], before, was_open)
        self._set(self._places(), DRAWER_TRAVEL * self._drawer_open())
        self._picture()
        return self.observe(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The front camera, for people: uint8 (size, size, 3)."""
        return self.sim.picture(self.embodiment.cameras[0], self.render_size)

    # -- the table -----------------------------------------------------------------------------------------------------

    def _lay(self, rng: np.random.Generator) -> None:
        things = [t for t in self._errand().scene.things if t.kind != "table"]
        self.layout = Layout.draw(rng, things)
        self.sim.load(self.randomization.apply(Table(items=self.layout.items), rng), REST)
        self._tool, self._opening, self.frames = REST.copy(), 1.0, []
        self._set(self._places(), DRAWER_TRAVEL * self._drawer_open())
        self._picture()

    def _places(self) -> dict[str, str]:
        return {f.args[0]: f.args[1] for f in sorted(self.facts) if f.pred in ("on", "in")}

    def _drawer_open(self) -> bool:
        return Literal("open", ("drawer",)) in self.facts

    def errand_kind(self, name: str) -> str:
        """Kind of a thing of the work at hand."""
        return self._errand().scene.names[name].kind

    def _set(self, places: dict[str, str], opening: float, held: str = "", at: np.ndarray | None = None) -> None:
        """Put everything where it belongs, a held thing at `at`, and the arm where the tool is."""
        data, robot = self.sim.data, self.embodiment.robot
        for name in places:
            spot = at if name == held and at is not None else self.layout.position(name, places, opening)
            yaw = self.layout.item(name).yaw
            data.joint(name).qpos[:] = [*spot, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        if any(item.kind == "drawer" for item in self.layout.items):
            data.joint("drawer").qpos[0] = opening
        joints = np.array([data.joint(j).qpos[0] for j in robot.joints])
        joints = self._kinematics.solve(self._tool, DOWN, joints)
        for joint, angle in zip(robot.joints, joints):
            data.joint(joint).qpos[0] = angle
        for finger in ("finger_left", "finger_right"):
            data.joint(finger).qpos[0] = self._opening * robot.gripper_stroke
        self.sim.settle()

    # -- motion --------------------------------------------------------------------------------------------------------

    def _move_through(self, call: SkillCall, before: dict[str, str], was_open: bool) -> None:
        if not self.record:
            return
        if call.spec.name in ("open", "close"):
            self._slide(before, was_open)
        else:
            self._carry(call.args[0], before)
        self._travel([REST], self._places(), DRAWER_TRAVEL * self._drawer_open())

    def _carry(self, name: str, before: dict[str, str]) -> None:
        """Fetch a thing and bring it to where it is now; one that stays where it was slips out of the fingers."""
        after, opening = self._places(), DRAWER_TRAVEL * self._drawer_open()
        start, goal = self.layout.position(name, before, opening), self.layout.position(name, after, opening)
        above = np.array([start[0], start[1], OVER])
        self._opening = 1.0
        self._travel([above, start], before, opening)
        self._opening = min(1.0, self.layout.item(name).size / self.embodiment.robot.gripper_stroke)
        self._picture_of(before, opening)
        if after[name] == before[name]:
            self._opening = 1.0
            self._travel([above], before, opening)
            return
        over = np.array([goal[0], goal[1], OVER])
        release = goal + np.array([0.0, 0.0, 0.012])
        self._travel([above, over, release], before, opening, held=name)
        self._opening = 1.0
        self._travel([over], after, opening)

    def _slide(self, places: dict[str, str], was_open: bool) -> None:
        """Take the drawer by its handle and bring it to where it is now."""
        begin, end = (DRAWER_TRAVEL * is_open for is_open in (was_open, self._drawer_open()))
        handle = self.sim.position("drawer")
        self._opening = 0.5
        self._travel([np.array([handle[0], handle[1], OVER]), handle], places, begin)
        self._opening = 0.3
        yaw = self.layout.item("drawer").yaw
        outward = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        for share in np.linspace(0.0, 1.0, 2 * self.moves + 1)[1:]:
            now = begin + share * (end - begin)
            self._tool = handle + outward * (now - begin)
            self._picture_of(places, now)
        self._opening = 0.5
        self._travel([np.array([*self._tool[:2], OVER])], places, end)

    def _travel(self, points: Sequence[np.ndarray], places: dict[str, str], opening: float, held: str = "") -> None:
        for point in points:
            start = self._tool.copy()
            for share in np.linspace(0.0, 1.0, self.moves + 1)[1:]:
                self._tool = start + share * (point - start)
                self._picture_of(places, opening, held)

    def _picture_of(self, places: dict[str, str], opening: float, held: str = "") -> None:
        self._set(places, opening, held, self._tool if held else None)
        self._picture()

    def _picture(self) -> None:
        if self.record:
            self.frames.append(self.render())

    def observe(self) -> dict[str, Any]:
        """What is seen now."""
        found = super().observe()
        return {**found, **self.sim.images()} if self.images and self.layout.items else found


def _shown(spec: EmbodimentSpec, embodiment: SimEmbodiment) -> EmbodimentSpec:
    """The symbolic robot with the cameras of a real one."""
    return replace(spec, cameras=embodiment.spec.cameras)
