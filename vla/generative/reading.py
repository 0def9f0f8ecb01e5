"""What an instruction says about an image, as generators are told it: a summary of the words, and where things are.

A generator trained here sees a few hundred scenes: too few to learn what "the red cube" is. As SuSIE's editor begins
from a model that has read the web, ours is conditioned on a pretrained vision-language model that points at what words
name (`vla.pretrained`); it stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...console import log, progress
from ...errors import ConfigError, SpecMismatchError
from ..grounding import ROLES, patch_centres
from ..pretrained import Pretrained, identity_of
from ..tokenizer import InstructionEncoder
from .frames import FrameData

CHUNK = 16
"""Frames read at once when a whole store is read."""
SPREAD = 0.05
"""Standard deviation of the spot that marks a place, as a share of the image."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What texts say about images.

    Attributes:
        words: Summary of each text, (b, d).
        uv: Where its object and its goal are in each camera's image, 0..1 from the left and the top edge, (b, r, n, 2).
        visible: How likely they are inside the image, 0..1, (b, r, n).
    """

    words: Float[Tensor, "b d"]
    uv: Float[Tensor, "b r n 2"]
    visible: Float[Tensor, "b r n"]

    def rows(self, index: Tensor) -> Reading:
        """Some of them, as often as `index` names them."""
        return Reading(words=self.words[index], uv=self.uv[index], visible=self.visible[index])

    def of(self, views: Sequence[int]) -> Reading:
        """The same with the places in some cameras only."""
        index = torch.tensor(list(views), device=self.uv.device)
        return Reading(words=self.words, uv=self.uv[:, :, index], visible=self.visible[:, :, index])

    def spots(self, size: int) -> Float[Tensor, "b m size size"]:
        """The places as images: a Gaussian spot a role and camera, as bright as it is visible."""
        centres = patch_centres((size, size), self.uv)
        apart = (self.uv.flatten(1, 2)[:, :, None] - centres).square().sum(-1)
        bright = self.visible.flatten(1, 2)[:, :, None] * torch.exp(-0.5 * apart / SPREAD**2)
        return bright.unflatten(2, (size, size))

    def jittered(self, generator: torch.Generator, words: float, places: float) -> Reading:
        """The same with noise: readings of few frames are learnt by heart without it."""
        noise = torch.randn(self.words.shape, generator=generator).to(self.words)
        moved = torch.randn(self.uv.shape, generator=generator).to(self.uv)
        return Reading(words=self.words + words * noise, uv=self.uv + places * moved, visible=self.visible)


class Reader(nn.Module):
    """A pretrained vision-language model that reads instructions about images.

    Args:
        pretrained: A model that points.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        if pretrained.encoder.point_readout is None:
            raise ConfigError("expected a pretrained model that points, such as encoder=nano")
        self.pretrained, self.encoder = pretrained, pretrained.encoder.eval().requires_grad_(False)
        self.instructions = InstructionEncoder(pretrained.tokenizer, pretrained.recipe.max_tokens)
        self.cameras, self.width, self.roles = pretrained.cameras, self.encoder.width, len(ROLES)
        backbone: Any = self.encoder.backbone
        self.vision, self.grid = int(backbone.vision_width), tuple(backbone.grid)
        if self.grid[0] != self.grid[1] or not self.vision:
            raise ConfigError("expected a pretrained model with a vision tower of square images, such as encoder=nano")

    @classmethod
    def load(cls, name: str) -> Reader:
        """Load one that ships with brachium, or a folder.

        Raises:
            NotFoundError, CheckpointError: See `Pretrained.load`.
        """
        return cls(Pretrained.load(name))

    def require(self, cameras: Sequence[str]) -> None:
        """Raise SpecMismatchError unless it was trained with these cameras."""
        if tuple(cameras) != tuple(self.cameras):
            raise SpecMismatchError(
                f"the pretrained model was trained with cameras {list(self.cameras)}, this robot has {list(cameras)}"
            )

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "b n height width 3"], texts: Sequence[str]) -> Reading:
        """Read one text an image set."""
        return self.read(images, [texts])[0]

    @torch.no_grad()
    def read(self, images: UInt8[Tensor, "b n height width 3"], texts: Sequence[Sequence[str]]) -> list[Reading]:
        """Read k texts an image set, in one pass: k lists of b texts."""
        tokens = torch.stack([torch.from_numpy(self.instructions(each)) for each in texts], dim=1)
        features = self.encoder.read(images, tokens.to(images.device))
        readout = self.encoder.point_readout
        assert readout is not None
        found = readout.look_up(features, slice(None))
        words, seen = features.readout[:, :, 0].float(), found.visible.sigmoid()
        return [Reading(words=words[:, k], uv=found.uv[:, k], visible=seen[:, k]) for k in range(len(texts))]


def other_texts(data: FrameData) -> list[str]:
    """For each episode the instruction of another one, told apart by its words: what it did not do."""
    texts = list(data.store.instructions)
    found = []
    for k, text in enumerate(texts):
        for step in range(1, len(texts) + 1):  # a fixed stride that visits all
            other = texts[(k + 97 * step) % len(texts)]
            if other != text:
                break
        found.append(other)
    return found


def read_store(reader: Reader, data: FrameData, folder: Path, encoder: str) -> tuple[Reading, Reading]:
    """Read every frame of a store with its own instruction, and with one of another episode.

    Kept in `folder` by the hash of the model's weights and of the data.
    """
    path = folder / f"readings-{identity_of(encoder)}-{data.store.fingerprint[:16]}.safetensors"
    names = [f"{kind}/{key}" for kind in ("own", "other") for key in ("words", "uv", "visible")]
    tensors: dict[str, Tensor] = {}
    if path.exists():
        try:
            tensors = load_file(path)
        except SafetensorError:
            log(f"{path} is damaged; reading the frames again")
    if set(tensors) != set(names):
        others = other_texts(data)
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        count = len(data.owner)
        with progress("reading instructions", total=count, unit="frames") as bar:
            for start in range(0, count, CHUNK):
                rows = torch.arange(start, min(start + CHUNK, count)).numpy()
                wrong = [others[k] for k in data.owner[rows].tolist()]
                both = reader.read(data.images(rows), [data.instructions(rows), wrong])
                for kind, reading in zip(("own", "other"), both):
                    for key in ("words", "uv", "visible"):
                        parts[f"{kind}/{key}"].append(getattr(reading, key))
                bar.update(len(rows))
        tensors = {name: torch.cat(each).contiguous() for name, each in parts.items()}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary)
        temporary.replace(path)
    own, other = (
        Reading(**{key: tensors[f"{kind}/{key}"] for key in ("words", "uv", "visible")}) for kind in ("own", "other")
    )
    return own, other
