"""The model card of a pretrained model: what it is, what it was made of, what it can and cannot do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KINDS = {
    "color": "What color is the cube?",
    "color_at": "What color is the thing at a place?",
    "shape": "What is the red thing?",
    "name_at": "What is at a place?",
    "exists": "Is there a red cube?",
    "count": "How many cubes are there?",
    "left": "Is one thing left of another?",
    "right": "Is one thing right of another?",
    "nearer": "Is one thing nearer to the robot than another?",
    "leftmost": "What is the leftmost thing?",
    "rightmost": "What is the rightmost thing?",
    "holding": "Is the gripper holding something?",
    "held": "What is the gripper holding?",
    "drawer": "Is the drawer open?",
    "place": "Where on the table is a thing?",
    "gripper": "Where is the gripper?",
    "caption": "What is on the table? (every name, in order)",
    "point": "Where in the image is a thing? (both location tokens right)",
    "box": "Box of a thing (all four location tokens right)",
    "detect": "Where are all things of a kind? (every token right)",
    "match": "Where in the other view is a place? (both location tokens right)",
}
SETS = {
    "eval/heldout": "new scenes",
    "eval/pair": "pairs never named",
    "eval/paraphrase": "new wordings",
    "blind/heldout": "no picture",
}


def recipe_hash(data: Any, settings: Mapping[str, Any], optimization: Any) -> str:
    """Digest of what was asked for: data (fingerprints, or how many tables to record), settings and optimization."""
    recipe = {"data": data, **settings, "optimization": optimization.noted()}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:12]


def model_card(notes: Mapping[str, Any], name: str = "brachium nano") -> str:
    """The card as Markdown, from the notes of a pretraining."""
    metrics: Mapping[str, float] = notes["metrics"]
    sets = [key for key in SETS if any(metric.startswith(key + "/") for metric in metrics)]
    lines = ["| question | " + " | ".join(SETS[key] for key in sets) + " |", "|---|" + "---|" * len(sets)]
    for kind, asked in KINDS.items():
        found = [metrics.get(f"{key}/accuracy/{kind}") for key in sets]
        if any(value is not None for value in found):
            lines.append(f"| {asked} | " + " | ".join("" if v is None else f"{100 * v:.0f} %" for v in found) + " |")
    cameras = sorted({key.rpartition("/")[2] for key in metrics if "/px/" in key})
    points = ["| pointing, error in pixels: median, 90th percentile | " + " | ".join(SETS[k] for k in sets[:3]) + " |"]
    points.append("|---|" + "---|" * len(sets[:3]))
    for camera in cameras:
        cells = [(metrics.get(f"{k}/px/{camera}"), metrics.get(f"{k}/px_p90/{camera}")) for k in sets[:3]]
        shown = ["" if a is None or b is None else f"{a:.2f}, {b:.2f}" for a, b in cells]
        points.append(f"| {camera} camera | " + " | ".join(shown) + " |")
    probe: Mapping[str, float] = notes.get("probe", {})
    probed = ", ".join(
        f"{key} {100 * probe[key]:.0f} % (chance {100 * probe[f'chance/{key}']:.0f} %)"
        for key in ("color", "kind")
        if key in probe
    )
    located: Mapping[str, Any] = notes.get("positions", {})
    places = ", ".join(
        f"{key.split('/')[1]} {value:.1f} mm ({located['metrics'][key + '_p90']:.0f})"
        for key, value in located.get("metrics", {}).items()
        if key.endswith("/position_mm")
    )
    taught = (
        f"- Positions: `brachium train-positions` on {located['scenes']} scenes of an arm at work.\n" if located else ""
    )
    options = notes["optimization"]
    remark = f"\n  {notes['remark']}" if notes.get("remark") else ""
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: brachium
---

# {name}

A vision-language model of {notes["parameters"] / 1e6:.2f} million parameters that knows one world: a rendered table
with a robot arm. It is a SmolVLM in the layout of `transformers`, with location tokens, and a readout that points at
what words name. It was trained from scratch, on rendered scenes only.

For: starting policies in brachium's simulator (`encoder=nano`), asking about its pictures (`brachium ask`), tests.
Not for: photographs, other cameras, other words. It has seen nothing else, and says something all the same.

## Data and compute

- {notes["scenes"]} scenes for training, with commands, questions with answers, and labels from the simulator: which
  thing covers which patch, and where it is. Stores: {", ".join(f"{k} ({v})" for k, v in notes["stores"].items())}.
- Colour-shape pairs that no text names: see `HELD_OUT_PAIRS`. They stand on the tables as distractors.
- {options["steps"]} steps of {options["batch_size"]} scenes in {notes["seconds"] / 60:.0f} minutes on
  {notes.get("machine", "a CPU")}, seed {options["seed"]}. Stage without labels: {"yes" if notes["seeing"] else "no"}.
{taught}- Recipe {notes["recipe"]}; `brachium pretrain` with the options of its `brachium.json` makes it again.{remark}

## Scores

Answers are right when every token is. Without a picture, what is right is what text alone gives.

{chr(10).join(lines)}

{chr(10).join(points)}

Images are 96 pixels wide; things count from 8 visible pixels.
{f"Positions in the base frame while an arm works, median error (90th percentile): {places}." if places else ""}
{f"A linear probe of single patches of the frozen vision tower: {probed}." if probed else ""}
"""
