"""Random numbers of a batch that several processes, or several parts of a step, share out.

A step draws the same numbers however its batch is divided: each share draws for the whole batch and keeps its own rows.
Noise of other rows costs next to nothing beside the model, and a run may go on with another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Draws for some rows of a batch.

    Attributes:
        generator: In the state in which the batch's draws begin.
        first: Number of the first row.
        rows: How many there are.
        total: Rows of the whole batch.
    """

    generator: torch.Generator
    first: int
    rows: int
    total: int

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.generator.device


RandomSource = torch.Generator | Draws


def normal(source: RandomSource, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 draws; the first axis of `shape` is the rows, each as often as there are draws of it."""
    return _drawn(source, shape, lambda size, generator: torch.randn(size, generator=generator, device=source.device))


def uniform(source: RandomSource, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 draws in [0, 1)."""
    return _drawn(source, shape, lambda size, generator: torch.rand(size, generator=generator, device=source.device))


def integers(source: RandomSource, below: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform integers from 0 to `below`, which is left out."""
    return _drawn(
        source, shape, lambda size, generator: torch.randint(below, size, generator=generator, device=source.device)
    )


def _drawn(
    source: RandomSource, shape: tuple[int, ...], draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
) -> Tensor:
    if isinstance(source, torch.Generator):
        return draw(shape, source)
    times = shape[0] // source.rows
    whole = draw((source.total * times, *shape[1:]), source.generator)
    return whole[source.first * times : (source.first + source.rows) * times]
