"""Batches for pretraining: scenes with commands to point at and questions to answer, from one or several stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ..datasets.store import EpisodeStore
from ..errors import ConfigError, SpecMismatchError, StoreError
from .ground import PIXELS, Grounding, SceneBatch, SceneData
from .looking import Looks, middles, token_labels
from .model import stack_images, tool_pose
from .questions import IGNORE, NamePriors, QuestionEncoder, Speller, bits
from .tokenizer import InstructionEncoder

COVER = "cover"
"""Extra field of a store of scenes: which thing covers each cell of each camera's image."""
AT_ONCE = 1000
"""Scenes whose texts are spelt at once."""
THINGS = 8
"""Things of a scene at most."""
SEEN = 8.0
"""Pixels from which on a thing counts as visible."""

TESTS = ("pair", "paraphrase")
"""Splits of scenes that are for scores only."""
SEEDS = 100_000
"""Seeds of tables for each robot."""
TEST_TABLES, TEST_SEED = 150, 2_000_000
"""Tables of each of them, and the first of their seeds, far from those of training."""


def record_all(
    scenes: Mapping[str, Callable[..., Any]],
    recorder: Callable[..., Any],
    tables: Mapping[str, int],
    folder: Path,
) -> tuple[list[str], dict[str, str]]:
    """Record what is not there yet: training scenes of every robot, and test scenes of the first; their folders."""
    if unknown := sorted(set(tables) - set(scenes)):
        raise ConfigError(f"tables: expected robots of {sorted(scenes)}, got {unknown}")
    stores, tests = [], {}
    for number, (robot, count) in enumerate(tables.items()):  # no table twice: one robot's are held out from another's
        stores.append(str(folder / robot))
        recorder(env=scenes[robot], out=stores[-1], episodes=count, seed=number * SEEDS)
    first = scenes[next(iter(tables))]
    for split in TESTS:
        tests[split] = str(folder / split)
        recorder(env=partial(first, split=split), out=tests[split], episodes=TEST_TABLES, seed=TEST_SEED)
    return stores, tests


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


def names_of(stores: Sequence[EpisodeStore]) -> tuple[str, ...]:
    """Every name of a thing, sorted."""
    names = {name for store in stores for episode in store.episodes for name in episode.meta.get("names", ()) if name}
    return tuple(sorted(names))


def words_of(names: Sequence[str]) -> tuple[str, ...]:
    """Every word of some names, sorted."""
    return tuple(sorted({word for name in names for word in name.split()}))


@dataclass(frozen=True, kw_only=True)
class PretrainBatch:
    """b scenes with k commands to point at and q questions: texts (b, k + q, l), targets of the questions (b, q, l).

    ``priors`` are rows of the table of `NamePriors`, for each target.
    """

    scenes: SceneBatch
    texts: Int[Tensor, "b t l"]
    targets: Int[Tensor, "b q l"]
    priors: Int[Tensor, "b q l"]
    one_view: Bool[Tensor, "b q"]
    looks: Looks
    kinds: tuple[tuple[str, ...], ...]

    @property
    def commands(self) -> int:
        """Number of commands k, which come first."""
        return self.texts.shape[1] - self.targets.shape[1]

    def questions_only(self) -> PretrainBatch:
        """The same without commands."""
        k = self.commands
        looks = replace(self.looks, things=self.looks.things[:, :, k:], views=self.looks.views[:, :, k:])
        return replace(self, texts=self.texts[:, k:], looks=looks)


@dataclass(frozen=True, kw_only=True)
class SceneTexts:
    """All q questions of a scene: arrays as in `EncodedText`, a row a question, and whether one view is enough."""

    tokens: Int[np.ndarray, "q l"]
    targets: Int[np.ndarray, "q l"]
    priors: Int[np.ndarray, "q l"]
    looks: UInt8[np.ndarray, "q 2 l"]
    views: UInt8[np.ndarray, "q 2 l"]
    one_view: Bool[np.ndarray, " q"]
    kinds: tuple[str, ...]


