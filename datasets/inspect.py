"""The verb ``brachium inspect``: what is in a store, in tables, warnings and pictures."""

from __future__ import annotations

import base64
import html as html_text
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..console import human_bytes, human_time, table
from ..errors import ConfigError
from .health import find_problems, sample_episodes
from .layout import disk_errors
from .pictures import contact_sheet
from .store import EpisodeStore

Rows = list[list[str]]
LISTED = 20
"""Lines of a table of counts; the rest are summed up in one."""


def inspect_store(
    *, store: str, version: int | None = None, out: str | None = None, pictures: int = 6, html: bool = False
) -> dict[str, Any]:
    """Print what a store holds and what looks wrong, and write a contact sheet.

    Args:
        store: Folder of the store.
        version: Version to look at; the newest by default.
        out: Folder for the contact sheet; ``outputs/inspect/<name of the store>`` by default.
        pictures: Episodes on the contact sheet; 0 for none.
        html: Also write everything as one HTML page.

    Returns:
        The same as numbers: episodes, frames, hours, lengths, counts, fields, bytes, warnings, files; of a store with
        several embodiments ``{"store": path, "embodiments": {name: these}}``.

    Raises:
        NotFoundError: No store there.
        StoreError: A damaged store.
    """
    if pictures < 0:
        raise ConfigError(f"expected pictures of at least 0, got {pictures}")
    opened = EpisodeStore.open(store, version)
    folder = Path(out) if out else Path("outputs") / "inspect" / opened.path.resolve().name
    if len(opened.embodiments) == 1:
        return _inspect_part(opened, folder, pictures, html)
    found = {name: _inspect_part(opened.of(name), folder / name, pictures, html) for name in opened.embodiments}
    return {"store": str(opened.path), "embodiments": found}


def _inspect_part(opened: EpisodeStore, folder: Path, pictures: int, html: bool) -> dict[str, Any]:
    """Print and draw the episodes of one embodiment."""
    summary = summarize(opened)
    files: dict[str, str] = {}
    if pictures and opened.num_episodes and opened.embodiment.cameras:
        contact_sheet(opened, folder / "contact_sheet.png", sample_episodes(opened.num_episodes, pictures))
        files["contact_sheet"] = str(folder / "contact_sheet.png")
    sections = _sections(summary)
    for title, columns, rows in sections:
        table(title, columns, rows)
        print()
    if html:
        files["html"] = str(_write_html(folder, opened, sections, summary["warnings"], files.get("contact_sheet")))
    for warning in summary["warnings"]:
        print(f"warning: {warning}")
    print("\n".join(f"{name}: {path}" for name, path in files.items()) or "no pictures written")
    return {**summary, "files": files}


def summarize(store: EpisodeStore) -> dict[str, Any]:
    """Return what `inspect_store` prints as plain numbers and strings; reads all low-dimensional fields."""
    lengths = np.diff(store.offsets)
    seconds = store.total_frames / store.embodiment.control_hz
    return {
        "store": str(store.path),
        "version": store.version,
        "fingerprint": store.fingerprint,
        "embodiment": store.embodiment.name,
        "robot": store.embodiment.robot,
        "control_hz": store.embodiment.control_hz,
        "episodes": store.num_episodes,
        "frames": store.total_frames,
        "hours": seconds / 3600,
        "bytes": sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file()),
        "lengths": _quantiles(lengths),
        "success": {str(label): sum(e.success is label for e in store.episodes) for label in (True, False, None)},
        "tasks": dict(Counter(str(e.meta.get("task", "")) for e in store.episodes).most_common()),
        "instructions": dict(Counter(e.instruction for e in store.episodes).most_common()),
        "cameras": {c.name: list(c.shape) for c in store.embodiment.cameras},
        "maps": {m.name: [*m.shape, m.dtype] for m in store.schema.maps},
        "fields": [row for field in store.schema.fields for row in _field(store, field)],
        "warnings": find_problems(store),
    }


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    names = ("min", "q10", "median", "q90", "max")
    return dict(zip(names, np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).tolist()))


