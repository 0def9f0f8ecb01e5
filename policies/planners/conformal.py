"""Ask when several options stay plausible: conformal selection over what a planner proposes.

KnowNo (Ren et al. 2023, 2307.01928): of n calibration cases the nonconformity ``1 - p(right option)`` is kept; options
with ``p >= 1 - q``, q their ``ceil((n + 1)(1 - epsilon)) / n`` quantile, hold the right one with probability
``1 - epsilon`` over exchangeable cases (Vovk et al. 2005). Where more than one is left, a person is asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import CheckpointError, ConfigError
from .base import Ask, Candidate, PlanContext, Planner, Proposal, describe

ANYTHING = 1.0
"""Threshold of too few cases: every option stays."""


def quantile_of(nonconformity: Sequence[float], epsilon: float) -> float:
    """The threshold q of split conformal prediction; `ANYTHING` where there are too few cases for `epsilon`.

    Args:
        nonconformity: ``1 - p(right option)`` of each calibration case, 0..1.
        epsilon: Share of cases in which the right option may be missing.

    Raises:
        ConfigError: No cases, or epsilon not between 0 and 1.
    """
    if not len(nonconformity) or not 0.0 < epsilon < 1.0:
        raise ConfigError(f"expected cases and epsilon between 0 and 1, got {len(nonconformity)} and {epsilon}")
    rank = math.ceil((len(nonconformity) + 1) * (1.0 - epsilon))
    if rank > len(nonconformity):
        return ANYTHING
    return float(np.sort(np.asarray(nonconformity, float))[rank - 1])


def plausibility(candidates: Sequence[Candidate], temperature: float = 1.0) -> np.ndarray:
    """Softmax of the candidates' scores (n,)."""
    scores = np.array([c.score for c in candidates], float) / temperature
    weights = np.exp(scores - scores.max()) if len(scores) else scores
    return weights / weights.sum() if len(scores) else scores


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold, and what it was found on.

    Attributes:
        threshold: q.
        epsilon: Share of cases in which the right option may be missing.
        temperature: Of the softmax.
        cases: Number of calibration cases.
        planner: Name of the planner it belongs to.
    """

    threshold: float
    epsilon: float
    temperature: float
    cases: int
    planner: str

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(vars(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; CheckpointError where it is none."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no calibration of a planner: {error}") from error


class ConformalPlanner:
    """Hands on what a planner proposes where one option is plausible, and asks where several are.

    Args:
        planner: Gives candidates with scores in nats, such as `ScoringPlanner`.
        calibration: Threshold of that planner, or its file.

    Raises:
        ConfigError: The calibration belongs to another planner: its guarantee would not hold.
    """

    name = "conformal"

    def __init__(self, *, planner: Planner, calibration: Calibration | str) -> None:
        self.planner = planner
        self.calibration = Calibration.load(calibration) if isinstance(calibration, str) else calibration
        if self.calibration.planner != planner.name:
            raise ConfigError(
                f"the calibration is of planner {self.calibration.planner!r}, this is {planner.name!r}: calibrate anew"
            )

    def propose(self, context: PlanContext) -> Proposal:
        """The same proposal, or a question with the plausible options."""
        proposal = self.planner.propose(context)
        kept = self.plausible(proposal.candidates)
        if len(kept) < 2:
            return proposal
        options = tuple(describe(candidate.subgoal) for candidate in kept)
        asked = Candidate(subgoal=Ask(question="which of these should come next?", options=options))
        return Proposal(candidates=(asked,), raw=proposal.raw, latency_s=proposal.latency_s)

    def plausible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The prediction set; it may be empty."""
        p = plausibility(candidates, self.calibration.temperature)
        return [c for c, weight in zip(candidates, p) if weight >= 1.0 - self.calibration.threshold]
