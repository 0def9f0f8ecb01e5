"""Texts of the tiny language model as numbers: a word each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ....errors import CheckpointError

PAD, BEGIN, END, ANSWER, PARSE, NEXT = "<pad>", "<s>", "</s>", "=>", "<parse>", "<next>"
SPECIAL = (PAD, BEGIN, END, ANSWER, PARSE, NEXT)
_WORD = re.compile(r"</?\w+>|=>|\w+|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Lower-case words and signs."""
    return _WORD.findall(text.lower())


class WordTokenizer:
    """A closed vocabulary of words.

    Args:
        vocabulary: The words, in the order of their numbers; the first are `SPECIAL`.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self._numbers = {word: number for number, word in enumerate(self.vocabulary)}
        self.pad, self.begin, self.end = (self._numbers[word] for word in (PAD, BEGIN, END))

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordTokenizer:
        """The words of some texts."""
        words = sorted({word for text in texts for word in split_words(text)} - set(SPECIAL))
        return cls((*SPECIAL, *words))

    def unknown(self, text: str) -> list[str]:
        """Words that are not in the vocabulary, in their order."""
        return [word for word in dict.fromkeys(split_words(text)) if word not in self._numbers]

    def encode(self, text: str) -> list[int]:
        """Numbers of the words.

        Raises:
            KeyError: A word that is not known; ask `unknown` first.
        """
        return [self._numbers[word] for word in split_words(text)]

    def decode(self, numbers: Iterable[int]) -> str:
        """The words with a space between them."""
        return " ".join(self.vocabulary[number] for number in numbers)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` as the `tokenizers` package reads it."""
        added = [
            {"id": k, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for k, w in enumerate(SPECIAL)
        ]
        pattern = {"Regex": _WORD.pattern}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._numbers, "unk_token": PAD},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=1) + "\n")
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> WordTokenizer:
        """Read ``tokenizer.json``.

        Raises:
            CheckpointError: It is none of this kind.
        """
        try:
            numbers: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
            words = sorted(numbers, key=lambda word: numbers[word])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: expected tokenizer.json with a vocabulary of words: {error}") from error
        if tuple(words[: len(SPECIAL)]) != SPECIAL:
            raise CheckpointError(f"{folder}/tokenizer.json: expected the words {SPECIAL} first, got {words[:6]}")
        return cls(words)
