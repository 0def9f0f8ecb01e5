"""What is done to images in training, so that policies bear what generators get wrong.

Observation and goal are augmented each for itself (GHIL-Glue, Hatch et al. 2024): a policy that saw both changed alike
would learn to compare pixels, and generated images differ from seen ones in just that.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def relight(
    images: Float[Tensor, "b n 3 height width"], generator: torch.Generator, amount: float = 0.15
) -> Float[Tensor, "b n 3 height width"]:
    """Another brightness, contrast and tint a sample, the same in all its cameras."""
    if amount <= 0.0:
        return images
    b = len(images)
    gain = 1.0 + amount * (2.0 * torch.rand(b, 1, 3, 1, 1, generator=generator) - 1.0)
    shift = amount * (2.0 * torch.rand(b, 1, 1, 1, 1, generator=generator) - 1.0)
    return (images * gain.to(images) + shift.to(images)).clamp(-1.0, 1.0)


def blur(
    images: Float[Tensor, "b n 3 height width"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b n 3 height width"]:
    """Gaussian blur of a standard deviation a sample [pixels]; 0 leaves a sample as it is."""
    offsets = torch.arange(-2, 3, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.to(images)[:, None].clamp(min=1e-3)).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    b, n, c, height, width = images.shape
    weight = kernel.repeat_interleave(n * c, 0)
    flat = images.reshape(1, b * n * c, height, width)
    flat = F.conv2d(F.pad(flat, (2, 2, 0, 0), mode="replicate"), weight[:, None, None, :], groups=b * n * c)
    flat = F.conv2d(F.pad(flat, (0, 0, 2, 2), mode="replicate"), weight[:, None, :, None], groups=b * n * c)
    return flat.reshape(images.shape)


def degrade(
    images: Float[Tensor, "b n 3 height width"], generator: torch.Generator, amount: float = 1.0
) -> Float[Tensor, "b n 3 height width"]:
    """Images as a generator might have made them: another light, blurred, noisy.

    They are not moved: a pixel of a small image is a centimetre on the table.

    Args:
        images: Pixels from -1 to 1.
        generator: Of all draws.
        amount: Factor of all that is done; 0 changes nothing.
    """
    if amount <= 0.0:
        return images
    b = len(images)
    changed = blur(relight(images, generator, 0.15 * amount), 0.9 * amount * torch.rand(b, generator=generator))
    strength = 0.08 * amount * torch.rand(b, 1, 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (changed + (strength * noise).to(images)).clamp(-1.0, 1.0)