def _field(store: EpisodeStore, field: str) -> list[dict[str, Any]]:
    """Return one row for each dimension of a field: name, unit, limits and what was measured, NaN left out."""
    spec = store.schema.field(field)
    values = store.lowdim(field).reshape(-1, store.schema.columns(field)).astype(np.float64)
    rows = []
    for column in range(values.shape[1]):
        x = values[:, column][np.isfinite(values[:, column])]
        fits = len(spec.names) == values.shape[1]
        rows.append(
            {
                "field": field,
                "index": column,
                "name": spec.names[column] if fits else "",
                "unit": spec.units[column] if len(spec.units) == values.shape[1] else "",
                "limits": [spec.low[column], spec.high[column]] if spec.low and spec.high and fits else None,
                "min": float(x.min()) if len(x) else None,
                "mean": float(x.mean()) if len(x) else None,
                "max": float(x.max()) if len(x) else None,
                "std": float(x.std()) if len(x) else None,
            }
        )
    return rows


def _sections(summary: dict[str, Any]) -> list[tuple[str, list[str], Rows]]:
    """Return (title, columns, rows) of every table."""
    overview = [
        ["episodes", f"{summary['episodes']}"],
        ["steps", f"{summary['frames']}  ({human_time(summary['hours'] * 3600)} at {summary['control_hz']:g} Hz)"],
        ["success", "  ".join(f"{k}: {v}" for k, v in summary["success"].items() if v).replace("None", "unlabelled")],
        ["steps an episode", "  ".join(f"{name} {value:g}" for name, value in summary["lengths"].items())],
        ["cameras", "  ".join(f"{n} {h}x{w}" for n, (h, w, _) in summary["cameras"].items())],
        ["maps", "  ".join(f"{n} {h}x{w} {dtype}" for n, (h, w, _, dtype) in summary["maps"].items())],
        ["robot", f"{summary['robot']}  (embodiment {summary['embodiment']})"],
        ["on disk", f"{human_bytes(summary['bytes'])}  version {summary['version']}  {summary['fingerprint']}"],
    ]
    overview = [row for row in overview if row[1]]
    fields = []
    for r in summary["fields"]:
        measured = [_number(r[key]) for key in ("min", "mean", "max", "std")]
        limits = "..".join(f"{x:g}" for x in r["limits"] or ())
        fields.append([f"{r['field']}[{r['index']}]", r["name"], r["unit"], *measured, limits])
    sections = [(f"Store {summary['store']}", ["what", "value"], overview)]
    sections += [("Fields", ["field", "name", "unit", "min", "mean", "max", "std", "limits"], fields)]
    for title, key in (("Tasks", "tasks"), ("Instructions", "instructions")):
        counts = list(summary[key].items())
        if [name for name, _ in counts if name]:
            rows = [[name or "(none)", str(count)] for name, count in counts[:LISTED]]
            if len(counts) > LISTED:
                rows.append([f"... {len(counts) - LISTED} more", str(sum(count for _, count in counts[LISTED:]))])
            sections.append((f"{title} ({len(counts)})", [key[:-1], "episodes"], rows))
    return sections


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _write_html(
    folder: Path,
    store: EpisodeStore,
    sections: list[tuple[str, list[str], Rows]],
    warnings: list[str],
    picture: str | None,
) -> Path:
    """Write one self-contained page; every text of the store is escaped."""
    escape = html_text.escape
    body = [f"<h1>{escape(store.path.name)}</h1>"]
    if warnings:
        body.append("<h2>Warnings</h2><ul>" + "".join(f"<li>{escape(w)}</li>" for w in warnings) + "</ul>")
    for title, columns, rows in sections:
        head = "".join(f"<th>{escape(c)}</th>" for c in columns)
        lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        body.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{lines}</table>")
    if picture:
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        body.append(f'<h2>Episodes</h2><img alt="contact sheet" src="data:image/png;base64,{data}">')
    style = "body{font:14px sans-serif;margin:2em}td,th{text-align:left;padding:2px 12px 2px 0}"
    page = f"<!doctype html><meta charset=utf-8><title>{escape(store.path.name)}</title><style>{style}</style>"
    path = folder / "index.html"
    os.makedirs(folder, exist_ok=True)
    with disk_errors(path):
        path.write_text(page + "\n".join(body) + "\n", encoding="utf-8")
    return path
