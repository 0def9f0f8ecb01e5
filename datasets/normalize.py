"""Scaling of a field to about [-1, 1] or unit variance, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, SpecMismatchError, did_you_mean
from .statistics import FieldStatistics

MODES = ("mean_std", "quantile", "min_max")
_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """``normalize(x) = (x - offset) / scale`` for each dimension of one field, and its inverse.

    Attributes:
        mode: ``mean_std`` gives zero mean and unit variance; ``quantile`` maps [q01, q99] to [-1, 1]; ``min_max`` maps
            [min, max] to [-1, 1].
        statistics: Statistics of the field; required.
        clip: Limit normalised values to [-1, 1]. Off by default, as what is clipped has no inverse.

    A dimension that never changes gets scale 1. One whose two quantiles are equal though it does change (a gripper
    that is seldom open) is scaled by its minimum and maximum.

    Raises:
        ConfigError: An unknown mode.
        SpecMismatchError: Missing statistics.
    """

    mode: str
    statistics: FieldStatistics
    clip: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"no normalisation mode {self.mode!r}. {did_you_mean(self.mode, MODES)}")
        if not isinstance(self.statistics, FieldStatistics):
            raise SpecMismatchError(
                f"expected the FieldStatistics of one field, got {type(self.statistics).__name__}: run "
                "compute_statistics and pass statistics['state'] or statistics['action']"
            )

    @functools.cached_property
    def _terms(self) -> tuple[np.ndarray, np.ndarray]:
        stats = self.statistics
        if self.mode == "mean_std":
            offset, scale = stats.mean, stats.std
        else:
            low, high = (stats.q01, stats.q99) if self.mode == "quantile" else (stats.min, stats.max)
            narrow = high - low <= _TINY * np.maximum(1.0, np.abs(low))
            low, high = np.where(narrow, stats.min, low), np.where(narrow, stats.max, high)
            offset, scale = (low + high) / 2, (high - low) / 2
        constant = (stats.max == stats.min) | (scale <= _TINY * np.maximum(1.0, np.abs(offset)))
        return offset, np.where(constant, 1.0, scale)

    @property
    def offset(self) -> np.ndarray:
        """float64 (d,), in the field's units."""
        return self._terms[0]

    @property
    def scale(self) -> np.ndarray:
        """float64 (d,), in the field's units; never 0."""
        return self._terms[1]

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Return `x` (..., d) normalised, in its own floating dtype."""
        x, dtype = self._checked(x)
        y = (x - self.offset) / self.scale
        return (np.clip(y, -1.0, 1.0) if self.clip else y).astype(dtype)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Return `x` (..., d) in the field's units; the inverse of `normalize` without `clip`."""
        x, dtype = self._checked(x)
        return (x * self.scale + self.offset).astype(dtype)

    def _checked(self, x: np.ndarray) -> tuple[np.ndarray, np.dtype]:
        array = np.asarray(x)
        if array.ndim == 0 or array.shape[-1] != self.statistics.dim:
            raise SpecMismatchError(f"expected (..., {self.statistics.dim}) to normalise, got {array.shape}")
        dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float32)
        return array.astype(np.float64), dtype

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        return {"mode": self.mode, "clip": self.clip, "statistics": self.statistics.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Normalizer:
        """Build from `to_dict` output."""
        if not data.get("statistics"):
            raise SpecMismatchError("a normalizer needs statistics, and these have none: run compute_statistics")
        statistics = FieldStatistics.from_dict(data["statistics"])
        return cls(mode=data["mode"], clip=bool(data.get("clip", False)), statistics=statistics)
