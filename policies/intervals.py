"""Intervals for success rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def wilson(successes: int, episodes: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), by default at 95 %.

    Unlike the normal approximation it stays inside [0, 1] and is honest at 0 and at n successes.
    """
    if episodes == 0:
        return 0.0, 1.0
    p, n = successes / episodes, episodes
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_rates(counts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Mean of several groups' rates, each counting as much however many episodes it has, and its 95 % interval.

    The interval joins the groups' own (MOVER, Zou and Donner 2008): it keeps what is good about Wilson's.

    Args:
        counts: (successes, episodes) of each group.

    Returns:
        Mean, lower and upper edge.
    """
    rates = [successes / episodes for successes, episodes in counts]
    edges = [wilson(*each) for each in counts]
    mean = sum(rates) / len(rates)
    below = math.sqrt(sum((rate - low) ** 2 for rate, (low, _) in zip(rates, edges))) / len(rates)
    above = math.sqrt(sum((high - rate) ** 2 for rate, (_, high) in zip(rates, edges))) / len(rates)
    return mean, mean - below, mean + above


def rate(successes: int, episodes: int) -> dict[str, Any]:
    """``{"episodes": n, "success": k, "success_rate": r, "ci95": [lo, hi]}``."""
    low, high = wilson(successes, episodes)
    return {
        "episodes": episodes,
        "success": successes,
        "success_rate": successes / episodes if episodes else 0.0,
        "ci95": [round(low, 4), round(high, 4)],
    }
