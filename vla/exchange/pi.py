"""pi0, pi0.5 and pi0-FAST as LeRobot and openpi write them (Black et al. 2024 and 2025; Pertsch et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shapes import decoder_config, shape_of, siglip_config
from .weights import Translation, normalisation, refuse

HEADS = 8
"""Query heads of Gemma 2B and of its expert."""
VLM, EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert.model."
DEAD = ("paligemma_with_expert.gemma_expert.lm_head.weight",)
"""Weights that are in their files and used by nobody."""


class Pi0:
    """pi0: the state is a token of the expert, time is fused with the actions."""

    kind = "pi0"
    fused = True
    prompt, tokens = "{instruction}\n", 48
    state = "vector"
    statistics = "mean_std"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        refuse(self.kind, options, {"use_relative_actions": False, "min_period": 4e-3, "max_period": 4.0})

    def recipe(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the `Recipe`; the sizes are those of the weights."""
        pad = shape_of(tensors, "action_in_proj.weight")[1]
        width = shape_of(tensors, "action_in_proj.weight")[0]
        return {
            **self.common(tensors),
            "head": {
                "_target_": "brachium.vla.heads.expert.ExpertHead",
                "width": width,
                "mlp": shape_of(tensors, f"{EXPERT}layers.0.mlp.gate_proj.weight")[0],
                "heads": HEADS,
                "time": "fused" if self.fused else "modulated",
                "state_token": self.state == "vector",
                "steps": int(self.options.get("num_inference_steps", 10)),
                "solver": "euler",
                "fills": True,
            },
            "width": width,
            "state_pad": pad if self.state == "vector" else 0,
            "action_pad": pad,
        }

    def common(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What all of the family share."""
        return {
            "backbone": {
                "_target_": "brachium.vla.backbones.hf.HFBackbone",
                "config": paligemma_config(tensors, self.options),
                "fit": "pad",
            },
            "points": False,
            "action_horizon": int(self.options.get("chunk_size", 50)),
            "max_tokens": int(self.options.get("tokenizer_max_length", self.tokens)),
            "prompt": self.prompt,
            "special_tokens": True,
            "state": self.state,
            "clean": self.state == "prompt",
            **normalisation(self.options, self.statistics),
        }

    def translation(self, embodiment: str) -> Translation:
        """Names here and there."""
        pairs = [
            ("encoder.backbone.vlm.", VLM),
            (f"head.action_in.{embodiment}.", "action_in_proj."),
            (f"head.action_out.{embodiment}.", "action_out_proj."),
            ("head.time_in.", "action_time_mlp_in." if self.fused else "time_mlp_in."),
            ("head.time_out.", "action_time_mlp_out." if self.fused else "time_mlp_out."),
            ("head.norm.", f"{EXPERT}norm."),
        ]
        if self.state == "vector":
            pairs.append((f"state_in.{embodiment}.", "state_proj."))
        return Translation([*pairs, *_expert_layers(64, f"{EXPERT}layers.")])

    def dead(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that their loader wants and nobody uses, for a model given in their names."""
        words = shape_of(tensors, f"{VLM}lm_head.weight")[0]
        layer = tensors[f"{EXPERT}layers.0.self_attn.q_proj.weight"]
        return {DEAD[0]: layer.new_zeros(words, layer.shape[1])}


class Pi05(Pi0):
    """pi0.5: the state is in the prompt, time modulates the expert's norms."""

    kind = "pi05"
    fused = False
    prompt, tokens = "Task: {instruction}, State: {state};\nAction: ", 200
    state = "prompt"
    statistics = "quantile"


class Pi0Fast(Pi0):
    """pi0-FAST: the language model writes compressed actions; there is no expert."""

    kind = "pi0_fast"
    prompt, tokens = "Task: {instruction}, State: {state};\n", 200
    state = "prompt"
    statistics = "quantile"

    def recipe(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the `Recipe`; what depends on tokenizers is filled in by `read_lerobot`."""
        return {
            **self.common(tensors),
            "head": {
                "_target_": "brachium.vla.heads.vocabulary.VocabularyHead",
                "tokenizer": {
                    "_target_": "brachium.vla.action_tokens.fast.FastTokenizer",
                    "path": str(self.options.get("action_tokenizer_name", "physical-intelligence/fast")),
                },
                "skip": int(self.options.get("fast_skip_tokens", 128)),
                "over": "vocabulary",
            },
        }

    def translation(self, embodiment: str) -> Translation:
        """Names here and there."""
        return Translation([("encoder.backbone.vlm.", VLM)])

    def dead(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None."""
        return {}


def paligemma_config(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the PaliGemma inside; only the tower's heads cannot be read off (So400m has 16 of 72)."""
    language = f"{VLM}model.language_model."
    text = decoder_config(tensors, language, heads=HEADS)
    head, embedding = tensors.get(f"{VLM}lm_head.weight"), tensors.get(f"{language}embed_tokens.weight")
    apart = head is not None and embedding is not None and not torch.equal(head, embedding)
    words = shape_of(tensors, f"{VLM}lm_head.weight")[0]
    tower = f"{VLM}model.vision_tower.vision_model."
    return {
        "_resolved": True,
        "model_type": "paligemma",
        "tie_word_embeddings": not apart,  # LeRobot trains the two apart
        "projection_dim": text["hidden_size"],
        "image_token_id": words - 1,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "projection_dim": text["hidden_size"],
            "projector_hidden_act": "gelu_fast",
            **siglip_config(tensors, tower, options.get("vision_heads")),
        },
        "text_config": {
            "model_type": "gemma",
            "vocab_size": words,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": 0,
            **text,
        },
    }


def _expert_layers(count: int, prefix: str) -> list[tuple[str, str]]:
    """Our flat layers against `transformers`' nested ones."""
    pairs = []
    for k in range(count):
        ours, theirs = f"head.layers.{k}.", f"{prefix}{k}."
        pairs += [(f"{ours}{name}.", f"{theirs}self_attn.{name}.") for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        pairs += [(f"{ours}{name}.", f"{theirs}mlp.{name}.") for name in ("gate_proj", "up_proj", "down_proj")]
        pairs += [(f"{ours}{name}.", f"{theirs}{name}.") for name in ("input_layernorm", "post_attention_layernorm")]
    return pairs
