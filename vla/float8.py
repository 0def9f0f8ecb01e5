"""Linear layers in float8: half the memory of bfloat16, and twice its arithmetic on GPUs of Ada, Hopper and later.

Numbers are e4m3 (4 bits exponent, 3 mantissa; Micikevicius et al. 2022) with a scale for each row of the weight, set
once, and for each token, found as it comes; sums are float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max
MULTIPLE = 16
"""What the kernels want of a layer's sizes."""


class Float8Linear(nn.Module):
    """A linear layer with weights in float8; for inference.

    Args:
        layer: What it takes the place of.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_float8(layer.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Float[Tensor, "*rest n"]) -> Float[Tensor, "*rest m"]:
        """``layer(x)`` in bfloat16, within what 3 bits of mantissa allow: about 4 % of a row's size."""
        rows = x.reshape(-1, self.in_features)
        told, scale = to_float8(rows.float())
        if x.device.type == "cuda":
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            found = torch._scaled_mm(
                told,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                bias=bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:  # the same numbers, slowly
            exact = (told.float() @ self.weight.float().t()) * scale * self.scale.t()
            found = (exact if self.bias is None else exact + self.bias.float()).to(torch.bfloat16)
        return found.view(*x.shape[:-1], self.out_features)


def to_float8(x: Float[Tensor, "r n"]) -> tuple[Tensor, Float[Tensor, "r 1"]]:
    """Each row in float8, and what it is to be multiplied with."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def use_float8(module: nn.Module) -> int:
    """Put float8 in place of the linear layers inside `module` that the kernels can do; returns how many."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not (child.in_features % MULTIPLE or child.out_features % MULTIPLE):
                setattr(parent, name, Float8Linear(child))
                count += 1
    return count
