"""What planners that generate pictures share: futures are imagined, ranked, and proposed as subgoals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from ...errors import ConfigError, did_you_mean
from ...vla.generative.generator import Guidance
from ...vla.generative.others import Others
from ...vla.generative.system import SubgoalSystem
from .base import Candidate, PlanContext, Proposal, Subgoal
from .imagine import Futures, Imaginer, NativeImaginer, rank

SHUFFLES = ("none", "image", "text")
"""``image``: futures of what another episode saw; ``text``: of another instruction."""


class GeneratedPlanner:
    """Proposes futures that a generator imagines, best first.

    Args:
        system: Generator, reader and progress filter.
        guidance: How futures are drawn.
        candidates: Futures to draw.
        rank: Order them by the progress filter, else as they were drawn.
        imaginer: What imagines them in place of the system's generator; given `system`, or none where null.
        shuffle: An honesty check, one of `SHUFFLES`: what is imagined has nothing to do with what is asked.
    """

    name = "generated"

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        guidance: Guidance | None = None,
        candidates: int = 2,
        rank: bool = True,
        imaginer: Callable[..., Imaginer] | None = None,
        shuffle: str = "none",
    ) -> None:
        if candidates < 1:
            raise ConfigError(f"expected at least 1 candidate, got {candidates}")
        if shuffle not in SHUFFLES:
            raise ConfigError(f"unknown shuffle {shuffle!r}. {did_you_mean(shuffle, SHUFFLES)}")
        if imaginer is None and system.kind != self.name:
            raise ConfigError(f"the checkpoint is one of brachium train-{system.kind}: type planner={system.kind}")
        self.system, self.candidates, self.rank, self.shuffle = system, candidates, rank, shuffle
        self.imaginer = NativeImaginer(system, guidance or Guidance()) if imaginer is None else imaginer(system=system)
        self._made, self._spent = 0, 0.0
        if shuffle != "none" and system.others is None:
            raise ConfigError(f"shuffle={shuffle} needs frames of other episodes, and the checkpoint keeps none")

    @property
    def cost(self) -> dict[str, float]:
        """How many proposals were made, and what one took [ms]."""
        return {"made": self._made, "ms": round(1e3 * self._spent / max(1, self._made), 1)}

    def propose(self, context: PlanContext) -> Proposal:
        """Futures of what is seen, if the instruction is followed; the same seed and step give the same."""
        begin = time.monotonic()
        found = self._propose(context)
        self._made, self._spent = self._made + 1, self._spent + time.monotonic() - begin
        return found

    def _propose(self, context: PlanContext) -> Proposal:
        seed = [context.seed, context.step, 0x5B6]
        images: Mapping[str, np.ndarray] = context.observation.images
        text = context.instruction
        if self.shuffle != "none" and self.system.others is not None:
            others: Others = self.system.others
            # One episode's stranger stays the same while it lasts, so that what is imagined makes sense in itself.
            k = others.pick(context.seed, text)
            images, text = (others.images(k), others.texts[k]) if self.shuffle == "image" else (images, others.texts[k])
        futures = self.imaginer.imagine(images, text, self.candidates, seed)
        scores = rank(self.system, images, text, futures) if self.rank else np.zeros(len(futures))
        order = sorted(range(len(futures)), key=lambda k: -scores[k])
        found = tuple(
            Candidate(
                subgoal=self.subgoal(futures, k, context.instruction),
                score=float(scores[k]),
                terms={"progress": float(scores[k])} if self.rank else {},
            )
            for k in order
        )
        return Proposal(candidates=found)

    def subgoal(self, futures: Futures, number: int, text: str) -> Subgoal:
        """One of some futures, as what is to be pursued."""
        raise NotImplementedError
