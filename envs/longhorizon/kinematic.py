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
from ...sim.scene import Item
from ...sim.scene import Scene as Table
from ...sim.simulation import DOWN, Simulation
from ...sim.world import DRAWER_TRAVEL
from ...spec import EmbodimentSpec
from ...symbols import Literal, SkillCall, Thing
from ..tasks.base import make_item, place_apart
from ..tasks.drawer import WOOD
from .families import Errand
from .symbolic import SymbolicTable, symbolic_spec

REST = np.array([0.26, 0.0, 0.30])
"""Where the tool waits [m]: the camera sees the table then."""
OVER = 0.14
"""Height of the tool for moving above things [m]."""
BOWL, ZONE = 0.050, 0.045
"""Radii of bowls and zones [m]: a little smaller than for single tasks, there are more of them."""
FROM_DRAWER = 0.25
"""Distance of things from the cabinet's middle [m]."""


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
        self._spots: dict[str, tuple[float, float]] = {}

    def begin(self, errand: Errand, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """An episode of given work, on a table that is laid anew."""
        super().begin(errand, seed)
        self._lay(np.random.default_rng([seed, 0x1A7]))
        return self._observe(), self._info(invalid=False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Try one skill, and show it."""
        before, number = self._places(), int(np.asarray(action).reshape(-1)[0])
        was_open = self._drawer_open()
        _, reward, terminated, truncated, info = super().step(action)
        if number >= 0 and not info["invalid"]:
            self._move_through(self.calls[number], before, was_open)
        self._set(self._places(), DRAWER_TRAVEL * self._drawer_open())
        self._picture()
        return self._observe(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The front camera, for people: uint8 (size, size, 3)."""
        return self.sim.picture(self.embodiment.cameras[0], self.render_size)

    # -- the table -----------------------------------------------------------------------------------------------------

    def _lay(self, rng: np.random.Generator) -> None:
        things = [t for t in self._errand().scene.things if t.kind != "table"]
        items = self._placed(rng, things)
        self._spots = {item.name: (item.x, item.y) for item in items}
        self.sim.load(self.randomization.apply(Table(items=items), rng), REST)
        self._tool, self._opening, self.frames = REST.copy(), 1.0, []
        self._set(self._places(), DRAWER_TRAVEL * self._drawer_open())
        self._picture()

    @staticmethod
    def _placed(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[Item, ...]:
        """Spots for all things; those that stand on or in others keep theirs for when they are put down."""
        cabinet = None
        if any(t.kind == "drawer" for t in things):
            x, y, yaw = (float(rng.uniform(*limits)) for limits in ((0.32, 0.40), (0.21, 0.24), (-0.1, 0.1)))
            cabinet = Item(name="drawer", kind="drawer", rgb=WOOD, x=x, y=y, size=1.0, yaw=yaw)
        wanted = [_sized(make_item(t.color, t.kind)) for t in things if t.kind != "drawer"]
        crowded = 0
        for attempt in range(400):
            try:
                placed = place_apart(rng, wanted, gap=max(0.004, 0.02 - 0.004 * crowded - 0.0001 * attempt))
            except ConfigError:
                crowded += 1
                if crowded > 4:
                    break
                continue
            if cabinet is None:
                return placed
            if all(np.hypot(p.x - cabinet.x, p.y - cabinet.y) > FROM_DRAWER - 0.0002 * attempt for p in placed):
                return (cabinet, *placed)
        raise ConfigError(f"no room on the table for {[t.name for t in things]}")

    def _places(self) -> dict[str, str]:
        return {f.args[0]: f.args[1] for f in sorted(self.facts) if f.pred in ("on", "in")}

    def _drawer_open(self) -> bool:
        return Literal("open", ("drawer",)) in self.facts

    def _position(self, name: str, places: dict[str, str], opening: float) -> np.ndarray:
        """Where a thing's middle is (3,) [m]."""
        item = self._item(name)
        place = places[name]
        if place == "table":
            return np.array([*self._spots[name], item.height])
        kind = self.errand_kind(place)
        alike = [n for n, p in places.items() if p == place]
        rank = alike.index(name)
        if kind == "cube":
            below = self._position(place, places, opening)
            return below + np.array([0.0, 0.0, self._item(place).height + item.height])
        if kind == "drawer":
            drawer = self._item("drawer")
            across, along = 0.032 * (rank % 3 - 1) if len(alike) > 1 else 0.0, -0.004 - opening + 0.04 * (rank // 3)
            c, s = np.cos(drawer.yaw), np.sin(drawer.yaw)
            return np.array([drawer.x + c * across - s * along, drawer.y + s * across + c * along, 0.011 + item.height])
        x, y = self._spots[place]
        if kind == "zone":
            return np.array([x, y, item.height])
        angle, radius = 2.4 * rank, 0.0 if len(alike) == 1 else 0.021
        return np.array(
            [x + radius * np.cos(angle), y + radius * np.sin(angle), 0.008 + item.height + 0.02 * (rank // 4)]
        )

    def errand_kind(self, name: str) -> str:
        """Kind of a thing of the work at hand."""
        return self._errand().scene.names[name].kind

    def _item(self, name: str) -> Item:
        return next(item for item in self.sim.scene.items if item.name == name)

    def _set(self, places: dict[str, str], opening: float, held: str = "", at: np.ndarray | None = None) -> None:
        """Put everything where it belongs, a held thing at `at`, and the arm where the tool is."""
        data, robot = self.sim.data, self.embodiment.robot
        for name in places:
            spot = at if name == held and at is not None else self._position(name, places, opening)
            yaw = self._item(name).yaw
            data.joint(name).qpos[:] = [*spot, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        if "drawer" in self._spots:
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
        start, goal = self._position(name, before, opening), self._position(name, after, opening)
        above = np.array([start[0], start[1], OVER])
        self._opening = 1.0
        self._travel([above, start], before, opening)
        self._opening = min(1.0, self._item(name).size / self.embodiment.robot.gripper_stroke)
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
        yaw = self._item("drawer").yaw
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

    def _observe(self) -> dict[str, Any]:
        found = super()._observe()
        return {**found, **self.sim.images()} if self.images and self._spots else found


def _sized(item: Item) -> Item:
    return replace(item, size={"bowl": BOWL, "zone": ZONE}.get(item.kind, item.size))


def _shown(spec: EmbodimentSpec, embodiment: SimEmbodiment) -> EmbodimentSpec:
    """The symbolic robot with the cameras of a real one."""
    return replace(spec, cameras=embodiment.spec.cameras)
