"""A picture of held-out samples, for people: what was seen, what was generated, and what came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from .generator import Guidance
from .stages import Stages

SCALE = 2
"""Screen pixels an image pixel."""
DRAWS = 2
GAP, LINE = 6, 14


def write_sheet(path: Path, stages: Stages, guidance: Guidance, count: int) -> Path:
    """Draw `count` held-out frames: the instruction, the present, `DRAWS` samples, and the true future."""
    now = stages.testing(count)
    batch = stages.frames(now, stages.futures(now, None), stages.own)
    model = stages.system.generator.eval()
    draws = [
        model.sample(
            batch["present"], batch["reading"], model.noise(len(now), torch.Generator().manual_seed(k)), guidance
        )
        for k in range(DRAWS)
    ]
    blocks = [[strip(batch["present"][:, None])], *([strip(found)] for found in draws), [strip(batch["future"])]]
    names = ["seen", *(f"generated {k + 1}" for k in range(DRAWS)), f"came {model.steps} steps apart"]
    columns = [column[0] for column in blocks]
    height, widths = columns[0].shape[1], [column.shape[2] for column in columns]
    page = Image.new("RGB", (sum(widths) + GAP * len(widths), LINE + (height + LINE + GAP) * len(now)), "white")
    draw = ImageDraw.Draw(page)
    for k, text in enumerate(stages.data.instructions(now)):
        top, left = LINE + k * (height + LINE + GAP), 0
        draw.text((2, top), text, fill="black")
        for name, column in zip(names, columns):
            if k == 0:
                draw.text((left + 2, 0), name, fill="black")
            page.paste(Image.fromarray(column[k]), (left, top + LINE))
            left += column.shape[2] + GAP
    page.save(path)
    return path


def strip(frames: UInt8[Tensor, "b f n size size 3"]) -> np.ndarray:
    """Frames side by side, cameras one under the other, enlarged: uint8 (b, height, width, 3)."""
    b, f, n, size, _, _ = frames.shape
    rows = frames.permute(0, 2, 3, 1, 4, 5).reshape(b, n * size, f * size, 3)
    return np.asarray(rows.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2).numpy())
