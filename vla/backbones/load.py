"""Making a model of `transformers`: from a folder or hub name, or from a configuration with random weights."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from ...errors import CheckpointError, ConfigError, did_you_mean
from .source import cannot_load, quiet, require_model_folder


def require_room(vlm: Any, vocab_size: int | None, path: str) -> None:
    rows = vlm.get_input_embeddings().weight.shape[0]
    if vocab_size is not None and vocab_size > rows:
        raise CheckpointError(
            f"{path}: its tokenizer has {vocab_size} tokens, but the model embeds {rows}: they do not belong together"
        )


def load_pretrained(path: str, attention: str) -> Any:
    """The model at `path`, whole, with float32 weights (published ones are bf16, and training needs the digits)."""
    require_model_folder(path)
    try:
        with quiet():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                attn_implementation=attention,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(cannot_load("a backbone", path, error)) from error
    vlm, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise CheckpointError(
            f"cannot load a backbone from {path!r}: {len(missing)} weights are missing, for example {missing[:3]}"
        )
    return vlm


def build(config: dict[str, Any], vocab_size: int | None, attention: str) -> Any:
    """A model with random weights."""
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise ConfigError("a backbone config needs model_type, for example smolvlm or idefics3")
    if vocab_size is not None and not config.get("_resolved"):
        text = {**config.get("text_config", {}), "vocab_size": vocab_size, "pad_token_id": 0}
        config |= {"text_config": text, "pad_token_id": 0, "image_token_id": 1}
    config.pop("_resolved", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers knows no model type {model_type!r}. {did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    try:
        made = AutoConfig.for_model(model_type, **config)
        return AutoModelForImageTextToText.from_config(made, attn_implementation=attention, trust_remote_code=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.backbone.config describes no {model_type} that can be built: {error}") from error