class Mixture:
    """Batches of scenes with questions from several stores; a batch is of one store, drawn by its number of scenes.

    Every draw is a function of (seed, step). For `evaluation` all scenes are held out.

    Args:
        stores: Of labelled scenes with questions.
        tokenizer: Tokenizer.
        max_tokens: Tokens of a command.
        length: Tokens of a question with its answer.
        questions: Questions a scene in a batch.
        options: Seed, batch size, commands a scene, held-out scenes.
        grids: Rows and columns of the model's image tokens, and of its patches.
        names: Of the things that texts may name (`names_of`).
        device: Where batches go.
        evaluation: Whether to hold all out.
    """

    def __init__(
        self,
        stores: Sequence[EpisodeStore],
        *,
        tokenizer: Any,
        max_tokens: int,
        length: int,
        questions: int,
        options: Grounding,
        grids: tuple[tuple[int, int], tuple[int, int]],
        names: tuple[str, ...],
        device: torch.device,
        evaluation: bool = False,
    ) -> None:
        self.tokenizer, self.questions, self.device, self.seed = tokenizer, questions, device, options.optimization.seed
        self.grid, self.words = grids[0], words_of(names)
        self.priors = NamePriors(tokenizer, names)
        self.body = list(tool_pose(stores[0].embodiment))
        encode = InstructionEncoder(tokenizer, max_tokens)
        self.parts: list[SceneData] = []
        self.texts: list[list[SceneTexts]] = []
        self.commands: list[np.ndarray] = []
        self.names: list[np.ndarray] = []
        ask = QuestionEncoder(tokenizer, length)
        for store in stores:
            _require_questions(store, grids)
            part = SceneData(store, encode, options, device, evaluation=evaluation)
            self.parts.append(part)
            training = set(part.train.tolist())
            self.texts.append([])
            for start in range(0, len(store.episodes), AT_ONCE):
                some = list(store.episodes[start : start + AT_ONCE])
                ask.spell.learn(q[part] for e in some for q in e.meta["questions"] for part in ("question", "answer"))
                self.texts[-1] += [
                    _encode(ask, episode.meta["questions"], store, self.priors, learn=start + k in training)
                    for k, episode in enumerate(some)
                ]
            ask.spell.learn(s["text"] for e in store.episodes for s in e.meta["sentences"])
            self.commands.append(np.stack([_look_up(ask.spell, max_tokens, e.meta) for e in store.episodes]))
            self.names.append(np.stack([self._spelt(episode.meta["names"]) for episode in store.episodes]))
        counts = np.array([max(1, len(part.train)) for part in self.parts], float)
        self.share = counts / counts.sum()

    def _spelt(self, names: Sequence[str | None]) -> Bool[np.ndarray, "9 w1"]:
        """Words of each thing's name, the last column for a thing without one; the last row is of no thing."""
        rows = np.zeros((THINGS + 1, len(self.words) + 1), bool)
        for k, name in enumerate(names):
            for word in name.split() if name else ():
                if word in self.words:
                    rows[k, self.words.index(word)] = True
            rows[k, -1] = name is None
        return rows

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
            count = len(self.texts[which][scene].kinds)
            order = np.arange(count) if rng is None else rng.permutation(count)
            rows.append(np.resize(order, self.questions))
        asked = [self.texts[which][scene] for scene in scenes]
        batch = self.parts[which].batch(scenes, rng)
        told = batch.tokens.cpu().numpy()
        commands = self.commands[which][scenes[:, None], batch.chosen] * (
            told != batch.pad
        )  # not where words are dropped
        tokens = [told, np.stack([t.tokens[row] for t, row in zip(asked, rows)])]
        looks = [np.stack([commands, commands * 0], axis=2), np.stack([t.looks[row] for t, row in zip(asked, rows)])]
        views = [looks[0] * 0, np.stack([t.views[row] for t, row in zip(asked, rows)])]
        targets = np.stack([t.targets[row] for t, row in zip(asked, rows)])
        priors = np.stack([t.priors[row] for t, row in zip(asked, rows)])
        length = max(int((part != batch.pad).any((0, 1)).sum()) for part in tokens)
        texts = np.concatenate([_last(part, length, batch.pad) for part in tokens], axis=1)
        return PretrainBatch(
            scenes=batch,
            texts=self._to(texts),
            targets=self._to(_last(targets, length, IGNORE)),
            priors=self._to(_last(priors, length, 0)),
            one_view=self._to(np.stack([t.one_view[row] for t, row in zip(asked, rows)])),
            looks=self._looks(
                which,
                scenes,
                np.concatenate([_last(part, length, 0) for part in looks], axis=1),
                np.concatenate([_last(part, length, 0) for part in views], axis=1),
            ),
            kinds=tuple(tuple(t.kinds[k] for k in row) for t, row in zip(asked, rows)),
        )

    def cover(self, which: int, scenes: np.ndarray) -> Int[Tensor, "b n side side"]:
        """Which thing covers each cell of some scenes' images; `THINGS` for none."""
        part = self.parts[which]
        cover = part.store.lowdim(COVER)[scenes].reshape(len(scenes), len(part.spec.cameras), -1)
        side = math.isqrt(cover.shape[-1])
        return torch.from_numpy(np.minimum(cover, THINGS).astype(np.int64)).unflatten(-1, (side, side))

    def _looks(self, which: int, scenes: np.ndarray, things: np.ndarray, views: np.ndarray) -> Looks:
        part = self.parts[which]
        n = len(part.spec.cameras)
        shown, most = token_labels(self.cover(which, scenes), self.grid, THINGS)
        spelt = torch.from_numpy(self.names[which][scenes])
        words = torch.einsum("bnmk,bkw->bnmw", shown.float(), spelt[:, :THINGS].float()) > 0
        uvz = torch.from_numpy(part.objects[scenes][..., 3:]).unflatten(-1, (n, 3)).transpose(1, 2)
        uv, k = uvz[..., :2], uvz.shape[2]
        none = torch.full((*uv.shape[:2], THINGS + 1 - k, 2), torch.nan)
        centre = torch.cat([uv, none], dim=2).gather(2, most[..., None].expand(-1, -1, -1, 2))
        centre = centre.masked_fill((centre - 0.5).abs() > 1.0, torch.nan)  # far outside: no place to point at
        pixels = torch.from_numpy(part.store.lowdim(PIXELS)[scenes].astype(np.float32)).transpose(1, 2)
        counts = middles(uv, (uvz[..., 2] > 0) & (pixels >= SEEN), spelt[:, :k].float(), self.grid)
        named = ~words[..., -1] & (counts[..., -1] == 0)
        return Looks(
            shown=shown.to(self.device),
            words=words[..., :-1].to(self.device),
            named=named.to(self.device),
            centre=centre.to(self.device),
            middles=counts[..., :-1].to(self.device),
            things=self._to(np.ascontiguousarray(things.swapaxes(1, 2))),
            views=self._to(np.ascontiguousarray(views.swapaxes(1, 2))),
        )

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def frames(self, step: int, count: int) -> UInt8[Tensor, "b n height width 3"]:
        """Unlabelled frames of a step of the first stage."""
        rng = np.random.default_rng([self.seed, step, 0x5EE])
        which = int(rng.choice(len(self.parts), p=self.share))
        part = self.parts[which]
        chosen = np.sort(rng.choice(part.train, size=min(count, len(part.train)), replace=False))
        images = {name: part.store.read_images(name, chosen) for name in part.spec.camera_names}
        return stack_images(images, part.spec, self.device)


