"""What a backbone gives, and what a family of vision-language models has to say for itself to become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ..attention import LayerShape, Rotary
from .packing import Packing
from .resize import Images


@dataclass(frozen=True, kw_only=True)
class BackboneFeatures:
    """Features of b image sets with k texts each.

    Attributes:
        vision: Vision-tower features of every patch, (b, n, p, v).
        grid: Rows and columns of patches; p = rows * columns.
        image: Language-model states at the image tokens, (b, m, d).
        text: Language-model states at the text tokens, (b, k, l, d).
        text_mask: True at real text tokens, (b, k, l).
        readout: Language-model states at the readout tokens after each text, (b, k, r, d).
        tokens: Image tokens as they enter the language model, (b, n, i, d); the image tokens proper, no markers.
        attention: Of each layer that was watched, how the first head divides its attention of each text token among
            those image tokens, (b, k, l, n * i).
    """

    vision: Float[torch.Tensor, "b n p v"]
    grid: tuple[int, int]
    image: Float[torch.Tensor, "b m d"]
    text: Float[torch.Tensor, "b k l d"]
    text_mask: Bool[torch.Tensor, "b k l"]
    readout: Float[torch.Tensor, "b k r d"]
    tokens: Float[torch.Tensor, "b n i d"]
    attention: tuple[Float[torch.Tensor, "b k l ni"], ...] = ()

    def first_texts(self, count: int) -> BackboneFeatures:
        """The features with the first `count` texts only."""
        return replace(
            self,
            text=self.text[:, :count],
            text_mask=self.text_mask[:, :count],
            readout=self.readout[:, :count],
            attention=tuple(shares[:, :count] for shares in self.attention),
        )


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What a backbone has read so far: all that comes after is conditioned on it.

    A head attends to `states`, or layer by layer to `keys` and `values` as the language model itself does; what goes on
    from here (`Backbone.extend`) computes the numbers that one pass over everything would.

    Attributes:
        states: Last states, (b, p, d); d = 0 where nobody asked.
        mask: True at real tokens, (b, p).
        keys, values: Of each layer, (b, g, p, c); keys are turned to their positions. Empty where nobody asked.
        next: Position of what follows, (b,).
        spans: Where in it are ``images``, ``text``, ``extra`` and ``readouts``.
    """

    states: Float[Tensor, "b p d"]
    mask: Bool[Tensor, "b p"]
    next: Int[Tensor, " b"]
    keys: tuple[Float[Tensor, "b g p c"], ...] = ()
    values: tuple[Float[Tensor, "b g p c"], ...] = ()
    spans: Mapping[str, slice] = field(default_factory=dict)

    def detach(self) -> Prefix:
        """The same, cut off from what computed it: no gradient of a head reaches the backbone."""
        return replace(
            self,
            states=self.states.detach(),
            keys=tuple(k.detach() for k in self.keys),
            values=tuple(v.detach() for v in self.values),
        )

    def rows(self, index: Tensor) -> Prefix:
        """Some rows, as often as `index` names them."""
        return replace(
            self,
            states=self.states[index],
            mask=self.mask[index],
            next=self.next[index],
            keys=tuple(k[index] for k in self.keys),
            values=tuple(v[index] for v in self.values),
        )

    def repeat(self, times: int) -> Prefix:
        """Each row `times` times, one after the other."""
        return self.rows(torch.arange(len(self.states), device=self.states.device).repeat_interleave(times))


