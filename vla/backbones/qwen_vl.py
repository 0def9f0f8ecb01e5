"""Qwen2-VL's descendants, Qwen2.5-VL and Qwen3-VL: merged patches between markers, and positions of three axes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError
from .base import Seen, VLMFamily


class QwenVL(VLMFamily):
    """What `HFBackbone` needs to know of Qwen2.5-VL and Qwen3-VL.

    An image is ``<vision_start>``, its merged patches, ``<vision_end>``. Positions have a time, a row and a column
    (Wang et al. 2024); what follows an image goes on from the largest of them. Qwen3-VL also adds features of lower
    layers of the tower to the first layers of the language model (DeepStack).
    """

    model_types = ("qwen2_5_vl", "qwen3_vl")

    default_size = 224
    """Edge of an image unless another is given [px], rounded to whole merged patches."""

    def __init__(self, vlm: Any, image_size: int | None) -> None:
        self.vlm, self.config, self.language_model = vlm, vlm.config, vlm.model.language_model
        visual = vlm.model.visual
        self.parts = {"vision": visual, "connector": visual.merger, "language": self.language_model}
        vision = vlm.config.vision_config
        self.patch, self.merge = int(vision.patch_size), int(vision.spatial_merge_size)
        self.frames = int(vision.temporal_patch_size)
        unit = self.patch * self.merge
        self.image_size = int(image_size or max(unit, self.default_size // unit * unit))
        if self.image_size % unit:
            raise ConfigError(f"image_size: expected a multiple of {unit} px, got {self.image_size}")
        side = self.image_size // self.patch
        self.grid, self.merged = (side, side), side // self.merge
        self.token_grid = (self.merged, self.merged)
        self.vision_width = int(vision.hidden_size)
        clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.pixels = clip if vlm.config.model_type == "qwen2_5_vl" else half

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Seen:
        """Patches and image tokens of images."""
        i, (rows, columns) = len(pixels), self.grid
        units = pixels.reshape(i, 3, self.merged, self.merge, self.patch, self.merged, self.merge, self.patch)
        flat = units.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]  # merged patches together, then channels
        flat = flat.expand(*flat.shape[:-3], self.frames, *flat.shape[-2:])  # a still image is a video that stands
        sizes = torch.tensor([[1, rows, columns]] * i, device=pixels.device)
        visual = self.vlm.model.visual
        found = visual(flat.reshape(i * rows * columns, -1), grid_thw=sizes, return_dict=True)
        patches = found.last_hidden_state.unflatten(0, (-1, self.merge**2))
        if hasattr(visual, "get_window_index"):  # Qwen2.5-VL's tower works in windows, and leaves patches in that order
            patches = patches[torch.argsort(visual.get_window_index(sizes)[0].to(patches.device))]
        patches = patches.reshape(i, self.merged, self.merged, self.merge, self.merge, -1)
        deep = getattr(found, "deepstack_features", None) or ()
        return Seen(
            patches=patches.permute(0, 1, 3, 2, 4, 5).reshape(i, rows * columns, -1),
            tokens=found.pooler_output.unflatten(0, (i, -1)),
            deep=tuple(features.unflatten(0, (i, -1)) for features in deep),
        )

    def prefix(self, tokens: Float[Tensor, "b n m d"]) -> tuple[Float[Tensor, "b p d"], Bool[Tensor, " p"]]:
        """Images in a row, each between its markers."""
        b, n, m = tokens.shape[:3]
        ids = torch.tensor([self.config.vision_start_token_id, self.config.vision_end_token_id], device=tokens.device)
        start, end = self.vlm.get_input_embeddings()(ids).to(tokens.dtype)
        parts = [start.expand(b, n, 1, -1), tokens, end.expand(b, n, 1, -1)]
        visual = torch.ones(n, m + 2, dtype=torch.bool, device=tokens.device)
        visual[:, [0, -1]] = False
        return torch.cat(parts, dim=2).flatten(1, 2), visual.flatten()

    def positions(self, cameras: int) -> tuple[Int[Tensor, "x p"], int]:
        """Time, row and column of every token of the images."""
        side, found, start = self.merged, [], 0
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        inner = torch.stack([torch.zeros(side * side, dtype=torch.long), rows.flatten(), columns.flatten()])
        for _ in range(cameras):
            found += [torch.full((3, 1), start), start + 1 + inner, torch.full((3, 1), start + 1 + side)]
            start += side + 2
        return torch.cat(found, dim=1), start
