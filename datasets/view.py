"""The verb ``brachium view``: look at episodes, in rerun where it is installed, else on an HTML page."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..console import log, progress
from ..errors import ConfigError, did_you_mean
from .health import sample_episodes
from .layout import disk_errors
from .selection import Selection
from .store import EpisodeStore

VIEWERS = ("auto", "html", "rerun")
STRIP, TILE = 12, 112
"""Pictures of a strip, and the height of one [px]."""
WIDTH, HEIGHT, CURVES = 440, 150, 16
"""Size of a plot [px]; fields with more dimensions than curves are not drawn."""
COLORS = ("#4361ee", "#e76f51", "#2a9d8f", "#9b5de5", "#f4a261", "#264653", "#d62828", "#6a994e")


def view(
    *,
    store: str,
    where: Selection,
    out: str | None = None,
    episodes: int = 12,
    version: int | None = None,
    viewer: str = "auto",
) -> int:
    """Look at episodes: pictures over time, and every signal beside them.

    Args:
        store: Folder of the store.
        where: Which episodes; all by default.
        out: Folder for the page (``index.html``) or the recording (``view.rrd``); ``outputs/view/NAME`` by default.
        episodes: Episodes to show at the most, spread evenly over those that fit.
        version: Version to look at; the newest by default.
        viewer: ``html``, ``rerun``, or ``auto``: rerun where it is installed.

    Raises:
        ConfigError: No such viewer, or rerun is not installed.
    """
    if viewer not in VIEWERS:
        raise ConfigError(f"no viewer={viewer!r}. {did_you_mean(viewer, VIEWERS)}")
    if episodes < 1:
        raise ConfigError(f"expected episodes of at least 1, got {episodes}")
    installed = importlib.util.find_spec("rerun") is not None
    if viewer == "rerun" and not installed:
        raise ConfigError("rerun is not installed. Type: uv pip install rerun-sdk   (or viewer=html)")
    opened = EpisodeStore.open(store, version)
    fitting = where.of(opened)
    chosen = [fitting[k] for k in sample_episodes(len(fitting), episodes)]
    folder = Path(out) if out else Path("outputs") / "view" / opened.path.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        (part, number)
        for name in opened.embodiments
        for part in [opened.of(name)]
        for number in _mine(part, opened, chosen)
    ]
    if viewer == "rerun" or (viewer == "auto" and installed):
        path = folder / "view.rrd"
        _write_rerun(path, parts)
        log(f"{path}: type `rerun {path}`")
    else:
        path = folder / "index.html"
        write_page(path, opened, parts, len(fitting))
        log(f"{path}: open it in a browser")
    return 0


def _mine(part: EpisodeStore, whole: EpisodeStore, chosen: Sequence[int]) -> list[int]:
    """Numbers in `part`, a part of `whole`, of the episodes that have the numbers `chosen` there."""
    numbers = {e.id: e.index for e in part.episodes}
    return [numbers[whole.episodes[i].id] for i in chosen if whole.episodes[i].id in numbers]


def write_page(path: Path, store: EpisodeStore, parts: Sequence[tuple[EpisodeStore, int]], fitting: int) -> None:
    """Write one self-contained page with a block an episode; every text of the store is escaped."""
    title = html.escape(store.path.resolve().name)
    blocks = [f"<h1>{title}</h1><p>{len(parts)} of {fitting} episodes, version {store.version}.</p>"]
    with progress("drawing", total=len(parts), unit="episodes") as bar:
        for part, number in parts:
            blocks.append(_block(part, number))
            bar.update(1)
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>" + "\n".join(blocks)
    with disk_errors(path):
        temporary = path.with_suffix(".partial")
        temporary.write_text(page + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _block(store: EpisodeStore, number: int) -> str:
    episode, info = store.episode(number), store.episodes[number]
    outcome = {True: "success", False: "failure", None: "unlabelled"}[info.success]
    meta = ", ".join(f"{key}: {value}" for key, value in info.meta.items() if isinstance(value, str | int | float))
    facts = [f"{info.length} steps", f"{episode.timestamp[-1]:.2f} s", outcome, *info.tags, store.embodiment.name]
    parts = [
        f"<h2>episode {number}: {html.escape(info.instruction or '(no instruction)')}</h2>",
        f"<p>{html.escape(' · '.join(facts))}<br><small>{html.escape(info.id)} {html.escape(meta[:300])}</small></p>",
    ]
    for spec in store.schema.images:
        there = np.arange(info.length)
        words = ""
        if spec.name in store.schema.optional:
            there = there[episode.extras["present"][:, store.schema.optional.index(spec.name)]]
            words = f", in {len(there)} of {info.length} steps"
        if not len(there):
            parts.append(f"<div class=name>{html.escape(spec.name)}: in no step</div>")
            continue
        steps = there[np.unique(np.linspace(0, len(there) - 1, min(STRIP, len(there))).round().astype(int))]
        pictures = _pictures(episode.images[spec.name][steps])
        caption = f"{html.escape(spec.name)}, steps {steps[0]} to {steps[-1]}{words}"
        parts.append(f"<div class=name>{caption}</div>{_strip(pictures)}")
    plots = []
    for field in (f for f in store.schema.fields if f not in ("timestamp", "present")):
        values = {"state": episode.state, "action": episode.action}.get(field)
        values = np.asarray(episode.extras[field] if values is None else values, np.float64).reshape(info.length, -1)
        spec = store.schema.field(field)
        names = list(spec.names) if len(spec.names) == values.shape[1] else [str(k) for k in range(values.shape[1])]
        units = list(spec.units) if len(spec.units) == values.shape[1] else [""] * values.shape[1]
        if values.shape[1] > CURVES:
            continue
        for unit in dict.fromkeys(units):  # metres and a gripper's 0..1 would flatten each other
            mine = [k for k, other in enumerate(units) if other == unit]
            title = f"{field} [{unit}]" if unit not in ("", "1") else field
            plots.append(_plot(title, [names[k] for k in mine], episode.timestamp, values[:, mine]))
    return "\n".join([*parts, f"<div class=plots>{''.join(plots)}</div>"])


def _pictures(images: np.ndarray) -> list[np.ndarray]:
    """Anything as RGB: maps are spread over grey, from the least value of all to the largest."""
    if images.dtype == np.uint8 and images.shape[3] == 3:
        return list(images)
    x = images[..., 0].astype(np.float64)
    low, high = float(x.min()), float(x.max())
    grey = ((x - low) / max(high - low, 1.0) * 255).astype(np.uint8) if high > low else np.full(x.shape, 128, np.uint8)
    return list(np.repeat(grey[..., None], 3, axis=3))


def _strip(pictures: Sequence[np.ndarray]) -> str:
    """Pictures side by side as one inline JPEG."""
    gap = np.full((TILE, 3, 3), 255, np.uint8)
    tiles: list[np.ndarray] = []
    for picture in pictures:
        height, width = picture.shape[:2]
        size = max(1, round(width * TILE / height)), TILE
        tiles += [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)), gap]
    data = io.BytesIO()
    Image.fromarray(np.concatenate(tiles, axis=1)).save(data, "JPEG", quality=85)
    return f'<img alt="pictures" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _plot(title: str, names: Sequence[str], times: np.ndarray, values: np.ndarray) -> str:
    """Curves over time [s] as inline SVG, each dimension with a colour; gaps where values are not finite."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    span, length = max(high - low, 1e-9), max(float(times[-1] - times[0]), 1e-9)
    left, top, width, height = 52, 8, WIDTH - 60, HEIGHT - 28
    lines = []
    for k in range(values.shape[1]):
        color = COLORS[k % len(COLORS)]
        dash = ' stroke-dasharray="5 3"' if k >= len(COLORS) else ""
        pieces: list[list[str]] = [[]]
        for t, value in zip(times, values[:, k]):
            if np.isfinite(value):
                x, y = left + width * (t - times[0]) / length, top + height * (high - value) / span
                pieces[-1].append(f"{x:.1f},{y:.1f}")
            elif pieces[-1]:
                pieces.append([])
        lines += [
            f'<polyline fill="none" stroke="{color}" stroke-width="1.5"{dash} points="{" ".join(piece)}"/>'
            for piece in pieces
            if piece
        ]
    frame = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>'
    axis = [
        f'<text x="{left - 4}" y="{top + 9}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{left - 4}" y="{top + height}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{left}" y="{HEIGHT - 5}">{times[0]:.3g} s</text>',
        f'<text x="{left + width}" y="{HEIGHT - 5}" text-anchor="end">{times[-1]:.3g} s</text>',
    ]
    legend = "".join(
        f'<span style="color:{COLORS[k % len(COLORS)]}">{html.escape(name)}</span> ' for k, name in enumerate(names)
    )
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}">{frame}{"".join(axis)}{"".join(lines)}</svg>'
    return f"<figure><figcaption><b>{html.escape(title)}</b> {legend}</figcaption>{svg}</figure>"


