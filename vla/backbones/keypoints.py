"""Convolutions that words modulate, and keypoints: a backbone from scratch that finds places within minutes on a CPU.

What behaviour cloning from pixels needs is where things are, finer than a patch. So features stay at a quarter of the
image's resolution, words scale and shift them (FiLM, Perez et al. 2018; as in BC-Z, Jang et al. 2021), and each of a
few maps becomes the place where its softmax lies in the mean (Levine et al. 2016; as in Diffusion Policy, Chi et al.
2023). In training, pictures are shifted by a few pixels (Kostrikov et al. 2020): few demonstrations are else learnt by
heart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError
from ..attention import LayerShape, Rotary, TransformerBlock
from .base import Prefix
from .resize import FITS, Images, pixel_statistics, squares

FIRST = 3.0
"""Sharpness of fresh softmax maps."""
WATCHED = 50
"""Batches at the beginning of training that features are centred by."""
LEAST = 0.05
"""Deviation below which a feature is not enlarged further."""


class KeypointBackbone(nn.Module):
    """One token for the words and one for each camera, which holds keypoints and a summary of its picture.

    Args:
        vocab_size: Size of the tokenizer.
        width: Width of the tokens.
        channels: Channels at half, a quarter and an eighth of the image's resolution; multiples of 8.
        blocks: Residual blocks at a quarter and at an eighth.
        keypoints: Maps a camera.
        image_size: Edge of an image [px].
        fit: How images get that size, one of `FITS`.
        cameras: Largest number of cameras.
        shift: Largest shift of a picture in training [px].
        heads: Attention heads among the words.
        max_words: Longest prompt, in tokens.
    """

    vision_width = 0
    vocabulary = 0
    layers: LayerShape | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int = 128,
        channels: tuple[int, ...] | list[int] = (32, 64, 128),
        blocks: int = 1,
        keypoints: int = 32,
        image_size: int = 96,
        fit: str = "stretch",
        cameras: int = 4,
        shift: int = 4,
        heads: int = 4,
        max_words: int = 256,
    ) -> None:
        super().__init__()
        if len(channels) != 3 or any(c % 8 for c in channels) or image_size % 8 or fit not in FITS or shift < 0:
            raise ConfigError(
                "keypoints: expected three numbers of channels, multiples of 8, image_size as a multiple of 8 px, "
                f"shift from 0 and a fit of {FITS}, got channels={list(channels)}, image_size={image_size}, "
                f"shift={shift}, fit={fit!r}"
            )
        if width % (2 * heads) or min(blocks, keypoints, cameras) < 1:
            raise ConfigError(
                f"keypoints: expected a width of even heads, and blocks, keypoints and cameras from 1, got "
                f"width={width}, heads={heads}, blocks={blocks}, keypoints={keypoints}, cameras={cameras}"
            )
        self.width, self.image_size, self.fit, self.shift = width, image_size, fit, shift
        self.grid = self.token_grid = (image_size // 4,) * 2
        half, quarter, eighth = channels
        self.words = nn.Embedding(vocab_size, width)
        self.word_place = nn.Parameter(torch.randn(max_words, width) * 0.02)
        self.reader = TransformerBlock(width, heads)
        self.camera_place = nn.Parameter(torch.randn(cameras, width) * 0.02)
        self.stem = nn.Sequential(nn.Conv2d(3, half, 5, stride=2, padding=2), nn.ReLU(), _down(half, quarter))
        self.fine = nn.ModuleList([_Modulated(quarter, width) for _ in range(blocks)])
        self.down = _down(quarter, eighth)
        self.coarse = nn.ModuleList([_Modulated(eighth, width) for _ in range(blocks)])
        self.lateral = _Pointwise(eighth, quarter)
        self.maps = nn.Sequential(nn.ReLU(), _Pointwise(quarter, keypoints))
        self.sharpness = nn.Parameter(torch.full((keypoints, 1), FIRST).log())
        self.centre = _Centre(cameras, 3 * keypoints + eighth)
        self.token = nn.Sequential(
            nn.Linear(3 * keypoints + eighth, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.LayerNorm(width)
        )
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((1, 3, 1, 1), 0.5))

    @property
    def rotary(self) -> Rotary | None:
        """It has no keys to turn."""
        return None

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """What may be frozen by name."""
        return {"words": self.words, "vision": nn.ModuleList([self.stem, self.fine, self.down, self.coarse])}

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
        """Read ``[text][images][extra]``, one token a text and a camera; see `Backbone`."""
        pixels = (squares(images, self.image_size, self.fit) / 255.0 - self.pixel_mean) / self.pixel_std
        b, n = pixels.shape[:2]
        if n > len(self.camera_place) or tokens.shape[1] > len(self.word_place):
            raise ConfigError(
                f"keypoints: got {n} cameras and {tokens.shape[1]} words, more than cameras={len(self.camera_place)} "
                f"and max_words={len(self.word_place)} allow: raise them in model.backbone"
            )
        told = self._told(tokens, token_mask)
        asked = told[:, None] + self.camera_place[:n]
        if self.training and self.shift:
            pixels = shifted(pixels.flatten(0, 1), self.shift).unflatten(0, (b, n))
        seen = self.look(pixels, asked) + self.camera_place[:n]
        parts = {"text": told[:, None], "images": seen}
        device = told.device
        here = torch.ones(b, n, dtype=torch.bool, device=device) if image_mask is None else image_mask
        masks = [token_mask.any(1, keepdim=True), here]
        if extra is not None:
            parts["extra"] = extra.to(told.dtype)
            masks.append(torch.ones(extra.shape[:2], dtype=torch.bool, device=device))
        edges = [0, *torch.tensor([part.shape[1] for part in parts.values()]).cumsum(0).tolist()]
        return Prefix(
            states=torch.cat(list(parts.values()), dim=1),
            mask=torch.cat(masks, dim=1),
            next=torch.full((b,), edges[-1], device=device),
            spans={name: slice(edges[k], edges[k + 1]) for k, name in enumerate(parts)},
        )

    def look(self, pixels: Float[Tensor, "b n 3 side side"], asked: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """A token for each normalised picture, asked for by words and a camera."""
        words = asked.flatten(0, 1)
        fine = self.stem(pixels.flatten(0, 1))
        for block in self.fine:
            fine = block(fine, words)
        coarse = self.down(fine)
        for block in self.coarse:
            coarse = block(coarse, words)
        above = nn.functional.interpolate(self.lateral(coarse), size=fine.shape[-2:], mode="nearest")
        scores = self.maps(fine + above).float()
        scores = scores - scores.mean(
            (2, 3), keepdim=True
        )  # and at one scale, or fresh maps are flat: all places alike
        places, height = keypoints(scores / (scores.std((2, 3), keepdim=True) + 1e-3), self.sharpness)
        summary = nn.functional.relu(coarse).mean((2, 3)).float()
        found = torch.cat([places.flatten(1), height, summary], dim=1).unflatten(0, pixels.shape[:2])
        if self.training and self.sharpness.requires_grad:
            self.centre.watch(found.detach())
        told: Tensor = self.token(self.centre(found))
        return told

    def extend(
        self, prefix: Prefix, embeddings: Float[Tensor, "b q d"], mask: Bool[Tensor, "b q"], *, two_way: bool = False
    ) -> Prefix:
        """It has no layers that could go on reading."""
        raise ConfigError("model/backbone=keypoints has no layers to go on reading with: take a head that pools tokens")

    def embed(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """It writes no words."""
        raise ConfigError("model/backbone=keypoints writes no words: a head that speaks needs rows=own")

    def next_words(self, states: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest w"]:
        """It writes no words."""
        raise ConfigError("model/backbone=keypoints writes no words: a head that speaks needs rows=own")

    def _told(self, tokens: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """The words summed up: each sees the others, then their mean."""
        place = (mask.cumsum(1) - 1).clamp(min=0)  # from the first real word on, however long the padding before it
        x = self.words(tokens) + self.word_place[place]
        who = mask[:, None, :].expand(-1, mask.shape[1], -1)
        x, _, _ = self.reader(x, who, None, place, None, None)
        real = mask[..., None].to(x.dtype)
        return (x * real).sum(1) / real.sum(1).clamp(min=1.0)


class _Centre(nn.Module):
    """Features of each camera without the mean of the first `WATCHED` batches, at a deviation of one (ActNorm).

    While little has been learnt, most of what is found is the same in all pictures. Layers that follow take it for a
    bias and grow it until their norm leaves nothing else: a policy that is told one instruction only, and needs no
    picture to know its task, went blind within some hundred steps. Statistics that went on following (BatchNorm) would
    be those of the trained weights, and spoil the averaged ones, which act.
    """

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, cameras: int, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(cameras, features))
        self.register_buffer("square", torch.zeros(cameras, features))
        self.register_buffer("count", torch.zeros(cameras, 1))

    @torch.no_grad()
    def watch(self, x: Float[Tensor, "b n f"]) -> None:
        """Take a batch into account, unless there were enough."""
        n = x.shape[1]
        share = torch.where(self.count[:n] < WATCHED, 1.0 / (self.count[:n] + 1.0), 0.0)
        self.mean[:n] += share * (x.mean(0) - self.mean[:n])
        self.square[:n] += share * (x.square().mean(0) - self.square[:n])
        self.count[:n] += share > 0

    def forward(self, x: Float[Tensor, "b n f"]) -> Float[Tensor, "b n f"]:
        n = x.shape[1]
        spread = (self.square[:n] - self.mean[:n].square()).clamp(min=LEAST**2).sqrt()
        return torch.where(self.count[:n] > 0, (x - self.mean[:n]) / spread, x)


class _Modulated(nn.Module):
    """A residual block whose first convolution is scaled and shifted by what is asked."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.film = nn.Linear(width, 2 * channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Float[Tensor, "i c y x"], asked: Float[Tensor, "i d"]) -> Float[Tensor, "i c y x"]:
        scale, offset = self.film(asked)[:, :, None, None].chunk(2, dim=1)
        inner = nn.functional.relu(self.norm(self.first(x)) * (1.0 + scale) + offset)
        out: Tensor = x + self.second(inner)
        return out


