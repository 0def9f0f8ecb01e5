"""Whether a generated subgoal is a step towards what the instruction says: what candidates are ranked by.

A classifier on (present, subgoal, instruction) as in GHIL-Glue (Hatch et al. 2024). Told apart from true futures are
futures of another instruction, the past, the present itself, and other scenes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from .augment import degrade
from .frames import to_unit
from .reading import Reading


class ProgressFilter(nn.Module):
    """Logit that an image shows progress.

    Args:
        size: Side of the images [pixels].
        cameras: Number of cameras n.
        words: Size of the reading's summary.
        roles: Places that a reading marks.
        width: Channels.
        words_dim: Values through which the summary reaches the network.
    """

    def __init__(
        self, *, size: int, cameras: int, words: int, roles: int = 2, width: int = 32, words_dim: int = 8
    ) -> None:
        super().__init__()
        self.size = size
        self.words = nn.Sequential(nn.LayerNorm(words), nn.Linear(words, words_dim), nn.Tanh())
        inputs = 9 * cameras + roles * cameras
        self.see = nn.Sequential(
            nn.Conv2d(inputs, width, 5, stride=2, padding=2),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.judge = nn.Sequential(nn.Linear(18 * width + words_dim, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(
        self, present: Float[Tensor, "b n 3 size size"], later: Float[Tensor, "b n 3 size size"], reading: Reading
    ) -> Float[Tensor, " b"]:
        """Logits, images from -1 to 1."""
        images = torch.cat([present, later, later - present], dim=1).flatten(1, 2)
        seen = self.see(torch.cat([images, reading.spots(self.size).to(images)], dim=1))
        pooled = F.adaptive_avg_pool2d(seen, 3).flatten(1)
        return self.judge(torch.cat([pooled, self.words(reading.words)], dim=1)).squeeze(1).float()

    def loss(
        self,
        present: UInt8[Tensor, "b n size size 3"],
        later: UInt8[Tensor, "b n size size 3"],
        reading: Reading,
        label: Float[Tensor, " b"],
        generator: torch.Generator,
    ) -> Float[Tensor, " b"]:
        """Cross-entropy on degraded images: generated ones must not be told by their blur."""
        now, then = to_unit(present), degrade(to_unit(later), generator)
        return F.binary_cross_entropy_with_logits(self(now, then, reading), label, reduction="none")

    @torch.no_grad()
    def score(
        self,
        present: UInt8[Tensor, "b n size size 3"],
        later: UInt8[Tensor, "b n size size 3"],
        reading: Reading,
    ) -> Float[Tensor, " b"]:
        """Log-probability of progress [nats]."""
        return F.logsigmoid(self(to_unit(present), to_unit(later), reading))
