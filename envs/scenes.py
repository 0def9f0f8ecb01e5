"""Free scenes: rendered tables with sentences about them and where the things they name are.

No task is done and no demonstration is needed. Scenes teach a model to find what words name ("grounding") before
it learns to act; they are drawn from the same things, words and looks as the tasks, and never name a held-out pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets.schema import StoreSchema
from ..sim.embodiment import SimEmbodiment
from ..sim.randomize import DomainRandomization
from ..sim.scene import FIXED_KINDS, OBJECT_KINDS, Item, Scene
from ..sim.simulation import Simulation
from ..spec import FeatureSpec
from .demonstrations import RecordedEpisode, Step
from .language import CLOSE_DRAWER, HELD_OUT_PAIRS, OPEN_DRAWER, PLACE, PUSH, REACH, STACK, Phrasings
from .tasks.base import Task

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
        images: Camera name -> uint8 (height, width, 3).
        state: float32 (s,).
        objects: float32 (MAX_ITEMS, 3 + 3 n), as `objects_feature` says.
        sentences: Each a text and its roles: ``{"text": str, "roles": {"object": k, "goal": k}}``.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    objects: np.ndarray
    sentences: tuple[dict[str, Any], ...]


class SceneSampler:
    """Draws labelled scenes.

    Args:
        tasks: Tasks whose tables are drawn.
        embodiment: Robot and cameras.
        randomization: How much looks vary.
        sentences: Sentences a scene.
        poses: Arm poses a table; each is one scene.
        held: Fraction of poses with an object between the fingers.
    """

    def __init__(
        self,
        *,
        tasks: tuple[Task, ...],
        embodiment: SimEmbodiment,
        randomization: DomainRandomization | None = None,
        sentences: int = 6,
        poses: int = 3,
        held: float = 0.25,
    ) -> None:
        self.tasks, self.embodiment = tuple(tasks), embodiment
        self.randomization = randomization or DomainRandomization()
        self.sentences, self.poses, self.held = sentences, poses, held
        self.sim = Simulation(embodiment)
        self.name = "scenes"
        self.schema = StoreSchema(embodiment=embodiment.spec, extras=(objects_feature(embodiment.cameras),))

    def record(self, seed: int) -> list[RecordedEpisode]:
        """The scenes of one table as episodes of one step each, the action zero, the sentences in ``meta``."""
        action = np.zeros(self.embodiment.spec.action.shape, np.float32)
        return [
            RecordedEpisode(
                instruction=scene.sentences[0]["text"],
                tags=("scene",),
                meta={"seed": seed, "task": self.name, "sentences": list(scene.sentences)},
                steps=[Step(scene.images, scene.state, action, {"objects": scene.objects})],
                success=None,
            )
            for scene in self.sample(seed)
        ]

    def sample(self, seed: int) -> list[LabelledScene]:
        """One table in `poses` arm poses; the same seed gives the same scenes."""
        rng = np.random.default_rng([seed, 0x5CE7E])
        task = self.tasks[int(rng.integers(len(self.tasks)))]
        scene = self.randomization.apply(task.sample(rng, "train").scene, rng)
        scenes = []
        for _ in range(self.poses):
            self._pose(scene, rng)
            names = tuple(item.name for item in scene.items)
            objects = np.full(objects_feature(self.embodiment.cameras).shape, np.nan, np.float32)
            objects[: len(names)] = self.sim.project(names)
            texts = tuple(describe(scene, rng) for _ in range(self.sentences))
            scenes.append(
                LabelledScene(images=self.sim.images(), state=self.sim.state, objects=objects, sentences=texts)
            )
        return scenes

    def _pose(self, scene: Scene, rng: np.random.Generator) -> None:
        """Load the scene with the tool somewhere: anywhere, close to an item, or holding an object."""
        tool = rng.uniform([0.20, -0.20, 0.02], [0.48, 0.20, 0.27])
        gripper = float(rng.choice([0.0, 0.45, 1.0]))
        movable = [item for item in scene.items if item.kind in OBJECT_KINDS]
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
            self.sim.data.joint("drawer").qpos[0] = rng.uniform(0.0, 0.10)
        self.sim.settle()


def describe(scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """A training sentence that fits the scene, with the index of the item each role names."""
    objects = [i for i in scene.items if i.kind in OBJECT_KINDS and not _held_out(i)]
    goals = [i for i in scene.items if i.kind in ("bowl", "zone")]
    drawer = next((i for i in scene.items if i.kind == "drawer"), None)
    if drawer is not None and (not objects or rng.random() < 0.5):
        phrasings = OPEN_DRAWER if rng.random() < 0.5 else CLOSE_DRAWER
        return _sentence(scene, phrasings, rng, drawer, drawer)
    if not objects:
        objects = goals or [i for i in scene.items if i.kind in FIXED_KINDS]
    target = objects[int(rng.integers(len(objects)))]
    cubes = [i for i in objects if i.kind == "cube" and i.name != target.name]
    if goals and target not in goals and rng.random() < 0.75:
        goal = goals[int(rng.integers(len(goals)))]
        return _sentence(scene, PUSH if goal.kind == "zone" else PLACE, rng, target, goal)
    if target.kind == "cube" and cubes and rng.random() < 0.4:
        return _sentence(scene, STACK, rng, target, cubes[int(rng.integers(len(cubes)))])
    return _sentence(scene, REACH, rng, target, target)


def _held_out(item: Item) -> bool:
    color, kind = item.name.split(" ")
    return (color, kind) in HELD_OUT_PAIRS


def _sentence(scene: Scene, phrasings: Phrasings, rng: np.random.Generator, target: Item, goal: Item) -> dict[str, Any]:
    names = [item.name for item in scene.items]
    text = phrasings.sample(rng, "train", {"object": target.name, "goal": goal.name})
    return {"text": text, "roles": {"object": names.index(target.name), "goal": names.index(goal.name)}}
