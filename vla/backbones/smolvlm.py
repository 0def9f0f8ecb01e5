"""SmolVLM and Idefics3: SigLIP vision tower, pixel-shuffle connector, Llama-like language model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError
from .base import Seen, VLMFamily


class SmolVLM(VLMFamily):
    """What `HFBackbone` needs to know of SmolVLM and Idefics3; image tokens stand bare, without markers around them."""

    model_types = ("smolvlm", "idefics3")

    def __init__(self, vlm: Any, image_size: int | None) -> None:
        self.core, self.language_model = vlm.model, vlm.model.text_model
        self.parts = {
            "vision": self.core.vision_model,
            "connector": self.core.connector,
            "language": self.core.text_model,
        }
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

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Seen:
        """Patches and image tokens of images.

        The tower's own `forward` looks which patches are padding, and waits for the device to say so; here none are.
        """
        tower = self.core.vision_model
        embedded = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        embedded = embedded + tower.embeddings.position_embedding(self._places(pixels.device))
        patches = tower.post_layernorm(tower.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state)
        return Seen(patches=patches, tokens=self.core.connector(patches))

    def _places(self, device: torch.device) -> Int[Tensor, " p"]:
        """Which of the position embeddings, learnt for the tower's own size, belong to the patches of an image."""
        own, side = int(self.core.vision_model.embeddings.num_patches_per_side), self.grid[0]
        edges = torch.arange(1 / own, 1.0, 1 / own, device=device)
        share = (torch.arange(side, device=device, dtype=torch.float32) * (1.0 / side)).clamp(max=1.0 - 1e-6)
        along = torch.bucketize(share, edges, right=True)
        return (along[:, None] * own + along).flatten()
