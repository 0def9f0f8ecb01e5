"""Exact statistics of low-dimensional fields, for normalisation.

Moments of parts are merged by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979), in float64: no cancellation however long the data. Quantiles do not merge; they are taken on
all the data at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SpecMismatchError, StoreError, did_you_mean
from .schema import PRESENT
from .store import EpisodeStore


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of each dimension; all float64 (d,)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Return the moments of `values` (n, d) with n of at least 1."""
        x = np.asarray(values, np.float64)
        mean = x.mean(axis=0)
        return cls(count=len(x), mean=mean, m2=((x - mean) ** 2).sum(axis=0), min=x.min(axis=0), max=x.max(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both parts together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
            min=np.minimum(self.min, other.min),
            max=np.maximum(self.max, other.max),
        )

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, (d,)."""
        return np.sqrt(self.m2 / self.count)


@dataclass(frozen=True, kw_only=True)
class FieldStatistics:
    """Statistics of each dimension of one field, float64 (d,), in the field's own units.

    Attributes:
        mean: Mean.
        std: Population standard deviation.
        min: Minimum.
        max: Maximum.
        q01: 1 % quantile, linear interpolation.
        q99: 99 % quantile.
        count: Steps they were taken from.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    count: int

    def __post_init__(self) -> None:
        for key in _ARRAYS:
            object.__setattr__(self, key, np.asarray(getattr(self, key), np.float64))
        object.__setattr__(self, "count", int(self.count))
        shapes = {getattr(self, key).shape for key in _ARRAYS}
        if len(shapes) != 1:
            raise SpecMismatchError(f"expected statistics of one shape, got {sorted(shapes)}")

    @property
    def dim(self) -> int:
        """Number of dimensions d."""
        return int(self.mean.shape[-1])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        return {**{key: getattr(self, key).tolist() for key in _ARRAYS}, "count": self.count}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FieldStatistics:
        """Build from `to_dict` output.

        Raises:
            SpecMismatchError: A statistic that is missing.
        """
        missing = [key for key in (*_ARRAYS, "count") if key not in data]
        if missing:
            raise SpecMismatchError(f"expected statistics {(*_ARRAYS, 'count')}, missing {missing}")
        return cls(**{key: data[key] for key in (*_ARRAYS, "count")})


_ARRAYS = ("mean", "std", "min", "max", "q01", "q99")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of several fields.

    Attributes:
        fields: Field name -> statistics.
    """

    fields: Mapping[str, FieldStatistics]

    def __getitem__(self, field: str) -> FieldStatistics:
        if field not in self.fields:
            hint = did_you_mean(field, self.fields) if self.fields else "There are none at all."
            raise SpecMismatchError(f"no statistics of field {field!r}. {hint}")
        return self.fields[field]

    def __contains__(self, field: object) -> bool:
        return field in self.fields

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` is the inverse."""
        return {name: stats.to_dict() for name, stats in self.fields.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Statistics:
        """Build from `to_dict` output."""
        return cls(fields={name: FieldStatistics.from_dict(stats) for name, stats in data.items()})


def field_statistics(parts: Sequence[np.ndarray]) -> FieldStatistics:
    """Return the statistics of `parts`, arrays (n_i, d) of which none is empty, as if they were one."""
    moments = Moments.of(parts[0])
    for part in parts[1:]:
        moments = moments.merge(Moments.of(part))
    columns = [np.concatenate([part[:, k] for part in parts]).astype(np.float64) for k in range(parts[0].shape[1])]
    q01, q99 = np.array([np.quantile(column, [0.01, 0.99]) for column in columns]).reshape(-1, 2).T
    return FieldStatistics(
        mean=moments.mean, std=moments.std, min=moments.min, max=moments.max, q01=q01, q99=q99, count=moments.count
    )


def compute_statistics(
    store: EpisodeStore,
    episodes: Sequence[int] | np.ndarray | None = None,
    fields: Sequence[str] = ("state", "action"),
) -> Statistics:
    """Compute exact statistics of `fields` over `episodes` (all by default). Padding plays no part, nor do gaps.

    Raises:
        StoreError: No steps, or a value that is not finite; the message names field, dimension and episode.
        SpecMismatchError: No such field.
    """
    chosen = range(store.num_episodes) if episodes is None else [int(i) for i in episodes]
    return pooled_statistics([(store, chosen)], fields)


def pooled_statistics(
    sources: Sequence[tuple[EpisodeStore, Sequence[int]]], fields: Sequence[str] = ("state", "action")
) -> Statistics:
    """Statistics over some episodes of each of several stores, as if they were one; see `compute_statistics`."""
    for store, chosen in sources:
        if not len(chosen):
            raise StoreError(f"store {store.path} has no episodes to take statistics of")
    found = {}
    for field in fields:
        parts = [part for store, chosen in sources for part in _parts(store, chosen, field)]
        if not parts:
            paths = ", ".join(str(store.path) for store, _ in sources)
            raise StoreError(f"no step of {paths} has {field!r}: there is nothing to take statistics of")
        found[field] = field_statistics(parts)
    return Statistics(fields=found)


def _parts(store: EpisodeStore, chosen: Sequence[int], field: str) -> list[np.ndarray]:
    """The rows of a field in each of some episodes, (n, d) each, none empty."""
    everything = store.lowdim(field).reshape(-1, store.schema.columns(field))
    there = None
    if field in store.schema.optional:
        there = store.lowdim(PRESENT)[:, store.schema.optional.index(field)]
    parts = []
    for index in chosen:
        rows = slice(store.offsets[index], store.offsets[index + 1])
        part = everything[rows] if there is None else everything[rows][there[rows]]
        if not np.isfinite(part).all():
            step, column = np.argwhere(~np.isfinite(part))[0]
            raise StoreError(
                f"{field}[{column}] is {part[step, column]} at step {step} of episode {index} of {store.path}: "
                "leave that episode out with episodes="
            )
        if len(part):
            parts.append(part)
    return parts
