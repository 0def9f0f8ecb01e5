"""A residual network over a whole chunk: Octo's denoiser (Ghosh et al. 2024), for flows, diffusion and regression."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .base import HeadInputs

TIME = 64
"""Features of time or of the noise level."""


class ChunkMLP(nn.Module):
    """Chunk and condition to a chunk; each embodiment has its own input and output layer.

    Args:
        inputs: What the head is built for.
        width: Width of the residual blocks.
        depth: Number of residual blocks.
        told: Whether it is told which rows are given, beside the chunk.
    """

    def __init__(self, inputs: HeadInputs, width: int, depth: int, *, told: bool = False) -> None:
        super().__init__()
        h, self.told = inputs.action_horizon, told
        self.time = nn.Sequential(nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, width))
        self.action_in = nn.ModuleDict({k: nn.Linear(h * (a + told), width) for k, a in inputs.action_dims.items()})
        self.action_out = nn.ModuleDict({k: nn.Linear(width, h * a) for k, a in inputs.action_dims.items()})
        self.blocks = nn.ModuleList([ModulatedBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        for layer in self.action_out.values():
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(
        self,
        pooled: Float[Tensor, "b w"],
        x: Float[Tensor, "b h a"],
        time: Float[Tensor, "b f"],
        embodiment: str,
        given: Bool[Tensor, "b h"] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """What becomes of chunk `x` at a time; rows where `given` is True are without noise."""
        condition = nn.functional.silu(pooled + self.time(time))
        entered = x.flatten(1)
        if self.told:
            flags = x.new_zeros(x.shape[:2]) if given is None else given.to(x.dtype)
            entered = torch.cat([entered, flags], dim=1)
        hidden = self.action_in[embodiment](entered)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.action_out[embodiment](self.norm(hidden)).reshape(x.shape)


class ModulatedBlock(nn.Module):
    """Residual MLP whose normalised input is scaled and shifted by the condition (adaLN-Zero, Peebles & Xie 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        with torch.no_grad():
            self.modulation.bias[2 * width :] = 1.0  # gates start open: the field is shallow, not a deep transformer

    def forward(self, x: Float[Tensor, "b w"], condition: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """One residual step."""
        scale, shift, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1.0 + scale) + shift)
