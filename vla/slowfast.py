"""A slow vision-language model and a fast policy, joined by a latent: what Helix (Figure, 2025) and OpenHelix
(2505.03912) do, small.

The slow system reads images and words and leaves one latent z, some steps old when it is used. The fast system sees
the present images and the robot's state, z and z's age, and gives a chunk of actions and how far the task is. Training
draws z from an earlier frame, as old as it will be when deployed; without that a policy takes z to be of now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ..spec import EmbodimentSpec, Observation
from .checkpoint import versions
from .companion import load_companion, save_companion
from .heads.base import Context, HeadInputs
from .heads.flow import FlowHead
from .judge import Features
from .pretrained import Pretrained

FILES = {"about": "slowfast.json", "weights": "model.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a slow-fast pair.

    Attributes:
        latent: Width d of z.
        width: Of the fast system's hidden layers.
        image: Edge of the images that the fast system sees [px].
        horizon: Actions in a chunk.
        oldest: Age of z at which its age's input is one [steps].
    """

    latent: int = 64
    width: int = 256
    image: int = 48
    horizon: int = 3
    oldest: int = 20


class Eye(nn.Module):
    """A small convolutional net on every camera, pooled by where its features are (spatial softmax).

    Levine et al. 2016, "End-to-End Training of Deep Visuomotor Policies".
    """

    def __init__(self, cameras: int, channels: int = 32) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, 16, 5, stride=2, padding=2),
                nn.ReLU(),
                nn.Conv2d(16, channels, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(cameras)
        )
        self.out = 3 * channels * cameras

    def forward(self, images: Float[Tensor, "b n 3 height width"]) -> Float[Tensor, "b f"]:
        """Expected coordinates and strength of every feature map."""
        parts = []
        for k, net in enumerate(self.nets):
            maps = net(images[:, k])
            rows, columns = maps.shape[-2:]
            flat = maps.flatten(2)
            weights = flat.softmax(-1).unflatten(-1, (rows, columns))
            v = torch.linspace(-1.0, 1.0, rows, device=maps.device)
            u = torch.linspace(-1.0, 1.0, columns, device=maps.device)
            parts += [(weights.sum(-1) * v).sum(-1), (weights.sum(-2) * u).sum(-1), flat.logsumexp(-1) * 0.1]
        return torch.cat(parts, dim=1)


