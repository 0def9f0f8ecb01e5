"""The verb ``brachium train-latent``: a slow vision-language model and a fast policy, with the delay they will see."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..console import human_time, log, progress
from ..datasets.store import EpisodeStore
from ..errors import ConfigError
from .judge import Features
from .loop import TrainLoop
from .model import stack_images
from .optim import Optimization
from .pretrained import Pretrained, identity_of
from .slowfast import Sizes, SlowFast, SlowFastModel, shrunk

AT_ONCE = 64
"""Frames whose features are computed at once."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Every frame of a store: what the slow system reads (n, f), what the fast one sees, and what was done.

    ``first`` and ``last`` (n,) are the frames that the episode begins and ends with.
    """

    slow: Float[Tensor, "n f"]
    images: UInt8[Tensor, "n c size size 3"]
    state: Float[Tensor, "n s"]
    action: Float[Tensor, "n a"]
    first: np.ndarray
    last: np.ndarray

    def batch(self, frames: np.ndarray, delays: np.ndarray, horizon: int) -> tuple[Tensor, ...]:
        """Inputs of `SlowFast.loss` for some frames, the slow system's from up to `delays` (b,) steps before."""
        begin, end = self.first[frames], self.last[frames]
        then = np.maximum(frames - delays, begin)
        steps = frames[:, None] + np.arange(horizon)
        real = torch.from_numpy(steps <= end[:, None])
        share = torch.from_numpy(((frames - begin) / np.maximum(1, end - begin)).astype(np.float32))
        age = torch.from_numpy((frames - then).astype(np.float32))
        now = torch.from_numpy(frames)
        action = self.action[torch.from_numpy(np.minimum(steps, end[:, None]))]
        return self.slow[torch.from_numpy(then)], age, self.images[now], self.state[now], action, real, share


def frames_of(store: EpisodeStore, model: Pretrained, size: int) -> Frames:
    """Read a store once: slow features of every frame, and small images."""
    make, spec = Features(model), store.embodiment
    lengths = np.array([episode.length for episode in store.episodes])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    tokens = torch.from_numpy(make.tokens([e.instruction for e in store.episodes]))
    state = torch.from_numpy(store.lowdim("state").astype(np.float32))
    slow, small = [], []
    with progress("features", total=len(owner), unit="frames") as bar:
        for k in range(0, len(owner), AT_ONCE):
            some = np.arange(k, min(k + AT_ONCE, len(owner)))
            pictures = {name: store.read_images(name, some) for name in spec.camera_names}
            images = stack_images(pictures, spec, torch.device("cpu"))
            assert isinstance(images, Tensor)
            slow.append(make(images, tokens[owner[some]][:, None], state[some])[:, 0])
            small.append(shrunk(images, size))
            bar.update(len(some))
    first = store.offsets[owner]
    return Frames(
        slow=torch.cat(slow),
        images=torch.cat(small),
        state=state,
        action=torch.from_numpy(store.lowdim("action").astype(np.float32)),
        first=first,
        last=first + lengths[owner] - 1,
    )


def train_latent(
    *,
    store: str,
    optimization: Optimization,
    vlm: str = "nano",
    max_delay: int = 10,
    latent: int = 64,
    width: int = 256,
    image: int = 48,
    horizon: int = 3,
    out: str = "outputs/latent",
) -> int:
    """Train a slow-fast pair on demonstrations: the vision-language model is frozen, its latent and the policy learnt.

    In training the latent is 0 to `max_delay` steps old, drawn evenly, so that the policy bears what deployment brings.
    An interrupted training goes on when the command is typed again. The result, ``OUT/pair``, is for
    ``planner=latent``.

    Args:
        store: Episode store of demonstrations.
        optimization: How to train.
        vlm: Pretrained model that the slow system reads with, ``nano`` or a folder.
        max_delay: Oldest latent in training [steps]; 0 for none, to see what that costs.
        latent: Width of the latent.
        width: Of the hidden layers.
        image: Edge of the fast system's images [px].
        horizon: Actions in a chunk.
        out: Folder.
    """
    if max_delay < 0 or min(latent, width, image, horizon) < 1:
        raise ConfigError(
            "expected max_delay from 0 and latent, width, image and horizon from 1, got "
            f"{max_delay}, {latent}, {width}, {image} and {horizon}"
        )
    begin, folder = time.process_time(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    opened, model = EpisodeStore.open(store), Pretrained.load(vlm)
    spec, sizes = opened.embodiment, Sizes(latent=latent, width=width, image=image, horizon=horizon)
    if spec.camera_names != model.cameras:
        raise ConfigError(f"{vlm} looks through {list(model.cameras)}, {store} has cameras {list(spec.camera_names)}")
    frames = frames_of(opened, model, image)
    with torch.random.fork_rng():
        torch.manual_seed(optimization.seed)
        net = SlowFast(frames.slow.shape[1], spec, sizes)
    net.fit(frames.slow, frames.state, frames.action)

    def batch(step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng([optimization.seed, step])
        some = rng.integers(len(frames.state), size=optimization.batch_size)
        return frames.batch(some, rng.integers(0, max_delay + 1, len(some)), horizon)

    def loss(some: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        slow, age, images, state, action, real, share = some
        return net.loss(net.slow(slow), age, images, state, action, real, share, generator)

    loop = TrainLoop(
        name="latent",
        module=net,
        make_batch=batch,
        loss=loss,
        options=optimization,
        folder=folder,
        resume=True,
        identity={"data": opened.fingerprint, "sizes": vars(sizes), "max_delay": max_delay, "vlm": identity_of(vlm)},
    )
    count = sum(p.numel() for p in net.parameters())
    log(f"slow-fast pair of {count / 1e6:.2f} M parameters on {len(frames.state)} frames")
    loop.run()
    loop.use_average()
    seconds = time.process_time() - begin
    notes: dict[str, Any] = {
        "cpu_seconds": round(seconds, 1),
        "data": opened.fingerprint,
        "max_delay": max_delay,
        "seed": optimization.seed,
        "optimization": optimization.noted(),
    }
    pair = SlowFastModel(net=net.eval(), model=model, embodiment=spec, notes=notes)
    path = pair.save(folder / "pair")
    SlowFastModel.load(path)  # what cannot be loaded is no result
    (folder / "notes.json").write_text(json.dumps(notes, indent=1, default=str) + "\n")
    log(f"{path}: saved and loaded again, {human_time(seconds)} of CPU")
    return 0
