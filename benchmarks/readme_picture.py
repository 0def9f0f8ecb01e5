"""Make the README's moving picture from real episodes: replays successes of an evaluated demo side by side.

Type: .venv/bin/python benchmarks/readme_picture.py outputs/demo/flow-0/eval
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from brachium.cli.compose import load
from brachium.policies.rollout import replay

SIZE = 224
BAND = 34
HOLD = 8


def panel(frame: np.ndarray, instruction: str) -> Image.Image:
    """A frame with the instruction below it."""
    image = Image.new("RGB", (SIZE, SIZE + BAND), "white")
    image.paste(Image.fromarray(frame), (0, 0))
    words, lines = instruction.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 36:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines[:2]):
        draw.text((6, SIZE + 4 + 14 * row), line, fill="black", font=ImageFont.load_default(12))
    return image


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    columns = []
    for task in dict.fromkeys(r["task"] for r in rows):
        chosen = [r for r in rows if r["task"] == task and r["success"] and r["split"] != "train"][:2]
        frames: list[Image.Image] = []
        for row in chosen:
            make = load(f"env/tabletop/{task}")
            actions = np.asarray(row["actions"], np.float32)
            seen, _ = replay(lambda make=make: make(render_size=SIZE), row["seed"], row["options"], actions)
            frames += [panel(f, row["instruction"]) for f in [*seen, *([seen[-1]] * HOLD)]]
        columns.append(frames)
    length = max(map(len, columns))
    pictures = []
    for k in range(length):
        wide = Image.new("RGB", (len(columns) * (SIZE + 4) - 4, SIZE + BAND), "white")
        for i, frames in enumerate(columns):
            wide.paste(frames[k % len(frames)], (i * (SIZE + 4), 0))
        pictures.append(wide.quantize(96, dither=Image.Dither.NONE))
    target = Path(__file__).resolve().parent.parent / "docs" / "rollout.gif"
    pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=100, loop=0, optimize=True)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, {length} frames")


if __name__ == "__main__":
    main()
