"""Free scenes: rendered tables with sentences about them and where the things they name are.

No task is done and no demonstration is needed. Scenes teach a model to find what words name ("grounding") before
it learns to act; they are drawn from the same things, words and looks as the tasks, and never name a held-out pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np

from ..datasets.schema import StoreSchema
from ..errors import ConfigError, did_you_mean
from ..sim.embodiment import SimEmbodiment, checked_details
from ..sim.randomize import DomainRandomization
from ..sim.scene import COLORS, FIXED_KINDS, OBJECT_KINDS, Item, Scene
from ..sim.simulation import DOWN, Simulation
from ..spec import FeatureSpec, detail_feature
from .demonstrations import Disturbances, RecordedEpisode, Step
from .language import (
    CLOSE_DRAWER,
    EVERYTHING,
    HELD_OUT_PAIRS,
    NAME,
    OPEN_DRAWER,
    PLACE,
    PUSH,
    PUT_DOWN,
    PUT_IN,
    PUT_ON,
    REACH,
    SPLITS,
    STACK,
    STACK_ON,
    Phrasings,
    may_name,
)
from .longhorizon.measure import places
from .questions import ON_TABLE, Asker, Facts, Question, cover, visible_boxes
from .tabletop import disturbable
from .tasks.base import Episode, Task, grasping, make_item, place_apart, sample_colors, sample_tool

MAX_ITEMS = 8


def objects_feature(cameras: tuple[str, ...]) -> FeatureSpec:
    """Spec of the label: row k is item k of the scene, NaN beyond the last item.

    A row is x, y, z [m] in the base frame, then for each camera u and v (0..1 from the left and top edges) and the
    depth [m].
    """
    return FeatureSpec(name="objects", shape=(MAX_ITEMS, 3 + 3 * len(cameras)), frame="base")


@dataclass(frozen=True, kw_only=True)
class LabelledScene:
    """One still scene.

    Attributes:
        images: Camera name -> uint8 (height, width, 3); those in detail too.
        state: float32 (s,).
        objects: float32 (MAX_ITEMS, 3 + 3 n), as `objects_feature` says.
        pixels: float32 (MAX_ITEMS, n), how many pixels of each camera show each item; NaN beyond the last, and
            everywhere without questions.
        cover: uint8 (n, cells), which item covers each cell of each camera's image, as `cover_feature` says.
        sentences: Each a text and its roles: ``{"text": str, "roles": {"object": k, "goal": k}}``.
        questions: Questions and answers.
        names: Of the items; None for one that the split does not name.
        holders: Name of what each item is in or on, ``table``, ``gripper``, or None where it is on nothing or cannot
            be; empty where nobody has looked.
        drawer: How far the drawer is out [m], or None.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    objects: np.ndarray
    pixels: np.ndarray
    cover: np.ndarray
    sentences: tuple[dict[str, Any], ...]
    questions: tuple[Question, ...]
    names: tuple[str | None, ...]
    holders: tuple[str | None, ...] = ()
    drawer: float | None = None


