"""Repeated layers that keep no activations, or that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Takes the place of a layer's `forward`: activations are computed again when the gradient needs them.

    Chen et al. 2016, without re-entering autograd: what a layer leaves elsewhere (the keys and values that a head
    attends to) belongs to the graph all the same.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def recompute(layers: Iterable[nn.Module]) -> None:
    """Keep no activations of these layers."""
    for layer in layers:
        layer.forward = Recomputed(layer.forward)


def keep_again(layers: Iterable[nn.Module]) -> None:
    """Undo `recompute`."""
    for layer in layers:
        if isinstance(layer.forward, Recomputed):
            layer.forward = layer.forward.forward