class Backbone(Protocol):
    """A model that reads images and words, and that heads condition on.

    Attributes:
        width: Width d of its states.
        layers: Shape of its layers' keys and values.
        vocabulary: Rows of its word embedding; 0 for a model that writes no words.
    """

    width: int
    layers: LayerShape
    vocabulary: int

    @property
    def rotary(self) -> Rotary | None:
        """How keys are turned to their positions."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """What may be frozen by name, such as ``vision``."""

    def read(
        self,
        images: Images,
        tokens: Int[Tensor, "b l"],
        token_mask: Bool[Tensor, "b l"],
        *,
        image_mask: Bool[Tensor, "b n"] | None = None,
        extra: Float[Tensor, "b e d"] | None = None,
        keep: bool = True,
        states: bool = True,
    ) -> Prefix:
        """Read ``[images][text][extra][readouts]``; `keep` keeps keys and values.

        Without `states` nobody wants the last layer's: a backbone may leave them out (d = 0) and save the layer. One
        that would not need not take the argument.
        """

    def extend(
        self, prefix: Prefix, embeddings: Float[Tensor, "b q d"], mask: Bool[Tensor, "b q"], *, two_way: bool = False
    ) -> Prefix:
        """Go on reading after a prefix, causally or `two_way`; the result holds both."""

    def fit_pixels(self, *sets: Images) -> None:
        """Set the pixel normalisation from images of one or several sets of cameras."""

    def embed(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Word embeddings as they enter the model."""

    def next_words(self, states: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest w"]:
        """Logits of the next token after each state."""


class PointingBackbone(Protocol):
    """A vision-language model seen as an encoder of observations with readouts after each of several texts."""

    width: int
    vision_width: int
    pixel_mean: torch.Tensor
    grid: tuple[int, int]
    token_grid: tuple[int, int]

    def fit_pixels(self, *sets: Images) -> None:
        """Set the pixel normalisation from images of one or several sets of cameras."""

    def __call__(
        self,
        images: UInt8[torch.Tensor, "b n height width 3"],
        tokens: Int[torch.Tensor, "b k l"],
        token_mask: Bool[torch.Tensor, "b k l"],
        watch: tuple[int, ...] = (),
    ) -> BackboneFeatures:
        """Encode images and k texts about them; a text sees the images and itself, never the other texts.

        `watch` names layers whose attention is wanted.
        """


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a vision tower makes of i images.

    Attributes:
        patches: Features of every patch, row by row, (i, p, v).
        tokens: Image tokens in the width of the language model, (i, m, d).
        deep: More features of the same tokens, added to the states of the first layers, each (i, m, d).
    """

    patches: Float[torch.Tensor, "i p v"]
    tokens: Float[torch.Tensor, "i m d"]
    deep: tuple[Float[torch.Tensor, "i m d"], ...] = ()


class VLMFamily:
    """How models of one family see, lay out and read. What is here is right for most.

    Attributes:
        model_types: Names of `transformers` for the models of the family.
        pixels: Mean and standard deviation of each channel that the vision tower was trained with.
        two_way: Whether image tokens see later ones too, and in `HFBackbone.read` the prompt's tokens as well.
        image_size: Edge of an image [px].
        grid: Rows and columns of patches.
        token_grid: Rows and columns of image tokens.
        vision_width: Width of the patch features.
        language_model: The language model, without its output layer.
        parts: What may be frozen by name: ``vision``, ``connector`` and ``language``.
    """

    model_types: tuple[str, ...]
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    two_way = False
    image_size: int
    grid: tuple[int, int]
    token_grid: tuple[int, int]
    vision_width: int
    language_model: Any
    parts: Mapping[str, nn.Module]

    def __init__(self, vlm: Any, image_size: int | None) -> None:
        raise NotImplementedError

    def look(self, pixels: Float[torch.Tensor, "i 3 side side"]) -> Seen:
        """Patches and image tokens of normalised images."""
        raise NotImplementedError

    def prefix(self, tokens: Float[torch.Tensor, "b n m d"]) -> tuple[torch.Tensor, Bool[torch.Tensor, " p"]]:
        """The sequence (b, p, d) of n images' tokens, and which of it are image tokens."""
        flat = tokens.flatten(1, 2)
        return flat, torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)

    def positions(self, cameras: int) -> tuple[Int[torch.Tensor, "x p"], int]:
        """Positions of that sequence along each of the model's axes, and where what follows goes on."""
        count = cameras * self.token_grid[0] * self.token_grid[1]
        return torch.arange(count)[None], count

    def read(
        self,
        embeddings: Float[torch.Tensor, "b q d"],
        mask: Float[torch.Tensor, "b 1 q k"] | None,
        positions: Int[torch.Tensor, "x b q"],
        visual: Bool[torch.Tensor, " p"],
        deep: tuple[torch.Tensor, ...],
        packing: Packing | None,
        cache: Any = None,
    ) -> Float[torch.Tensor, "b q d"]:
        """Last states of the language model; `visual` and `deep` are of the image tokens.

        Who sees whom is in `mask`, which is additive, or in `packing`. A `cache` of `transformers` holds the keys and
        values of what was read before, and gets the new ones.
        """
        extra: dict[str, Any] = {} if packing is None else {"packing": packing}  # the model hands it on to the kernel
        if deep:
            where = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            where[:, : len(visual)] = visual
            extra |= {
                "visual_pos_masks": where,
                "deepstack_visual_embeds": [features.flatten(0, 1) for features in deep],
            }
        states: torch.Tensor = self.language_model(
            inputs_embeds=embeddings,
            position_ids=positions[0] if len(positions) == 1 else positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        ).last_hidden_state
        return states
