"""SmolVLA as LeRobot writes it (Shukor et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .pi import _expert_layers
from .shapes import decoder_config, shape_of, siglip_config
from .weights import Translation, normalisation, refuse

VLM, EXPERT = "vlm_with_expert.vlm.", "vlm_with_expert.lm_expert."
HEAD_DIM = 64
"""Of SmolLM2's attention."""


class SmolVLA:
    """SmolVLA: the first layers of a SmolVLM, the state in the prefix, joint and cross layers in turn."""

    kind = "smolvla"
    tokens = 48

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        expected = {"add_image_special_tokens": False, "adapt_to_pi_aloha": False, "attention_mode": "cross_attn"}
        expected |= {"use_delta_joint_actions_aloha": False, "prefix_length": -1}
        refuse(self.kind, options, {**expected, "min_period": 4e-3, "max_period": 4.0})

    def recipe(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the `Recipe`; the sizes are those of the weights."""
        config = smolvlm_config(tensors, self.options)
        width, pad = shape_of(tensors, "action_in_proj.weight")
        layers = config["text_config"]["num_hidden_layers"]
        if layers != decoder_config(tensors, EXPERT, head_dim=config["text_config"]["head_dim"])["num_hidden_layers"]:
            raise CheckpointError("SmolVLA with fewer layers in the expert than in the language model: not converted")
        size, _ = self.options.get("resize_imgs_with_padding") or (None, None)
        return {
            "backbone": {
                "_target_": "brachium.vla.backbones.hf.HFBackbone",
                "config": config,
                "image_size": size,
                "fit": "pad_start",
                "two_way": True,
                "scale": True,
            },
            "head": {
                "_target_": "brachium.vla.heads.expert.ExpertHead",
                "width": width,
                "mlp": shape_of(tensors, f"{EXPERT}layers.0.mlp.gate_proj.weight")[0],
                "joint_every": int(self.options.get("self_attn_every_n_layers", 2)),
                "state_token": False,
                "two_way": False,
                "norm_offset": 0.0,
                "activation": "silu",
                "eps": float(config["text_config"]["rms_norm_eps"]),
                "steps": int(self.options.get("num_steps", 10)),
                "solver": "euler",
                "fills": True,
            },
            "points": False,
            "action_horizon": int(self.options.get("chunk_size", 50)),
            "max_tokens": int(self.options.get("tokenizer_max_length", self.tokens)),
            "width": width,
            "prompt": "{instruction}\n",
            "special_tokens": True,
            "state": "prefix",
            "state_pad": shape_of(tensors, "state_proj.weight")[1],
            "action_pad": pad,
            **normalisation(self.options, "mean_std"),
        }

    def translation(self, embodiment: str) -> Translation:
        """Names here and there."""
        pairs = [
            ("encoder.backbone.vlm.", VLM),
            (f"state_in.{embodiment}.", "state_proj."),
            (f"head.action_in.{embodiment}.", "action_in_proj."),
            (f"head.action_out.{embodiment}.", "action_out_proj."),
            ("head.time_in.", "action_time_mlp_in."),
            ("head.time_out.", "action_time_mlp_out."),
            ("head.norm.", f"{EXPERT}norm."),
        ]
        return Translation([*pairs, *_expert_layers(64, f"{EXPERT}layers.")])

    def dead(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None."""
        return {}


def smolvlm_config(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the SmolVLM inside; the rotary base is SmolVLA's own, 10 000."""
    text = decoder_config(tensors, f"{VLM}model.text_model.", head_dim=int(options.get("head_dim", HEAD_DIM)))
    vision = siglip_config(tensors, f"{VLM}model.vision_model.", options.get("vision_heads", None))
    mixed = shape_of(tensors, f"{VLM}model.connector.modality_projection.proj.weight")[1]
    words = shape_of(tensors, f"{VLM}model.text_model.embed_tokens.weight")[0]
    return {
        "_resolved": True,
        "model_type": "smolvlm",
        "scale_factor": math.isqrt(mixed // vision["hidden_size"]),
        "image_token_id": min(49190, words - 1),
        "pad_token_id": 2 if words > 2 else 0,
        "vision_config": vision,
        "text_config": {
            "model_type": "llama",
            "vocab_size": words,
            "pad_token_id": 2 if words > 2 else 0,
            "rms_norm_eps": float(options.get("rms_norm_eps", 1e-5)),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **text,
        },
    }
