"""How many looks a verdict takes: Wald's sequential test, and how it is fed by a checker that errs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigError

YES, NO, OPEN = "yes", "no", "open"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """When looks that err at known rates are enough (sequential probability ratio test; Wald 1945).

    Each look is worth its log-likelihood ratio; the test says yes or no when their sum crosses a bound. Looks must be
    fresh: the same picture asked twice is one look.

    Attributes:
        false_positive: Share of looks that say yes where it is not so.
        false_negative: Share of looks that say no where it is so.
        alpha: Probability of a yes that may be wrong.
        beta: Probability of a no that may be wrong.
        most: Looks; undecided after them is a no.
    """

    false_positive: float = 0.05
    false_negative: float = 0.05
    alpha: float = 0.001
    beta: float = 0.01
    most: int = 9

    def __post_init__(self) -> None:
        for name in ("false_positive", "false_negative", "alpha", "beta"):
            if not 0.0 < getattr(self, name) < 0.5:
                raise ConfigError(f"expected {name} between 0 and 0.5, got {getattr(self, name)}")
        if self.most < 1:
            raise ConfigError(f"expected at least one look, got most={self.most}")

    @property
    def gain(self) -> float:
        """What a yes is worth [nats]."""
        return math.log((1.0 - self.false_negative) / self.false_positive)

    @property
    def loss(self) -> float:
        """What a no is worth [nats]."""
        return math.log(self.false_negative / (1.0 - self.false_positive))

    def decide(self, looks: tuple[bool, ...]) -> str:
        """`YES`, `NO`, or `OPEN` while another look is needed."""
        total = 0.0
        for look in looks:
            total += self.gain if look else self.loss
            if total >= math.log((1.0 - self.beta) / self.alpha):
                return YES
            if total <= math.log(self.beta / (1.0 - self.alpha)):
                return NO
        return NO if len(looks) >= self.most else OPEN
