"""A judge of skills: how likely one is to succeed from here, and whether it is done, on a pretrained model's features.

The value of a skill in the sense of SayCan (Ahn et al. 2022): where a reward of one at success is not discounted, the
value of the policy that acts is its probability of success, so a classifier of executed skills is its value function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from .companion import load_companion, save_companion
from .pretrained import Pretrained
from .tokenizer import InstructionEncoder

DONE = "done"
"""Extra field of executed skills: whether the skill is done at a step."""
FILES = {"about": "judge.json", "weights": "judge.safetensors"}
OUTPUTS = ("can", "done")
"""What is judged: will it succeed from here, and is it done."""


class JudgeNet(nn.Module):
    """Two layers on features: logits of `OUTPUTS`, each with a temperature that calibration sets.

    Args:
        features: Number of features.
        width: Of the hidden layers.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("scale", torch.ones(len(OUTPUTS)))
        self.register_buffer("shift", torch.zeros(len(OUTPUTS)))
        self.mean: Tensor
        self.std: Tensor
        self.scale: Tensor
        self.shift: Tensor
        self.net = nn.Sequential(
            nn.Linear(features, width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(width, len(OUTPUTS)),
        )

    def forward(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b o"]:
        """Logits."""
        return self.net((features - self.mean) / self.std) * self.scale + self.shift


class Features:
    """What a judge sees of images, words and the tool: states of a frozen model's language tower.

    Args:
        model: Pretrained model.
    """

    def __init__(self, model: Pretrained) -> None:
        self.model = model
        self.tokens = InstructionEncoder(model.tokenizer, model.recipe.max_tokens)

    @torch.no_grad()
    def __call__(
        self,
        images: UInt8[Tensor, "b n height width 3"],
        tokens: Int[Tensor, "b k l"],
        state: Float[Tensor, "b s"],
    ) -> Float[Tensor, "b k f"]:
        """Features of k texts an image set; `state` in the embodiment's units."""
        encoder = self.model.encoder
        seen = encoder.read(images, tokens)
        points, _ = encoder.points_of(seen, state)
        k = tokens.shape[1]
        body = state[:, encoder.body]
        parts = [
            seen.readout.flatten(2).float(),
            seen.text[:, :, -1].float(),
            points.position.flatten(2),
            (points.position - state[:, None, None, :3]).flatten(2),
            body[:, None].expand(-1, k, -1),
        ]
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A trained judge.

    Attributes:
        net: Of the features.
        model: The pretrained model whose features they are.
        notes: Data and scores.
    """

    net: JudgeNet
    model: Pretrained
    notes: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the folder; it appears whole or not at all."""
        linear: Any = self.net.net[0]
        meta = {"features": linear.in_features, "width": linear.out_features, "notes": dict(self.notes)}
        return save_companion(path, self.net, self.model, **FILES, meta=meta)

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Load a folder that `save` wrote; errors as of `load_companion`."""
        net, meta, model = load_companion(
            path,
            lambda told: JudgeNet(int(told["features"]), int(told["width"])),
            **FILES,
            what="judge that brachium train-judge",
        )
        return cls(net=net, model=model, notes=meta["notes"])

    @cached_property
    def features(self) -> Features:
        """Of the model; it remembers how instructions are spelt."""
        return Features(self.model)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], state: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Probabilities (k, 2) of `OUTPUTS` for k instructions.

        Args:
            images: uint8 (height, width, 3), one a camera, in the order of the model's cameras.
            state: float32 (s,), in the embodiment's units.
            texts: Instructions.
        """
        tokens = torch.from_numpy(self.features.tokens(texts))[None]
        found = self.features(torch.from_numpy(np.stack(images))[None], tokens, torch.from_numpy(state)[None].float())
        return self.net(found[0]).sigmoid().double().numpy()


def calibrate(logits: Float[Tensor, "n o"], labels: Float[Tensor, "n o"]) -> tuple[Tensor, Tensor]:
    """Scale and shift of each logit that make probabilities honest (Platt 1999), by likelihood on held-out data.

    NaN labels are unknown; columns without both kinds of label keep their logits.
    """
    from scipy.optimize import minimize

    scales, shifts = torch.ones(logits.shape[1]), torch.zeros(logits.shape[1])
    for k in range(logits.shape[1]):
        known = labels[:, k].isfinite()
        x, y = logits[known, k].double().numpy(), labels[known, k].double().numpy()
        if len(y) == 0 or not 0.0 < y.mean() < 1.0:
            continue

        def loss(weight: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> tuple[float, np.ndarray]:
            z = weight[0] * x + weight[1]
            wrong = 1.0 / (1.0 + np.exp(-z)) - y
            return float(np.mean(np.logaddexp(0.0, z) - y * z)), np.array([np.mean(wrong * x), np.mean(wrong)])

        found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e3), (-20.0, 20.0)])
        scales[k], shifts[k] = (float(v) for v in found.x)
    return scales, shifts


def auroc(p: np.ndarray, label: np.ndarray) -> float:
    """Probability that a positive is ranked above a negative, ties half (Mann-Whitney U); NaN without both."""
    from scipy.stats import rankdata

    label = label.astype(bool)
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(p)
    return float((ranks[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def expected_calibration_error(p: np.ndarray, label: np.ndarray, bins: int = 10) -> float:
    """Mean gap of confidence and frequency over bins of equal width, weighted by their size (Guo et al. 2017)."""
    index = np.minimum((p * bins).astype(int), bins - 1)
    total = 0.0
    for k in range(bins):
        own = index == k
        if own.any():
            total += float(own.mean()) * abs(float(p[own].mean()) - float(label[own].mean()))
    return total
