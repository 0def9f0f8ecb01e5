"""A small word tokenizer for models trained from scratch; pretrained backbones bring their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError
from .backbones.source import cannot_load, require_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files that hold a tokenizer's words; one of them is enough."""
PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"


def word_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    """A lower-case word-level tokenizer over the words of `corpus`, as a Hugging Face fast tokenizer.

    Words it has never seen become ``<unk>``; the vocabulary is sorted, so the same words give the same ids.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    lower, splitter = Lowercase(), Whitespace()
    words: set[str] = set()
    for text in corpus:  # by the tokenizer's own lower case, which is not quite Python's
        words.update(word for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text)))
    vocabulary = {word: k for k, word in enumerate([PAD, UNKNOWN, BEGIN, END, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = lower
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub name, which must be able to pad.

    Raises:
        CheckpointError: None there, or it has neither a padding nor an end token.
    """
    from transformers import AutoTokenizer

    require_model_folder(path)
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers would make an empty tokenizer of the kind that config.json names
        raise CheckpointError(f"{path} has no tokenizer: expected one of {', '.join(VOCABULARIES)} beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(cannot_load("a tokenizer", path, error)) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(f"{path}: expected a tokenizer with a padding or end token, got one with neither")
    return tokenizer


class InstructionEncoder:
    """Instructions (and states) -> token ids of one fixed length, padded on the left, with a cache.

    Args:
        tokenizer: Any Hugging Face tokenizer with a pad token.
        length: Tokens kept; longer prompts lose their beginning.
        prompt: What is read: ``{instruction}`` and perhaps ``{state}`` between other words.
        special_tokens: Whether the tokenizer adds its own (a begin token, for most).
        clean: Strip instructions, and read ``_`` and line breaks in them as spaces.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        prompt: str = "{instruction}",
        special_tokens: bool = False,
        clean: bool = False,
    ) -> None:
        self.tokenizer, self.length, self.prompt, self.special = tokenizer, length, prompt, special_tokens
        self.clean = clean
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self.unknown = int(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else self.pad
        self._cache: dict[str, np.ndarray] = {}

    def __call__(self, instructions: Iterable[str], state: np.ndarray | None = None) -> np.ndarray:
        """Return int64 (b, l); `state` (b, s), normalised to [-1, 1], is written as whole numbers from 0 to 255."""
        texts = [t.strip().replace("_", " ").replace("\n", " ") if self.clean else t for t in instructions]
        if state is None:
            return np.stack([self._cached(self.prompt.format(instruction=text)) for text in texts])
        said = [" ".join(map(str, row)) for row in state_bins(state)]
        return np.stack([self._encode(self.prompt.format(instruction=t, state=s)) for t, s in zip(texts, said)])

    def _cached(self, text: str) -> np.ndarray:
        if text not in self._cache:
            self._cache[text] = self._encode(text)
        return self._cache[text]

    def _encode(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, add_special_tokens=self.special)["input_ids"][-self.length :]
        return np.array([self.pad] * (self.length - len(ids)) + ids, np.int64)


def state_bins(state: np.ndarray) -> np.ndarray:
    """The bin of each value among 256 from -1 to 1, as pi0.5 and pi0-FAST were trained on: below -1 it is -1."""
    return np.digitize(state, np.linspace(-1.0, 1.0, 257)[:-1]) - 1


IMAGE = "<image>"
LOCATIONS = 96
"""Location tokens along an image edge; what writes the texts (`envs.questions`) has the same number."""


def subword_tokenizer(corpus: Iterable[str], *, size: int = 640, locations: int = LOCATIONS) -> PreTrainedTokenizerBase:
    """A lower-case byte-level BPE tokenizer with location tokens, as a Hugging Face fast tokenizer.

    Frequent words of `corpus` are single tokens; any other text is spelt, so nothing is unknown. Tokens 0 and 1 are the
    padding and the image token. ``<loc00>`` and so on stand for a place along an image edge (PaliGemma, Beyer et al.
    2024). The same corpus gives the same tokens.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteDecoder
    from tokenizers.models import BPE
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = ByteDecoder()
    special = [PAD, IMAGE, BEGIN, END, *(f"<loc{k:02d}>" for k in range(locations))]
    trainer = BpeTrainer(
        vocab_size=size + locations,
        special_tokens=special,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
    )
