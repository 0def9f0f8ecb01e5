"""From one observation to what a head sees: the backbone, and the points it is asked for.

With a point readout the encoding is small (a summary of the words, and points), so the encoder can be trained to
ground, frozen, and its encodings cached a frame. Without one, the encoding is every token of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones.base import Backbone, BackboneFeatures
from .grounding import METRES, ROLES, PointReadout, Points
from .recipe import Recipe, instantiate


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a head sees of images and words; a frame each.

    Attributes:
        words: Summary of the instruction, (b, d).
        points: For each role uv a camera, visibility a camera, position [m]; (b, r * (3 n + 3)). Empty without points.
        tokens: All tokens (b, l, d), or None when points stand for them.
        mask: True at real tokens, (b, l).
    """

    words: Float[Tensor, "b d"]
    points: Float[Tensor, "b q"]
    tokens: Float[Tensor, "b l d"] | None = None
    mask: Bool[Tensor, "b l"] | None = None

    def rows(self, index: Tensor) -> Encoding:
        """The encodings of some frames."""
        return Encoding(
            words=self.words[index],
            points=self.points[index],
            tokens=None if self.tokens is None else self.tokens[index],
            mask=None if self.mask is None else self.mask[index],
        )

    def detach(self) -> Encoding:
        """The same, cut off from what computed it."""
        return Encoding(
            words=self.words.detach(),
            points=self.points.detach(),
            tokens=None if self.tokens is None else self.tokens.detach(),
            mask=self.mask,
        )


class Encoder(nn.Module):
    """Backbone + optional point readout.

    Args:
        backbone: Images and words to features.
        body: Indices of the tool's pose in the state, x, y, z first, to point at the roles with; None for a model that
            does not. Pointing needs grounding (supervision of the points) to be of use.
        cameras: Number of cameras.
        vocab_size: Size of the vocabulary whose words the summary must be able to name.
        pad_id: Padding token.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        body: tuple[int, ...] | None,
        cameras: int,
        vocab_size: int,
        pad_id: int,
    ) -> None:
        super().__init__()
        self.backbone, self.pad_id = backbone, pad_id
        self.body = list(body or ())
        self.point_readout = (
            PointReadout(
                width=backbone.width,
                vision_width=backbone.vision_width,
                cameras=cameras,
                state_dim=len(self.body),
                tool=(0, 1, 2),
            )
            if body is not None
            else None
        )
        self.word_readout = nn.Linear(backbone.width, vocab_size) if body is not None else None
        self.width = backbone.width
        self.points_dim = len(ROLES) * (3 * cameras + 3) if body is not None else 0

    def point(
        self,
        images: UInt8[Tensor, "b n height width 3"],
        tokens: Int[Tensor, "b k l"],
        state: Float[Tensor, "b s"],
    ) -> tuple[Points, Float[Tensor, "b k w"], tuple[int, int]]:
        """Points for k texts an image set, the logits of the words each summary names, and the patch grid."""
        features = self.read(images, tokens)
        return *self.points_of(features, state), features.grid

    def read(
        self,
        images: UInt8[Tensor, "b n height width 3"],
        tokens: Int[Tensor, "b k l"],
        watch: tuple[int, ...] = (),
    ) -> BackboneFeatures:
        """The backbone's features of k texts an image set."""
        return self.backbone(images, tokens, tokens != self.pad_id, watch)

    def points_of(
        self, features: BackboneFeatures, state: Float[Tensor, "b s"]
    ) -> tuple[Points, Float[Tensor, "b k w"]]:
        """Points and named words of every text of some features."""
        if self.point_readout is None or self.word_readout is None:
            raise RuntimeError("this encoder has no point readout")
        points = self.point_readout(features, state[:, self.body])
        return points, self.word_readout(features.readout[:, :, 0]).float()

    def forward(
        self,
        images: UInt8[Tensor, "b n height width 3"],
        tokens: Int[Tensor, "b l"],
        state: Float[Tensor, "b s"],
    ) -> Encoding:
        """Encode one text an image set; `state` is in the embodiment's units."""
        return self.encoding(self.read(images, tokens[:, None]), tokens, state)

    def encoding(self, features: BackboneFeatures, tokens: Int[Tensor, "b l"], state: Float[Tensor, "b s"]) -> Encoding:
        """What a head sees of the first text of some features, `tokens`."""
        features = features.first_texts(1)
        words = features.readout[:, 0, 0].float()
        if self.point_readout is None:
            everything = torch.cat([features.image, features.text[:, 0], features.readout[:, 0]], dim=1)
            real = torch.ones(everything.shape[:2], dtype=torch.bool, device=everything.device)
            start = features.image.shape[1]
            real[:, start : start + tokens.shape[1]] = tokens != self.pad_id
            return Encoding(words=words, points=words[:, :0], tokens=everything, mask=real)
        found = self.point_readout(features, state[:, self.body])
        parts = [found.uv[:, 0].flatten(-2), found.visible[:, 0].sigmoid(), found.position[:, 0] / METRES]
        return Encoding(words=words, points=torch.cat(parts, dim=-1).flatten(1))


def build_encoder(
    recipe: Recipe, *, vocab_size: int, pad_id: int, cameras: int, body: tuple[int, ...] | None
) -> Encoder:
    """The encoder that a recipe describes; its backbone is fresh, or pretrained where it names a path."""
    backbone = instantiate(recipe.backbone, vocab_size=vocab_size, readouts=1 + len(ROLES))
    return Encoder(backbone=backbone, body=body, cameras=cameras, vocab_size=vocab_size, pad_id=pad_id)


def word_loss(logits: Float[Tensor, "b k w"], tokens: Int[Tensor, "b k l"], pad_id: int) -> Float[Tensor, ""]:
    """Binary cross-entropy of naming the set of words in a text: makes the summary keep what was asked."""
    target = torch.zeros_like(logits).scatter_(-1, tokens, 1.0)
    target[..., pad_id] = 0.0
    return F.binary_cross_entropy_with_logits(logits, target)
