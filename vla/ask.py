"""The verb ``brachium ask``: a question about an image, for people."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..console import log
from ..errors import ConfigError, NotFoundError
from .pretrained import Pretrained
from .tokenizer import LOCATIONS


def ask(*, image: str, question: str, vlm: str = "nano", out: str | None = None) -> int:
    """Answer a question about an image file.

    What ``brachium pretrain`` makes knows rendered tables: ``what color is the cube?``,
    ``how many balls are there?``, ``is the red cube left of the green bowl?``,
    ``where is the red cube in the front view?``, ``describe the table.``

    Args:
        image: PNG or JPEG; a picture of the front camera.
        question: What to ask.
        vlm: Pretrained model: ``nano``, which is there, or the folder that ``brachium pretrain`` made.
        out: Where to draw the places that an answer names, as PNG; by default beside the image.
    """
    pixels = read_image(Path(image))
    answer = Pretrained.load(vlm).answer(pixels, question)
    print(answer or "(no answer)")
    groups = [[int(k) for k in re.findall(r"\d+", found)] for found in re.findall(r"(?:<loc\d+>)+", answer)]
    if groups:
        target = Path(out) if out else Path(image).with_name(f"{Path(image).stem}-answer.png")
        draw_places(pixels, groups, target)
        log(f"drawn into {target}")
    return 0


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (height, width, 3).

    Raises:
        NotFoundError: No such file.
        ConfigError: No image.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise NotFoundError(f"no image at {path}: expected a PNG or JPEG file")
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{path} is no image that can be read: {error}") from error


def draw_places(pixels: np.ndarray, groups: list[list[int]], target: Path) -> None:
    """Draw each group of location tokens, y before x, into an enlarged copy: two are a cross, four a box."""
    from PIL import Image, ImageDraw

    size = max(384, pixels.shape[0])
    picture = Image.fromarray(pixels).resize(
        (size * pixels.shape[1] // pixels.shape[0], size), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(picture)
    for places in groups:
        points = [
            ((x + 0.5) / LOCATIONS * picture.width, (y + 0.5) / LOCATIONS * picture.height)
            for y, x in zip(places[::2], places[1::2])
        ]
        if len(points) == 2:
            (left, right), (top, bottom) = (sorted(axis) for axis in zip(*points))
            draw.rectangle((left, top, right, bottom), outline="red", width=3)
            continue
        for x, y in points:
            draw.line((x - 10, y, x + 10, y), fill="red", width=3)
            draw.line((x, y - 10, x, y + 10), fill="red", width=3)
    picture.save(target, "PNG")
