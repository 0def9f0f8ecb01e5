"""LeRobot's own PI0, PI05, PI0-FAST and SmolVLA, a few thousand random weights each, built without a network."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, CHUNK, STATE, ACTION, PAD, SIDE = 800, 6, 4, 3, 10, 28
KINDS = ("pi0", "pi05", "pi0_fast", "smolvla")
WORDS = [chr(k) for k in range(33, 127)]
BAR = 9 + WORDS.index("|")
"""The token that ends an action of PI0-FAST."""
CAMERAS = {"front": (20, 30), "wrist": (28, 28)}


def text_tokenizer(size=VOCABULARY):
    """A tokenizer of single characters, with the special tokens that SmolVLA asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<fake>", "<global>"]
    words = [*special, " ", "\n", *WORDS]
    words += [f"word{k}" for k in range(size - len(words))]
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake>",
            "global_image_token": "<global>",
        },
    )


def features():
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for name, size in CAMERAS.items()
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))}


def stir(policy, seed=0):
    """Weights large enough that a wrong detail shows, none that are zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "position" not in name:
                parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return policy.eval()


class PublishedFast:
    """FAST as published: byte-level BPE over characters, scipy's DCT; written anew from the paper, as an oracle.

    It also stands in for the processor that LeRobot asks the hub for.
    """

    scale, min_token = 10.0, -60

    def __init__(self, chunks, size=320):
        from tokenizers import ByteLevelBPETokenizer
        from tokenizers.trainers import BpeTrainer
        from transformers import PreTrainedTokenizerFast

        made = ByteLevelBPETokenizer()
        trainer = BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(k) for k in range(120)],
            max_token_length=10000,
        )
        made._tokenizer.train_from_iterator(map(self.text, chunks), trainer)
        self.bpe_tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)

    def text(self, chunk):
        from scipy.fft import dct

        numbers = np.around(dct(np.asarray(chunk), axis=0, norm="ortho") * self.scale)
        return "".join(map(chr, np.maximum(numbers.flatten() - self.min_token, 0).astype(int)))

    def __call__(self, chunks):
        return [self.bpe_tokenizer(self.text(chunk))["input_ids"] for chunk in np.asarray(chunks)]

    def decode(self, rows, h, a):
        from scipy.fft import idct

        texts = [self.bpe_tokenizer.decode(row) for row in rows]
        numbers = np.stack([np.array(list(map(ord, text))).reshape(h, a) + self.min_token for text in texts])
        return idct(numbers / self.scale, axis=1, norm="ortho")

    def save(self, path):
        self.bpe_tokenizer.save_pretrained(path)
        options = {"scale": self.scale, "vocab_size": len(self.bpe_tokenizer), "min_token": self.min_token}
        (Path(path) / "processor_config.json").write_text(json.dumps(options))
        return str(path)


class Given:
    """Stands for a class whose ``from_pretrained`` would ask the hub."""

    def __init__(self, made):
        self.made = made

    def from_pretrained(self, *args, **kwargs):
        return self.made


def smooth_chunks(count, h=CHUNK, a=ACTION, seed=0):
    """Chunks in [-1, 1] that change slowly."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 0.25, (count, h, a)).cumsum(1)
    return np.clip(rng.uniform(-0.6, 0.6, (count, 1, a)) + steps, -1, 1).astype(np.float32)


def make_pi(kind, monkeypatch):
    """One of the pi family, with small Gemmas in place of the two that it knows."""
    import importlib

    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    name = {"pi0": "PI0", "pi05": "PI05", "pi0_fast": "PI0Fast"}[kind]
    config_class = getattr(importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}"), f"{name}Config")

    def gemma(variant):
        width, mlp = (48, 64) if variant == "gemma_2b" else (32, 40)
        return module.GemmaConfig(width=width, depth=3, mlp_dim=mlp, num_heads=8, num_kv_heads=1, head_dim=8)

    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, getattr(module, "PiGemmaForCausalLM", None)

    def small_vlm(config):
        vision, text = config.vision_config, config.text_config
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 24, 32, 2
        vision.num_attention_heads, vision.patch_size, vision.image_size = 2, 14, SIDE
        vision.projection_dim = config.projection_dim = text.hidden_size
        text.vocab_size = VOCABULARY
        return vlm(config)

    def small_expert(config):
        config.vocab_size = VOCABULARY
        return expert(config)

    monkeypatch.setattr(module, "get_gemma_config", gemma)
    monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm)
    if expert is not None:
        monkeypatch.setattr(module, "PiGemmaForCausalLM", small_expert)
    inputs, outputs = features()
    if kind == "pi0_fast":
        fast = PublishedFast(smooth_chunks(200))
        monkeypatch.setattr(module, "AutoProcessor", Given(fast))
        monkeypatch.setattr(module, "AutoTokenizer", Given(text_tokenizer()))
    config = config_class(
        image_resolution=(SIDE, SIDE),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=PAD,
        max_action_dim=PAD,
        device="cpu",
        input_features=inputs,
        output_features=outputs,
    )
    return getattr(module, f"{name}Policy"), config


def make_smolvlm_folder(path):
    """A SmolVLM with its processor, as SmolVLA asks the hub for."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=4, pad_token_id=0)
    SmolVLMForConditionalGeneration(config).save_pretrained(path)
    tokenizer = text_tokenizer()
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=4,
    ).save_pretrained(path)
    return path


def make_smolvla(path):
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    inputs, outputs = features()
    config = SmolVLAConfig(
        vlm_model_name=str(make_smolvlm_folder(Path(path) / "vlm")),
        load_vlm_weights=False,
        num_vlm_layers=4,
        resize_imgs_with_padding=(32, 32),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=PAD,
        max_action_dim=PAD,
        device="cpu",
        input_features=inputs,
        output_features=outputs,
    )
    return SmolVLAPolicy, config


def make_lerobot(kind, path, monkeypatch, seed=0):
    """A policy of a kind with random weights; its class and configuration as well."""
    pytest.importorskip("lerobot")
    made, config = make_smolvla(path) if kind == "smolvla" else make_pi(kind, monkeypatch)
    torch.manual_seed(seed)
    return stir(made(config), seed), made, config


def statistics(seed=0):
    rng = np.random.default_rng(seed)

    def of(dim):
        mean, std = rng.normal(0, 0.5, dim), rng.uniform(0.5, 1.5, dim)
        low, high = mean - 2 * std, mean + 2 * std
        values = {"mean": mean, "std": std, "min": 1.1 * low, "max": 1.1 * high, "q01": low, "q99": high}
        return {k: torch.from_numpy(v.astype(np.float32)) for k, v in values.items()}

    return {"observation.state": of(STATE), "action": of(ACTION)}


def save_lerobot(policy, config, path, stats):
    """What ``save_pretrained`` of a policy and of its processors write, but for the text tokenizer's name."""
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, UnnormalizerProcessorStep

    policy.save_pretrained(path)
    everything = {**config.input_features, **config.output_features}
    common = {"norm_map": config.normalization_mapping, "stats": stats}
    before = NormalizerProcessorStep(features=everything, **common)
    after = UnnormalizerProcessorStep(features=config.output_features, **common)
    for step, name in ((before, "policy_preprocessor"), (after, "policy_postprocessor")):
        PolicyProcessorPipeline(steps=[step], name=name).save_pretrained(path)
    return path, before, after
