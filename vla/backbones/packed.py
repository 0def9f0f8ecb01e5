"""Attention over several texts on one image prefix, without the scores that the mask would throw away.

Registered with `transformers` as the kernel ``packed``. A text looks at the images and at itself, never at other texts:
of q x q scores that a masked kernel computes, most are wasted. Here each text's scores are with the prefix and its own
tokens alone. The result is the same; in training on a CPU it is several times faster, as memory traffic is what counts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from ...errors import ConfigError
from ..attention import additive
from .packing import Packing

KERNEL = "packed"


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b g k d"],
    value: Float[Tensor, "b g k d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """Attention as `transformers` asks for it, and each text token's share of the prefix, (b, h, t, m).

    Without a packing (vision towers) it is plain attention, and there are no shares.
    """
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is None:
        if attention_mask is None and getattr(module, "is_causal", False):  # nobody made the mask that a text needs
            raise ConfigError(
                "the kernel packed reads texts through HFBackbone alone: set attention=sdpa for other uses"
            )
        if softcap is None:
            found = sdpa(query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=groups > 1)
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            found = _weights((scale * query) @ key.mT, attention_mask, value, softcap) @ value
        return found.transpose(1, 2).contiguous(), None
    query = scale * query
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    m, (_, k, e, _) = len(packing.prefix), packing.own.shape
    first = _weights(query[:, :, :m] @ key[:, :, :m].mT, additive(packing.prefix, query.dtype), value, softcap)
    images = first @ value[:, :, :m]
    mine, keys, values = (part[:, :, m:].unflatten(2, (k, e)) for part in (query, key, value))
    outer = (query[:, :, m:] @ key[:, :, :m].mT).unflatten(2, (k, e))
    inner = mine @ keys.mT
    if softcap is not None:
        outer, inner = (softcap * torch.tanh(scores / softcap) for scores in (outer, inner))
    inner = inner + additive(packing.own, query.dtype)[:, None]
    weights = _weights(torch.cat([outer, inner], dim=-1), None, value, None)
    shares = weights[..., :m].flatten(2, 3)
    texts = shares @ value[:, :, :m] + (weights[..., m:] @ values).flatten(2, 3)
    return torch.cat([images, texts], dim=2).transpose(1, 2).contiguous(), shares


def _weights(scores: Tensor, mask: Tensor | None, like: Tensor, softcap: float | None) -> Tensor:
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(like.dtype)


AttentionInterface.register(KERNEL, packed_attention)
