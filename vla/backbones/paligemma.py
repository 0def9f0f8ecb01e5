"""PaliGemma and PaliGemma 2: SigLIP vision tower, linear connector, Gemma language model (Beyer et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from .base import Seen, VLMFamily
from .packed import Packing, given


class PaliGemma(VLMFamily):
    """What `HFBackbone` needs to know of PaliGemma: images see each other, and positions count from 1.

    Gemma scales its word embeddings by the root of the width, inside the embedding or inside the model according to the
    version of `transformers`. Words and images are therefore embedded by the model's own methods only.
    """

    model_types = ("paligemma",)
    pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    two_way = True

    def __init__(self, vlm: Any, image_size: int | None) -> None:
        self.vlm = vlm
        vision = vlm.config.vision_config
        self.image_size = int(vision.image_size)
        if image_size not in (None, self.image_size):
            raise ConfigError(
                f"image_size: PaliGemma's vision tower takes {self.image_size} px alone, got {image_size}"
            )
        side = self.image_size // int(vision.patch_size)
        self.grid = self.token_grid = (side, side)
        self.vision_width = int(vision.hidden_size)

    @property
    def layers(self) -> Any:
        """Gemma's."""
        return self.vlm.model.language_model.layers

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Seen:
        """Patches and image tokens of images."""
        found = self.vlm.get_image_features(pixel_values=pixels)
        return Seen(patches=found.last_hidden_state, tokens=found.pooler_output)

    def prefix(self, tokens: Float[Tensor, "b n m d"]) -> tuple[Float[Tensor, "b p d"], Bool[Tensor, " p"]]:
        """All images' tokens in a row."""
        flat = tokens.flatten(1, 2)
        return flat, torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)

    def positions(self, cameras: int) -> tuple[Int[Tensor, "x p"], int]:
        """1, 2, 3, ..."""
        count = cameras * self.grid[0] * self.grid[1]
        return 1 + torch.arange(count)[None], 1 + count

    def read(
        self,
        embeddings: Float[Tensor, "b q d"],
        mask: Float[Tensor, "b 1 q q"] | None,
        positions: Int[Tensor, "x b q"],
        visual: Bool[Tensor, " p"],
        deep: tuple[Tensor, ...],
        packing: Packing | None,
    ) -> Float[Tensor, "b q d"]:
        """One pass of the language model."""
        return self.vlm.model.language_model(
            inputs_embeds=embeddings, position_ids=positions[0], attention_mask=mask, use_cache=False, **given(packing)
        ).last_hidden_state
