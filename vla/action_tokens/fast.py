"""Actions as compressed frequencies: FAST (Pertsch et al. 2025).

A discrete cosine transform over the steps of each dimension, rounded; the numbers, low frequencies first, are one
string, which byte-pair encoding shortens. The published tokenizer ("FAST+") and those that others fit load too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import CheckpointError, ConfigError, DecodeError
from .base import Grammar, require_tokens

NEVER = 1 << 30
"""Values written by a token that no action has."""
FILES = ("processor_config.json", "tokenizer.json")


class FastTokenizer:
    """FAST, fitted to data (`fit`) or published (`path`).

    Args:
        scale: Frequencies are multiplied by this before they are rounded: the step of rounding is 1 / scale.
        vocabulary: Size of the vocabulary that is fitted.
        lowest: Smallest rounded frequency that has a token; others are cut off.
        merges: Pairs of strings that byte-pair encoding joins, as `fit` gives them.
        highest: Largest rounded frequency that has a token.
        path: Folder or hub name of a published tokenizer (``tokenizer.json``, ``processor_config.json``); its scale and
            range take the place of those here.
        tokenizer: Content of a ``tokenizer.json`` in place of a path, as checkpoints hold it.
    """

    ordered = False

    def __init__(
        self,
        *,
        scale: float = 10.0,
        vocabulary: int = 1024,
        lowest: int | None = None,
        highest: int | None = None,
        merges: Sequence[Sequence[str]] | None = None,
        path: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        if scale <= 0 or vocabulary < 2:
            raise ConfigError(f"FAST: expected scale above 0 and a vocabulary from 2, got {scale} and {vocabulary}")
        self.scale, self.vocabulary = scale, vocabulary
        self.lowest, self.highest = lowest, highest
        self._bpe: Any = None
        if path is not None:
            tokenizer, options = _published(path)
            self.scale, self.lowest = float(options["scale"]), int(options["min_token"])
        self._content = tokenizer
        if tokenizer is not None:
            from tokenizers import Tokenizer

            if self.lowest is None:
                raise ConfigError("FAST: a tokenizer needs the lowest frequency that it writes")
            self._bpe = Tokenizer.from_str(tokenizer)
        elif merges is not None:
            if lowest is None or highest is None:
                raise ConfigError("FAST: merges need the lowest and highest frequency")
            self._bpe = _make([(str(a), str(b)) for a, b in merges], highest - lowest + 1)

    @property
    def bpe(self) -> Any:
        """The byte-pair encoding; a ConfigError where there is none yet."""
        if self._bpe is None:
            raise ConfigError(
                "FAST has no vocabulary yet: brachium train fits one to the data; or give tokenizer.path=FOLDER of a "
                "published one"
            )
        return self._bpe

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self.bpe.get_vocab_size())

    @cached_property
    def _bytes(self) -> list[bytes]:
        """What each token writes, in UTF-8."""
        words = sorted(self.bpe.get_vocab().items(), key=lambda item: item[1])
        if not _is_byte_level(self.bpe):
            return [word.encode() for word, _ in words]
        table = {character: byte for byte, character in _byte_letters().items()}
        return [bytes(table[c] for c in word) if all(c in table for c in word) else b"" for word, _ in words]

    @cached_property
    def grammar(self) -> Grammar:
        """A token writes as many values as it has characters."""
        writes, inside, leaves = [], [], []
        whole = not _is_byte_level(self.bpe)
        for content in self._bytes:
            begun = len(content.decode()) if whole else sum(byte & 0xC0 != 0x80 for byte in content)
            fits = bool(content) and (whole or _writes_values(content))
            writes.append(begun if fits else NEVER)
            inside.append(fits and not whole and content[0] & 0xC0 == 0x80)
            leaves.append(fits and not whole and content[-1] >= 0xC0)
        return Grammar(writes=torch.tensor(writes), inside=torch.tensor(inside), leaves=torch.tensor(leaves))

    @cached_property
    def _range(self) -> tuple[int, int]:
        """The lowest and highest frequency that can be written."""
        lowest = int(self.lowest or 0)
        if self.highest is not None:
            return lowest, int(self.highest)
        letters = {c for content in self._bytes for c in content.decode(errors="ignore")}
        return lowest, lowest + max(map(ord, letters), default=0)

    def values(self, h: int, a: int) -> int:
        """One for every frequency of every dimension."""
        return h * a

    def frequencies(self, actions: Float[Tensor, "b h a"]) -> Int[Tensor, "b h a"]:
        """Rounded frequencies, those of the vocabulary alone."""
        found = torch.einsum("kh,bha->bka", dct_matrix(actions.shape[1]).to(actions), actions)
        rounded: Tensor = (found * self.scale).round().long()
        return rounded

    def encode(
        self, actions: Float[Tensor, "b h a"], step_mask: Bool[Tensor, "b h"]
    ) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Tokens of each chunk."""
        bpe, (lowest, highest) = self.bpe, self._range
        numbers = self.frequencies(actions).clamp(lowest, highest) - lowest
        rows = [bpe.encode("".join(map(chr, row))).ids for row in numbers.flatten(1).tolist()]
        longest = max((len(row) for row in rows), default=0)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for k, row in enumerate(rows):
            tokens[k, : len(row)] = torch.tensor(row, dtype=torch.long)
            real[k, : len(row)] = True
        tokens, real = tokens.to(actions.device), real.to(actions.device)
        return tokens, real, real

    def decode(self, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], h: int, a: int) -> Float[Tensor, "b h a"]:
        """The actions that the tokens write.

        Raises:
            DecodeError: Tokens that are none, or that write another number of values than a chunk has.
        """
        require_tokens(tokens[real], self.size)
        rows = []
        for row, mask in zip(tokens.cpu(), real.cpu()):
            content = b"".join(self._bytes[k] for k in row[mask].tolist())
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise DecodeError(f"these tokens cut a value in two: {error}") from error
            if len(text) != h * a:
                raise DecodeError(
                    f"expected tokens that write {h * a} values ({h} steps of {a} dimensions), got {len(text)}"
                )
            rows.append([ord(c) for c in text])
        lowest = self._range[0]
        numbers = (torch.tensor(rows, dtype=torch.float32).reshape(-1, h, a) + lowest) / self.scale
        return torch.einsum("kh,bka->bha", dct_matrix(h), numbers).to(tokens.device)

    def fit(self, chunks: Iterable[Tensor]) -> Mapping[str, Any] | None:
        """Learn the range and the pairs from normalised chunks of each embodiment; nothing where they are there."""
        if self._bpe is not None:
            return {"tokenizer": self._content, "lowest": self.lowest, "scale": self.scale} if self._content else None
        rows = [row for part in chunks for row in self.frequencies(part).flatten(1).tolist()]
        lowest, highest = min(map(min, rows)), max(map(max, rows))
        alphabet = highest - lowest + 1
        if alphabet > self.vocabulary:
            raise ConfigError(
                f"FAST: rounded frequencies take {alphabet} values, more than a vocabulary of {self.vocabulary}: raise "
                "tokenizer.vocabulary or lower tokenizer.scale"
            )
        merges = _learn(("".join(chr(k - lowest) for k in row) for row in rows), alphabet, self.vocabulary)
        return {"lowest": lowest, "highest": highest, "merges": merges}