class TableSampler(Protocol):
    """What draws tables: any task, or `Clutter`."""

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Draw a table."""


def pixels_feature(cameras: tuple[str, ...]) -> FeatureSpec:
    """Spec of the second label: pixels that show each item, a column a camera, NaN beyond the last item."""
    return FeatureSpec(name="pixels", shape=(MAX_ITEMS, len(cameras)))


NAMES = 0.25
"""Share of bare names among the sentences, where questions are asked too."""
MOTION = {"noise": 0.3, "noisy": 0.8, "drop": 0.1, "stumble": 0.5}
"""Disturbances of an expert that is looked at; those of demonstrations."""
PAUSE = 13
"""Steps between two looks at it are fewer than this."""
CELL = 4
"""Edge of a cell of the third label [px]."""


def cover_feature(cameras: tuple[str, ...], image_size: int) -> FeatureSpec:
    """Spec of the third label: which item covers each cell of `CELL` pixels, row by row; 255 for none."""
    return FeatureSpec(name="cover", shape=(len(cameras), (image_size // CELL) ** 2), dtype="uint8")


class SceneSampler:
    """Draws labelled scenes.

    Args:
        tasks: Tasks whose tables are drawn.
        embodiment: Robot and cameras.
        randomization: How much looks vary.
        sentences: Sentences a scene.
        poses: Arm poses a table; each is one scene.
        held: Fraction of poses with an object between the fingers.
        questions: Questions a scene; 0 for none.
        split: Which things and words: one of `language.SPLITS`, or ``all``: training words for every thing. All but
            ``train`` and ``all`` are for evaluation.
        skills: Name what is to be done as the skills of long-horizon work do, and ask what things are in and on.
        details: Cameras that are also recorded in detail, as maps ``NAME_detail``, and the size of these pictures [px].
        moving: Share of tables seen while the expert of the drawn task is at work, disturbed as in demonstrations: the
            hand in motion, things that are carried, dropped and put down. Tables without a task stand still.
    """

    def __init__(
        self,
        *,
        tasks: tuple[TableSampler, ...],
        embodiment: SimEmbodiment,
        randomization: DomainRandomization | None = None,
        sentences: int = 6,
        poses: int = 3,
        held: float = 0.25,
        questions: int = 0,
        split: str = "train",
        skills: bool = False,
        moving: float = 0.0,
        details: Mapping[str, int] | None = None,
    ) -> None:
        if split not in (*SPLITS, EVERYTHING):
            raise ConfigError(f"unknown split {split!r}. {did_you_mean(split, (*SPLITS, EVERYTHING))}")
        if questions and embodiment.image_size % CELL:
            raise ConfigError(f"expected images of a multiple of {CELL} px to ask about, got {embodiment.image_size}")
        self.tasks, self.embodiment = tuple(tasks), embodiment
        self.randomization = randomization or DomainRandomization()
        self.sentences, self.poses, self.held, self.questions, self.split = sentences, poses, held, questions, split
        self.skills, self.moving = skills, moving
        self.sim = Simulation(embodiment)
        self.name = "scenes"
        self.details = checked_details(details, embodiment.cameras)
        maps = tuple(detail_feature(name, size) for name, size in self.details.items())
        self.schema = StoreSchema(embodiment=embodiment.spec, extras=self._labels(), maps=maps)

    def _labels(self) -> tuple[FeatureSpec, ...]:
        """Positions always; what is seen of things, which costs another rendering, where questions are asked."""
        cameras = self.embodiment.cameras
        seen = (pixels_feature(cameras), cover_feature(cameras, self.embodiment.image_size))
        return (objects_feature(cameras), *(seen if self.questions else ()))

    def record(self, seed: int) -> list[RecordedEpisode]:
        """The scenes of one table as episodes of one step each, the action zero, the sentences in ``meta``."""
        action, labels = np.zeros(self.embodiment.spec.action.shape, np.float32), self._labels()
        return [
            RecordedEpisode(
                instruction=scene.sentences[0]["text"],
                tags=("scene",),
                meta={
                    "seed": seed,
                    "task": self.name,
                    "sentences": list(scene.sentences),
                    "names": list(scene.names),
                    **({"holders": list(scene.holders), "drawer": scene.drawer} if self.skills else {}),
                    "questions": [asdict(question) for question in scene.questions],
                },
                steps=[Step(scene.images, scene.state, action, {f.name: getattr(scene, f.name) for f in labels})],
                success=None,
            )
            for scene in self.sample(seed)
        ]

    def sample(self, seed: int) -> list[LabelledScene]:
        """One table in `poses` arm poses, or moments; the same seed gives the same scenes."""
        rng = np.random.default_rng([seed, 0x5CE7E])
        task = self.tasks[int(rng.integers(len(self.tasks)))]
        drawn = task.sample(rng, "pair" if self.split == "pair" else "train")
        scene = self.randomization.apply(drawn.scene, rng)
        way = None
        if self.moving and hasattr(task, "expert") and rng.random() < self.moving:
            way = self._way(cast(Task, task), drawn, scene, rng)
        scenes = []
        for pose in range(self.poses):
            if way is None:
                held = self._pose(scene, rng, drawn.drawer_start if _in_drawer(drawn) else None)
            else:
                next(way)
                held = next((k for k, item in enumerate(scene.items) if self._carried(item)), None)
            names = tuple(item.name for item in scene.items)
            objects = np.full(objects_feature(self.embodiment.cameras).shape, np.nan, np.float32)
            objects[: len(names)] = self.sim.project(names)
            tell = describe_skill if self.skills else describe
            texts = tuple(tell(scene, rng, self.split) for _ in range(self.sentences))
            pixels = np.full(pixels_feature(self.embodiment.cameras).shape, np.nan, np.float32)
            size = self.embodiment.image_size
            covered = np.zeros(cover_feature(self.embodiment.cameras, size).shape, np.uint8)
            asked: list[Question] = []
            if self.questions:
                shown = self.sim.masks()
                masks = {name: visible_boxes(mask, len(names)) for name, mask in shown.items()}
                covered = np.stack([cover(mask, CELL) for mask in shown.values()])
                pixels[: len(names)] = np.stack([found for found, _ in masks.values()], axis=1)
                own = np.random.default_rng([seed, pose, 0xA5C])  # questions have no say in what is drawn next
                texts = tuple(self._bare(scene, own) or text for text in texts)
                asked = Asker(self._facts(scene, objects, masks, held), self.split, own).draw(self.questions)
            scenes.append(
                LabelledScene(
                    images={**self.sim.images(), **self.sim.details(self.details)},
                    state=self.sim.state,
                    objects=objects,
                    pixels=pixels,
                    cover=covered,
                    sentences=texts,
                    questions=tuple(asked),
                    names=tuple(item.name if may_name(item.name, self.split) else None for item in scene.items),
                    **(self._told(scene, held) if self.skills else {}),
                )
            )
        return scenes

    def _bare(self, scene: Scene, rng: np.random.Generator) -> dict[str, Any] | None:
        """Now and then the name of a thing alone."""
        options = [item for item in scene.items if may_name(item.name, self.split)]
        if not options or rng.random() > NAMES:
            return None
        target = options[int(rng.integers(len(options)))]
        return _sentence(scene, self.split, NAME, rng, target, target)

    def _facts(
        self, scene: Scene, objects: np.ndarray, masks: dict[str, tuple[np.ndarray, np.ndarray]], held: int | None
    ) -> Facts:
        count = len(scene.items)
        views = objects[:count, 3:].reshape(count, -1, 3)
        return Facts(
            items=scene.items,
            points={name: views[:, k] for k, name in enumerate(self.embodiment.cameras)},
            pixels={name: found for name, (found, _) in masks.items()},
            boxes={name: boxes for name, (_, boxes) in masks.items()},
            positions=objects[:count, :3],
            tool=self.sim.tool_position,
            held=held,
            drawer=self.sim.drawer_opening if any(i.kind == "drawer" for i in scene.items) else None,
            holders=self._holders(scene, held) if self.skills else None,
        )

    def _told(self, scene: Scene, held: int | None) -> dict[str, Any]:
        found, names = places(self.sim), [item.name for item in scene.items]
        holders = tuple("gripper" if k == held else found.get(name) for k, name in enumerate(names))
        return {"holders": holders, "drawer": self.sim.drawer_opening if "drawer" in names else None}

    def _holders(self, scene: Scene, held: int | None) -> tuple[int | None, ...]:
        names, found = [item.name for item in scene.items], places(self.sim)
        index = {name: k for k, name in enumerate(names)} | {"table": ON_TABLE}
        return tuple(None if k == held or n not in found else index[found[n]] for k, n in enumerate(names))

    def _way(self, task: Task, drawn: Episode, scene: Scene, rng: np.random.Generator) -> Iterator[None]:
        """The expert's way through a drawn episode, moment by moment."""
        sim = self.sim
        sim.load(scene, np.asarray(drawn.tool_start))
        if drawn.drawer_start:
            sim.data.joint("drawer").qpos[0] = drawn.drawer_start
            sim.settle()
        disturbed = Disturbances(disturbable(self.embodiment), rng, **MOTION)
        t = 0
        while True:
            for _ in range(int(rng.integers(1, PAUSE))):
                position, gripper = task.expert(sim, drawn)
                sim.step(disturbed.executed(t, sim.driver.encode(position, DOWN, gripper)))
                t += 1
            yield

    def _carried(self, item: Item) -> bool:
        return item.kind in OBJECT_KINDS and grasping(self.sim, item.name)

    def _pose(self, scene: Scene, rng: np.random.Generator, drawer: float | None) -> int | None:
        """Load the scene with the tool anywhere, close to an item, or holding one, whose index is returned.

        `drawer` is how far the drawer is out where that may not be drawn [m].
        """
        tool = rng.uniform([0.20, -0.20, 0.02], [0.48, 0.20, 0.27])
        gripper = float(rng.choice([0.0, 0.45, 1.0]))
        movable = [item for item in scene.items if item.kind in OBJECT_KINDS and not _under(item, scene)]
        near = scene.items[int(rng.integers(len(scene.items)))]
        style = rng.random()
        if style < 0.45:
            tool[:2] = np.array([near.x, near.y]) + rng.normal(0.0, 0.035, 2)
            tool[2] = 0.02 + abs(rng.normal(0.0, 0.08))
        held = movable[int(rng.integers(len(movable)))] if movable and style > 1.0 - self.held else None
        if held is not None:
            tool[2] = max(tool[2], 0.03)
            gripper = held.size / self.embodiment.robot.gripper_stroke
        self.sim.load(scene, tool, gripper)
        if held is not None:
            place = self.sim.tool_position + np.array([*rng.normal(0.0, 0.004, 2), rng.normal(0.0, 0.006)])
            self.sim.data.joint(held.name).qpos[:3] = place
        if any(item.kind == "drawer" for item in scene.items):
            self.sim.data.joint("drawer").qpos[0] = rng.uniform(0.0, 0.10) if drawer is None else drawer
        self.sim.settle()
        return None if held is None else scene.items.index(held)


