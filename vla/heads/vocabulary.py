"""Actions as words of the language model itself: RT-2 (Brohan et al. 2023), OpenVLA, pi0-FAST (Pertsch et al. 2025).

The model goes on after the prompt and says the action, token by token, by its own layers. The tokens take the last
words of its vocabulary (those that texts hardly use), or rows of their own where it has none to spare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, did_you_mean
from ..backbones.base import Backbone, Prefix
from ..draws import RandomSource
from ..parts import part
from ..recipe import instantiate
from .base import Context, HeadInputs
from .written import Written, target_loss, write

ROWS = ("vocabulary", "own")
OVER = ("actions", "vocabulary")


class VocabularyHead(nn.Module):
    """The language model as action head.

    Args:
        inputs: What the head is built for; the backbone must be able to go on reading.
        tokenizer: Action tokenizer: class and arguments.
        rows: ``vocabulary`` takes words of the language model: token k is word ``last - skip - k``. ``own`` adds
            embeddings and an output layer to the head, for models that write no words or have none to spare.
        skip: Words at the end of the vocabulary that are left alone (128 in PaliGemma's: its image segments).
        begin: Words read after the prompt and before the action.
        preamble: Words said before the action; they count in the loss, and are not asked for in decoding.
        end: Words said after the action; they count in the loss too.
        over: What a token competes with in the loss: other allowed ``actions``, or the whole ``vocabulary`` (so that a
            model which also talks knows when to act).
        last: Number of the last word; None for the last of the embedding.
        smoothing: Standard deviation of the target's blur over neighbouring tokens, where neighbours are alike and
            compete with each other alone.
    """

    discrete = True
    goes_on = True
    reads = "layers"
    fills = False
    words: Tensor

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        tokenizer: Mapping[str, Any],
        rows: str = "vocabulary",
        skip: int = 0,
        begin: Sequence[int] = (),
        preamble: Sequence[int] = (),
        end: Sequence[int] = (),
        over: str = "actions",
        last: int | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        inputs.require_prefix("vocabulary")
        for name, value, choices in (("rows", rows, ROWS), ("over", over, OVER)):
            if value not in choices:
                raise ConfigError(f"unknown {name} {value!r}. {did_you_mean(value, choices)}")
        self.tokenizer = instantiate(tokenizer)
        self.over, self.smoothing = over, smoothing
        self.begin, self.preamble, self.end = list(begin), list(preamble), list(end)
        size = self.tokenizer.size
        self.embedding: nn.Embedding | None = None
        if rows == "own":
            if begin or preamble or end or over == "vocabulary":
                raise ConfigError("rows=own: the head has words of its own, so no begin, preamble, end or over")
            self.embedding = nn.Embedding(size, inputs.token_dim)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.out = nn.Linear(inputs.token_dim, size)
        else:
            highest = (inputs.vocabulary - 1 if last is None else last) - skip
            if not size <= highest + 1 <= inputs.vocabulary:
                raise ConfigError(
                    f"{size} action tokens do not fit into a vocabulary of {inputs.vocabulary} words (skip={skip}): "
                    "take fewer, or set rows=own"
                )
            self.register_buffer("words", torch.arange(highest, highest - size, -1), persistent=False)

    def loss(
        self,
        context: Context,
        actions: Float[Tensor, "b h a"],
        step_mask: Bool[Tensor, "b h"],
        dim_mask: Bool[Tensor, " a"],
        embodiment: str,
        generator: RandomSource,
    ) -> Float[Tensor, " b"]:
        """Cross-entropy of what is said, averaged over its tokens."""
        backbone, prefix = _speaker(context)
        written = Written.of(self.tokenizer, actions, step_mask, dim_mask)
        if self.embedding is not None:
            states = self._after(backbone, prefix, self.embedding(written.tokens[:, :-1]), written.real[:, :-1])
            return target_loss(self.out(states).float(), written, self._blur)
        said, real, counts = self.sentence(written)
        states = self._after(backbone, prefix, backbone.embed(said[:, :-1]), real[:, :-1])
        if self.over == "actions":
            first = len(self.begin) + len(self.preamble)
            states = states[:, first : first + written.tokens.shape[1]]
            return target_loss(backbone.next_words(states)[..., self.words].float(), written, self._blur)
        states, targets = states[:, len(self.begin) :], said[:, len(self.begin) :]
        counts = counts[:, len(self.begin) :]
        logs = backbone.next_words(states).float().log_softmax(-1)
        error = -logs.gather(-1, targets[..., None])[..., 0]
        return torch.where(counts, error, 0.0).sum(1) / counts.sum(1).clamp(min=1)

    def sentence(self, written: Written) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"], Bool[Tensor, "b m"]]:
        """``[begin][preamble][action][end]`` as words of the language model; which are real; which count."""
        b, device = len(written.tokens), written.tokens.device
        head = torch.tensor([*self.begin, *self.preamble], dtype=torch.long, device=device).expand(b, -1)
        said = torch.cat([head, self.words[written.tokens]], dim=1)
        before = torch.ones(head.shape, dtype=torch.bool, device=device)
        real = torch.cat([before, written.real], dim=1)
        counts = torch.cat([before, written.counts], dim=1)
        if self.end:  # right after the last real token
            more = len(self.end)
            said, real, counts = (nn.functional.pad(x, (0, more)) for x in (said, real, counts))
            place = real.sum(1, keepdim=True) + torch.arange(more, device=device)
            said.scatter_(1, place, torch.tensor(self.end, device=device).expand(b, -1))
            real.scatter_(1, place, True)
            counts.scatter_(1, place, True)
        return said, real, counts

    def sample(
        self, context: Context, noise: Float[Tensor, "b h a"], dim_mask: Bool[Tensor, " a"], embodiment: str
    ) -> Float[Tensor, "b h a"]:
        """The likeliest allowed token at every position, greedily; `noise` gives only the shape."""
        backbone, prefix = _speaker(context)
        forced = torch.tensor([*self.begin, *self.preamble], dtype=torch.long, device=noise.device)
        if len(forced):
            prefix = _go_on(backbone, prefix, backbone.embed(forced.expand(len(noise), -1)))

        def follow(token: Int[Tensor, " b"] | None, before: Int[Tensor, " b"]) -> Float[Tensor, "b size"]:
            nonlocal prefix
            if token is not None:
                embedded = (
                    backbone.embed(self.words[token][:, None])
                    if self.embedding is None
                    else self.embedding(token)[:, None]
                )
                with part("head: next token"):
                    prefix = _go_on(backbone, prefix, embedded)
            last = prefix.states[:, -1]
            return self.out(last) if self.embedding is not None else backbone.next_words(last)[..., self.words]

        return write(self.tokenizer, follow, noise, dim_mask)

    @torch.no_grad()
    def speak(self, context: Context, steps: int) -> Int[Tensor, "b steps"]:
        """What the language model would say if it were free to: words, greedily, whether actions or not."""
        backbone, prefix = _speaker(context)
        if self.begin:
            begin = torch.tensor(self.begin, device=prefix.mask.device)
            prefix = _go_on(backbone, prefix, backbone.embed(begin.expand(len(prefix.mask), -1)))
        said = [backbone.next_words(prefix.states[:, -1]).argmax(-1)]
        for _ in range(steps - 1):
            prefix = _go_on(backbone, prefix, backbone.embed(said[-1][:, None]))
            said.append(backbone.next_words(prefix.states[:, -1]).argmax(-1))
        return torch.stack(said, dim=1)

    def _embed(self, backbone: Backbone, tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        return backbone.embed(self.words[tokens]) if self.embedding is None else self.embedding(tokens)

    @property
    def _blur(self) -> float:
        return self.smoothing if self.tokenizer.ordered else 0.0

    @staticmethod
    def _after(
        backbone: Backbone, prefix: Prefix, embedded: Float[Tensor, "b m d"], real: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b n d"]:
        """States from which each token of a sentence follows, the first from the end of the prompt."""
        p = prefix.states.shape[1]
        return backbone.extend(prefix, embedded, real).states[:, p - 1 :]


def _speaker(context: Context) -> tuple[Backbone, Prefix]:
    if context.backbone is None or context.prefix is None or not context.prefix.keys:
        raise ConfigError("vocabulary: expected a backbone that can go on reading, got none")
    return context.backbone, context.prefix


def _go_on(backbone: Backbone, prefix: Prefix, embedded: Float[Tensor, "b q d"]) -> Prefix:
    return backbone.extend(prefix, embedded, torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device))
