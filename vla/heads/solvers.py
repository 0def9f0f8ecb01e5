"""Numerical integration of a velocity field from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...errors import ConfigError, did_you_mean

Field = Callable[[Tensor, float], Tensor]


def check_solver(solver: str, steps: int) -> None:
    """Raise ConfigError unless a field can be integrated so."""
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}. {did_you_mean(solver, SOLVERS)}")
    if steps < 1:
        raise ConfigError(f"expected at least 1 solver step, got {steps}")


def integrate(field: Field, x: Tensor, steps: int, solver: str) -> Tensor:
    """Integrate dx/dt = field(x, t) from t = 1 to t = 0 in equal steps."""
    size = 1.0 / steps
    for k in range(steps):
        x = SOLVERS[solver](field, x, 1.0 - k * size, size)
    return x


def _euler(field: Field, x: Tensor, t: float, size: float) -> Tensor:
    return x - size * field(x, t)


def _midpoint(field: Field, x: Tensor, t: float, size: float) -> Tensor:
    return x - size * field(x - 0.5 * size * field(x, t), t - 0.5 * size)


def _heun(field: Field, x: Tensor, t: float, size: float) -> Tensor:
    first = field(x, t)
    second = field(x - size * first, max(t - size, 0.0))
    return x - 0.5 * size * (first + second)


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}