@lru_cache(maxsize=16)
def dct_matrix(h: int) -> Float[Tensor, "h h"]:
    """Orthonormal DCT-II over h steps: row k is frequency k; its transpose is its inverse."""
    k, n = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(h, dtype=torch.float64)[None]
    rows = math.sqrt(2.0 / h) * torch.cos(math.pi * (2.0 * n + 1.0) * k / (2.0 * h))
    rows[0] /= math.sqrt(2.0)
    return rows.float()


def _make(merges: Sequence[tuple[str, str]], alphabet: int) -> Any:
    """A byte-pair encoding over the characters 0 to `alphabet`, whole chunks being its words."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    words = [chr(k) for k in range(alphabet)]
    words += [a + b for a, b in merges]
    return Tokenizer(BPE({word: k for k, word in enumerate(words)}, list(merges)))


def _learn(texts: Iterable[str], alphabet: int, vocabulary: int) -> list[list[str]]:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=[chr(k) for k in range(alphabet)],
        max_token_length=10000,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [list(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _published(path: str) -> tuple[str, dict[str, Any]]:
    """Content of ``tokenizer.json``, and the options, of a folder or hub name."""
    from transformers.utils import cached_file

    try:
        found = [Path(path, name) if Path(path).is_dir() else Path(str(cached_file(path, name))) for name in FILES]
        options = json.loads(found[0].read_text())
        missing = [name for name in ("scale", "min_token") if name not in options]
        if missing:
            raise CheckpointError(f"{found[0]}: expected scale and min_token, missing {missing}")
        return found[1].read_text(), options
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot load a FAST tokenizer from {path!r}: expected a folder with {list(FILES)}, or a hub name that can "
            f"be reached.\nThe library says: {error}"
        ) from error


def _is_byte_level(bpe: Any) -> bool:
    return type(bpe.decoder).__name__ == "ByteLevel"


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    spare = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + k) for k, byte in enumerate(spare)}


def _writes_values(content: bytes) -> bool:
    """Whether some bytes may stand in the UTF-8 of values below 2048, which take one or two bytes each.

    They may begin with the second byte of a value, and end with the first of one.
    """
    open_ = content[0] & 0xC0 == 0x80
    for byte in content:
        follows = byte & 0xC0 == 0x80
        if follows != open_ or (not follows and 0x80 <= byte < 0xC2) or byte >= 0xE0:
            return False
        open_ = not follows and byte >= 0xC2
    return True