class Clutter:
    """Tables of no task: one to `most` objects, often two to four of one kind, and up to two bowls or zones."""

    def __init__(self, *, most: int = 6) -> None:
        self.most = most

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """A table; with `split` ``pair`` the first object is a held-out pair."""
        while True:
            options = [(color, kind) for color in COLORS for kind in OBJECT_KINDS]
            options = [options[int(i)] for i in rng.permutation(len(options))]
            picked = options[: int(rng.integers(1, self.most + 1))]
            if rng.random() < 0.6:  # so that there is something to count
                kind, alike = str(rng.choice(OBJECT_KINDS)), int(rng.choice([2, 3, 4, 4]))
                others = [pair for pair in options if pair[1] != kind][: int(rng.integers(0, self.most - alike + 1))]
                picked = [*[pair for pair in options if pair[1] == kind][:alike], *others]
            if all(pair in HELD_OUT_PAIRS for pair in picked) and split != "pair":
                continue  # nothing that a sentence may name
            if split == "pair":
                pairs = sorted(HELD_OUT_PAIRS)
                first = pairs[int(rng.integers(len(pairs)))]
                picked = [first, *(p for p in picked[: self.most - 1] if p != first)]
            colors = sample_colors(rng, int(rng.integers(0, 3)))
            goals = [(color, str(rng.choice(("bowl", "zone")))) for color in colors]
            items = [make_item(color, kind) for color, kind in [*picked, *goals]]
            try:
                placed = place_apart(rng, items[:MAX_ITEMS], gap=0.015)
            except ConfigError:  # no room for this many
                continue
            return Episode(scene=Scene(items=placed), instruction="", tool_start=sample_tool(rng))


