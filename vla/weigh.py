"""Ask a pretrained model questions that have a few possible answers, and how likely it takes each to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import ConfigError
from .pretrained import Pretrained
from .questions import Speller

AT_ONCE = 96
"""Texts that share one pass over the images at most."""


class AnswerScorer:
    """Weighs answers: the probability of each of some answers, all others left out.

    Every text ``question <bos> answer <eos>`` is one of k that share a pass over the images, so many questions about
    what is seen cost little more than one.

    Args:
        model: Pretrained vision-language model.
    """

    def __init__(self, model: Pretrained) -> None:
        self.model, self._spell = model, Speller(model.tokenizer)
        tokenizer = model.tokenizer
        self._pad, self._begin, self._end = (int(getattr(tokenizer, f"{n}_token_id")) for n in ("pad", "bos", "eos"))

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], asked: Sequence[tuple[str, Sequence[str]]]) -> list[np.ndarray]:
        """Probabilities (a,) of the a answers of each question, which sum to one.

        Args:
            images: uint8 (height, width, 3), one a camera, in the order of the model's cameras.
            asked: Questions, each with its possible answers.

        Raises:
            ConfigError: A question without answers.
        """
        for question, answers in asked:
            if not answers:
                raise ConfigError(f"expected possible answers to {question!r}, got none")
        spelt = [
            ([*self._spell(question), self._begin], [*self._spell(answer), self._end])
            for question, answers in asked
            for answer in answers
        ]
        found = [self._log_probabilities(images, spelt[k : k + AT_ONCE]) for k in range(0, len(spelt), AT_ONCE)]
        scores, taken = torch.cat(found) if found else torch.zeros(0), 0
        weights = []
        for _, answers in asked:
            weights.append(scores[taken : taken + len(answers)].double().softmax(0).numpy())
            taken += len(answers)
        return weights

    def _log_probabilities(
        self, images: Sequence[np.ndarray], spelt: Sequence[tuple[list[int], list[int]]]
    ) -> torch.Tensor:
        """Sums over the tokens of each answer (k,)."""
        length = max(len(before) + len(after) for before, after in spelt)
        tokens = torch.full((1, len(spelt), length), self._pad)
        for row, (before, after) in enumerate(spelt):
            tokens[0, row, length - len(before) - len(after) :] = torch.tensor(before + after)
        encoder: Any = self.model.encoder
        pixels = torch.from_numpy(np.stack(images))[None]
        states = encoder.backbone(pixels, tokens, tokens != self._pad).text[0]
        totals = []
        for row, (_, after) in enumerate(spelt):
            says = encoder.backbone.next_words(states[row, -len(after) - 1 : -1]).float()
            totals.append(-F.cross_entropy(says, torch.tensor(after), reduction="sum"))
        return torch.stack(totals)
