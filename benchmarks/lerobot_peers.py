"""LeRobot's own PI0 and SmolVLA in small, with random weights, built without a network."""

from __future__ import annotations

import importlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

VOCABULARY, STATE, ACTION, PAD, CHUNK = 2000, 14, 7, 32, 50
CAMERAS = ("front", "wrist")


@dataclass(frozen=True)
class Sizes:
    """Of a policy: language model, expert and vision tower."""

    width: int
    mlp: int
    depth: int
    head_dim: int
    expert: int
    expert_mlp: int
    vision: int
    vision_mlp: int
    vision_depth: int
    vision_heads: int
    side: int
    patch: int


SIZES = {
    "pi0": {
        "2 M": Sizes(128, 512, 4, 16, 64, 256, 96, 384, 2, 2, 112, 14),
        "10 M": Sizes(256, 1024, 6, 32, 128, 512, 192, 768, 4, 6, 224, 14),
        "39 M": Sizes(512, 2048, 6, 64, 256, 1024, 384, 1536, 4, 6, 224, 14),
    },
    "smolvla": {
        "2 M": Sizes(96, 256, 8, 16, 72, 192, 96, 384, 2, 2, 128, 16),
        "9 M": Sizes(192, 512, 8, 32, 144, 384, 192, 768, 4, 6, 256, 16),
        "32 M": Sizes(384, 1024, 8, 64, 288, 768, 384, 1536, 4, 6, 512, 16),
    },
}
"""Kind -> weights in all -> sizes. Images have the real models' tokens in pi0 from 10 M on, in SmolVLA with 32 M."""


def tokenizer() -> Any:
    """Words and single characters, with the special tokens that SmolVLA asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<fake>", "<global>"]
    words = [*special, " ", "\n", *(chr(k) for k in range(33, 127))]
    words += [f"word{k}" for k in range(VOCABULARY - len(words))]
    made = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Split("", "isolated")
    made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global>"},
    )


def features(side: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes in and what comes out, in their words."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {f"observation.images.{n}": PolicyFeature(FeatureType.VISUAL, (3, side, side)) for n in CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))}


def make_pi0(sizes: Sizes) -> Any:
    """A PI0Policy; the two Gemmas that it knows by name get other sizes."""
    module = importlib.import_module("lerobot.policies.pi0.modeling_pi0")
    config_class = importlib.import_module("lerobot.policies.pi0.configuration_pi0").PI0Config
    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def gemma(variant: str) -> Any:
        big = variant == "gemma_2b"
        width, mlp = (sizes.width, sizes.mlp) if big else (sizes.expert, sizes.expert_mlp)
        return module.GemmaConfig(
            width=width, depth=sizes.depth, mlp_dim=mlp, num_heads=8, num_kv_heads=1, head_dim=sizes.head_dim
        )

    def small_vlm(config: Any) -> Any:
        vision, text = config.vision_config, config.text_config
        vision.hidden_size, vision.intermediate_size = sizes.vision, sizes.vision_mlp
        vision.num_hidden_layers, vision.num_attention_heads = sizes.vision_depth, sizes.vision_heads
        vision.patch_size, vision.image_size = sizes.patch, sizes.side
        vision.projection_dim = config.projection_dim = text.hidden_size
        text.vocab_size = VOCABULARY
        return vlm(config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = VOCABULARY
        return expert(config)

    inputs, outputs = features(sizes.side)
    config = config_class(
        image_resolution=(sizes.side, sizes.side),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=PAD,
        max_action_dim=PAD,
        device="cpu",
        input_features=inputs,
        output_features=outputs,
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "get_gemma_config", gemma))
        stack.enter_context(patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm))
        stack.enter_context(patch.object(module, "PiGemmaForCausalLM", small_expert))
        return module.PI0Policy(config)


def make_smolvla(folder: Path, sizes: Sizes) -> Any:
    """A SmolVLAPolicy; the SmolVLM that it asks the hub for is written into `folder`."""
    import transformers as hf
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.width // sizes.head_dim,
        "num_key_value_heads": 2,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": sizes.vision,
        "intermediate_size": sizes.vision_mlp,
        "num_hidden_layers": sizes.vision_depth,
        "num_attention_heads": sizes.vision_heads,
        "image_size": sizes.side,
        "patch_size": sizes.patch,
    }
    config = hf.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, image_token_id=4, pad_token_id=0)
    hf.SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(),
        tokenizer=tokenizer(),
        video_processor=hf.SmolVLMVideoProcessor(),
        image_seq_len=64,
    ).save_pretrained(folder)
    inputs, outputs = features(sizes.side)
    return SmolVLAPolicy(
        SmolVLAConfig(
            vlm_model_name=str(folder),
            load_vlm_weights=False,
            num_vlm_layers=sizes.depth,
            resize_imgs_with_padding=(sizes.side, sizes.side),
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
            max_state_dim=PAD,
            max_action_dim=PAD,
            device="cpu",
            input_features=inputs,
            output_features=outputs,
        )
    )


def stir(policy: Any, seed: int = 0) -> None:
    """Random weights with which a wrong detail shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "position" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def statistics(seed: int = 0) -> dict[str, Any]:
    """Made-up statistics of states and actions."""
    rng = np.random.default_rng(seed)

    def of(dim: int) -> dict[str, Any]:
        mean, std = rng.normal(0, 0.5, dim), rng.uniform(0.5, 1.5, dim)
        low, high = mean - 2 * std, mean + 2 * std
        values = {"mean": mean, "std": std, "min": low, "max": high, "q01": low, "q99": high}
        return {key: torch.from_numpy(value.astype(np.float32)) for key, value in values.items()}

    return {"observation.state": of(STATE), "action": of(ACTION)}


def save(policy: Any, folder: Path) -> tuple[Any, Any]:
    """Write what ``save_pretrained`` of a policy and its processors write; returns the two normalisers."""
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, UnnormalizerProcessorStep

    config = policy.config
    everything = {**config.input_features, **config.output_features}
    common = {"norm_map": config.normalization_mapping, "stats": statistics()}
    before = NormalizerProcessorStep(features=everything, **common)
    after = UnnormalizerProcessorStep(features=config.output_features, **common)
    policy.save_pretrained(folder)
    for step, name in ((before, "policy_preprocessor"), (after, "policy_postprocessor")):
        PolicyProcessorPipeline(steps=[step], name=name).save_pretrained(folder)
    return before, after
