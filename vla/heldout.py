"""Loss and action error on episodes that were kept back, beside what trivial answers would score."""

from __future__ import annotations

import numpy as np
import torch

from ..datasets.statistics import Statistics
from .model import VLAModel
from .policy_data import PolicyData

EVALUATED_WINDOWS, EVALUATED_AT_ONCE = 512, 128


@torch.no_grad()
def evaluate_heldout(vla: VLAModel, data: PolicyData, embodiment: str, statistics: Statistics) -> dict[str, float]:
    """Loss and action error on held-out episodes, beside two trivial baselines.

    The errors are mean absolute differences over real steps and dimensions, as a share of each dimension's scale:
    ``action_error`` of a sampled chunk, ``mean_error`` of always answering the mean training action, ``last_error``
    of going on with the action before the window.
    """
    count = min(EVALUATED_WINDOWS, len(data.windows))
    chosen = np.linspace(0, len(data.windows) - 1, count).astype(int)
    mean = torch.as_tensor(np.asarray(statistics["action"].mean), dtype=torch.float32, device=vla.device)
    scale = vla.get_buffer(f"action_scale_{embodiment}")
    noise, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(0)
    sums = dict.fromkeys(("loss", "action_error", "mean_error", "last_error"), 0.0)
    elements = 0.0
    for first in range(0, count, EVALUATED_AT_ONCE):
        batch = data.batch(chosen[first : first + EVALUATED_AT_ONCE])
        encoding = batch.encode(vla)
        args = (batch.state, batch.action, batch.action_pad, embodiment, draws, batch.executed)
        each = vla.loss(encoding, *args)
        shape = (*batch.action.shape[:2], vla.noise_dim(embodiment))
        drawn = torch.randn(shape, generator=noise).to(batch.action.device)
        real = (~batch.action_pad)[:, :, None] & vla.get_buffer(f"action_active_{embodiment}")
        usual = mean + vla.origin(batch.state, embodiment)  # a mean of relative actions is one from where the robot is
        guesses = {
            "action_error": vla.sample(encoding, batch.state, drawn, embodiment),
            "mean_error": usual,
            "last_error": torch.where(batch.first[:, None, None], usual, batch.previous[:, None]),
        }
        sums["loss"] += float(each.sum())
        for name, guess in guesses.items():
            sums[name] += float((((guess - batch.action).abs() / scale) * real).sum())
        elements += float(real.sum())
    return {name: total / (count if name == "loss" else max(elements, 1.0)) for name, total in sums.items()}
