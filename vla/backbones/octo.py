"""Octo's transformer: images, words and readouts in one sequence, trained from nothing (Ghosh et al. 2024).

Each kind of input has a tokenizer of its own, and rules say who sees whom: the task (words) sees itself, observations
see the task and each other, readouts see all and are seen by nobody before them. What is missing is masked, so a model
trained with dropped inputs works without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ..attention import LayerShape, Rotary, TransformerBlock, block_mask
from .base import Prefix
from .resize import FITS, Images, pixel_statistics, squares
from .source import cannot_load, quiet, require_model_folder

TASK, OBSERVATION, READOUT = 0, 1, 2
"""Blocks of `block_mask`: a token sees those of its own block and of earlier ones."""


class OctoBackbone(nn.Module):
    """A transformer over tokens of words and images.

    Args:
        path: Folder or hub name of a T5-class encoder that reads the words, frozen; None learns word embeddings.
        config: Its configuration in place of a path, as checkpoints hold it.
        vocab_size: Size of the tokenizer.
        width: Width of the transformer.
        depth: Layers.
        heads: Attention heads.
        stem: Channels of the convolutions that images enter by, each halving their size; patches have 2^len(stem) px.
        image_size: Edge of an image [px].
        fit: How images get that size, one of `FITS`.
        cameras: Largest number of cameras; each has an embedding of its own.
        readouts: Learned tokens that sum up the rest.
        drop: Chance that a camera, or the words, are left out of a training sample; never all at once.
        max_words: Longest prompt, in tokens.
    """

    vision_width = 0
    pixel_mean: Tensor
    pixel_std: Tensor
    frequencies: Tensor

    def __init__(
        self,
        *,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        vocab_size: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        stem: tuple[int, ...] | list[int] = (32, 64, 96, 128),
        image_size: int = 96,
        fit: str = "stretch",
        cameras: int = 4,
        readouts: int = 4,
        drop: float = 0.1,
        max_words: int = 256,
    ) -> None:
        super().__init__()
        patch = 2 ** len(stem)
        if width % heads or (width // heads) % 2 or image_size % patch or not 0 <= drop < 1 or fit not in FITS:
            raise ConfigError(
                f"octo: expected a width of even heads, image_size as a multiple of {patch} px, drop in [0, 1) and a "
                f"fit of {FITS}, got width={width}, heads={heads}, image_size={image_size}, drop={drop}, fit={fit!r}"
            )
        self.width, self.image_size, self.fit, self.drop = width, image_size, fit, drop
        self.grid = self.token_grid = (image_size // patch,) * 2
        self.words, into = _word_reader(path, config, vocab_size, width)
        self.from_words = nn.Linear(into, width)
        channels = [3, *stem]
        steps: list[nn.Module] = []
        for before, after in pairwise(channels):
            steps += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.stem = nn.Sequential(*steps, nn.Conv2d(stem[-1], width, 1))
        patches = self.grid[0] * self.grid[1]
        self.word_place = nn.Parameter(torch.randn(max_words, width) * 0.02)
        self.patch_place = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.camera_place = nn.Parameter(torch.randn(cameras, 1, width) * 0.02)
        self.readouts = nn.Parameter(torch.randn(readouts, width) * 0.02)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        c = width // heads
        self.layers = LayerShape(count=depth, heads=heads, groups=heads, head_dim=c, rotary=True)
        self.vocabulary = 0
        self.register_buffer("frequencies", 10_000.0 ** -(torch.arange(0, c, 2) / c), persistent=False)
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((1, 3, 1, 1), 0.5))

    @property
    def rotary(self) -> Rotary:
        """How keys are turned to their positions; beside the places that each kind of token learns."""
        return Rotary(frequencies=self.frequencies)

    def resolved_config(self) -> dict[str, Any]:
        """Configuration of the encoder that reads words; empty where there is none."""
        words: Any = self.words
        return dict(words.config.to_dict()) if hasattr(words, "config") else {}

    def train(self, mode: bool = True) -> OctoBackbone:
        """Switch between training and evaluation; a T5 that reads the words stays as it is, dropout and all."""
        super().train(mode)
        if not isinstance(self.words, nn.Embedding):
            self.words.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> OctoBackbone:
        """Freeze or free all but a T5 that reads the words, which is never trained."""
        super().requires_grad_(requires_grad)
        if not isinstance(self.words, nn.Embedding):
            self.words.requires_grad_(False)
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What may be frozen by name."""
        return {"words": self.words, "vision": self.stem, "transformer": self.blocks}

    @torch.no_grad()
    def fit_pixels(self, *sets: Images) -> None:
        """Set the pixel normalisation from images: one mean and deviation a channel, for all cameras."""
        self.pixel_mean, self.pixel_std = pixel_statistics(sets, self.image_size, self.fit)

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
        """Read ``[text][images][extra][readouts]``; see `Backbone`. `extra` are observations too."""
        pixels = squares(images, self.image_size, self.fit).div_(255.0).sub_(self.pixel_mean).div_(self.pixel_std)
        b, n = pixels.shape[:2]
        if n > len(self.camera_place) or tokens.shape[1] > len(self.word_place):
            raise ConfigError(
                f"octo: got {n} cameras and {tokens.shape[1]} words, more than cameras={len(self.camera_place)} and "
                f"max_words={len(self.word_place)} allow: raise them in model.backbone"
            )
        device = pixels.device
        here = torch.ones(b, n, dtype=torch.bool, device=device) if image_mask is None else image_mask
        words_here = torch.ones(b, dtype=torch.bool, device=device)
        if self.training and self.drop:
            here, words_here = self._dropped(here)
        seen = self.stem(pixels.flatten(0, 1)).flatten(2).mT.unflatten(0, (b, n))
        pictures = (seen + self.patch_place + self.camera_place[:n]).flatten(1, 2)
        told = self.from_words(self._read_words(tokens, token_mask)) + self.word_place[: tokens.shape[1]]
        parts = {"text": told, "images": pictures}
        masks = [token_mask & words_here[:, None], here.repeat_interleave(seen.shape[2], dim=1)]
        if extra is not None:
            parts["extra"] = extra.to(told.dtype)
            masks.append(torch.ones(extra.shape[:2], dtype=torch.bool, device=device))
        parts["readouts"] = self.readouts.expand(b, -1, -1)
        masks.append(torch.ones(b, len(self.readouts), dtype=torch.bool, device=device))
        lengths = [part.shape[1] for part in parts.values()]
        kinds = [{"text": TASK, "readouts": READOUT}.get(name, OBSERVATION) for name in parts]
        blocks = torch.cat([torch.full((count,), kind) for count, kind in zip(lengths, kinds)])
        mask, blocks = torch.cat(masks, dim=1), blocks.to(device).expand(b, -1)
        x, keys, values = torch.cat(list(parts.values()), dim=1), [], []
        positions = torch.arange(x.shape[1], device=device).expand(b, -1)
        who = block_mask(blocks, blocks, mask)
        for block in self.blocks:
            x, key, value = block(x, who, self.rotary, positions, None, None)
            keys.append(key)
            values.append(value)
        edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        return Prefix(
            states=self.norm(x),
            mask=mask,
            next=torch.full((b,), x.shape[1], device=device),
            keys=tuple(keys) if keep else (),
            values=tuple(values) if keep else (),
            spans={name: slice(edges[k], edges[k + 1]) for k, name in enumerate(parts)},
        )

    def extend(
        self, prefix: Prefix, embeddings: Float[Tensor, "b q d"], mask: Bool[Tensor, "b q"], *, two_way: bool = False
    ) -> Prefix:
        """Go on reading after a prefix; see `Backbone`."""
        b, q = mask.shape
        device, before = mask.device, prefix.mask.shape[1]
        real = torch.cat([prefix.mask, mask], dim=1)
        asking = (torch.zeros(q, dtype=torch.long) if two_way else torch.arange(q)).to(device).expand(b, -1)
        known = torch.cat([torch.full((b, before), -1, device=device), asking], dim=1)
        who = block_mask(asking, known, real)
        positions = prefix.next[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        x, keys, values = embeddings, [], []
        for block, key, value in zip(self.blocks, prefix.keys, prefix.values):
            x, key, value = block(x, who, self.rotary, positions, key, value)
            keys.append(key)
            values.append(value)
        return Prefix(
            states=torch.cat([prefix.states, self.norm(x)], dim=1),
            mask=real,
            next=prefix.next + mask.sum(1),
            keys=tuple(keys),
            values=tuple(values),
            spans=prefix.spans,
        )

    def embed(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """It writes no words."""
        raise ConfigError("octo writes no words: a head that speaks needs rows=own")

    def next_words(self, states: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest w"]:
        """It writes no words."""
        raise ConfigError("octo writes no words: a head that speaks needs rows=own")

    def _dropped(self, here: Bool[Tensor, "b n"]) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, " b"]]:
        """Cameras and words that are left in, by the global generator, which training seeds at every step."""
        keep = torch.rand(here.shape, device=here.device) >= self.drop
        words = torch.rand(len(here), device=here.device) >= self.drop
        blind = ~(here & keep).any(1)
        return torch.where(blind[:, None], here, here & keep), words

    def _read_words(self, tokens: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b l e"]:
        if isinstance(self.words, nn.Embedding):
            embedded: Tensor = self.words(tokens)
            return embedded
        with torch.no_grad():
            states: Tensor = self.words(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return states


def _word_reader(
    path: str | None, config: Mapping[str, Any] | None, vocab_size: int, width: int
) -> tuple[nn.Module, int]:
    """What reads words, and the width of what it makes of them."""
    if path is None and not {k: v for k, v in (config or {}).items() if k != "_resolved"}:
        return nn.Embedding(vocab_size, width), width
    from transformers import AutoConfig, T5EncoderModel

    if path is not None:
        require_model_folder(path)
        try:
            with quiet():
                reader: Any = T5EncoderModel.from_pretrained(path, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise CheckpointError(cannot_load("a T5 encoder", path, error)) from error
    else:
        options = {k: v for k, v in dict(config or {}).items() if k not in ("_resolved", "model_type")}
        made: Any = AutoConfig.for_model("t5", **options)
        reader = T5EncoderModel(made)
    for parameter in reader.parameters():
        parameter.requires_grad_(False)
    return reader, int(reader.config.d_model)
