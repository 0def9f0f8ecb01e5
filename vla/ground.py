"""Grounding: teach an encoder to find what words name, on free labelled scenes, before it learns to act."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..console import log
from ..datasets.sampler import ShuffledSampler
from ..datasets.store import EpisodeStore
from ..errors import StoreError
from .encoder import Encoder, word_loss
from .grounding import ROLES, grounding_loss, inside
from .loop import TrainLoop
from .model import VLAModel, stack_images
from .optim import Optimization
from .tokenizer import InstructionEncoder

PIXELS = "pixels"
"""Extra field: a row an item, the pixels that show it in each camera."""
LABEL = "objects"
"""Extra field of a store of scenes: a row an item, x, y, z [m] and u, v, depth a camera."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """The grounding stage.

    Attributes:
        store: Episode store of labelled scenes (``brachium record env=scenes``).
        optimization: How to train; a batch is of scenes.
        sentences: Sentences a scene in a batch; they share one pass over the images.
        word_dropout: Share of words replaced by the unknown word, so that new words do not throw the model off.
        heldout: Number of scenes kept for evaluation.
        out: Folder of the result, so that several trainings share it; the training's own folder when None.
    """

    store: str
    optimization: Optimization = field(default_factory=Optimization)
    sentences: int = 4
    word_dropout: float = 0.05
    heldout: int = 200
    out: str | None = None


@dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """Scenes with k sentences each: images (b, n, H, W, 3), tokens (b, k, l), state (b, s), labels (b, k, r, f).

    ``chosen`` are the numbers of the sentences, (b, k), and ``pad`` the padding token.
    """

    images: UInt8[Tensor, "b n height width 3"]
    tokens: Int[Tensor, "b k l"]
    clean_tokens: Int[Tensor, "b k l"]
    state: Float[Tensor, "b s"]
    objects: Float[Tensor, "b k r f"]
    chosen: np.ndarray
    pad: int


class SceneData:
    """Batches of labelled scenes; every draw is a function of (seed, step). For `evaluation` all are held out."""

    def __init__(
        self,
        store: EpisodeStore,
        encode: InstructionEncoder,
        options: Grounding,
        device: torch.device,
        *,
        evaluation: bool = False,
    ) -> None:
        if LABEL not in store.schema.fields:
            raise StoreError(
                f"{store.path} has no field {LABEL!r}: it is no store of labelled scenes. "
                "Type: brachium record env=scenes out=SCENES"
            )
        self.store, self.encode, self.options, self.device = store, encode, options, device
        self.spec = store.embodiment
        self.state = store.lowdim("state").astype(np.float32, copy=False)
        self.objects = store.lowdim(LABEL).astype(np.float32, copy=False)
        sentences = [episode.meta.get("sentences") or () for episode in store.episodes]
        total = store.total_frames
        if total <= options.heldout and not evaluation:
            raise StoreError(
                f"{store.path}: expected more than {options.heldout} scenes (grounding.heldout), got {total}"
            )
        counts = {len(texts) for texts in sentences}
        if len(counts) > 1 or 0 in counts or any(episode.length != 1 for episode in store.episodes):
            raise StoreError(
                f"{store.path}: expected scenes of one step, each with the same number of sentences in its meta. "
                "Type: brachium record env=scenes out=SCENES"
            )
        self.tokens = np.stack([encode(s["text"] for s in scene) for scene in sentences])
        self.roles = np.array([[[s["roles"][role] for role in ROLES] for s in scene] for scene in sentences])
        seeds = [int(episode.meta.get("seed", k)) for k, episode in enumerate(store.episodes)]
        order = np.lexsort((np.arange(total), np.asarray(seeds)))  # recorders in parallel write in any order
        kept = total if evaluation else options.heldout
        self.train, self.heldout = order[: total - kept], order[total - kept :]
        batch = options.optimization.batch_size
        if len(self.train):
            self.sampler = ShuffledSampler(len(self.train), min(batch, len(self.train)), options.optimization.seed)

    def visible(self, scenes: np.ndarray, batch: SceneBatch) -> Float[Tensor, "b k r n"]:
        """Pixels of each camera that show what the texts of a batch made without generator name; all, if unlabelled."""
        shape = (*batch.objects.shape[:3], len(self.spec.cameras))
        if PIXELS not in self.store.schema.fields:
            return torch.full(shape, torch.inf, device=self.device)
        roles = self.roles[scenes[:, None], np.arange(shape[1])]
        pixels = self.store.lowdim(PIXELS).astype(np.float32, copy=False)[scenes]
        return torch.from_numpy(pixels[np.arange(len(scenes))[:, None, None], roles]).to(self.device)

    def make(self, step: int) -> SceneBatch:
        """The training batch of a step."""
        rng = np.random.default_rng([self.options.optimization.seed, step, 0x6D])
        return self.batch(self.train[self.sampler.batch(step)], rng)

    def batch(self, scenes: np.ndarray, rng: np.random.Generator | None) -> SceneBatch:
        """Some scenes with `sentences` sentences each; words are dropped only when there is a generator."""
        count = min(self.options.sentences, self.tokens.shape[1])
        if rng is None:
            chosen = np.tile(np.arange(count), (len(scenes), 1))
        else:
            chosen = rng.permuted(np.tile(np.arange(self.tokens.shape[1]), (len(scenes), 1)), axis=1)[:, :count]
        rows = np.arange(len(scenes))[:, None]
        clean = self.tokens[scenes[:, None], chosen]
        roles = self.roles[scenes[:, None], chosen]
        tokens = clean.copy()
        if rng is not None:
            dropped = (rng.random(clean.shape) < self.options.word_dropout) & (clean != self.encode.pad)
            tokens[dropped] = self.encode.unknown
        labels = self.objects[scenes][rows[:, :, None], roles]
        images = {name: self.store.read_images(name, scenes) for name in self.spec.camera_names}
        return SceneBatch(
            images=stack_images(images, self.spec, self.device),
            tokens=torch.from_numpy(tokens).to(self.device),
            clean_tokens=torch.from_numpy(clean).to(self.device),
            state=torch.from_numpy(self.state[scenes]).to(self.device),
            objects=torch.from_numpy(labels).to(self.device),
            chosen=chosen,
            pad=self.encode.pad,
        )


def ground(model: VLAModel, options: Grounding, folder: Path, *, resume: bool) -> dict[str, float]:
    """Train the encoder of `model` to point; leaves the averaged weights in place and returns held-out metrics."""
    encoder, device = model.encoder, model.device
    data = SceneData(EpisodeStore.open(options.store), model.instructions, options, device)
    if encoder.point_readout is None:
        raise StoreError("grounding needs a model that points: set model.points=true or grounding=null")
    if not model.recipe.backbone.get("path"):  # a pretrained backbone keeps the pixels it was trained with
        sample = data.batch(data.train[:: max(1, len(data.train) // 256)], None)
        encoder.backbone.fit_pixels(sample.images)
    positions = torch.from_numpy(data.objects[data.train, :, :3]).flatten(0, -2)
    centre = positions[positions.isfinite().all(-1)].mean(0)
    states = torch.from_numpy(data.state[data.train][:, encoder.body])
    encoder.point_readout.fit(states.to(device), centre.to(device))

    def loss(batch: SceneBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        points, words, grid = encoder.point(batch.images, batch.tokens, batch.state)
        value, parts = grounding_loss(points, batch.objects, grid)
        named = word_loss(words, batch.clean_tokens, encoder.pad_id)
        return value + named, {"cells": parts["cells"], "shift": parts["shift"], "position": parts["position"]}

    loop = TrainLoop(
        name="ground",
        module=encoder,
        make_batch=data.make,
        loss=loss,
        options=options.optimization,
        folder=folder,
        resume=resume,
        evaluate=(lambda: evaluate_grounding(encoder, data)) if len(data.heldout) else None,
        identity={
            "data": data.store.fingerprint,
            "backbone": dict(model.recipe.backbone),
            "words": sorted(model.tokenizer.get_vocab()),
            "max_tokens": model.recipe.max_tokens,
            "sentences": options.sentences,
            "word_dropout": options.word_dropout,
            "heldout": options.heldout,
        },
    )
    log(
        f"grounding {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters on "
        f"{len(data.train)} scenes of {options.store}"
    )
    metrics = loop.run()
    loop.use_average()
    encoder.eval()
    return metrics


@torch.no_grad()
def evaluate_grounding(encoder: Encoder, data: SceneData) -> dict[str, float]:
    """Pixel error (median and 90th percentile) a camera and position error [mm] on held-out scenes."""
    pixels: list[list[Tensor]] = [[] for _ in data.spec.cameras]
    metres = []
    for start in range(0, len(data.heldout), 50):
        batch = data.batch(data.heldout[start : start + 50], None)
        points, _, _ = encoder.point(batch.images, batch.tokens, batch.state)
        label = batch.objects[..., 3:].unflatten(-1, (-1, 3))
        seen = inside(label)
        for k, camera in enumerate(data.spec.cameras):
            size = torch.tensor([camera.shape[1], camera.shape[0]], device=label.device)
            error = ((points.uv - label[..., :2]) * size).norm(dim=-1)[..., k]
            pixels[k].append(error[seen[..., k]])
        metres.append((points.position - batch.objects[..., :3]).norm(dim=-1).flatten())
    result: dict[str, float] = {}
    levels = torch.tensor([0.5, 0.9])
    for camera, errors in zip(data.spec.cameras, pixels):
        found = torch.cat(errors).cpu()
        median, tail = found.quantile(levels).tolist() if len(found) else (math.nan, math.nan)
        result |= {f"{camera.name}_px": median, f"{camera.name}_px_p90": tail}
    median, tail = torch.cat(metres).cpu().quantile(levels).tolist()
    return result | {"position_mm": 1000 * median, "position_mm_p90": 1000 * tail}