def describe(scene: Scene, rng: np.random.Generator, split: str = "train") -> dict[str, Any]:
    """A sentence that fits the scene and the split, with the index of the item each role names."""
    objects = [i for i in scene.items if i.kind in OBJECT_KINDS and may_name(i.name, split)]
    goals = [i for i in scene.items if i.kind in ("bowl", "zone")]
    drawer = next((i for i in scene.items if i.kind == "drawer"), None)
    if drawer is not None and (not objects or rng.random() < 0.5):
        phrasings = OPEN_DRAWER if rng.random() < 0.5 else CLOSE_DRAWER
        return _sentence(scene, split, phrasings, rng, drawer, drawer)
    if not objects:
        objects = goals or [i for i in scene.items if i.kind in FIXED_KINDS]
    target = objects[int(rng.integers(len(objects)))]
    cubes = [i for i in objects if i.kind == "cube" and i.name != target.name]
    if goals and target not in goals and rng.random() < 0.75:
        goal = goals[int(rng.integers(len(goals)))]
        return _sentence(scene, split, PUSH if goal.kind == "zone" else PLACE, rng, target, goal)
    if target.kind == "cube" and cubes and rng.random() < 0.4:
        return _sentence(scene, split, STACK, rng, target, cubes[int(rng.integers(len(cubes)))])
    return _sentence(scene, split, REACH, rng, target, target)


