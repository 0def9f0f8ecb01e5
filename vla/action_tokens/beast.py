"""Actions as control points of B-splines (BEAST, Zhou et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from .base import Grammar, require_length, require_tokens


class BeastTokenizer:
    """Each dimension of a chunk is a clamped uniform B-spline; its control points, in bins, are the tokens.

    The number of tokens is fixed and small, the result smooth. The control points solve a ridge regression, so a chunk
    that is such a spline comes back exactly but for the bins.

    Args:
        points: Control points of each dimension.
        degree: Of the polynomials; 0 makes steps, 3 is smooth in acceleration.
        bins: Bins of a control point, uniform over [-reach, reach].
        reach: Largest control point (those of a spline may lie outside the values that it takes); None to learn it from
            the data, 1.5 until then.
        ridge: Weight of the points' squares in the regression.
    """

    ordered = True

    def __init__(
        self, *, points: int = 5, degree: int = 3, bins: int = 256, reach: float | None = None, ridge: float = 1e-6
    ) -> None:
        if not 0 <= degree < points or bins < 2 or (reach is not None and reach <= 0) or ridge < 0:
            raise ConfigError(
                "BEAST: expected degree from 0 and below points, at least 2 bins, reach above 0 and ridge from 0, got "
                f"points={points}, degree={degree}, bins={bins}, reach={reach}, ridge={ridge}"
            )
        self.points, self.degree, self.size, self.ridge = points, degree, bins, ridge
        self.reach, self.given = 1.5 if reach is None else reach, reach is not None
        self.grammar = Grammar.of(torch.ones(bins, dtype=torch.long))

    def values(self, h: int, a: int) -> int:
        """One for every control point."""
        return self.points * a

    def basis(self, h: int) -> Float[Tensor, "h p"]:
        """Value of each basis function at each of h steps; rows sum to 1."""
        from scipy.interpolate import BSpline

        if h < 2 or self.points > h:
            raise ConfigError(
                f"BEAST: expected at most as many points as steps in a chunk (and 2 steps), got {self.points} points "
                f"for {h} steps"
            )
        inner = np.linspace(0.0, 1.0, self.points - self.degree + 1)
        knots = np.concatenate([np.zeros(self.degree), inner, np.ones(self.degree)])
        rows = BSpline.design_matrix(np.linspace(0.0, 1.0, h), knots, self.degree).toarray()
        return torch.from_numpy(rows.astype(np.float32))

    def control(self, actions: Float[Tensor, "b h a"]) -> Float[Tensor, "b p a"]:
        """Control points of the spline that is nearest to each dimension."""
        basis = self.basis(actions.shape[1]).double()
        gram = basis.T @ basis + self.ridge * torch.eye(self.points, dtype=torch.float64)
        solve = torch.linalg.solve(gram, basis.T).to(actions)
        return torch.einsum("ph,bha->bpa", solve, actions)

    def encode(
        self, actions: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"]
    ) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Bins of the control points, point by point."""
        share = self.control(actions).clamp(-self.reach, self.reach) / self.reach
        tokens = ((share + 1.0) * (0.5 * self.size)).long().clamp(max=self.size - 1).flatten(1)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return tokens, real, real

    def decode(self, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], h: int, a: int) -> Float[Tensor, "b h a"]:
        """The splines, at every step.

        Raises:
            DecodeError: Too few tokens, or numbers that are no bins.
        """
        require_length(int(real.sum(1).min()) if len(real) else self.values(h, a), self.values(h, a), "tokens")
        require_tokens(tokens, self.size)
        control = ((tokens.float() + 0.5) * (2.0 / self.size) - 1.0) * self.reach
        return torch.einsum("hp,bpa->bha", self.basis(h).to(control), control.unflatten(1, (self.points, a)))

    def fit(self, chunks: Iterable[Tensor]) -> Mapping[str, Any] | None:
        """The reach of the control points that occur; nothing where one was given."""
        if self.given:
            return None
        reach = max(float(self.control(part).abs().max()) for part in chunks)
        return {"reach": max(reach, 1e-3)}
