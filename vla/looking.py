"""What a vision-language model learns from knowing which thing covers which patch: to name it, and to look at it.

Next-token training alone leaves a small model blind for long: nothing tells its language side which of the patches a
word stands for. Two losses do. Each image token names the thing in its place, says where the middle of it lies, and how
many middles lie in its own place: what attention adds up over all image tokens is then a count. And one attention head
of two layers is led to the patches of the thing that a word stands for, and of the thing that the next word is about
(attention supervision, Liu et al. 2017, "Attention Correctness in Neural Image Captioning").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

SURE = 1e-4
"""Added to the share of attention before its logarithm, so that a head that sees nothing yet is no infinity."""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Labels of b scenes with t texts, n cameras of m image tokens, and up to 8 things.

    Attributes:
        shown: Whether a thing is seen in an image token, (b, n, m, 8).
        words: Words of the names of what is seen in it, (b, n, m, w).
        named: False where a thing is seen that texts do not name, (b, n, m).
        centre: u and v of the thing seen most, 0..1, (b, n, m, 2); NaN for none.
        middles: How many of the things that each word names have their middle in it, (b, n, m, w).
        things: Which things to look at from each token, as bits: where a word stands for them, and where the next word
            is about them, (b, 2, t, l).
        views: In which camera, (b, 2, t, l).
    """

    shown: Bool[Tensor, "b n m 8"]
    words: Bool[Tensor, "b n m w"]
    named: Bool[Tensor, "b n m"]
    centre: Float[Tensor, "b n m 2"]
    middles: Float[Tensor, "b n m w"]
    things: UInt8[Tensor, "b 2 t l"]
    views: UInt8[Tensor, "b 2 t l"]

    def patches(self, which: int) -> Bool[Tensor, "b t l m2"]:
        """The image tokens, of all cameras in a row, to look at from each token; `which` as in `things`."""
        bit = 1 << torch.arange(8, device=self.things.device)
        wanted = (self.things[:, which, ..., None].long() & bit) > 0
        found = []
        for camera in range(self.shown.shape[1]):
            mine = wanted & (self.views[:, which, ..., None] == camera)
            found.append(torch.einsum("btlk,bmk->btlm", mine.float(), self.shown[:, camera].float()) > 0)
        return torch.cat(found, dim=-1)


class PatchNames(nn.Module):
    """What each image token says of the thing in its place; for training only.

    Args:
        width: Width of the image tokens.
        words: Number of words that names are made of.
    """

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.words, self.centre = nn.Linear(width, words), nn.Linear(width, 2)
        self.middles = nn.Linear(width, words)

    def forward(self, tokens: Float[Tensor, "b n m d"], looks: Looks) -> tuple[Tensor, Tensor, Tensor]:
        """Binary cross-entropy of the words, absolute error of the thing's middle, squared error of the middles."""
        n = tokens.shape[1]  # the first cameras only, where fewer are shown
        wanted, named, centre = looks.words[:, :n].float(), looks.named[:, :n], looks.centre[:, :n]
        entropy = F.binary_cross_entropy_with_logits(self.words(tokens).float(), wanted, reduction="none").sum(-1)
        number = named.sum().clamp(min=1)
        placed = centre.isfinite().all(-1)
        error = (self.centre(tokens).float() - centre.nan_to_num()).abs().sum(-1)
        missed = (self.middles(tokens).float() - looks.middles[:, :n]).square().sum(-1)
        return (
            (entropy * named).sum() / number,
            (error * placed).sum() / placed.sum().clamp(min=1),
            (missed * named).sum() / number,
        )


def looking_loss(attention: Sequence[Float[Tensor, "b t l m2"]], looks: Looks) -> tuple[Tensor, list[Tensor]]:
    """Cross-entropy of attention to the patches that words stand for, and to those that the next word is about.

    Args:
        attention: Share of attention from each token to each image token, of the first head of two layers.
        looks: Labels.

    Returns:
        The loss, and the mean share of attention on the right patches of each layer.
    """
    total, shares = attention[0].new_zeros(()), []
    for which, given in enumerate(attention):
        wanted = looks.patches(which)[..., : given.shape[-1]]
        counted = wanted.any(-1)
        share = (given.float() * wanted).sum(-1)
        number = counted.sum().clamp(min=1)
        total = total - ((share + SURE).log() * counted).sum() / number
        shares.append((share * counted).sum().detach() / number)
    return total, shares


def token_labels(
    cover: Int[Tensor, "b n side side"], grid: tuple[int, int], things: int = 8
) -> tuple[Bool[Tensor, "b n m 8"], Int[Tensor, "b n m"]]:
    """Things seen in each image token, and the one seen most (`things` for none).

    Args:
        cover: Index of the thing that covers each cell of a finer grid; `things` or more for none.
        grid: Rows and columns of image tokens.
        things: Number of things.
    """
    b, n, side, _ = cover.shape
    rows, columns = grid
    cells = cover.reshape(b, n, rows, side // rows, columns, side // columns).transpose(3, 4).flatten(4).flatten(2, 3)
    counts = (cells[..., None] == torch.arange(things, device=cover.device)).sum(-2)
    shown = counts >= max(1, cells.shape[-1] // 8)
    return shown, torch.where(shown.any(-1), counts.argmax(-1), things)


def middles(
    places: Float[Tensor, "b n k 2"],
    counted: Bool[Tensor, "b n k"],
    spelt: Float[Tensor, "b k w"],
    grid: tuple[int, int],
) -> Float[Tensor, "b n m w"]:
    """How many of the things that each word names have their middle in each image token.

    Args:
        places: u and v of each thing's middle, 0..1.
        counted: Whether to count it.
        spelt: 1 for the words of each thing's name.
        grid: Rows and columns of image tokens.
    """
    rows, columns = grid
    inside = counted & (places >= 0).all(-1) & (places < 1).all(-1)
    cells = (places.nan_to_num().clamp(0, 1 - 1e-6) * torch.tensor([columns, rows])).long()
    index = cells[..., 1] * columns + cells[..., 0]
    found = torch.zeros(*places.shape[:2], rows * columns, spelt.shape[-1])
    return found.scatter_add(
        2, index[..., None].expand(-1, -1, -1, spelt.shape[-1]), spelt[:, None] * inside[..., None].float()
    )
