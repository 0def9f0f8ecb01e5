"""Actions relative to the state a chunk begins in: absolute targets, learnt as distances from where the robot is.

openpi and LeRobot call these delta actions (of a chunk). Each row is relative to the one state of the observation, not
to the row before it, so a chunk means the same however late its rows are executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..datasets.statistics import FieldStatistics, Statistics, field_statistics
from ..datasets.store import EpisodeStore
from ..datasets.window import WindowDataset, WindowSpec
from ..errors import SpecMismatchError, did_you_mean
from ..spec import EmbodimentSpec

WINDOWS = 4096
"""Windows that are looked at together."""


def shared_elements(spec: EmbodimentSpec, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where elements stand in the action, and where those of the same names stand in the state.

    Raises:
        SpecMismatchError: One is in neither, its units differ, or the action is relative already.
    """
    if names and spec.action.reference != "absolute":
        raise SpecMismatchError(
            f"embodiment {spec.name!r}: model.relative needs absolute actions, these are {spec.action.reference}"
        )
    for feature in (spec.action, spec.state):
        for name in names:
            if name not in feature.names:
                hint = did_you_mean(name, feature.names) if feature.names else "They have no names."
                raise SpecMismatchError(
                    f"model.relative: embodiment {spec.name!r} has no {feature.name} {name!r}. {hint}"
                )
    act, seen = ([feature.names.index(name) for name in names] for feature in (spec.action, spec.state))
    for name, a, s in zip(names, act, seen):
        units = [f.units[k] if f.units else "" for f, k in ((spec.action, a), (spec.state, s))]
        if units[0] != units[1]:
            raise SpecMismatchError(f"model.relative: {name!r} is in {units[0]} as an action, in {units[1]} as a state")
    return act, seen


def relative_to(action: np.ndarray, state: np.ndarray, spec: EmbodimentSpec, names: Sequence[str]) -> np.ndarray:
    """Chunks (b, h, a) with `names` relative to the states (b, s) they begin in."""
    act, seen = shared_elements(spec, names)
    found = np.array(action)
    found[..., act] -= state[..., None, seen]
    return found


def relative_statistics(
    statistics: Statistics,
    parts: Sequence[tuple[EpisodeStore, Sequence[int]]],
    names: Sequence[str],
    horizon: int,
) -> Statistics:
    """`statistics` with those of the action taken over whole chunks, relative as they are learnt."""
    pieces = []
    for store, episodes in parts:
        windows = WindowDataset(store, WindowSpec(action_horizon=horizon), episodes=list(episodes))
        for start in range(0, len(windows), WINDOWS):
            window = windows.batch(np.arange(start, min(start + WINDOWS, len(windows))), images=False)
            relative = relative_to(window.action, window.state[:, -1], store.embodiment, names)
            pieces.append(relative[~window.action_pad].astype(np.float64))
    action: FieldStatistics = field_statistics(pieces)
    return replace(statistics, fields={**statistics.fields, "action": action})
