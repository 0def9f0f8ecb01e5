"""Wald's test: its errors are what was asked for, and looks are few."""

import math

import numpy as np
import pytest

from brachium.errors import ConfigError
from brachium.policies.planners.evidence import NO, OPEN, YES, Evidence


def run(test, p, rng):
    looks = []
    while (decision := test.decide(tuple(looks))) == OPEN:
        looks.append(bool(rng.random() < p))
    return decision, len(looks)


@pytest.mark.parametrize("error", [0.05, 0.1])
def test_errors_are_at_most_those_asked_for(error):
    """Wald's bounds: P(yes | not so) <= alpha / (1 - beta), P(no | so) <= beta / (1 - alpha) without a limit."""
    test = Evidence(false_positive=error, false_negative=error, alpha=0.01, beta=0.02, most=60)
    rng, count = np.random.default_rng(0), 20_000
    wrong_yes = sum(run(test, error, rng)[0] == YES for _ in range(count)) / count
    wrong_no = sum(run(test, 1.0 - error, rng)[0] == NO for _ in range(count)) / count
    assert wrong_yes <= 0.01 / 0.98 + 4 * math.sqrt(0.01 / count)
    assert wrong_no <= 0.02 / 0.99 + 4 * math.sqrt(0.02 / count)


def test_looks_that_agree_are_enough_by_the_closed_form():
    test = Evidence(false_positive=0.05, false_negative=0.05, alpha=0.001, beta=0.01)
    needed = math.ceil(math.log(0.99 / 0.001) / math.log(0.95 / 0.05))
    assert needed == 3
    assert test.decide((True,) * (needed - 1)) == OPEN
    assert test.decide((True,) * needed) == YES
    assert test.decide((True, False) * 2) == OPEN
    assert test.decide((False, False)) == NO


def test_undecided_is_a_no_in_the_end():
    assert Evidence(most=4).decide((True, False, True, False)) == NO


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="false_positive"):
        Evidence(false_positive=0.6)
    with pytest.raises(ConfigError, match="at least one look"):
        Evidence(most=0)
