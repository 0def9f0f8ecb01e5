"""Scenes and success as a vision-language model sees them, by the answers that it gives to questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import ConfigError
from ...spec import DETAIL, Observation
from ...symbols import Scene, Thing
from ...vla.pretrained import Pretrained, identity_of
from ...vla.weigh import AnswerScorer
from .asking import DRAWER, TABLE, Kinds, holders, question
from .base import LanguageSubgoal, PlanContext, Subgoal, Verdict
from .beliefs import Beliefs


class SeenScenes:
    """Reads scenes by asking a vision-language model what there is, what each thing is in or on, and of the drawer.

    What is there is asked once, when a lane begins with a free view; things do not come and go. What was last seen in
    the drawer is in it while it is closed.

    Args:
        model: `Pretrained`, or where it is.
        kinds: Of the world.
        present: Least probability of a thing that is there.
    """

    def __init__(self, *, model: Pretrained | str, kinds: Kinds, present: float = 0.5) -> None:
        self.identity = identity_of(model) if isinstance(model, str) else ""
        self.model = Pretrained.load(model) if isinstance(model, str) else model
        self.ask, self.kinds, self.present = AnswerScorer(self.model), kinds, present
        self._lanes: dict[int, Beliefs] = {}

    def reset(self, lane: int) -> None:
        """Forget what was seen in a lane."""
        self._lanes.pop(lane, None)

    def estimate(self, observation: Observation, lane: int) -> Scene:
        """The scene as it looks."""
        images = views(observation, self.model.cameras)
        if lane not in self._lanes:
            self._lanes[lane] = Beliefs(kinds=self.kinds, things=self._present(images))
        beliefs = self._lanes[lane]
        movable = [t for t in beliefs.things if t.kind in self.kinds.movable]
        answers = [holders(thing, beliefs.things, self.kinds) for thing in movable]
        asked = [(f"what is the {t.name} in or on?", names) for t, names in zip(movable, answers)]
        drawer = [("is the drawer open?", ("yes", "no"))] if beliefs.has_drawer else []
        weights = self.ask(images, [*asked, *drawer])
        places = {
            thing.name: (names[int(np.argmax(weight))], float(np.max(weight)))
            for thing, names, weight in zip(movable, answers, weights)
        }
        is_open = float(weights[-1][0]) if drawer else 0.0
        return beliefs.look(places, is_open, source="vlm", stamp=float(observation.timestamp))

    def _present(self, images: Sequence[np.ndarray]) -> tuple[Thing, ...]:
        found = []
        asked = [t for t in self.kinds.things if t.kind not in (TABLE, DRAWER)]
        weights = self.ask(images, [(f"is there a {t.name}?", ("yes", "no")) for t in asked])
        found += [t for t, weight in zip(asked, weights) if weight[0] > self.present]
        drawers = [t for t in self.kinds.things if t.kind == DRAWER]
        if drawers and self.ask(images, [("is there a drawer?", ("yes", "no"))])[0][0] > 0.5:
            found += drawers
        return (*found, *(t for t in self.kinds.things if t.kind == TABLE))


class SeenSuccess:
    """Whether a skill is done, by asking a vision-language model about each literal that tells so.

    Args:
        model: `Pretrained`, or where it is.
        kinds: Of the world.
        threshold: Least probability that all literals hold.
    """

    def __init__(self, *, model: Pretrained | str, kinds: Kinds, threshold: float = 0.5) -> None:
        self.identity = identity_of(model) if isinstance(model, str) else ""
        self.model = Pretrained.load(model) if isinstance(model, str) else model
        self.ask, self.kinds, self.threshold = AnswerScorer(self.model), kinds, threshold

    def check(self, context: PlanContext, subgoal: Subgoal, lane: int) -> Verdict:
        """From the picture of this moment alone."""
        if not isinstance(subgoal, LanguageSubgoal) or subgoal.call is None:
            raise ConfigError("only skills of the library have literals that tell their success")
        things = self.kinds.things if context.scene is None else context.scene.things
        images = views(context.observation, self.model.cameras)
        p = 1.0
        for literal in subgoal.call.success:
            text, answers, right = question(literal, things, self.kinds)
            weight = float(self.ask(images, [(text, answers)])[0][right])
            p *= weight if literal.value else 1.0 - weight
        return Verdict(ok=p > self.threshold, p=p, source="vlm")


def views(observation: Observation, cameras: Sequence[str]) -> list[np.ndarray]:
    """Pictures of an observation in the order of a model's cameras."""
    missing = [name for name in cameras if name not in observation.images]
    if missing:
        raise ConfigError(f"the model looks through {list(cameras)}, the observation lacks {missing}")
    return [np.asarray(observation.images[name]) for name in cameras]


def details(observation: Observation, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Pictures in detail of some cameras, by camera.

    Raises:
        ConfigError: One is missing, or has another size.
    """
    found = {}
    for name, size in sizes.items():
        picture = observation.images.get(name + DETAIL)
        if picture is None or np.shape(picture) != (size, size, 3):
            got = "none" if picture is None else f"one of {np.shape(picture)}"
            raise ConfigError(
                f"these eyes see camera {name!r} in detail: expected a picture of {size} x {size} px, got {got}. "
                f"Type: env.details.{name}={size}"
            )
        found[name] = np.asarray(picture)
    return found
