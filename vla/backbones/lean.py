"""Layers of `transformers` run with fewer passes over memory on a CPU.

A layer that is made lean computes what it did before, with `fused.linear` in place of its linear layers and what
follows each of them. Called in a way not known here, or elsewhere than on a CPU, it runs as it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..attention import turned_by
from ..fused import linear
from .packed import KERNEL

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
"""`transformers`' names of what `fused.linear` knows."""


class Lean:
    """Takes the place of a layer's `forward`.

    Args:
        layer: A layer of `VISION` or `DECODER`.
        run: What computes it.
    """

    def __init__(self, layer: nn.Module, run: Callable[..., Tensor | None]) -> None:
        self.layer: Any = layer
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        states = args[0] if args else kwargs["hidden_states"]
        if states.device.type == "cpu" and not torch.compiler.is_compiling() and _plain(self.layer.self_attn):
            found = self.run(self.layer, *args, **kwargs)
            if found is not None:
                return found
        return type(self.layer).forward(self.layer, *args, **kwargs)


def make_lean(layers: Iterable[nn.Module]) -> None:
    """Make the layers lean that are of a class known here; others stay as they are."""
    for layer in layers:
        run = RUNS.get(type(layer).__name__)
        if run is not None and _activation(layer) is not None:
            layer.forward = Lean(layer, run)  # type: ignore[method-assign]


def _plain(attention: Any) -> bool:
    """Whether attention is the usual one, and nobody looks on."""
    watched = attention._forward_hooks or attention._forward_pre_hooks
    return not watched and str(attention.config._attn_implementation) in ("sdpa", KERNEL)


def _activation(layer: Any) -> str | None:
    config = getattr(layer.mlp, "config", None)
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return ACTIVATIONS.get(str(name))


def _vision(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """A layer of SigLIP: norm, attention, norm, two linear layers."""
    if attention_mask is not None or kwargs:
        return None
    attention = layer.self_attn
    inner = layer.layer_norm1(hidden_states)
    query, key, value = (
        linear(inner, part).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    seen = sdpa(query, key, value, scale=attention.scale).transpose(1, 2).flatten(2)
    states = linear(seen, attention.out_proj, plus=hidden_states)
    inner = linear(layer.layer_norm2(states), layer.mlp.fc1, activation=_activation(layer))
    return linear(inner, layer.mlp.fc2, plus=states)


def _decoder(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A layer of Gemma or Llama: norm, attention with rotary positions, norm, gated linear layers."""
    if attention_mask is None or position_embeddings is None or kwargs.get("packing") is not None:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    inner = _normed(layer.input_layernorm, hidden_states)
    query, key, value = (
        linear(inner, part).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if query.dtype == torch.float32:
        cos, sin = (angle[:, None] for angle in position_embeddings)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        query, key = turned_by(query, cos, sin), turned_by(key, cos, sin)
    else:
        turn: Any = import_module(type(attention).__module__).apply_rotary_pos_emb
        query, key = turn(query, key, *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    shared = query.shape[1] != key.shape[1]
    seen = sdpa(query, key, value, attn_mask=attention_mask, scale=attention.scaling, enable_gqa=shared)
    states = linear(seen.transpose(1, 2).flatten(2), attention.o_proj, plus=hidden_states)
    inner = _normed(layer.post_attention_layernorm, states)
    gate = linear(inner, mlp.gate_proj, activation=_activation(layer))
    return linear(linear(inner, mlp.up_proj, times=gate), mlp.down_proj, plus=states)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """A root-mean-square norm of `transformers` in one pass; Gemma adds one to its weight."""
    offset = OFFSETS.get(type(norm).__name__)
    if offset is None or x.dtype != torch.float32 or norm._forward_hooks or norm._forward_pre_hooks:
        found: Tensor = norm(x)
        return found
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return rms_norm(x, x.shape[-1:], norm.weight + offset if offset else norm.weight, eps)


OFFSETS = {"LlamaRMSNorm": 0.0, "GemmaRMSNorm": 1.0}
RUNS: dict[str, Callable[..., Tensor | None]] = {
    "SiglipEncoderLayer": _vision,
    "SmolVLMEncoderLayer": _vision,
    "Idefics3EncoderLayer": _vision,
    "GemmaDecoderLayer": _decoder,
    "LlamaDecoderLayer": _decoder,
}
"""Name of a class of `transformers` -> what computes it."""
