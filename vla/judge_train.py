"""Train a judge on executed skills: features once, a small network, calibration on held-out episodes, and scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..console import log, progress, table
from ..datasets.store import EpisodeStore
from ..errors import StoreError
from .judge import DONE, OUTPUTS, Features, Judge, JudgeNet, auroc, calibrate, expected_calibration_error
from .loop import TrainLoop
from .model import stack_images
from .optim import Optimization
from .pretrained import Pretrained

STRIDE = 4
"""Every so many steps of an execution are looked at, beside the first and those where it is done."""
AT_ONCE = 32
"""Frames whose features are computed at once."""
SHARES = (0.7, 0.15)
"""Of the episodes for training and for calibration; the others are for the scores."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Looks at executed skills: features (n, f), labels (n, o) with NaN for unknown, which part (n,), which task."""

    features: Float[Tensor, "n f"]
    labels: Float[Tensor, "n o"]
    part: np.ndarray
    task: np.ndarray

    def rows(self, part: int) -> tuple[Tensor, Tensor]:
        """Features and labels of a part: 0 training, 1 calibration, 2 scores."""
        own = torch.from_numpy(np.nonzero(self.part == part)[0])
        return self.features[own], self.labels[own]


def examples_of(store: EpisodeStore, model: Pretrained, *, seed: int = 0) -> Examples:
    """Looks at every execution of a store; whole episodes go to a part.

    Raises:
        StoreError: The store has no `DONE` field.
    """
    if DONE not in store.schema.fields:
        raise StoreError(
            f"{store.path}: expected executed skills with the field {DONE!r} (brachium train-judge records them)"
        )
    make, spec = Features(model), store.embodiment
    done = store.lowdim(DONE)[:, 0] > 0.5
    state = store.lowdim("state").astype(np.float32)
    rng = np.random.default_rng([seed, 0x1D6E])
    frames, labels, parts, tasks, texts = [], [], [], [], []
    for episode, first in zip(store.episodes, store.offsets):
        part = int(np.searchsorted(np.cumsum(SHARES), rng.random(), side="right"))
        last = int(first) + episode.length
        own = sorted({*range(int(first), last, STRIDE), *(int(first) + np.nonzero(done[first:last])[0])})
        before = done[first:last].argmax() if done[first:last].any() else episode.length
        for frame in own:
            can = float(bool(episode.success)) if frame - first < before else float("nan")
            frames.append(frame)
            labels.append([can, float(done[frame])])
            parts.append(part)
            tasks.append(str(episode.meta.get("task", "")))
            texts.append(episode.instruction)
    tokens = torch.from_numpy(make.tokens(texts))[:, None]
    found = []
    with progress("features", total=len(frames), unit="frames") as bar:
        for k in range(0, len(frames), AT_ONCE):
            some = frames[k : k + AT_ONCE]
            pictures = {name: store.read_images(name, np.array(some)) for name in spec.camera_names}
            images = stack_images(pictures, spec, torch.device("cpu"))
            assert isinstance(images, Tensor)
            found.append(make(images, tokens[k : k + AT_ONCE], torch.from_numpy(state[some]))[:, 0])
            bar.update(len(some))
    return Examples(features=torch.cat(found), labels=torch.tensor(labels), part=np.array(parts), task=np.array(tasks))


def fit_judge(examples: Examples, model: Pretrained, *, optimization: Optimization, width: int, folder: Path) -> Judge:
    """Train, calibrate and score a judge; training goes on where it was interrupted."""
    features, labels = examples.rows(0)
    with torch.random.fork_rng():
        torch.manual_seed(optimization.seed)
        net = JudgeNet(features.shape[1], width)
    net.mean, net.std = features.mean(0), features.std(0).clamp(min=1e-3)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([optimization.seed, step])
        rows = torch.from_numpy(rng.integers(len(features), size=optimization.batch_size))
        return features[rows], labels[rows]

    def loss(some: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = some
        known = y.isfinite()
        each = F.binary_cross_entropy_with_logits(net(x), y.nan_to_num(), reduction="none")
        return (each * known).sum() / known.sum(), {}

    loop = TrainLoop(
        name="judge",
        module=net,
        make_batch=batch,
        loss=loss,
        options=optimization,
        folder=folder,
        resume=True,
        identity={"examples": [len(features), float(features.double().sum()), float(labels.nansum())], "width": width},
    )
    loop.run()
    loop.use_average()
    net.eval()
    held, known = examples.rows(1)
    with torch.no_grad():
        scale, shift = calibrate(net(held), known)
        net.scale, net.shift = scale, shift
    scores = score(net, examples)
    return Judge(net=net, model=model, notes={"scores": scores, "optimization": optimization.noted()})


@torch.no_grad()
def score(net: JudgeNet, examples: Examples) -> dict[str, Any]:
    """AUROC and ECE of both outputs on episodes that neither training nor calibration saw, in all and by task."""
    own = examples.part == 2
    p = net(examples.features[torch.from_numpy(np.nonzero(own)[0])]).sigmoid().numpy()
    labels, tasks = examples.labels.numpy()[own], examples.task[own]
    found: dict[str, Any] = {}
    for name in ("all", *sorted(set(tasks.tolist()))):
        rows = np.ones(len(tasks), bool) if name == "all" else tasks == name
        for k, output in enumerate(OUTPUTS):
            known = rows & np.isfinite(labels[:, k])
            x, y = p[known, k], labels[known, k]
            if len(y):
                found[f"{name}/{output}"] = {
                    "looks": len(y),
                    "positive": round(float(y.mean()), 4),
                    "auroc": round(auroc(x, y), 4),
                    "ece": round(expected_calibration_error(x, y), 4),
                    "brier": round(float(((x - y) ** 2).mean()), 4),
                    "reliability": _bins(x, y),
                }
    return found


def _bins(p: np.ndarray, label: np.ndarray, bins: int = 10) -> list[list[float]]:
    """Mean confidence, frequency and number of looks of each bin that has any."""
    index = np.minimum((p * bins).astype(int), bins - 1)
    return [
        [round(float(p[index == k].mean()), 4), round(float(label[index == k].mean()), 4), int((index == k).sum())]
        for k in range(bins)
        if (index == k).any()
    ]


def show(judge: Judge, folder: Path) -> None:
    """Print the scores, and draw how often what was said with some confidence was so."""
    from matplotlib.figure import Figure

    scores = judge.notes["scores"]
    rows = [
        [
            name,
            str(s["looks"]),
            f"{100 * s['positive']:.0f} %",
            f"{s['auroc']:.3f}",
            f"{s['ece']:.3f}",
            f"{s['brier']:.3f}",
        ]
        for name, s in scores.items()
    ]
    table("judge, on held-out executions", ["", "looks", "positive", "AUROC", "ECE", "Brier"], rows)
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for output in OUTPUTS:
        bins = np.array(scores[f"all/{output}"]["reliability"])
        axes.plot(bins[:, 0], bins[:, 1], marker="o", label=f"{output} (ECE {scores[f'all/{output}']['ece']:.3f})")
    axes.set(xlabel="said", ylabel="was so", title="reliability on held-out executions", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(folder / "reliability.png", dpi=120)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    log(f"plot: {folder / 'reliability.png'}")
