"""Linear layers with what comes right after them, in one pass over memory where nobody learns.

On a CPU a large activation costs about as much to write and read again as to compute. Without gradients oneDNN applies
the activation, the product with a gate or the sum with a residual while the result is still in its registers; the
numbers are the plain layers' to the last digits (the order of sums differs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, PRODUCTS = 64, 2**25
"""Rows from which on an activation is worth fusing, and multiplications from which on anything is: measured on two
cores with AVX-512; below, what oneDNN does to begin with takes longer than what it saves."""
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu", "tanh"),
    "gelu": (F.gelu, "gelu", "none"),
    "silu": (F.silu, "swish", ""),
}
"""Name -> (the function, oneDNN's name for it, and which kind)."""


def linear(
    x: Float[Tensor, "*rest n"],
    layer: nn.Module,
    *,
    activation: str | None = None,
    times: Float[Tensor, "*rest m"] | None = None,
    plus: Float[Tensor, "*rest m"] | None = None,
) -> Float[Tensor, "*rest m"]:
    """``layer(x)``, then one of: an activation (of `ACTIVATIONS`), a product, or a sum."""
    if _fuses(x, layer, activation is not None):
        weight: Any = layer.weight
        bias: Any = layer.bias
        other = plus if times is None else times
        if other is not None:
            word = "add" if times is None else "mul"
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, word)
        _, word, kind = ACTIVATIONS[activation] if activation else (None, "none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, word, [], kind)
    found = layer(x)
    if activation is not None:
        found = ACTIVATIONS[activation][0](found)
    if times is not None:
        found = found * times
    return found if plus is None else plus + found


def _fuses(x: Tensor, layer: nn.Module, activates: bool) -> bool:
    """Whether oneDNN may compute a layer: plain, in float32 on a CPU, on many rows, and nobody learns."""
    if x.device.type != "cpu" or type(layer) is not nn.Linear:
        return False
    if x.numel() < ROWS * x.shape[-1] or not (activates or x.numel() * layer.out_features >= PRODUCTS):
        return False
    if x.dtype != torch.float32 or layer.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad):
        return False
    return bool(torch.backends.mkldnn.is_available()) and not torch.compiler.is_compiling()


def joined_weight(layers: Sequence[nn.Module]) -> Float[Tensor, "m n"]:
    """The weights of linear layers that read the same, as one matrix in one piece of memory.

    They are moved there the first time, and each layer's weight is a part of it from then on: training changes both,
    and no memory is taken twice. Where weights are not this process's own (sharded), it is a copy.
    """
    weights: list[Any] = [layer.weight for layer in layers]
    first, size = weights[0], sum(w.numel() for w in weights)
    if len(weights) == 1:
        return first
    shape = (size // first.shape[1], first.shape[1])
    starts = [first.storage_offset() + sum(w.numel() for w in weights[:k]) for k in range(len(weights))]
    beside = all(
        w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and w.storage_offset() == start
        and w.is_contiguous()
        for w, start in zip(weights, starts)
    )
    if beside:
        return (
            first.as_strided(shape, (shape[1], 1))
            if first.requires_grad
            else first.data.as_strided(shape, (shape[1], 1))
        )
    whole = torch.cat([w.detach() for w in weights])
    if all(type(w) is nn.Parameter for w in weights):
        for w, part in zip(weights, whole.split([len(w) for w in weights])):
            w.data = part
    return whole
