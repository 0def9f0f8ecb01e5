"""PaliGemma and PaliGemma 2: SigLIP vision tower, linear connector, Gemma language model (Beyer et al. 2024)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from .base import Seen, VLMFamily


class PaliGemma(VLMFamily):
    """What `HFBackbone` needs to know of PaliGemma: images and prompt see each other (prefix-LM).

    Gemma scales its word embeddings by the root of the width, inside the embedding or inside the model according to the
    version of `transformers`. Words and images are therefore embedded by the model's own methods only.
    """

    model_types = ("paligemma",)
    two_way = True

    def __init__(self, vlm: Any, image_size: int | None) -> None:
        self.vlm, self.language_model = vlm, vlm.model.language_model
        core = vlm.model
        self.parts = {
            "vision": core.vision_tower,
            "connector": core.multi_modal_projector,
            "language": core.language_model,
        }
        vision = vlm.config.vision_config
        self.image_size = int(vision.image_size)
        if image_size not in (None, self.image_size):
            raise ConfigError(
                f"image_size: PaliGemma's vision tower takes {self.image_size} px alone, got {image_size}"
            )
        side = self.image_size // int(vision.patch_size)
        self.grid = self.token_grid = (side, side)
        self.vision_width = int(vision.hidden_size)

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Seen:
        """Patches and image tokens of images."""
        found = self.vlm.get_image_features(pixel_values=pixels)
        return Seen(patches=found.last_hidden_state, tokens=found.pooler_output)