class _Pointwise(nn.Linear):
    """A convolution of one pixel. As a product of matrices: its gradient as a convolution takes the CPU 20 times as
    long in bfloat16 (torch 2.11)."""

    def forward(self, x: Float[Tensor, "i c y x"]) -> Float[Tensor, "i k y x"]:  # type: ignore[override]
        return super().forward(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def _down(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU())


def keypoints(
    scores: Float[Tensor, "i k y x"], log_sharpness: Float[Tensor, "k 1"]
) -> tuple[Float[Tensor, "i k 2"], Float[Tensor, "i k"]]:
    """Where each map's softmax lies in the mean, u and v from -1 to 1, and the logarithm of its partition function.

    The second says whether there is anything at all: it grows with the scores, as a soft maximum does.
    """
    height, width = scores.shape[-2:]
    flat = scores.flatten(2) * log_sharpness.exp()
    shares = flat.softmax(-1)
    v = torch.linspace(-1.0, 1.0, height, device=scores.device)
    u = torch.linspace(-1.0, 1.0, width, device=scores.device)
    where = torch.stack([u.repeat(height), v.repeat_interleave(width)], dim=1)
    return shares @ where, (flat.logsumexp(-1) - torch.log(torch.tensor(float(height * width)))) / 4.0


def shifted(pixels: Float[Tensor, "i 3 side side"], most: int) -> Float[Tensor, "i 3 side side"]:
    """Each picture shifted by up to `most` pixels, its edges repeated (DrQ); by torch's generator, seeded each step."""
    side = pixels.shape[-1]
    padded = nn.functional.pad(pixels, (most,) * 4, mode="replicate")
    by = torch.randint(2 * most + 1, (len(pixels), 2), device=pixels.device)
    span = torch.arange(side, device=pixels.device)
    rows, columns = by[:, :1] + span, by[:, 1:] + span
    index = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