def _last(array: np.ndarray, length: int, fill: int) -> np.ndarray:
    """The last `length` entries of the last axis, filled up on the left where there are fewer."""
    short = max(0, length - array.shape[-1])
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(short, 0)], constant_values=fill)[..., -length:]


def _require_questions(store: EpisodeStore, grids: Sequence[tuple[int, int]]) -> None:
    say = "Type: brachium record env=scenes out=SCENES"
    if not {COVER, PIXELS} <= set(store.schema.fields) or any(
        not e.meta.get("questions") or "names" not in e.meta for e in store.episodes
    ):
        raise StoreError(f"{store.path} has scenes without questions, or without what covers their patches. {say}")
    side = math.isqrt(store.schema.field(COVER).shape[-1])
    if any(side % edge for grid in grids for edge in grid):
        raise StoreError(
            f"{store.path}: its covers of {side} x {side} cells do not fit image tokens of {grids[0]} or patches of "
            f"{grids[1]}. Choose an image_size and a patch_size whose patches are whole cells"
        )


def _encode(
    ask: QuestionEncoder,
    questions: Sequence[Mapping[str, Any]],
    store: EpisodeStore,
    priors: NamePriors,
    *,
    learn: bool,
) -> SceneTexts:
    """Every question that is short enough."""
    found, kinds, one_view, rows = [], [], [], []
    for question in questions:
        made = ask(question["question"], question["answer"], question.get("asked", ()), question.get("meant", ()))
        if made is not None:
            found.append(made)
            kinds.append(question["kind"])
            rows.append(priors.index(question["kind"], made.tokens.tolist(), made.targets.tolist(), learn=learn))
            one_view.append(not made.views.any())
    if not found:
        raise StoreError(
            f"{store.path} has a scene whose questions are all longer than {ask.length} tokens: raise length"
        )
    return SceneTexts(
        tokens=np.stack([made.tokens for made in found]),
        targets=np.stack([made.targets for made in found]),
        priors=np.stack(rows),
        looks=np.stack([made.looks for made in found]),
        views=np.stack([made.views for made in found]),
        one_view=np.array(one_view),
        kinds=tuple(kinds),
    )


def _look_up(spell: Speller, length: int, meta: Mapping[str, Any]) -> UInt8[np.ndarray, "k l"]:
    """Which thing the last token of each name in the commands of a scene stands for, as bits."""
    rows = np.zeros((len(meta["sentences"]), length), np.uint8)
    for row, sentence in zip(rows, meta["sentences"]):
        text = sentence["text"]
        for thing in sentence["roles"].values():
            name = meta["names"][thing]
            start = text.find(name) if name else -1
            if start >= 0:
                from_end = len(spell(text)) - spell.within(text, start, start + len(name))[-1]
                if from_end <= length:
                    row[-from_end] |= bits([thing])
    return rows