class SlowFast(nn.Module):
    """Both systems behind the frozen features of a vision-language model.

    Args:
        features: Number of the slow model's features.
        embodiment: Whose state and action.
        sizes: Sizes.
    """

    def __init__(self, features: int, embodiment: EmbodimentSpec, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.name, self.action_dim = sizes, embodiment.name, embodiment.action.dim
        state = embodiment.state.dim
        for name, size in (("slow", features), ("state", state), ("action", self.action_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.say = nn.Sequential(
            nn.Linear(features, sizes.width),
            nn.GELU(),
            nn.Linear(sizes.width, sizes.latent),
            nn.LayerNorm(sizes.latent, elementwise_affine=False),
        )
        self.eye = Eye(len(embodiment.cameras))
        self.look = nn.Sequential(nn.Linear(self.eye.out, sizes.width), nn.GELU())
        known = sizes.width + state + sizes.latent + 1
        inputs = HeadInputs(context_dim=known, action_horizon=sizes.horizon, action_dims={self.name: self.action_dim})
        self.head = FlowHead(inputs=inputs, width=sizes.width, depth=3, steps=5, solver="midpoint", draws=2)
        self.finished = nn.Sequential(nn.Linear(known, 128), nn.GELU(), nn.Linear(128, 1))
        # What z alone says of the next actions: the slow system cannot leave it all to the fast one (OpenHelix).
        self.alone = nn.Linear(sizes.latent + state, self.action_dim)

    def slow(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """The latent z."""
        return self.say((features - self._of("slow", "mean")) / self._of("slow", "std"))

    def known(
        self,
        z: Float[Tensor, "b d"],
        age: Float[Tensor, " b"],
        images: UInt8[Tensor, "b n height width 3"],
        state: Float[Tensor, "b s"],
    ) -> Float[Tensor, "b c"]:
        """What the fast system knows; `age` in steps, `state` in the embodiment's units."""
        pixels = images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        seen = self.look(self.eye(pixels))
        return torch.cat([seen, self._normal("state", state), z, age[:, None] / self.sizes.oldest], dim=1)

    def loss(
        self,
        z: Float[Tensor, "b d"],
        age: Float[Tensor, " b"],
        images: UInt8[Tensor, "b n height width 3"],
        state: Float[Tensor, "b s"],
        action: Float[Tensor, "b h a"],
        real: Tensor,
        share: Float[Tensor, " b"],
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching of the chunk, what z alone says of it, and the share of the task that is done."""
        known, target = self.known(z, age, images, state), self._normal("action", action)
        every = torch.ones(self.action_dim, dtype=torch.bool, device=z.device)
        flow = self.head.loss(Context(vector=known), target, real, every, self.name, generator).mean()
        alone = F.smooth_l1_loss(self.alone(torch.cat([z, self._normal("state", state)], dim=1)), target[:, 0])
        done = F.mse_loss(self.finished(known)[:, 0].sigmoid(), share)
        parts = {"flow": flow.detach(), "alone": alone.detach(), "finished": done.detach()}
        return flow + 0.2 * alone + 0.5 * done, parts

    @torch.no_grad()
    def act(
        self,
        z: Float[Tensor, "b d"],
        age: Float[Tensor, " b"],
        images: UInt8[Tensor, "b n height width 3"],
        state: Float[Tensor, "b s"],
        noise: Float[Tensor, "b h a"],
    ) -> tuple[Float[Tensor, "b h a"], Float[Tensor, " b"]]:
        """Chunks in the embodiment's units, and how far the task is, 0..1."""
        known = self.known(z, age, images, state)
        every = torch.ones(self.action_dim, dtype=torch.bool, device=z.device)
        found = self.head.sample(Context(vector=known), noise, every, self.name)
        return found * self._of("action", "std") + self._of("action", "mean"), self.finished(known)[:, 0].sigmoid()

    def fit(self, slow: Tensor, state: Tensor, action: Tensor) -> None:
        """Set the normalisation from data (n, f), (n, s) and (n, a)."""
        for name, values in (("slow", slow), ("state", state), ("action", action)):
            self._of(name, "mean").copy_(values.mean(0))
            self._of(name, "std").copy_(values.std(0).clamp(min=1e-3))

    def _of(self, name: str, what: str) -> Tensor:
        return self.get_buffer(f"{name}_{what}")

    def _normal(self, name: str, values: Tensor) -> Tensor:
        return (values - self._of(name, "mean")) / self._of(name, "std")


def is_pair(folder: str | Path) -> bool:
    """Whether a folder holds a slow-fast pair."""
    return (Path(folder) / FILES["about"]).exists()


def shrunk(images: UInt8[Tensor, "b n height width 3"], size: int) -> UInt8[Tensor, "b n small small 3"]:
    """Images averaged down to `size` [px]."""
    b, n = images.shape[:2]
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(size, size), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (b, n)).contiguous()


@dataclass(frozen=True, kw_only=True)
class SlowFastModel:
    """A trained pair with its vision-language model.

    Attributes:
        net: Both systems.
        model: Whose features the slow system reads.
        embodiment: Who acts.
        notes: Data, training, scores.
    """

    net: SlowFast
    model: Pretrained
    embodiment: EmbodimentSpec
    notes: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the folder; it appears whole or not at all."""
        meta = {
            "features": len(self.net.get_buffer("slow_mean")),
            "sizes": vars(self.net.sizes),
            "embodiment": self.embodiment.to_dict(),
            "notes": dict(self.notes),
        }
        about = {"head": "slow-fast", "parameters": sum(p.numel() for p in self.net.parameters()), **versions()}
        more = json.dumps({**about, **self.notes}, indent=1, default=str) + "\n"
        return save_companion(path, self.net, self.model, **FILES, meta=meta, more=more)

    @classmethod
    def load(cls, path: str | Path) -> SlowFastModel:
        """Load a folder that `save` wrote; errors as of `load_companion`."""

        def build(told: dict[str, Any]) -> SlowFast:
            embodiment = EmbodimentSpec.from_dict(told["embodiment"])
            return SlowFast(int(told["features"]), embodiment, Sizes(**told["sizes"]))

        net, meta, model = load_companion(path, build, **FILES, what="slow-fast pair that brachium train-latent")
        embodiment = EmbodimentSpec.from_dict(meta["embodiment"])
        return cls(net=net, model=model, embodiment=embodiment, notes=meta["notes"])

    @cached_property
    def features(self) -> Features:
        """Of the model; it remembers how instructions are spelt."""
        return Features(self.model)

    @torch.no_grad()
    def think(self, observations: Sequence[Observation]) -> np.ndarray:
        """What the slow system makes of observations: float32 (n, d)."""
        features = self.features
        views = [np.stack([o.images[name] for name in self.model.cameras]) for o in observations]
        state = torch.from_numpy(np.stack([o.state for o in observations])).float()
        tokens = torch.from_numpy(features.tokens([str(o.instruction) for o in observations]))[:, None]
        found = features(torch.from_numpy(np.stack(views)), tokens, state)[:, 0]
        return self.net.slow(found).numpy()
