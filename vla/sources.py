"""What a policy is trained on: stores of one or several embodiments, mixed by weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.mixture import MixtureSampler
from ..datasets.normalize import Normalizer
from ..datasets.split import is_heldout
from ..datasets.statistics import Statistics, pooled_statistics
from ..datasets.store import EpisodeStore
from ..datasets.window import WindowDataset, WindowSpec
from ..errors import ConfigError, StoreError
from ..spec import EmbodimentSpec
from .model import VLAModel
from .policy_data import PolicyBatch, PolicyData, Rows, cached_encodings, episode_key, joined
from .recipe import Recipe
from .relative import relative_statistics, relative_to

EXPLAINED = 6
"""Windows of a batch that an error names."""
FITTED_WINDOWS = 2000
"""Windows of each embodiment that an action tokenizer is fitted to."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A store, and which of its episodes are trained on and which are kept back.

    Attributes:
        store: Episodes of one embodiment.
        training, testing: Indices of episodes.
    """

    store: EpisodeStore
    training: tuple[int, ...]
    testing: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the embodiment."""
        return self.store.embodiment.name


def open_sources(paths: str | Sequence[str], heldout: float) -> list[Source]:
    """Open stores and split their usable episodes; each episode's side depends on itself alone.

    Raises:
        ConfigError: No store, or a share that is none.
        StoreError: A store without a usable episode.
        SpecMismatchError: Two stores whose embodiments have one name but differ.
    """
    if not 0.0 <= heldout < 1.0:
        raise ConfigError(f"expected heldout in [0, 1), got {heldout}")
    listed = [paths] if isinstance(paths, str) else list(paths)
    if not listed:
        raise ConfigError("expected a store to train on, got none: store=STORE, or store=[STORE,STORE]")
    sources: list[Source] = []
    for path in listed:
        store = EpisodeStore.open(path)
        for other in sources:
            if other.name == store.embodiment.name:
                store.embodiment.require_same(other.store.embodiment, f"store {path}", f"store {other.store.path}")
        episodes = usable_episodes(store)
        testing = [i for i in episodes if is_heldout(episode_key(store.episodes[i]), heldout, 0)]
        training = [i for i in episodes if i not in set(testing)]
        if not training:
            training, testing = episodes, []
        sources.append(Source(store=store, training=tuple(training), testing=tuple(testing)))
    return sources


def usable_episodes(data: EpisodeStore) -> list[int]:
    """Successful episodes (all, where none says if it succeeded), in an order that recording order has no say in."""
    labelled = any(episode.success is not None for episode in data.episodes)
    chosen = [e for e in data.episodes if e.success or not labelled]
    if not chosen:
        raise StoreError(
            f"{data.path} has no successful episode to train on ({data.num_episodes} in all).\n"
            f"See: brachium inspect store={data.path}"
        )
    return [e.index for e in sorted(chosen, key=episode_key)]


def embodiments_of(sources: Sequence[Source]) -> dict[str, EmbodimentSpec]:
    """Name -> spec of every embodiment."""
    return {source.name: source.store.embodiment for source in sources}


def statistics_of(sources: Sequence[Source], recipe: Recipe | None = None) -> dict[str, Statistics]:
    """Statistics of the training episodes of every embodiment, of actions as a recipe has them learnt."""
    found = {}
    for name in embodiments_of(sources):
        parts = [(s.store, s.training) for s in sources if s.name == name]
        found[name] = pooled_statistics(parts)
        if recipe is not None and recipe.relative:
            found[name] = relative_statistics(found[name], parts, recipe.relative, recipe.action_horizon)
    return found


