"""Images to the square that a vision tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

FITS = ("stretch", "pad", "pad_start")
Images = Any
"""uint8 images of b observations from n cameras: (b, n, height, width, 3), or one (b, height, width, 3) a camera where
their sizes differ."""


def squares(images: Images, side: int, fit: str) -> Tensor:
    """Images at the edge `side` [px], (b, n, 3, side, side), still 0..255, in memory of their own."""
    if isinstance(images, (tuple, list)):
        return torch.cat([squares(image[:, None], side, fit) for image in images], dim=1)
    pixels: Tensor = images.permute(0, 1, 4, 2, 3)
    if pixels.shape[-2:] == (side, side):
        return pixels.to(torch.float32, copy=True)
    return resize(pixels.flatten(0, 1).float(), side, fit).unflatten(0, pixels.shape[:2])


def pixel_statistics(sets: Sequence[Images], side: int, fit: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over several sets of images, scaled to 0..1, each (1, 3, 1, 1)."""
    pixels = torch.cat([(squares(images, side, fit) / 255.0).flatten(0, 1) for images in sets])
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-3)
    return mean.reshape(1, 3, 1, 1), deviation.reshape(1, 3, 1, 1)


def resize(images: Float[Tensor, "i 3 height width"], side: int, fit: str) -> Float[Tensor, "i 3 side side"]:
    """Images at the edge `side` [px], black where nothing is.

    Args:
        images: Of any range that has black at 0.
        side: Edge of the result.
        fit: ``stretch`` to the square (with antialiasing); or keep the shape and ``pad`` both ends equally, as openpi
            does, or the left and the top (``pad_start``), as SmolVLA does. These two do not antialias: published
            weights were trained so.
    """
    height, width = images.shape[-2:]
    if (height, width) == (side, side):
        return images
    if fit == "stretch":
        return nn.functional.interpolate(
            images, size=(side, side), mode="bilinear", antialias=True, align_corners=False
        )
    ratio = max(width / side, height / side)
    rows, columns = int(height / ratio), int(width / ratio)
    scaled = nn.functional.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False)
    down, across = side - rows, side - columns
    top, left = (down // 2, across // 2) if fit == "pad" else (down, across)
    return torch.nn.functional.pad(scaled, (left, across - left, top, down - top))
