"""Batches for pretraining: scenes with commands to point at and questions to answer, from one or several stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ..datasets.store import EpisodeStore
from ..errors import SpecMismatchError, StoreError
from .ground import Grounding, SceneBatch, SceneData
from .model import stack_images, tool_pose
from .questions import QuestionEncoder
from .tokenizer import InstructionEncoder


def corpus_of(stores: Sequence[EpisodeStore]) -> set[str]:
    """Every text of the stores, once."""
    texts: set[str] = set()
    for store in stores:
        for episode in store.episodes:
            texts.update(s["text"] for s in episode.meta.get("sentences", ()))
            for question in episode.meta.get("questions", ()):
                texts |= {question["question"], question["answer"]}
    return texts


def same_body(stores: Sequence[EpisodeStore]) -> tuple[int, tuple[int, ...]]:
    """Number of cameras, and where the tool's pose stands in the state, which all stores share."""
    first = stores[0].embodiment
    for store in stores[1:]:
        other = store.embodiment
        if (other.camera_names, tool_pose(other)) != (first.camera_names, tool_pose(first)):
            raise SpecMismatchError(
                f"{store.path} and {stores[0].path} cannot train one model: expected cameras {first.camera_names} and "
                f"the tool pose at {tool_pose(first)} of the state, got {other.camera_names} and {tool_pose(other)}"
            )
    return len(first.camera_names), tool_pose(first)


@dataclass(frozen=True, kw_only=True)
class PretrainBatch:
    """b scenes: commands to point at, and q questions each as tokens and targets (b, q, l)."""

    scenes: SceneBatch
    tokens: Int[Tensor, "b q l"]
    targets: Int[Tensor, "b q l"]
    one_view: Bool[Tensor, "b q"]
    kinds: tuple[tuple[str, ...], ...]


class Mixture:
    """Batches of scenes with questions from several stores; a batch is of one store, drawn by its number of scenes.

    Every draw is a function of (seed, step). For `evaluation` all scenes are held out.
    """

    def __init__(
        self,
        stores: Sequence[EpisodeStore],
        tokenizer: Any,
        max_tokens: int,
        length: int,
        questions: int,
        options: Grounding,
        device: torch.device,
        *,
        evaluation: bool = False,
    ) -> None:
        self.tokenizer, self.questions, self.device, self.seed = tokenizer, questions, device, options.optimization.seed
        self.body = list(tool_pose(stores[0].embodiment))
        words = InstructionEncoder(tokenizer, max_tokens)
        self.parts: list[SceneData] = []
        self.texts: list[list[list[tuple[np.ndarray, np.ndarray, str, bool]]]] = []
        encode = QuestionEncoder(tokenizer, length)
        for store in stores:
            self.parts.append(SceneData(store, words, options, device, evaluation=evaluation))
            self.texts.append([_texts(encode, e.meta.get("questions", ())) for e in store.episodes])
            if not all(self.texts[-1]):
                raise StoreError(
                    f"{store.path} has scenes without questions. Type: brachium record env=pretraining out=SCENES"
                )
        counts = np.array([max(1, len(part.train)) for part in self.parts], float)
        self.share = counts / counts.sum()

    def make(self, step: int) -> PretrainBatch:
        """The training batch of a step."""
        rng = np.random.default_rng([self.seed, step, 0x9E7])
        which = int(rng.choice(len(self.parts), p=self.share))
        part = self.parts[which]
        return self.batch(which, part.train[part.sampler.batch(step)], rng)

    def batch(self, which: int, scenes: np.ndarray, rng: np.random.Generator | None) -> PretrainBatch:
        """Some scenes of a store, with questions drawn by `rng`, or the first ones."""
        rows = []
        for scene in scenes:
            texts = self.texts[which][scene]
            order = np.arange(len(texts)) if rng is None else rng.permutation(len(texts))
            rows.append([texts[int(order[k % len(order)])] for k in range(self.questions)])
        return PretrainBatch(
            scenes=self.parts[which].batch(scenes, rng),
            tokens=torch.from_numpy(np.array([[t[0] for t in row] for row in rows])).to(self.device),
            targets=torch.from_numpy(np.array([[t[1] for t in row] for row in rows])).to(self.device),
            one_view=torch.tensor([[t[3] for t in row] for row in rows], device=self.device),
            kinds=tuple(tuple(t[2] for t in row) for row in rows),
        )

    def frames(self, step: int, count: int) -> UInt8[Tensor, "b n height width 3"]:
        """Unlabelled frames of a step of the first stage."""
        rng = np.random.default_rng([self.seed, step, 0x5EE])
        which = int(rng.choice(len(self.parts), p=self.share))
        part = self.parts[which]
        chosen = np.sort(rng.choice(part.train, size=min(count, len(part.train)), replace=False))
        images = {name: part.store.read_images(name, chosen) for name in part.spec.camera_names}
        return stack_images(images, part.spec, self.device)


def _texts(encode: QuestionEncoder, questions: Sequence[Mapping[str, str]]) -> list[tuple[Any, Any, str, bool]]:
    """(tokens, targets, kind, whether the first view is enough) of every question that is short enough."""
    found = []
    for question in questions:
        made = encode(question["question"], question["answer"])
        if made is not None:
            found.append((*made, question["kind"], "wrist" not in question["question"]))
    return found
