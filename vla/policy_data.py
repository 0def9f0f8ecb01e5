"""Batches for training a head: windows of a store, with images, or with the cached encodings of a frozen encoder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..console import log, progress
from ..datasets.episode import EpisodeInfo
from ..datasets.sampler import ShuffledSampler
from ..datasets.schema import EXECUTED
from ..datasets.store import EpisodeStore
from ..datasets.window import WindowDataset, WindowSpec
from .backbones.resize import Images
from .checkpoint import share
from .draws import Draws, RandomSource
from .encoder import Encoding
from .model import VLAModel, stack_images

CACHED = ("words", "points", "around")
"""Parts of an encoding that are kept for every frame, as far as there are any; the last in half precision."""
CHUNK = 16
"""Frames encoded at once when a cache is made."""


def episode_key(episode: EpisodeInfo) -> str:
    """What an episode is, rather than when it was written: recorders in parallel finish in any order."""
    if "seed" in episode.meta:
        return f"{episode.meta.get('task')}:{int(episode.meta['seed']):012d}"
    return episode.id


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which rows of a batch somebody has.

    Attributes:
        first: Number of the first.
        total: Rows of the whole batch.
        counts: False for a row that is another's, computed for nothing: processes that share a batch must all run the
            same parts of a model, whether there is something for each in it or not.
    """

    first: int
    total: int
    counts: bool = True

    @classmethod
    def of(cls, total: int, index: int, count: int) -> tuple[Rows, slice]:
        """Share `index` of `count`, and where it lies."""
        first, last = index * total // count, (index + 1) * total // count
        if first == last:
            first = min(first, total - 1)
            return cls(first=first, total=total, counts=False), slice(first, first + 1)
        return cls(first=first, total=total), slice(first, last)


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """b windows: state (b, s), action (b, h, a), action_pad (b, h), and either an encoding or images and tokens.

    `previous` (b, a) is the action before each window; where `first` (b,) is True there is none. `executed` (b, h, a)
    is what was done where it differs from what would have been right. `share` says which windows of a larger batch
    they are, where they are not all of it.
    """

    embodiment: str
    state: Float[Tensor, "b s"]
    action: Float[Tensor, "b h a"]
    action_pad: Bool[Tensor, "b h"]
    previous: Float[Tensor, "b a"]
    first: Bool[Tensor, " b"]
    executed: Float[Tensor, "b h a"] | None = None
    encoding: Encoding | None = None
    images: Images | None = None
    tokens: Int[Tensor, "b l"] | None = None
    share: Rows | None = None

    @property
    def total(self) -> int:
        """Windows of the whole batch of this embodiment."""
        return len(self.state) if self.share is None else self.share.total

    @property
    def counts(self) -> bool:
        """Whether these windows are learnt from: a share of fewer windows than there are shares borrows one."""
        return self.share is None or self.share.counts

    def draws(self, generator: torch.Generator) -> RandomSource:
        """Random numbers of these windows, which are the same however a batch is shared out."""
        if self.share is None:
            return generator
        return Draws(generator=generator, first=self.share.first, rows=len(self.state), total=self.share.total)

    def encode(self, model: VLAModel) -> Encoding:
        """The cached encoding, or a fresh one from the images."""
        if self.encoding is not None:
            return self.encoding
        if self.images is None or self.tokens is None:
            raise RuntimeError("a batch without encoding needs images and tokens")
        return model.encode(self.images, self.tokens, self.state, self.embodiment)


def joined(parts: Sequence[PolicyBatch]) -> PolicyBatch:
    """Batches of one embodiment as one, so that a model runs once for all of them."""
    first = parts[0]
    if len(parts) == 1:
        return first
    fields: dict[str, Any] = {
        key: torch.cat([getattr(part, key) for part in parts])
        for key in ("state", "action", "action_pad", "previous", "first")
    }
    if any(part.executed is not None for part in parts):
        fields["executed"] = torch.cat([part.action if part.executed is None else part.executed for part in parts])
    seen = [part.encoding for part in parts]
    if first.encoding is not None:
        kept = [key for key in CACHED if getattr(first.encoding, key) is not None]
        encodings: dict[str, Any] = {key: torch.cat([getattr(each, key) for each in seen]) for key in kept}
        return PolicyBatch(**fields, embodiment=first.embodiment, encoding=Encoding(**encodings))
    pictures: list[Any] = [part.images for part in parts]
    images = tuple(map(torch.cat, zip(*pictures))) if isinstance(first.images, tuple) else torch.cat(pictures)
    tokens: list[Any] = [part.tokens for part in parts]
    return PolicyBatch(**fields, embodiment=first.embodiment, images=images, tokens=torch.cat(tokens))


