"""From one observation to what a head sees: the backbone, and the points it is asked for.

With a point readout the encoding is small (a summary of the words, and points), so the encoder can be trained to
ground, frozen, and its encodings cached a frame. Without one, the encoding is all that the backbone has read.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones.base import BackboneFeatures, Prefix
from .backbones.resize import Images
from .grounding import METRES, ROLES, PointReadout, Points, patches_around
from .recipe import Recipe, instantiate


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a head sees of images and words; a frame each.

    Attributes:
        words: Summary of the instruction, (b, d). Empty without points.
        points: For each role uv a camera, visibility a camera, position [m]; (b, r * (3 n + 3)). Empty without points.
        prefix: What the backbone has read, or None when points stand for it.
        around: What the cameras see at and around each point, as `patches_around`, in one row; None without.
    """

    words: Float[Tensor, "b d"]
    points: Float[Tensor, "b q"]
    prefix: Prefix | None = None
    around: Float[Tensor, "b a"] | None = None

    def rows(self, index: Tensor) -> Encoding:
        """The encodings of some frames."""
        return Encoding(
            words=self.words[index],
            points=self.points[index],
            prefix=None if self.prefix is None else self.prefix.rows(index),
            around=None if self.around is None else self.around[index],
        )

    def detach(self) -> Encoding:
        """The same, cut off from what computed it."""
        return Encoding(
            words=self.words.detach(),
            points=self.points.detach(),
            prefix=None if self.prefix is None else self.prefix.detach(),
            around=None if self.around is None else self.around.detach(),
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
        surround: Whether encodings hold what is seen around the points.
    """

    def __init__(
        self,
        *,
        backbone: Any,
        body: tuple[int, ...] | None,
        cameras: int,
        vocab_size: int,
        pad_id: int,
        surround: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.pad_id, self.surround = backbone, pad_id, surround
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
        self._spares = "states" in inspect.signature(backbone.read).parameters if hasattr(backbone, "read") else False
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
        images: Images,
        tokens: Int[Tensor, "b l"],
        state: Float[Tensor, "b s"],
        *,
        image_mask: Bool[Tensor, "b n"] | None = None,
        extra: Float[Tensor, "b e d"] | None = None,
        keep: bool = False,
        states: bool = True,
    ) -> Encoding:
        """Encode one text an image set.

        Args:
            images, tokens: What to read.
            state: In the embodiment's units, for a model that points.
            image_mask: False at cameras that are not there; only without points.
            extra: Tokens to read after the text; only without points.
            keep: Keep keys and values of every layer.
            states: Whether somebody wants the last layer's states.
        """
        if self.point_readout is not None:
            return self.encoding(self.read(images, tokens[:, None]), tokens, state)
        backbone: Any = self.backbone
        real = tokens != self.pad_id
        more = {"states": states} if self._spares else {}
        prefix = backbone.read(images, tokens, real, image_mask=image_mask, extra=extra, keep=keep, **more)
        nothing = prefix.states.new_zeros(len(tokens), 0)
        return Encoding(words=nothing, points=nothing, prefix=prefix)

    def encoding(self, features: BackboneFeatures, tokens: Int[Tensor, "b l"], state: Float[Tensor, "b s"]) -> Encoding:
        """What a head sees of the first text of some features, `tokens`, for a model that points."""
        if self.point_readout is None:
            raise RuntimeError("this encoder has no point readout")
        features = features.first_texts(1)
        words = features.readout[:, 0, 0].float()
        found = self.point_readout(features, state[:, self.body])
        parts = [found.uv[:, 0].flatten(-2), found.visible[:, 0].sigmoid(), found.position[:, 0] / METRES]
        around = None
        if self.surround:
            around = patches_around(features.vision, features.grid, found.uv[:, 0])
            around = (around * found.visible[:, 0].sigmoid()[..., None, None]).flatten(1)
        return Encoding(words=words, points=torch.cat(parts, dim=-1).flatten(1), around=around)


def build_encoder(
    recipe: Recipe, *, vocab_size: int, pad_id: int, cameras: int, body: tuple[int, ...] | None
) -> Encoder:
    """The encoder that a recipe describes; its backbone is fresh, or pretrained where it names a path."""
    own: dict[str, Any] = {"readouts": 1 + len(ROLES)} if body is not None else {}
    backbone = instantiate(recipe.backbone, vocab_size=vocab_size, **own)
    return Encoder(
        backbone=backbone,
        body=body,
        cameras=cameras,
        vocab_size=vocab_size,
        pad_id=pad_id,
        surround=recipe.surround > 0 and body is not None,
    )


def word_loss(logits: Float[Tensor, "b k w"], tokens: Int[Tensor, "b k l"], pad_id: int) -> Float[Tensor, ""]:
    """Binary cross-entropy of naming the set of words in a text: makes the summary keep what was asked."""
    target = torch.zeros_like(logits).scatter_(-1, tokens, 1.0)
    target[..., pad_id] = 0.0
    return F.binary_cross_entropy_with_logits(logits, target)
