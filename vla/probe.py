"""A linear probe: how much a line through frozen features of single patches says of what they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .encoder import Encoder
from .looking import token_labels
from .pretrain_data import THINGS, Mixture

RIDGE = 1e-3
"""Weight of the penalty, relative to the mean square of the features."""


@torch.no_grad()
def linear_probe(encoder: Encoder, mixture: Mixture, scenes: int = 400) -> dict[str, float]:
    """Accuracy of colour and kind of the thing that covers a patch, by ridge regression on the vision tower's features.

    The probe is fitted on `scenes` of the training set of the first store and scored on its held-out scenes;
    ``chance`` is the share of the most frequent answer.

    Returns:
        ``color``, ``kind``, ``chance/color`` and ``chance/kind``.
    """
    part = mixture.parts[0]
    rng = np.random.default_rng(mixture.seed)
    chosen = np.sort(rng.choice(part.train, size=min(scenes, len(part.train)), replace=False))
    fitted, asked = _patches(encoder, mixture, chosen)
    scored, wanted = _patches(encoder, mixture, part.heldout)
    result: dict[str, float] = {}
    for which, name in enumerate(("color", "kind")):
        words = sorted({row[which] for row in asked if row[which]})
        if not words:  # names of one word have no colour
            continue
        used = [k for k, row in enumerate(asked) if row[which]]
        target = torch.zeros(len(used), len(words))
        target[range(len(used)), [words.index(asked[k][which]) for k in used]] = 1.0
        weights = _ridge(fitted[used], target)
        tested = [k for k, row in enumerate(wanted) if row[which] in words]
        if not tested:
            continue
        found = (_with_one(scored[tested]) @ weights).argmax(-1).tolist()
        right = [wanted[k][which] for k in tested]
        result[name] = float(np.mean([words[f] == r for f, r in zip(found, right)]))
        result[f"chance/{name}"] = max(right.count(word) for word in words) / len(right)
    return result


def _with_one(features: Float[Tensor, "p v"]) -> Float[Tensor, "p v1"]:
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def _ridge(features: Float[Tensor, "p v"], target: Float[Tensor, "p w"]) -> Float[Tensor, "v1 w"]:
    x = _with_one(features).double()
    gram = x.mT @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram, x.mT @ target.double()).float()


def _patches(
    encoder: Encoder, mixture: Mixture, scenes: np.ndarray
) -> tuple[Float[Tensor, "p v"], list[tuple[str, str]]]:
    """Features of every patch that a named thing covers, and the (colour, kind) of the thing."""
    backbone: Any = encoder.backbone
    part, features, labels = mixture.parts[0], [], []
    for start in range(0, len(scenes), 25):
        some = scenes[start : start + 25]
        images = part.batch(some, None).images
        seen = backbone.look(backbone.normalise(images).flatten(0, 1)).float().cpu().flatten(0, 1)
        _, most = token_labels(mixture.cover(0, some), backbone.grid, THINGS)
        for scene, things in zip(some, most.flatten(1)):
            names = [*part.store.episodes[int(scene)].meta["names"], *[None] * THINGS]
            labels += [names[thing] if thing < THINGS else None for thing in things.tolist()]
        features.append(seen)
    kept = [k for k, name in enumerate(labels) if name]
    split = [(name.split()[0] if " " in name else "", name.split()[-1]) for name in labels if name]
    return torch.cat(features)[kept], split