class PolicyData:
    """Windows of some episodes of a store.

    Args:
        store: Episodes.
        episodes: Indices of the episodes to use.
        model: Gives the chunk length and the tokens.
        batch_size, seed: Of the training batches.
        encodings: Cached encodings of every frame of the store, or None to load images.
    """

    def __init__(
        self,
        store: EpisodeStore,
        episodes: list[int],
        model: VLAModel,
        *,
        batch_size: int,
        seed: int,
        encodings: Encoding | None,
    ) -> None:
        self.store, self.model, self.encodings = store, model, encodings
        h = model.recipe.action_horizon
        self.disturbed = model.max_delay > 0 and EXECUTED in store.schema.fields
        more: dict[str, Any] = {"extras": (EXECUTED,), "offsets": {EXECUTED: range(h)}} if self.disturbed else {}
        self.windows = WindowDataset(store, WindowSpec(action_horizon=h, **more), episodes=episodes)
        self.sampler = ShuffledSampler(len(self.windows), min(batch_size, len(self.windows)), seed)

    def make(self, step: int) -> PolicyBatch:
        """The training batch of a step."""
        return self.batch(self.sampler.batch(step))

    def described(self, indices: np.ndarray) -> list[str]:
        """Which windows they are: store, episode and frame, and what in them is no number."""
        window = self.windows.batch(indices, images=False)
        owners, _ = self.store.locate(window.frame[:, -1])
        found = []
        for row, (owner, frame) in enumerate(zip(owners, window.frame[:, -1])):
            text = f"{self.store.path} episode {int(owner)} frame {int(frame - self.store.offsets[int(owner)])}"
            broken = [
                k for k, v in (("state", window.state), ("action", window.action)) if not np.isfinite(v[row]).all()
            ]
            found.append(text + (f" ({' and '.join(broken)} not finite)" if broken else ""))
        return sorted(found, key=lambda text: "not finite" not in text)

    def batch(self, indices: np.ndarray) -> PolicyBatch:
        """Some windows."""
        window = self.windows.batch(indices, images=self.encodings is None)
        device = self.model.device
        now = window.frame[:, -1]
        before = self.store.lowdim("action")[np.maximum(now - 1, 0)].astype(np.float32)
        name = self.store.embodiment.name
        common: dict[str, Any] = {
            "embodiment": name,
            "previous": torch.from_numpy(before).to(device),
            "first": torch.from_numpy(np.isin(now, self.store.offsets)).to(device),
            "state": torch.from_numpy(window.state[:, -1]).to(device),
            "action": torch.from_numpy(window.action).to(device),
            "action_pad": torch.from_numpy(window.action_pad).to(device),
        }
        if self.disturbed:
            executed = window.extras[EXECUTED].astype(np.float32, copy=False)
            known = np.isfinite(executed)  # a merged store may lack the field in some episodes: nothing disturbed them
            common["executed"] = torch.from_numpy(np.where(known, executed, window.action)).to(device)
        if self.encodings is not None:
            return PolicyBatch(**common, encoding=self.encodings.rows(torch.from_numpy(now).to(device)))
        images = {k: v[:, -1] for k, v in window.images.items()}
        return PolicyBatch(
            **common,
            images=stack_images(images, self.store.embodiment, device),
            tokens=self.model.tokens(window.instruction, common["state"], name),
        )


@torch.no_grad()
def cached_encodings(model: VLAModel, store: EpisodeStore, folder: Path) -> Encoding:
    """Encode every frame of a store once; kept in `folder` by the hash of the encoder's weights and of the data.

    Where `folder` cannot be written (a store of others, a full disk) the encodings are made anew each time.
    """
    path = folder / f"encodings-{encoding_key(model, store)}.safetensors"
    device = model.device
    if path.exists():
        log(f"features of {store.path}: reusing {path}")
        tensors = load_file(path)
    else:
        tensors = _encode_all(model, store)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            share(temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            log(f"features are not kept: {path} cannot be written ({error})")
    kept: dict[str, Any] = {key: tensors[key].to(device) for key in CACHED if key in tensors}
    return Encoding(**kept)


def _encode_all(model: VLAModel, store: EpisodeStore) -> dict[str, Tensor]:
    device, spec = model.device, store.embodiment
    lengths = [episode.length for episode in store.episodes]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    tokens = model.instructions(episode.instruction for episode in store.episodes)
    state = store.lowdim("state").astype(np.float32, copy=False)
    by_key = store.episode_frames([e.index for e in sorted(store.episodes, key=episode_key)])
    found: dict[str, list[Tensor]] = {key: [] for key in CACHED}
    model.eval()
    with progress("encoding frames", total=store.total_frames, unit="frames") as bar:
        for start in range(0, store.total_frames, CHUNK):
            frames = by_key[start : start + CHUNK]  # the last digits depend on what is computed together
            images = {name: store.read_images(name, frames) for name in spec.camera_names}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                encoding = model.encode(
                    stack_images(images, spec, device),
                    torch.from_numpy(tokens[owner[frames]]).to(device),
                    torch.from_numpy(state[frames]).to(device),
                    spec.name,
                )
            for key in CACHED:
                value = getattr(encoding, key)
                if value is not None:
                    found[key].append((value.half() if key == "around" else value.float()).cpu())
            bar.update(len(frames))
    place = torch.from_numpy(np.argsort(by_key))
    return {key: torch.cat(values)[place] for key, values in found.items() if values}


def encoding_key(model: VLAModel, store: EpisodeStore) -> str:
    """16 hex digits that change with the encoder's weights or the data."""
    recipe = model.recipe
    told = [recipe.max_tokens, recipe.backbone, recipe.prompt, recipe.special_tokens, recipe.clean]
    told += ["surround"] if recipe.surround else []
    digest = hashlib.sha256(f"{store.fingerprint} {told}".encode())
    for key, value in sorted(model.encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