def describe_skill(scene: Scene, rng: np.random.Generator, split: str) -> dict[str, Any]:
    """A sentence as `describe` gives it, or a skill of long-horizon work in the words of its library."""
    objects = [i for i in scene.items if i.kind in OBJECT_KINDS and may_name(i.name, split)]
    if not objects or rng.random() < 0.25:
        return describe(scene, rng, split)
    target = objects[int(rng.integers(len(objects)))]
    goals = [i for i in scene.items if i.kind in FIXED_KINDS]
    goals += [i for i in objects if i.kind == target.kind == "cube" and i is not target]
    k = int(rng.integers(len(goals) + 1))
    if k == len(goals):
        return _sentence(scene, split, PUT_DOWN, rng, target, target)
    goal = goals[k]
    said = STACK_ON if goal.kind == "cube" else PUT_ON if goal.kind == "zone" else PUT_IN
    return _sentence(scene, split, said, rng, target, goal)


def _under(item: Item, scene: Scene) -> bool:
    """Whether something stands on an item."""
    return any(
        other.lift > item.lift and np.hypot(other.x - item.x, other.y - item.y) < 0.5 * item.size
        for other in scene.items
        if item.kind == "cube" and other is not item
    )


def _in_drawer(drawn: Episode) -> bool:
    """Whether a drawn table has something in its drawer, which then cannot slide under it."""
    cabinet = next((i for i in drawn.scene.items if i.kind == "drawer"), None)
    if cabinet is None:
        return False
    return any(
        i.lift > 0.0 and np.hypot(i.x - cabinet.x, i.y - cabinet.y) < 0.2
        for i in drawn.scene.items
        if i.kind in OBJECT_KINDS
    )


def _sentence(
    scene: Scene, split: str, phrasings: Phrasings, rng: np.random.Generator, target: Item, goal: Item
) -> dict[str, Any]:
    names = [item.name for item in scene.items]
    text = phrasings.sample(rng, split, {"object": target.name, "goal": goal.name})
    return {"text": text, "roles": {"object": names.index(target.name), "goal": names.index(goal.name)}}
