"""A small U-Net for images and short videos, conditioned on time and a vector.

Ho et al. 2020 and Dhariwal & Nichol 2021 for the residual blocks with their scale and shift, (2+1)-dimensional for
videos (Ho et al. 2022, "Video Diffusion Models"): convolutions in space, then along time, which begin as the identity.
Attention at the coarsest level sees all places of all frames at once. Pixels come in patches (`patch`), so that a small
image costs what its content is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ..heads.flow import time_features

TIME = 64
GROUPS = 8


class UNet(nn.Module):
    """Frames to frames of the same size.

    Args:
        inputs: Channels that come in, in a frame.
        outputs: Channels that go out, in a frame.
        frames: Frames f.
        widths: Channels of each level, the finest first; each level halves the sides.
        condition: Size c of the vector it is told.
        patch: Side of the patches that are one place of the finest level [pixels].
        heads: Attention heads at the coarsest level.
    """

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        frames: int,
        widths: Sequence[int],
        condition: int,
        patch: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if not widths or any(w % GROUPS for w in widths) or widths[-1] % heads:
            raise ConfigError(f"expected widths that are multiples of {GROUPS}, got {list(widths)}")
        self.patch, self.frames, self.scale = patch, frames, patch * 2 ** (len(widths) - 1)
        told = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(TIME, told), nn.SiLU(), nn.Linear(told, told))
        self.told = nn.Linear(condition, told)
        self.place = nn.Parameter(torch.randn(frames, told) * 0.02)
        self.enter = nn.Conv2d(inputs * patch * patch, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for k, wide in enumerate(widths):
            self.down.append(Block(width, wide, told, frames))
            if k + 1 < len(widths):
                self.shrink.append(nn.Conv2d(wide, wide, 3, stride=2, padding=1))
            width = wide
        self.middle = Block(width, width, told, frames)
        self.attention = Attention(width, heads)
        for k in reversed(range(len(widths))):
            self.up.append(Block(width + widths[k], widths[k], told, frames))
            if k:
                self.grow.append(nn.Conv2d(widths[k], widths[k - 1], 3, padding=1))
                width = widths[k - 1]
        self.leave = nn.Sequential(
            nn.GroupNorm(GROUPS, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], outputs * patch * patch, 3, padding=1)
        )
        last: nn.Conv2d = self.leave[-1]  # type: ignore[assignment]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "b f i height width"], t: Float[Tensor, " b"], condition: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b f o height width"]:
        """Run it at times `t`; sides must be multiples of `scale`."""
        b, f = x.shape[:2]
        told = (self.time(time_features(t, TIME)) + self.told(condition))[:, None] + self.place
        told = F.silu(told).flatten(0, 1)
        hidden = self.enter(F.pixel_unshuffle(x.flatten(0, 1), self.patch))
        kept = []
        for k, block in enumerate(self.down):
            hidden = block(hidden, told, f)
            kept.append(hidden)
            if k < len(self.shrink):
                hidden = self.shrink[k](hidden)
        hidden = self.attention(self.middle(hidden, told, f), f)
        for k, block in enumerate(self.up):
            hidden = block(torch.cat([hidden, kept.pop()], dim=1), told, f)
            if k < len(self.grow):
                hidden = self.grow[k](F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.leave(hidden), self.patch).unflatten(0, (b, f))


class Block(nn.Module):
    """Two convolutions around a residual, told by scale and shift; along time a third, which begins as the identity."""

    def __init__(self, inputs: int, outputs: int, told: int, frames: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.norm = nn.GroupNorm(GROUPS, outputs)
        self.tell = nn.Linear(told, 2 * outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.along: nn.Conv1d | None = None
        if frames > 1:
            self.along = nn.Conv1d(outputs, outputs, 3, padding=1)
            nn.init.zeros_(self.along.weight)
            nn.init.zeros_(self.along.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "bf i h w"], told: Float[Tensor, "bf c"], frames: int
    ) -> Float[Tensor, "bf o h w"]:
        scale, shift = self.tell(told)[:, :, None, None].chunk(2, dim=1)
        hidden = self.second(F.silu(self.norm(self.first(x)) * (1.0 + scale) + shift)) + self.skip(x)
        if self.along is None:
            return hidden
        bf, o, h, w = hidden.shape
        lines = hidden.reshape(bf // frames, frames, o, h * w).permute(0, 3, 2, 1).flatten(0, 1)
        moved = self.along(F.silu(lines)).unflatten(0, (bf // frames, h * w)).permute(0, 3, 2, 1)
        return hidden + moved.reshape(bf, o, h, w)


class Attention(nn.Module):
    """Every place of every frame looks at every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(GROUPS, width), heads
        self.ask, self.answer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.zeros_(self.answer.weight)
        nn.init.zeros_(self.answer.bias)

    def forward(self, x: Float[Tensor, "bf c h w"], frames: int) -> Float[Tensor, "bf c h w"]:
        bf, c, h, w = x.shape
        tokens = self.norm(x).reshape(bf // frames, frames, c, h * w).transpose(2, 3).flatten(1, 2)
        q, k, v = self.ask(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        moved = self.answer(seen).unflatten(1, (frames, h * w)).transpose(2, 3)
        return x + moved.reshape(bf, c, h, w)
