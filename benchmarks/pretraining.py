"""Collects what runs of ``brachium pretrain`` scored, for the pages of results.

Type: .venv/bin/python benchmarks/pretraining.py PART NAME=OUT [NAME=OUT ...]

PART is ``runs`` (what parts of the training are worth, in short runs) or ``seeds`` (the shipped recipe from several
seeds); OUT is the folder of a finished run, and NAME what its row is called. Figures are added to
``benchmarks/results/pretraining.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from demo_controls import ROOT

from brachium.hardware import processor

TARGET = ROOT / "benchmarks" / "results" / "pretraining.json"
PARTS = ("runs", "seeds")


def collect(out: Path) -> dict[str, Any]:
    """Steps, time and scores of a finished run."""
    notes = json.loads((out / "scores.json").read_text())
    kept = {key.removeprefix("eval/"): round(value, 4) for key, value in notes["metrics"].items() if "accuracy" in key}
    pixels = {key.removeprefix("eval/"): round(value, 4) for key, value in notes["metrics"].items() if "/px" in key}
    optimization = notes["optimization"]
    return {
        "seed": int(optimization["seed"]),
        "steps": int(optimization["steps"]),
        "seconds": round(notes["seconds"]),
        "scores": kept | pixels,
    }


def main(words: list[str]) -> int:
    """Collect the runs that the command names."""
    part, rows = (words or [""])[0], [word.partition("=") for word in words[1:]]
    if part not in PARTS or not rows or not all(out for _, _, out in rows):
        print(__doc__)
        return 2
    results = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    results["machine"] = f"{processor()}, no GPU; each run on one core"
    results.setdefault(part, {}).update({name: collect(Path(out)) for name, _, out in rows})
    TARGET.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
