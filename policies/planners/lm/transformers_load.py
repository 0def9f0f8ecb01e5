"""Language and image-text models of `transformers`, from a folder or the hub, with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ....errors import CheckpointError, ConfigError, NotFoundError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
_TYPE = "Type a folder with config.json and tokenizer.json, or a name of huggingface.co such as Qwen/Qwen3-0.6B"


def load(name: str, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and its processor where it takes images (else None).

    Raises:
        NotFoundError: No such folder or hub name, or the hub cannot be reached.
        ConfigError: A model of a kind that `transformers` does not know, a device or dtype that is none.
    """
    import torch
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    from ....vla.backbones.source import cannot_load, quiet, require_model_folder

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}. {did_you_mean(dtype, DTYPES)}")
    place = _device(device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # half precision is slower there, and scores are compared
    try:
        require_model_folder(name)
    except CheckpointError as error:
        raise NotFoundError(f"{error}\n{_TYPE}") from error
    source = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
            model = kind.from_pretrained(source, trust_remote_code=False, **kwargs)
            processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False) if sees else None
            tokenizer = processor.tokenizer if sees else AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise NotFoundError(f"{cannot_load('a language model', name, error)}\n{_TYPE}") from error
    except (ValueError, KeyError) as error:
        raise ConfigError(cannot_load("a language model", name, error)) from error
    return model.to(place).eval().requires_grad_(False), tokenizer, processor


def _device(device: str) -> Any:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}. {did_you_mean(device, ('auto', 'cpu', 'cuda'))}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: no CUDA device here. Type device=cpu, or see: brachium doctor")
    return place


class Cutter:
    """Text into tokens and back, for texts that are parts of others.

    Args:
        tokenizer: Of `transformers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before = "a"  # what stands before a part while it is encoded or decoded: no tokenizer leaves it out
        self._before_ids = self.ids(self._before)
        bos = tokenizer.bos_token_id
        self.lead = [bos] if bos is not None and list(tokenizer(self._before).input_ids)[:1] == [bos] else []
        """What the tokenizer puts before every text; what it puts behind (an end) has no place in a prompt."""

    def ids(self, text: str) -> list[int]:
        """Tokens of a text without special ones of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def middle(self, text: str) -> list[int]:
        """Tokens of a text that stands in the middle of another.

        Tokenizers in the way of SentencePiece put a space before every text; then the tokens are those behind a text
        that keeps its own.

        Raises:
            ConfigError: Whatever the tokenizer makes of it, it is not read back as that text.
        """
        if not text:
            return []
        alone = self.ids(text)
        if self._reads(self._before_ids, alone, self._before + text):
            return alone
        for before in ("\n", ".", self._before):
            first, both = self.ids(before), self.ids(before + text)
            rest = both[len(first) :]
            if both[: len(first)] == first and self._reads(self._before_ids, rest, self._before + text):
                return rest
        raise ConfigError(f"expected a text that the tokenizer can write and read back, got {text!r}")

    def text(self, ids: list[int]) -> str:
        """What tokens in the middle of a text say; special ones say nothing."""
        special = set(self.tokenizer.all_special_ids)
        whole = self._decode(self._before_ids + [i for i in ids if i not in special])
        return whole[len(self._before) :] if whole.startswith(self._before) else whole

    def _reads(self, before: list[int], ids: list[int], text: str) -> bool:
        return self._decode(before + ids) == text

    def _decode(self, ids: list[int]) -> str:
        said: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return said


def guide_tokenizer(tokenizer: Any, vocab: int) -> Any:
    """The tokenizer as `llguidance` wants it, which takes a second to make.

    Raises:
        ConfigError: The package is not installed, or cannot use this tokenizer.
    """
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ConfigError("JSON of a schema needs llguidance. Type: pip install llguidance") from error
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab)
    except ValueError as error:
        raise ConfigError(f"llguidance cannot use this tokenizer: {error}") from error


def json_matcher(guide: Any, schema: dict[str, object]) -> Any:
    """What tells which tokens keep to a JSON schema.

    Raises:
        ConfigError: The schema is none.
    """
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(guide, LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))
        complaint = matcher.get_error() if matcher.is_error() else ""
    except ValueError as error:
        complaint = str(error)
    if complaint:
        raise ConfigError(f"expected a JSON schema, got one that llguidance cannot use: {complaint}")
    return matcher
