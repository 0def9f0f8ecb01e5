"""SmolVLM and Idefics3: SigLIP vision tower, pixel-shuffle connector, Llama-like language model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from .base import Seen, VLMFamily
from .packed import Packing, given


class SmolVLM(VLMFamily):
    """What `HFBackbone` needs to know of SmolVLM and Idefics3; image tokens stand bare, without markers around them."""

    model_types = ("smolvlm", "idefics3")
    pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    two_way = False

    def __init__(self, vlm: Any, image_size: int | None) -> None:
        self.core = vlm.model
        vision = vlm.config.vision_config
        self.image_size = int(image_size or vision.image_size)
        unit = int(vision.patch_size) * int(vlm.config.scale_factor)
        if self.image_size % unit or self.image_size > int(vision.image_size):
            raise ConfigError(
                f"image_size: expected a multiple of {unit} px up to {vision.image_size}, got {self.image_size}"
            )
        side = self.image_size // int(vision.patch_size)
        self.grid = (side, side)
        self.token_grid = (side // int(vlm.config.scale_factor),) * 2
        self.vision_width = int(vision.hidden_size)

    @property
    def layers(self) -> Any:
        """Llama's."""
        return self.core.text_model.layers

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Seen:
        """Patches and image tokens of images."""
        patches = self.core.vision_model(pixel_values=pixels).last_hidden_state
        return Seen(patches=patches, tokens=self.core.connector(patches))

    def prefix(self, tokens: Float[Tensor, "b n m d"]) -> tuple[Float[Tensor, "b p d"], Bool[Tensor, " p"]]:
        """All images' tokens in a row."""
        flat = tokens.flatten(1, 2)
        return flat, torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)

    def positions(self, cameras: int) -> tuple[Int[Tensor, "x p"], int]:
        """0, 1, 2, ..."""
        count = cameras * self.token_grid[0] * self.token_grid[1]
        return torch.arange(count)[None], count

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
        return self.core.text_model(
            inputs_embeds=embeddings, position_ids=positions[0], attention_mask=mask, use_cache=False, **given(packing)
        ).last_hidden_state
