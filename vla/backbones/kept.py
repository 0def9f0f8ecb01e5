"""The keys and values that a language model of `transformers` computes on its way, and nothing nobody asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class Read(Exception):
    """All keys and values are there: what the last layer would go on to compute is wanted by nobody."""


class KeptLayers(Cache):
    """Takes each layer's keys and values as the model computes them; nothing was read before.

    Unlike `transformers`' own caches it may be given the same layer twice, as activation checkpointing does when it
    computes a layer again: the first are kept.

    Args:
        layers: Number of layers.
        stops: Raise `Read` when the last layer has given its own, before it attends to anything.
    """

    def __init__(self, layers: int, *, stops: bool) -> None:
        super().__init__(layers=[])
        self.count, self.stops = layers, stops
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what a layer has computed."""
        first = layer_idx not in self.keys
        if first:
            self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        if first and self.stops and layer_idx == self.count - 1:
            raise Read
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing was read before."""
        return 0
