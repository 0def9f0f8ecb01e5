"""Turns figures of the store (``results/store.json``, ``durability.json``) into ``docs/results-store.md`` and README.

Type: .venv/bin/python benchmarks/store_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from demo_controls import ROOT
from results_page import table

RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """Figures of one script; empty where it has not run."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def random_windows(found: Mapping[str, Any]) -> str:
    """A table a size of image."""
    parts = []
    for size, part in found.items():
        rows = [
            [name, f"{r['per_cpu_s']:.0f}", f"{r['per_s']:.0f}", f"{r['ours_x_cpu']:.2f}", f"{r['ours_x']:.2f}"]
            for name, r in part["readers"].items()
        ]
        heads = ["reader", "windows a CPU second", "windows a second", "ours is x (CPU)", "ours is x"]
        sizes = ", ".join(f"{name} {size_ / 1e6:.1f} MB" for name, size_ in part["bytes"].items())
        parts.append(f"### {size} px\n\n{table(heads, rows)}\n\nOn the disk: {sizes}.")
    return "\n\n".join(parts)


def page(store: Mapping[str, Any], kills: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        "# Results of the episode store",
        f"Made by `benchmarks/store.py` and `benchmarks/durability.py` on {store.get('machine', 'no machine yet')}; "
        "figures are in `benchmarks/results/`. A window is one frame of two cameras, the state and sixteen actions, at "
        "random. All readers of a part run in one process, on one thread unless said otherwise, in interleaved rounds, "
        "files in the page cache; a ratio is the median over rounds.",
    ]
    if "random" in store:
        parts += [
            "## Random windows",
            "*Decode from memory* decodes the same two JPEG streams, already in memory, into one buffer: nothing that "
            "decodes with libjpeg-turbo can be faster. *Ours* is batches of 64 into buffers that are used again, as "
            "`BatchReader` does.",
            random_windows(store["random"]),
        ]
    if "loader" in store:
        one = store["loader"]
        rows = [[name, f"{value:.0f}"] for name, value in one["windows_per_s"].items()]
        parts += [
            "## The training loader",
            f"Shuffled batches of 64, {one['size']} px, normalised, as float32 tensors; two threads of ours, two "
            f"worker processes of LeRobot's DataLoader ({one['lerobot_backend']}). Ours is {one['ours_x']:.1f} x.",
            table(["loader", "windows a second"], rows),
        ]
    if "write" in store:
        rows = [
            [f"{size} px", *(f"{value:.0f}" for value in part["frames_per_cpu_s"].values()), f"{part['ours_x']:.0f}"]
            for size, part in store["write"].items()
        ]
        parts += ["## Writing", table(["", "ours [frames/CPU s]", "LeRobot video [frames/CPU s]", "ours is x"], rows)]
    if "memory" in store:
        rows = [[n, f"{r['import_mb']:.0f}", f"{r['steady_mb']:.0f}"] for n, r in store["memory"].items()]
        parts += ["## Memory", table(["", "after import [MB]", "after reading [MB]"], rows)]
    if "index" in store:
        one = store["index"]
        parts += [
            "## Ten million frames",
            f"{one['frames'] / 1e6:.0f} million frames in {one['episodes']:.0f} episodes (made up, with their columns "
            f"in the cache): opened in {one['open_s']:.2f} s, first batch of places and states after another "
            f"{one['first_batch_s']:.2f} s; after 200 batches {one['own_mb']:.0f} MB of memory of its own "
            f"({one['resident_mb']:.0f} MB with pages of the cache, which processes share and the kernel takes back).",
        ]
    if "remote" in store:
        one = store["remote"]
        rows = [
            [name, f"{one[name]['per_s']:.0f}", f"{one[name]['requests_per_window']:.3f}"]
            for name in ("blocks", "zarr-python, 16 threads")
        ]
        parts += [
            "## Far away",
            f"128 px over HTTP, 20 ms a request. `BlockStreamer` is {one['ours_x']:.1f} x zarr-python.",
            table(["reader", "windows a second", "requests a window"], rows),
        ]
    if kills:
        a, b, c = kills["recorders"], kills["conversions"], kills["shared"]
        parts += [
            "## Kills",
            f"{a['kills']} recorders killed by SIGKILL at random moments: of {a['reported']} episodes that they had "
            f"reported {a['lost']} were lost, {a['unopenable']} stores did not open, {a['wrong_steps']} steps were not "
            f"what was given; {a['torn']} episodes broke off, {a['torn_saved']} of them were saved, with "
            f"{a['steps_lost']} reported steps missing. {b['kills']} conversions killed and typed again: "
            f"{b['finished']} finished, {b['different']} of them with something else than an uninterrupted one. Two "
            f"writers and a reader for {c['seconds']:.0f} s: {c['episodes']} episodes, {c['snapshots']} snapshots, "
            f"{c['torn_reads']} torn reads.",
        ]
    return "\n\n".join(parts) + "\n"


def row(store: Mapping[str, Any]) -> str:
    """What README says, in one table."""
    rows = []
    for size, part in store.get("random", {}).items():
        readers = part["readers"]
        video = [
            f"{r['ours_x']:.0f}x {n.removeprefix('LeRobot video, ')}" for n, r in readers.items() if "LeRobot" in n
        ]
        limit = readers["decode from memory"]["ours_x_cpu"]
        zarr = readers["zarr-python, same files"]["ours_x"]
        cells = [f"random windows, {size} px", f"{', '.join(video)}", f"{zarr:.0f}x", f"{100 * limit:.0f} %"]
        rows.append(cells)
    heads = ["", "against LeRobot video", "against zarr-python", "of decoding from memory"]
    return table(heads, rows) + "\n\nMore: [results](docs/results-store.md)."


def main() -> None:
    store, kills = read("store"), read("durability")
    (ROOT / "docs" / "results-store.md").write_text(page(store, kills))
    readme = ROOT / "README.md"
    pattern = r"(<!-- store: begin -->\n).*?(<!-- store: end -->)"
    text = readme.read_text()
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit("README.md has no markers <!-- store: begin --> and <!-- store: end -->")
    readme.write_text(re.sub(pattern, lambda m: f"{m[1]}\n{row(store)}\n\n{m[2]}", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
