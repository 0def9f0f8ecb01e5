"""Diffusion: noise is taken out of a chunk step by step (Ho et al. 2020), with Octo's network (Ghosh et al. 2024).

With alpha^2 the share of the signal and sigma^2 = 1 - alpha^2 that of the noise, x = alpha * actions + sigma * noise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError, did_you_mean
from ..draws import RandomSource, integers, normal
from ..parts import part
from .base import Context, ContextPool, HeadInputs, masked_mean
from .flow import time_features
from .mlp import ChunkMLP

SAMPLERS = ("ddpm", "ddim")
PREDICTS = ("noise", "velocity", "sample")


class DiffusionHead(nn.Module):
    """Denoising diffusion over the whole chunk.

    Args:
        inputs: What the head is built for.
        width: Width of the residual blocks.
        depth: Number of residual blocks.
        predict: What the network answers: the ``noise`` (Octo), the actions themselves (``sample``), or the
            ``velocity`` alpha * noise - sigma * actions (Salimans & Ho 2022), which no level of noise blows up.
        levels: Noise levels in training; their variances follow a cosine (Nichol & Dhariwal 2021).
        sampler: ``ddim`` (Song et al. 2021) takes `steps` of the levels and draws nothing more; ``ddpm`` takes all, and
            its draws are a function of the noise that a chunk begins with.
        steps: Steps of ``ddim``; None for all levels.
        draws: Noise draws a chunk in training; what was read is computed once for all.
        clip: Largest normalised action that sampling may pass through; Octo's 5 is for unit variance, actions scaled to
            [-1, 1] need little more than 1.
    """

    discrete = False
    reads = "states"
    fills = False
    alphas: Tensor

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        width: int = 256,
        depth: int = 3,
        predict: str = "velocity",
        levels: int = 20,
        sampler: str = "ddim",
        steps: int | None = 10,
        draws: int = 4,
        clip: float = 5.0,
    ) -> None:
        super().__init__()
        for name, value, choices in (("sampler", sampler, SAMPLERS), ("predict", predict, PREDICTS)):
            if value not in choices:
                raise ConfigError(f"unknown {name} {value!r}. {did_you_mean(value, choices)}")
        if levels < 2 or not 1 <= (steps or levels) <= levels or draws < 1 or clip <= 0:
            raise ConfigError(
                f"diffusion: expected at least 2 levels, 1 to {levels} steps, at least 1 draw and clip above 0, got "
                f"levels={levels}, steps={steps}, draws={draws}, clip={clip}"
            )
        self.sampler, self.predict, self.draws, self.clip = sampler, predict, draws, clip
        self.steps = levels if sampler == "ddpm" or steps is None else steps
        self.pool = ContextPool(inputs, width)
        self.net = ChunkMLP(inputs, width, depth)
        self.register_buffer("alphas", cosine_alphas(levels), persistent=False)

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: RandomSource,
    ) -> Float[Tensor, " b"]:
        """Squared error of the prediction, averaged over `draws` of noise and level."""
        b, draws, device = len(actions), self.draws, actions.device
        actions = torch.where(step_mask[:, :, None] & dim_mask, actions, 0.0)
        target = actions.repeat_interleave(draws, 0)
        noise = normal(generator, tuple(target.shape)).to(device) * dim_mask
        level = integers(generator, len(self.alphas), (b * draws,)).to(device)
        kept = self.alphas[level][:, None, None]
        alpha, sigma = kept.sqrt(), (1.0 - kept).sqrt()
        wanted = {"noise": noise, "sample": target, "velocity": alpha * noise - sigma * target}[self.predict]
        pooled = self.pool(context).repeat_interleave(draws, 0)
        error = (self._answer(pooled, alpha * target + sigma * noise, level, embodiment).float() - wanted).square()
        return masked_mean(error, step_mask.repeat_interleave(draws, 0), dim_mask).reshape(b, draws).mean(1)

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """Take the noise out, from the highest level to none."""
        with part("head: context"):
            pooled, x = self.pool(context), noise * dim_mask
        draw = _more_noise(noise) if self.sampler == "ddpm" else None
        levels = [round(k) for k in torch.linspace(len(self.alphas) - 1, 0, self.steps).tolist()]
        for level, after in zip(levels, [*levels[1:], None]):
            kept = self.alphas[level]
            later = self.alphas.new_ones(()) if after is None else self.alphas[after]
            with part("head: solver step"):
                answer = self._answer(pooled, x, x.new_full((len(x),), level, dtype=torch.long), embodiment).float()
            clean = self._clean(x, answer, kept.sqrt(), (1.0 - kept).sqrt()).clamp(-self.clip, self.clip)
            if draw is None:
                found = (x - kept.sqrt() * clean) / (1.0 - kept).sqrt()  # of the chunk as it was cut off
                x = later.sqrt() * clean + (1.0 - later).sqrt() * found
            else:  # the posterior of the chain (Ho et al. 2020, eq. 7)
                beta = 1.0 - kept / later
                mean = later.sqrt() * beta / (1.0 - kept) * clean
                mean = mean + (kept / later).sqrt() * (1.0 - later) / (1.0 - kept) * x
                x = mean + (beta * (1.0 - later) / (1.0 - kept)).sqrt() * draw() if after is not None else mean
            x = x * dim_mask
        return x

    def _clean(self, x: Tensor, answer: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The actions that an answer means."""
        if self.predict == "noise":
            return (x - sigma * answer) / alpha
        return answer if self.predict == "sample" else alpha * x - sigma * answer

    def _answer(self, pooled: Tensor, x: Tensor, level: Tensor, embodiment: str) -> Tensor:
        return self.net(pooled, x, time_features((level + 1) / len(self.alphas)), embodiment)


def cosine_alphas(levels: int, offset: float = 0.008) -> Float[Tensor, " levels"]:
    """Share of the signal's variance that is left at each level: a squared cosine, steps of at most 0.999."""
    t = torch.arange(levels + 1, dtype=torch.float64) / levels
    share = torch.cos((t + offset) / (1.0 + offset) * math.pi / 2.0).square()
    betas = (1.0 - share[1:] / share[:-1]).clamp(max=0.999)
    return torch.cumprod(1.0 - betas, 0).float()


def _more_noise(noise: Float[Tensor, "b h a"]) -> Callable[[], Tensor]:
    """More draws for each row, a function of the row alone: a chunk must not depend on what is computed beside it."""
    makers = [torch.Generator().manual_seed(zlib.crc32(row.cpu().numpy().tobytes())) for row in noise]

    def draw() -> Tensor:
        return torch.stack([torch.randn(noise.shape[1:], generator=maker) for maker in makers]).to(noise)

    return draw
