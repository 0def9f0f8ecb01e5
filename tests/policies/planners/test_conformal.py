"""Conformal selection: the guarantee on exchangeable cases, the quantile in closed form, and questions."""

import numpy as np
import pytest

from brachium.errors import CheckpointError, ConfigError
from brachium.policies.planners.base import Ask, Candidate, LanguageSubgoal, PlanContext, Proposal
from brachium.policies.planners.conformal import ANYTHING, Calibration, ConformalPlanner, plausibility, quantile_of
from brachium.spec import Observation


class Fixed:
    """Proposes what it is given."""

    name = "fixed"

    def __init__(self, scores):
        self.scores = scores

    def propose(self, context):
        some = [Candidate(subgoal=LanguageSubgoal(text=f"do {k}"), score=s) for k, s in enumerate(self.scores)]
        return Proposal(candidates=tuple(sorted(some, key=lambda c: -c.score)))


CONTEXT = PlanContext(instruction="work", observation=Observation(state=np.zeros(1, np.float32)))


def calibration(threshold, planner="fixed"):
    return Calibration(threshold=threshold, epsilon=0.1, temperature=1.0, cases=10, planner=planner)


def test_quantile_is_the_order_statistic():
    cases = np.linspace(0.01, 0.99, 99)
    assert quantile_of(cases, 0.1) == pytest.approx(cases[89])  # ceil(100 * 0.9) = 90th smallest
    assert quantile_of([0.3] * 5, 0.01) == ANYTHING


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.4])
def test_the_right_option_is_kept_as_often_as_promised(epsilon):
    """Coverage averaged over calibration draws lies in [1 - epsilon, 1 - epsilon + 1 / (n + 1)]."""
    rng, n, covered = np.random.default_rng(0), 60, []
    for _ in range(400):
        logits = rng.normal(size=(n + 50, 6)) * 2.0
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        right = np.array([rng.choice(6, p=row) for row in p])
        told = 1.0 - p[np.arange(len(p)), right]
        q = quantile_of(told[:n], epsilon)
        covered.append(np.mean(told[n:] <= q))
    spread = 3.0 * np.std(covered) / np.sqrt(len(covered))
    assert 1.0 - epsilon - spread <= np.mean(covered) <= 1.0 - epsilon + 1.0 / (n + 1) + spread


def test_one_plausible_option_is_handed_on_and_several_are_asked_about():
    sure = ConformalPlanner(planner=Fixed([5.0, 0.0, 0.0]), calibration=calibration(0.7))
    assert sure.propose(CONTEXT).candidates[0].subgoal.text == "do 0"
    torn = ConformalPlanner(planner=Fixed([2.0, 1.9, -5.0]), calibration=calibration(0.7))
    asked = torn.propose(CONTEXT).candidates[0].subgoal
    assert isinstance(asked, Ask)
    assert asked.options == ("do 0", "do 1")


def test_plausibility_is_a_softmax():
    p = plausibility([Candidate(subgoal=LanguageSubgoal(text=t), score=s) for t, s in (("a", 0.0), ("b", np.log(3.0)))])
    assert p == pytest.approx([0.25, 0.75])
    assert len(plausibility([])) == 0


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="got 0"):
        quantile_of([], 0.1)
    with pytest.raises(ConfigError, match="epsilon"):
        quantile_of([0.1], 1.5)
    with pytest.raises(ConfigError, match="calibrate anew"):
        ConformalPlanner(planner=Fixed([0.0]), calibration=calibration(0.5, planner="saycan"))
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no calibration"):
        Calibration.load(tmp_path / "c.json")


def test_a_calibration_is_saved_and_loaded(tmp_path):
    calibration(0.25).save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration(0.25)
