"""Policies without language: from what is seen now and what should be seen, to actions.

`GoalPolicy` is the lower half of SuSIE (Black et al. 2023): a goal-conditioned policy trained by hindsight, where any
later frame of an episode is a goal of the frames before it. With a fixed step between the frames and regression in
place of a flow it is an inverse dynamics model, the lower half of UniPi (Du et al. 2023).

The present is seen by every camera through a pretrained model's frozen vision, which has learnt where things are; a
thousand demonstrations are too few to learn to see from. Goals are as small as a generator makes them, and new to that
model, so their features are learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ...spec import EmbodimentSpec
from ..heads.base import Context, HeadInputs
from ..recipe import instantiate
from .augment import degrade
from .frames import to_unit

STILL = 1e-4
"""Standard deviation below which an action's dimension is held at its mean."""


class ViewPair(nn.Module):
    """One camera's present and goal image to features.

    Keypoints (spatial softmax, Levine et al. 2016), and what is seen at some of them.

    Args:
        vision: Width of the present's patches.
        grid: Patches a side.
        size: Side of the goal image [pixels].
        goals: Whether there are goal images of this camera.
        width: Channels.
        keypoints: Number of keypoints; at every eighth the features are read too.
    """

    def __init__(self, *, vision: int, grid: int, size: int, goals: bool, width: int, keypoints: int) -> None:
        super().__init__()
        self.grid, self.read = grid, max(1, keypoints // 8)
        self.now = nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, width))
        self.goal: nn.Module | None = None
        if goals:
            layers: list[nn.Module] = [nn.Conv2d(3, width // 2, 5, stride=2, padding=2), nn.SiLU()]
            stride = 2 if size > 2 * grid else 1
            self.goal = nn.Sequential(*layers, nn.Conv2d(width // 2, width, 3, stride, 1), nn.GroupNorm(4, width))
        self.both = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(2 * width if goals else width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
        )
        self.points, self.seen = nn.Conv2d(width, keypoints, 1), nn.Conv2d(width, width, 1)
        self.features = 2 * keypoints + self.read * width

    def forward(
        self, now: Float[Tensor, "b p v"], goal: Float[Tensor, "b 3 small small"] | None
    ) -> Float[Tensor, "b f"]:
        """Features of a pair, or of the present alone."""
        both = [self.now(now).transpose(1, 2).unflatten(2, (self.grid, self.grid))]
        if self.goal is not None and goal is not None:
            wanted = self.goal(goal)
            if wanted.shape[-1] != self.grid:
                wanted = F.interpolate(wanted, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
            both.append(wanted)
        joined = self.both(torch.cat(both, dim=1))
        weights = self.points(joined).float().flatten(2).softmax(-1)
        places = torch.linspace(-1.0, 1.0, self.grid, device=now.device)
        spread = weights.unflatten(2, (self.grid, self.grid))
        u, v = (spread.sum(2) * places).sum(-1), (spread.sum(3) * places).sum(-1)
        read = weights[:, : self.read] @ self.seen(joined).float().flatten(2).transpose(1, 2)
        return torch.cat([u, v, read.flatten(1)], dim=1)


class GoalPolicy(nn.Module):
    """Images, proprioception and goal images to action chunks.

    States and actions go in and come out in the embodiment's own units.

    Args:
        embodiment: Who acts; all its cameras are looked at.
        vision: Width of the patches that the present comes in.
        grid: Patches a side of an image.
        goal_size: Side of goal images [pixels].
        goals: Cameras of which there are goal images, n of them.
        head: Action head: class and arguments, as in a recipe.
        action_horizon: Steps h of a chunk.
        width: Channels and, times four, width of the features.
        keypoints: Keypoints a camera.
    """

    def __init__(
        self,
        *,
        embodiment: EmbodimentSpec,
        vision: int,
        grid: int,
        goal_size: int,
        goals: Sequence[str],
        head: Mapping[str, Any],
        action_horizon: int = 4,
        width: int = 64,
        keypoints: int = 32,
    ) -> None:
        super().__init__()
        self.embodiment, self.goal_size, self.action_horizon = embodiment, goal_size, action_horizon
        self.goals = tuple(goals)
        for name in self.goals:
            embodiment.camera(name)
        views = [
            ViewPair(
                vision=vision, grid=grid, size=goal_size, goals=name in self.goals, width=width, keypoints=keypoints
            )
            for name in embodiment.camera_names
        ]
        self.views = nn.ModuleList(views)
        state, action, wide = embodiment.state.dim, embodiment.action.dim, 4 * width
        features = sum(view.features for view in views)
        self.join = nn.Sequential(
            *(nn.Linear(features + state, wide), nn.LayerNorm(wide), nn.SiLU()),
            *(nn.Linear(wide, wide), nn.LayerNorm(wide), nn.SiLU()),
        )
        inputs = HeadInputs(context_dim=wide, action_horizon=action_horizon, action_dims={embodiment.name: action})
        self.head = instantiate(head, inputs=inputs)
        for name, dim in (("state", state), ("action", action)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_scale", torch.ones(dim))
        self.register_buffer("active", torch.ones(action, dtype=torch.bool))

    def fit(self, state: Float[Tensor, "n s"], action: Float[Tensor, "n a"]) -> None:
        """Take the scales of states and actions from data; what never changes is held at its mean."""
        for name, values in (("state", state), ("action", action)):
            mean, deviation = values.double().mean(0), values.double().std(0)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_scale").copy_(torch.where(deviation > STILL, deviation, 1.0))
            if name == "action":
                self.get_buffer("active").copy_(deviation > STILL)

    def context(
        self,
        now: Float[Tensor, "b c p v"],
        goal: Float[Tensor, "b n 3 small small"],
        state: Float[Tensor, "b s"],
    ) -> Context:
        """What the head is told; `now` in patches, goal images from -1 to 1, `state` scaled."""
        place = {name: k for k, name in enumerate(self.goals)}
        pairs = [goal[:, place[name]] if name in place else None for name in self.embodiment.camera_names]
        seen = [view(now[:, k], pairs[k]) for k, view in enumerate(self.views)]
        return Context(vector=self.join(torch.cat([*seen, state], dim=1)).float())

    def loss(
        self,
        patches: Float[Tensor, "b c p v"],
        goal: UInt8[Tensor, "b n small small 3"],
        state: Float[Tensor, "b s"],
        actions: Float[Tensor, "b h a"],
        real: Bool[Tensor, "b h"],
        generator: torch.Generator,
        *,
        augment: float = 1.0,
        goal_augment: float = 1.0,
    ) -> Float[Tensor, " b"]:
        """The head's loss, with noise on the state and goals as a generator might have made them."""
        scaled = (state - self.get_buffer("state_mean")) / self.get_buffer("state_scale")
        if augment > 0.0:
            scaled = scaled + 0.02 * augment * torch.randn(scaled.shape, generator=generator).to(scaled)
        wanted = degrade(to_unit(goal), generator, goal_augment)
        target = (actions - self.get_buffer("action_mean")) / self.get_buffer("action_scale")
        context = self.context(patches, wanted, scaled)
        return self.head.loss(context, target, real, self.get_buffer("active"), self.embodiment.name, generator)

    @torch.no_grad()
    def predict(
        self,
        patches: Float[Tensor, "b c p v"],
        goal: UInt8[Tensor, "b n small small 3"],
        state: Float[Tensor, "b s"],
        noise: Float[Tensor, "b h a"],
    ) -> Float[Tensor, "b h a"]:
        """Chunks, in the embodiment's units and limits; the same noise gives the same chunk."""
        scaled = (state - self.get_buffer("state_mean")) / self.get_buffer("state_scale")
        context = self.context(patches, to_unit(goal), scaled)
        found = self.head.sample(context, noise, self.get_buffer("active"), self.embodiment.name).float()
        found = found * self.get_buffer("action_scale") + self.get_buffer("action_mean")
        spec = self.embodiment.action
        if spec.low and spec.high:
            found = torch.clamp(
                found, *(torch.from_numpy(np.array(v, np.float32)).to(found) for v in (spec.low, spec.high))
            )
        return found
