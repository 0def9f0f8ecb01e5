"""What a fresh encoder learns before the head does: to ground, or at least how bright pixels are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import log
from ..datasets.store import EpisodeStore
from .checkpoint import unshared
from .ground import Grounding, ground
from .model import VLAModel, stack_images
from .recipe import Recipe
from .sources import Source


def teach_encoder(
    vla: VLAModel, sources: Sequence[Source], grounding: Grounding | None, folder: Path, resume: bool
) -> dict[str, Any]:
    """What a new encoder learns before the head: to ground, or at least how bright pixels are. Returns notes."""
    if grounding is None:
        _fit_pixels(vla, sources)
        readout = vla.encoder.point_readout
        if readout is not None:
            frames = [s.store.lowdim("state")[s.store.episode_frames(list(s.training))] for s in sources]
            poses = [part.astype(np.float32)[:, vla.encoder.body] for part in frames]
            body = torch.from_numpy(np.concatenate(poses)).to(vla.device)
            readout.fit(body, body[:, :3].mean(0))
        return {}
    begin = time.monotonic()
    metrics = _ground_once(vla, grounding, Path(grounding.out or folder), resume)
    return {"grounding": metrics, "seconds": {"ground": time.monotonic() - begin}}


def is_pretrained_vision(recipe: Recipe) -> bool:
    """Whether the backbone's vision comes with weights; a path of `OctoBackbone` is of its words alone."""
    return bool(recipe.backbone.get("path")) and not str(recipe.backbone["_target_"]).endswith("OctoBackbone")


def _ground_once(vla: VLAModel, grounding: Grounding, folder: Path, resume: bool) -> Mapping[str, float]:
    """Ground, or take the finished result of an earlier run with the same options, data and words."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    done = folder / "grounded.safetensors"
    wanted = {
        "options": grounding.optimization.noted(),
        "store": EpisodeStore.open(grounding.store).fingerprint,
        "sentences": grounding.sentences,
        "word_dropout": grounding.word_dropout,
        "heldout": grounding.heldout,
        "words": sorted(vla.tokenizer.get_vocab()),
        "max_tokens": vla.recipe.max_tokens,
        "backbone": dict(vla.recipe.backbone),
    }
    if done.exists():
        try:
            with safe_open(done, "pt") as file:
                saved = json.loads(file.metadata()["grounding"])
        except Exception:  # damaged, or something else: ground anew
            saved = {"wanted": None}
        if saved["wanted"] == json.loads(json.dumps(wanted, default=str)):
            weights = load_file(done)
            vla.encoder.backbone.pixel_mean = weights["backbone.pixel_mean"].to(vla.device)
            vla.encoder.load_state_dict(weights)
            log(f"{done}: grounding is done already; reusing it")
            return dict(saved["metrics"])
    metrics = ground(vla, grounding, folder, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = done.with_suffix(".partial")
    note = json.dumps({"wanted": wanted, "metrics": metrics}, default=str)
    save_file(unshared(vla.encoder.state_dict()), temporary, {"grounding": note})
    temporary.replace(done)
    (folder / "resume-ground.safetensors").unlink(missing_ok=True)
    return metrics


def _fit_pixels(vla: VLAModel, sources: Sequence[Source]) -> None:
    """Pixel statistics from the demonstrations, for a backbone trained from scratch without grounding."""
    if is_pretrained_vision(vla.recipe):
        return
    found = []
    for source in sources:
        frames = source.store.episode_frames(list(source.training))
        frames = frames[:: max(1, len(frames) // 256)]
        images = {name: source.store.read_images(name, frames) for name in source.store.embodiment.camera_names}
        found.append(stack_images(images, source.store.embodiment, vla.device))
    vla.encoder.backbone.fit_pixels(*found)
