"""What a backbone gives: features of images and words, whatever the model behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8


@dataclass(frozen=True, kw_only=True)
class BackboneFeatures:
    """Features of b image sets with k texts each.

    Attributes:
        vision: Vision-tower features of every patch, (b, n, p, v).
        grid: Rows and columns of patches; p = rows * columns.
        image: Language-model states at the image tokens, (b, m, d).
        text: Language-model states at the text tokens, (b, k, l, d).
        text_mask: True at real text tokens, (b, k, l).
        readout: Language-model states at the readout tokens after each text, (b, k, r, d).
    """

    vision: Float[torch.Tensor, "b n p v"]
    grid: tuple[int, int]
    image: Float[torch.Tensor, "b m d"]
    text: Float[torch.Tensor, "b k l d"]
    text_mask: Bool[torch.Tensor, "b k l"]
    readout: Float[torch.Tensor, "b k r d"]

    def first_texts(self, count: int) -> BackboneFeatures:
        """The features with the first `count` texts only."""
        return replace(
            self, text=self.text[:, :count], text_mask=self.text_mask[:, :count], readout=self.readout[:, :count]
        )


class Backbone(Protocol):
    """A vision-language model seen as an encoder of observations."""

    width: int
    vision_width: int
    pixel_mean: torch.Tensor

    def fit_pixels(self, images: UInt8[torch.Tensor, "b n height width 3"]) -> None:
        """Set the pixel normalisation from images."""

    def __call__(
        self,
        images: UInt8[torch.Tensor, "b n height width 3"],
        tokens: Int[torch.Tensor, "b k l"],
        token_mask: Bool[torch.Tensor, "b k l"],
    ) -> BackboneFeatures:
        """Encode images and k texts about them; a text sees the images and itself, never the other texts."""
