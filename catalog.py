"""`brachium list`: the parts one can pick by config, and the stores and checkpoints made so far."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path

from .cli.compose import CONF_MODULE, Composer
from .console import log, table
from .errors import ConfigError, did_you_mean

RESULTS = ("stores", "checkpoints")


def show(*, what: str | None = None, outputs: str = "outputs", search_path: Sequence[str] = ()) -> int:
    """List the parts that a config can name, and the stores and checkpoints under outputs/.

    Args:
        what: A group such as `model/head`, or its last word, also in the plural (heads, backbones, envs); or
            `stores` or `checkpoints`; null for all.
        outputs: Folder that runs write to.
        search_path: Places of third-party configs; set by hydra.searchpath.
    """
    composer = Composer(search_path)
    groups = composer.groups()
    chosen = groups if what is None else match_groups(what, groups)
    for group in chosen:
        rows = [[option, describe(f"{group}/{option}", search_path)] for option in composer.options(group)]
        table(f"{group}  (type {composer.pick(group, 'NAME')})", ["name", "what it is"], rows)
        print()
    if what is None or what in RESULTS:
        found = results(Path(outputs))
        for kind in RESULTS if what is None else (what,):
            rows = [list(row) for row in found[kind]]
            if rows:
                table(f"{kind} in {outputs}/", ["path", "what it is"], rows)
                print()
            elif what is not None:
                log(f"no {kind} in {outputs}/ yet. Type: brachium {'record' if kind == 'stores' else 'train'} --help")
    if what is None and not groups:
        log("no config groups found")
    return 0


def match_groups(what: str, groups: Sequence[str]) -> list[str]:
    """Return the groups called `what` (full name, last word, or its plural), with the groups inside them."""
    word = what.strip("/")
    names = {form for form in (word, word.removesuffix("s"), word.removesuffix("es")) if form}
    found = [g for g in groups if g in names or g.rpartition("/")[2] in names or g.partition("/")[0] in names]
    if found or what in RESULTS:
        return found
    plurals = [group.rpartition("/")[2] + "s" for group in groups]
    raise ConfigError(f"what={what}: expected a group or result. {did_you_mean(what, [*plurals, *groups, *RESULTS])}")


def describe(config: str, search_path: Sequence[str] = ()) -> str:
    """Return the first comment line of a YAML, for example of ``model/head/flow``; empty when it has none."""
    for place in (f"pkg://{CONF_MODULE}", *search_path):
        scheme, _, where = place.partition("://")
        root = importlib.resources.files(where.replace("/", ".")) if scheme == "pkg" else Path(where or scheme)
        file = root.joinpath(f"{config}.yaml")
        if file.is_file():
            lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
            first = next((line for line in lines if line and not line.startswith("# @package")), "")
            return first.lstrip("# ") if first.startswith("#") else ""
    return ""


def results(outputs: Path, depth: int = 4) -> dict[str, list[tuple[str, str]]]:
    """Return the stores (folders with a zarr.json) and checkpoints (with *.safetensors) below `outputs`."""
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in RESULTS}
    folders = [(outputs, 0)] if outputs.is_dir() else []
    while folders:
        folder, level = folders.pop()
        if (folder / "zarr.json").is_file():
            found["stores"].append((str(folder), _store_line(folder)))
        elif weights := sorted(folder.glob("*.safetensors")):
            size = sum(file.stat().st_size for file in weights)
            found["checkpoints"].append((str(folder), f"{size / 1e6:.1f} MB of weights"))
        elif level < depth:
            folders += [(child, level + 1) for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
    return {kind: sorted(rows) for kind, rows in found.items()}


def _store_line(folder: Path) -> str:
    """Read what the store's own header says; a header that cannot be read is no reason to stop listing."""
    try:
        attributes = json.loads((folder / "zarr.json").read_text(encoding="utf-8")).get("attributes", {})
    except (OSError, ValueError):
        return "zarr.json cannot be read"
    known = [
        f"{key} {attributes[key]}"
        for key in ("name", "format", "version")
        if isinstance(attributes, dict) and key in attributes
    ]
    return ", ".join(known) or "zarr group"
