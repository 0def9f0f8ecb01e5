"""Tiny language models with random weights and byte-pair tokenizers trained on the spot, as folders."""

from __future__ import annotations

TEXTS = [
    "I would: 1. put the red cube in the bowl.\n2. put the blue cube in the drawer.\n3. done.\n",
    "Human: how would you sort the cubes? Robot: I would: 1. open the drawer.\n2. done.\n\n",
    'The sky is blue, the carburetor is dirty. {"skill": "put", "thing": "red cube", "n": [1, 2, 3]}\n',
]
# How Llama 3 and Qwen cut texts: full stops take line ends along, words their space.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_tokenizer(kind="words", bos=False, template=False, size=420):
    """``words``: byte level, cut at words; ``whole``: byte level, merges over spaces; ``space``: as SentencePiece."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=kind == "space", unk_token=None))
    letters = pre_tokenizers.ByteLevel.alphabet()
    if kind == "space":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        letters = [chr(i) for i in range(33, 127)] + ["▁", "\n"]
    else:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cut = [pre_tokenizers.Split(Regex(WORDS), "isolated"), level] if kind == "words" else [level]
        made.pre_tokenizer = pre_tokenizers.Sequence(cut)
        made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"pad_token": "<pad>", "bos_token": "<s>" if bos else None, "eos_token": "</s>"}
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, **tokens, additional_special_tokens=[AddedToken(t, special=True) for t in SPECIAL[3:]]
    )
    found.chat_template = TEMPLATE if template else None
    return found


def make_lm(path, kind="llama", tokenizer=None):
    """A folder with a model whose likelihoods are far from even."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, Qwen2Config

    tokenizer = tokenizer or make_tokenizer()
    common = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    configs = {
        "llama": lambda: LlamaConfig(**common, **sizes),
        "qwen2": lambda: Qwen2Config(**common, **sizes),
        "gemma3": lambda: Gemma3TextConfig(
            **common, **sizes, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256),
        "mamba": lambda: MambaConfig(**common, hidden_size=32, num_hidden_layers=2, state_size=4),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[kind]())
    _sharpen(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_vlm(path, kind="llava"):
    """A folder with an image-text model and its processor."""
    import torch

    tokenizer = make_tokenizer(template=True)
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    text |= {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    torch.manual_seed(0)
    if kind == "llava":
        from transformers import (
            CLIPImageProcessor,
            CLIPVisionConfig,
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
            LlavaProcessor,
        )

        vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text, head_dim=8), image_token_index=token["<image>"]
        )
        model = LlavaForConditionalGeneration(config)
        pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            chat_template=TEMPLATE,
            num_additional_image_tokens=1,
        )
    else:
        from transformers import (
            Qwen2_5_VLConfig,
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLProcessor,
            Qwen2VLImageProcessor,
            Qwen2VLVideoProcessor,
        )

        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 8}
        vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32}
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=token["<|image_pad|>"],
            video_token_id=token["<|video_pad|>"],
            vision_start_token_id=token["<|vision_start|>"],
            vision_end_token_id=token["<|vision_end|>"],
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        small = {"patch_size": 8, "min_pixels": 256, "max_pixels": 4096}
        template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**small), tokenizer, Qwen2VLVideoProcessor(**small), chat_template=template
        )
    _sharpen(model)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def _sharpen(model):
    """Random weights of the usual size give nearly even likelihoods, under which mistakes would hide."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "conv" not in name:
                weight.mul_(6.0 if "embed" in name or "lm_head" in name or "wte" in name else 3.0)