_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:1400px}img{max-width:100%;display:block}h2{margin-top:2em}"
    ".name{margin-top:.6em;color:#555}.plots{display:flex;flex-wrap:wrap}figure{margin:.6em 1em .6em 0}"
    "svg text{font:11px sans-serif;fill:#555}small{color:#888}"
)


def _write_rerun(path: Path, parts: Sequence[tuple[EpisodeStore, int]]) -> None:
    """Write a rerun recording: one tree an episode, on a time line of its own seconds."""
    import rerun as rr  # type: ignore[import-not-found,unused-ignore]

    rr.init("brachium", recording_id="view")
    rr.save(path)
    with progress("writing", total=len(parts), unit="episodes") as bar:
        for part, number in parts:
            episode, info = part.episode(number), part.episodes[number]
            root = f"{part.embodiment.name}/episode_{number}"
            rr.log(f"{root}/instruction", rr.TextDocument(info.instruction), static=True)
            for step in range(len(episode)):
                rr.set_time("time", duration=float(episode.timestamp[step]))
                for spec in part.schema.images:
                    rr.log(f"{root}/{spec.name}", _rerun_image(rr, episode.images[spec.name][step]))
                for field, values in (("state", episode.state), ("action", episode.action)):
                    names = part.schema.field(field).names or [str(k) for k in range(values.shape[1])]
                    for name, value in zip(names, values[step]):
                        rr.log(f"{root}/{field}/{name}", rr.Scalars([float(value)]))
            bar.update(1)


def _rerun_image(rr: Any, image: np.ndarray) -> Any:
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return rr.Image(image).compress(jpeg_quality=90)
    return rr.DepthImage(image[..., 0]) if image.dtype == np.uint16 else rr.SegmentationImage(image[..., 0])
