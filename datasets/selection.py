"""Which episodes of a store are meant, said by what they are: ``where.success=true where.tags=[lab]``."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, StoreError, did_you_mean
from .episode import EpisodeInfo
from .store import EpisodeStore

Condition = tuple[Callable[[EpisodeInfo], bool], Callable[[Sequence[EpisodeInfo]], str]]
"""Whether an episode fits, and what to say of some of which none does."""
OUTCOMES: dict[str, bool | None] = {"true": True, "false": False, "unknown": None}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Conditions on an episode; all that are given must hold.

    Attributes:
        episodes: Numbers, ranges such as ``3-7`` (both ends included), or ids.
        success: ``true``, ``false`` or ``unknown``.
        instruction: Pattern with ``*`` and ``?`` for the whole instruction; case does not count.
        tags: Tags that it has, all of them.
        without_tags: Tags of which it has none.
        steps: Fewest and most steps; null leaves an end open.
        meta: What its recorder noted, for example ``{task: reach}``.

    Raises:
        ConfigError: A condition that cannot be understood.
    """

    episodes: Sequence[int | str] | None = None
    success: str | bool | None = None
    instruction: str | None = None
    tags: Sequence[str] = ()
    without_tags: Sequence[str] = ()
    steps: Sequence[int | None] = (None, None)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.success is not None:
            name = str(self.success).lower()
            if name not in OUTCOMES:
                raise ConfigError(f"no success={self.success!r}. {did_you_mean(name, OUTCOMES)}")
            object.__setattr__(self, "success", name)
        if len(self.steps) != 2:
            raise ConfigError(f"expected steps=[fewest,most], either of them null, got {list(self.steps)}")
        for key in ("tags", "without_tags", "episodes"):
            if isinstance(getattr(self, key), str):
                raise ConfigError(f"expected {key} as a list, such as {key}=[{getattr(self, key)}]")
            if getattr(self, key) is not None:
                object.__setattr__(self, key, tuple(getattr(self, key)))
        object.__setattr__(self, "steps", tuple(self.steps))

    @property
    def everything(self) -> bool:
        """Whether nothing is asked."""
        return self == Selection()

    def of(self, store: EpisodeStore) -> tuple[int, ...]:
        """Return the numbers of the episodes of `store` that fit, in its order.

        Raises:
            StoreError: An episode that is not there, or none that fits; the message says what is there.
        """
        named = self._named(store)
        fitting = list(store.episodes)
        for condition, what in self._conditions(named):
            left = [e for e in fitting if condition(e)]
            if not left:
                raise StoreError(f"store {store.path} has no such episode: {what(fitting)}")
            fitting = left
        return tuple(e.index for e in fitting)

    def _conditions(self, named: set[int] | None) -> list[Condition]:
        """Each condition, and what to say of episodes of which none fits it."""
        found: list[Condition] = []
        if named is not None:
            found.append((lambda e: e.index in named, lambda _: f"episodes={list(self.episodes or ())}"))
        if self.success is not None:
            wanted = OUTCOMES[str(self.success)]
            found.append((lambda e: e.success is wanted, lambda some: f"success={self.success}; {_outcomes(some)}"))
        if self.instruction is not None:
            pattern = self.instruction.lower()
            found.append(
                (lambda e: fnmatch.fnmatchcase(e.instruction.lower(), pattern), lambda some: self._unsaid(some))
            )
        if self.tags:
            found.append((lambda e: set(self.tags) <= set(e.tags), lambda some: self._untagged(some)))
        if self.without_tags:
            found.append(
                (lambda e: not set(self.without_tags) & set(e.tags), lambda _: f"all have one of {self.without_tags}")
            )
        fewest, most = self.steps
        if fewest is not None or most is not None:
            found.append(
                (
                    lambda e: (fewest is None or e.length >= fewest) and (most is None or e.length <= most),
                    lambda some: f"they have {min(e.length for e in some)} to {max(e.length for e in some)} steps",
                )
            )
        found += [_noted(key, value) for key, value in self.meta.items()]
        return found

    def _named(self, store: EpisodeStore) -> set[int] | None:
        if self.episodes is None:
            return None
        numbers = {e.id: e.index for e in store.episodes}
        found: set[int] = set()
        for word in self.episodes:
            first, dash, last = str(word).partition("-")
            if str(word) in numbers:
                found.add(numbers[str(word)])
            elif first.isdigit() and (last.isdigit() or not dash):
                chosen = range(int(first), int(last or first) + 1)
                if not chosen or chosen[-1] >= store.num_episodes:
                    raise StoreError(f"store {store.path} has episodes 0 to {store.num_episodes - 1}, got {word!r}")
                found.update(chosen)
            else:
                raise StoreError(
                    f"expected episodes as numbers, ranges such as 3-7, or ids of this store, got {word!r}"
                )
        return found

    def _unsaid(self, some: Sequence[EpisodeInfo]) -> str:
        said = {e.instruction for e in some}
        return f"instruction={self.instruction!r}. {did_you_mean(str(self.instruction), said)[:300]}"

    def _untagged(self, some: Sequence[EpisodeInfo]) -> str:
        known = {tag for e in some for tag in e.tags}
        hint = (
            next((did_you_mean(t, known) for t in self.tags if t not in known), "") if known else "They have no tags."
        )
        return f"tags={list(self.tags)}. {hint}"


def _noted(key: str, value: Any) -> Condition:
    def fits(episode: EpisodeInfo) -> bool:
        return key in episode.meta and bool(episode.meta[key] == value)

    return fits, lambda some: f"meta.{key} is one of {_some(repr(e.meta.get(key)) for e in some)}"


def _outcomes(some: Sequence[EpisodeInfo]) -> str:
    counts = Counter(e.success for e in some)
    return f"{counts[True]} succeeded, {counts[False]} failed, {counts[None]} are unlabelled"


def _some(words: Any, limit: int = 8) -> str:
    known = sorted(set(words))
    return ", ".join(known[:limit]) + (" ..." if len(known) > limit else "")
