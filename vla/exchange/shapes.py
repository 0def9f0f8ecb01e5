"""Sizes of a vision-language model, read off its weights: published checkpoints name a variant, not its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers whose weights start with ``PREFIX<number>.``."""
    found = [re.match(re.escape(prefix) + r"(\d+)\.", key) for key in tensors]
    return 1 + max((int(m.group(1)) for m in found if m), default=-1)


def shape_of(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of one weight; a CheckpointError that names it where it is missing."""
    if key not in tensors:
        near = [name for name in tensors if name.rpartition(".")[2] == key.rpartition(".")[2]][:3]
        raise CheckpointError(f"expected a weight {key}, got none; there are {len(tensors)}, such as {near}")
    return tuple(tensors[key].shape)


def siglip_config(tensors: Mapping[str, Tensor], prefix: str, heads: int | None) -> dict[str, Any]:
    """Configuration of a SigLIP tower whose weights start with `prefix`; heads of 72 where none are given."""
    width, _, patch, _ = shape_of(tensors, f"{prefix}embeddings.patch_embedding.weight")
    places = shape_of(tensors, f"{prefix}embeddings.position_embedding.weight")[0]
    layer = f"{prefix}encoder.layers."
    return {
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{layer}0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_layers(tensors, layer),
        "num_attention_heads": heads or (width // 72 if width % 72 == 0 else max(1, width // 64)),
        "image_size": patch * math.isqrt(places),
        "patch_size": patch,
        "vision_use_head": f"{prefix}head.probe" in tensors,
    }


def decoder_config(
    tensors: Mapping[str, Tensor], prefix: str, *, heads: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """Configuration of a Gemma or Llama decoder whose layers start with ``PREFIXlayers.``."""
    layer = f"{prefix}layers.0."
    rows, width = shape_of(tensors, f"{layer}self_attn.q_proj.weight")
    size = head_dim or rows // (heads or 1)
    return {
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{layer}mlp.gate_proj.weight")[0],
        "num_hidden_layers": count_layers(tensors, f"{prefix}layers."),
        "num_attention_heads": rows // size,
        "num_key_value_heads": shape_of(tensors, f"{layer}self_attn.k_proj.weight")[0] // size,
        "head_dim": size,
    }
