"""What is likely wrong with recorded data, found before training does: one sentence a finding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..spec import FeatureSpec
from .schema import PRESENT
from .store import EpisodeStore

SAMPLED_EPISODES = 24
SATURATED_SHARE = 0.2
GAP, JITTER = 2.5, 0.25
"""In steps: what is longer is a gap; what deviates more is jitter."""
DARK = 16
"""A frame whose brightest value is below this is called black; JPEG makes black a little noisy."""


def find_problems(store: EpisodeStore) -> list[str]:
    """Return warnings about labels, times, values and cameras; empty when nothing stands out."""
    if not store.num_episodes:
        return ["the store is empty"]
    found = [*_labels(store), *_times(store)]
    found += _duplicates(store)
    for field in (f for f in store.schema.fields if f not in ("timestamp", PRESENT)):
        values = store.lowdim(field).reshape(-1, store.schema.columns(field))
        if field in store.schema.optional:
            values = values[store.lowdim(PRESENT)[:, store.schema.optional.index(field)]]
        found += _values(field, store.schema.field(field), values) if len(values) else [f"{field} is in no step"]
    for camera in store.embodiment.camera_names:
        found += _camera(store, camera)
    return found


def sample_episodes(total: int, count: int) -> tuple[int, ...]:
    """Return up to `count` of the numbers from 0 to `total` - 1, spread evenly."""
    spread = np.linspace(0, total - 1, min(count, total))
    return tuple(dict.fromkeys(int(i) for i in np.round(spread)))


def _labels(store: EpisodeStore) -> list[str]:
    found = []
    silent = sum(not e.instruction.strip() for e in store.episodes)
    if silent:
        found.append(f"{silent} of {store.num_episodes} episodes have no instruction")
    short = [e.index for e in store.episodes if e.length < 2]
    if short:
        found.append(f"{len(short)} episodes have fewer than 2 steps: {_some(short)}")
    return found


def _times(store: EpisodeStore) -> list[str]:
    found, backwards, rates, gaps, jittery = [], [], [], [], []
    times, hz = store.lowdim("timestamp"), store.embodiment.control_hz
    for i in range(store.num_episodes):
        steps = np.diff(times[store.offsets[i] : store.offsets[i + 1]])
        if not (steps > 0).all():
            backwards.append(i)
        elif len(steps):
            period = float(np.median(steps))
            rates.append(1 / period)
            if steps.max() > GAP * period:
                gaps.append(i)
            if np.abs(steps - period)[steps <= GAP * period].max() > JITTER * period:
                jittery.append(i)
    if backwards:
        found.append(f"timestamps do not increase in {len(backwards)} episodes: {_some(backwards)}")
    if gaps:
        found.append(f"{len(gaps)} episodes have gaps of more than {GAP:g} steps in time: {_some(gaps)}")
    if jittery:
        found.append(
            f"the clock jitters by more than {100 * JITTER:.0f} % of a step in {len(jittery)} episodes: "
            f"{_some(jittery)}"
        )
    off = [r for r in rates if abs(r - hz) > 0.1 * hz]
    if off:
        found.append(
            f"{len(off)} of {len(rates)} episodes were not recorded at {hz:g} Hz but at {min(off):.3g} to "
            f"{max(off):.3g} Hz"
        )
    return found


def _duplicates(store: EpisodeStore) -> list[str]:
    """Episodes with the same states, actions and words as an earlier one; still ones of a step or two do not count."""
    state, action = store.lowdim("state"), store.lowdim("action")
    seen: dict[bytes, int] = {}
    found = []
    for i in range(store.num_episodes):
        rows = slice(store.offsets[i], store.offsets[i + 1])
        if store.offsets[i + 1] - store.offsets[i] < 3:
            continue
        content = hashlib.sha256(state[rows].tobytes() + action[rows].tobytes() + store.instructions[i].encode())
        if seen.setdefault(content.digest(), i) != i:
            found.append(i)
    return (
        [f"{len(found)} episodes are the same as an earlier one, word for word and step for step: {_some(found)}"]
        if found
        else []
    )


def _values(field: str, spec: FeatureSpec, values: np.ndarray) -> list[str]:
    """Not finite, constant, outside limits, or stuck at them; grippers are at their limits by nature."""
    found = []
    for column in range(values.shape[1]):
        name = spec.names[column] if len(spec.names) == values.shape[1] else ""
        label = f"{field}[{column}]" + (f" ({name})" if name else "")
        x = values[:, column].astype(np.float64)
        broken = int((~np.isfinite(x)).sum())
        if broken:
            found.append(f"{label} is not finite in {broken} of {len(x)} steps: leave those episodes out of training")
            continue
        if len(x) > 1 and x.min() == x.max():
            found.append(f"{label} is constant at {x[0]:.4g}")
            continue
        if len(spec.low) != values.shape[1] or len(spec.high) != values.shape[1]:
            continue
        low, high = spec.low[column], spec.high[column]
        margin = 1e-4 * (high - low)
        outside = int(((x < low - margin) | (x > high + margin)).sum())
        if outside:
            found.append(
                f"{label} is outside its limits {low:g}..{high:g} in {outside} of {len(x)} steps "
                f"({x.min():.4g}..{x.max():.4g})"
            )
        stuck = float(((x <= low + margin) | (x >= high - margin)).mean())
        if stuck > SATURATED_SHARE and "grip" not in name:
            found.append(f"{label} is saturated at its limits in {100 * stuck:.0f} % of the steps")
    return found


def _camera(store: EpisodeStore, camera: str) -> list[str]:
    """Black or frozen images, judged by the first, middle and last frame of some episodes."""
    sampled = sample_episodes(store.num_episodes, SAMPLED_EPISODES)
    black, frozen = [], []
    for i in sampled:
        first, last = int(store.offsets[i]), int(store.offsets[i + 1]) - 1
        frames = store.read_images(camera, sorted({first, (first + last) // 2, last}))
        if frames.max() < DARK:
            black.append(i)
        elif len(frames) > 1 and (frames == frames[0]).all():
            frozen.append(i)
    found = []
    for what, episodes in (("is black", black), ("shows one frozen picture", frozen)):
        if episodes:
            found.append(
                f"camera {camera!r} {what} in {len(episodes)} of {len(sampled)} sampled episodes: {_some(episodes)}"
            )
    return found


def _some(indices: Sequence[int], limit: int = 8) -> str:
    listed = ", ".join(str(i) for i in indices[:limit])
    return f"episodes {listed}" + (" ..." if len(indices) > limit else "")