def sampled_chunks(
    sources: Sequence[Source],
    statistics: dict[str, Statistics],
    mode: str,
    horizon: int,
    relative: Sequence[str] = (),
) -> list[Tensor]:
    """Normalised training chunks of every embodiment, of the dimensions that change."""
    found = []
    for source in sources:
        field = statistics[source.name]["action"]
        normalizer = Normalizer(mode=mode, statistics=field)
        windows = WindowDataset(source.store, WindowSpec(action_horizon=horizon), episodes=list(source.training))
        chosen = np.unique(np.linspace(0, len(windows) - 1, FITTED_WINDOWS).astype(int))
        window = windows.batch(chosen, images=False)
        action = relative_to(window.action, window.state[:, -1], source.store.embodiment, relative)
        chunk = normalizer.normalize(action)
        found.append(torch.from_numpy(np.ascontiguousarray(chunk[..., field.max > field.min], np.float32)))
    return found


class MixedData:
    """Training batches over several sources; those of one store are shuffled, those of several mixed by weights.

    A batch is a list of parts, one an embodiment that was drawn: it has one action dimension and one set of cameras.

    Args:
        sources: Stores and their episodes.
        model: Gives the chunk length and the tokens.
        weights: Share of the windows of each source; None for the number of windows each has.
        batch_size, seed: Of the batches.
        cached: Encode every frame once and keep that, for an encoder that is frozen and small.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        model: VLAModel,
        *,
        weights: Sequence[float] | None,
        batch_size: int,
        seed: int,
        cached: bool,
    ) -> None:
        if weights is not None and len(weights) != len(sources):
            raise ConfigError(f"expected a weight for each of {len(sources)} stores, got {list(weights)}")
        self.training: list[PolicyData] = []
        self.testing: list[PolicyData] = []
        for source in sources:
            encodings = cached_encodings(model, source.store, Path(source.store.path) / "cache") if cached else None
            options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "encodings": encodings}
            self.training.append(PolicyData(source.store, list(source.training), model, **options))
            if source.testing:
                self.testing.append(PolicyData(source.store, list(source.testing), model, **options))
        sizes = [len(part.windows) for part in self.training]
        self.windows, self.batch_size = sum(sizes), batch_size
        self.sampler = MixtureSampler(sizes, sizes if weights is None else weights, seed) if len(sizes) > 1 else None

    def make(self, step: int) -> list[PolicyBatch]:
        """The training batch of a step."""
        return self.make_share(step, 0, 1)

    def make_share(self, step: int, index: int, count: int) -> list[PolicyBatch]:
        """Share `index` of `count` of a step's batch: of every embodiment in it, as many windows as of the others."""
        found = []
        for drawn in self._drawn(step).values():
            rows, where = Rows.of(len(drawn), index, count)
            mine = drawn[where]
            parts = [self.training[k].batch(mine[mine[:, 0] == k, 1]) for k in np.unique(mine[:, 0])]
            batch = joined(parts)
            found.append(batch if count == 1 else replace(batch, share=rows))
        return found

    def _drawn(self, step: int) -> dict[str, np.ndarray]:
        """Embodiment -> (source, window) of every window of a step's batch, in order of the sources."""
        if self.sampler is None:
            windows = self.training[0].sampler.batch(step)
            return {self.training[0].store.embodiment.name: np.stack([np.zeros_like(windows), windows], axis=1)}
        source, window = self.sampler.draws(step * self.batch_size, self.batch_size)
        found: dict[str, list[np.ndarray]] = {}
        for k, part in enumerate(self.training):
            if (source == k).any():
                chosen = window[source == k]
                both = np.stack([np.full_like(chosen, k), chosen], axis=1)
                found.setdefault(part.store.embodiment.name, []).append(both)
        return {name: np.concatenate(each) for name, each in found.items()}

    def explain(self, step: int) -> str:
        """Which windows a step's batch was made of, those first that hold something that is no number."""
        texts = [
            text
            for drawn in self._drawn(step).values()
            for k in np.unique(drawn[:, 0])
            for text in self.training[k].described(drawn[drawn[:, 0] == k, 1])
        ]
        texts.sort(key=lambda text: "not finite" not in text)
        more = f", and {len(texts) - EXPLAINED} more" if len(texts) > EXPLAINED else ""
        return ", ".join(texts[:EXPLAINED]) + more
