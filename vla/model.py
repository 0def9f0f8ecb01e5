"""The whole model: encoder, per-embodiment input layers, head, and normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ..datasets.normalize import Normalizer
from ..datasets.statistics import Statistics
from ..errors import SpecMismatchError, StoreError, did_you_mean
from ..spec import EmbodimentSpec
from .encoder import Encoding, build_encoder
from .grounding import METRES, ROLES
from .heads.base import Context
from .recipe import Recipe, instantiate
from .tokenizer import InstructionEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VLAModel(nn.Module):
    """Images, words and proprioception to action chunks, for every embodiment it was built with.

    States and actions go in and come out in the embodiment's own units; normalisation is part of the model.

    Args:
        recipe: Backbone, head and sizes.
        embodiments: Name -> spec.
        tokenizer: Hugging Face tokenizer.
    """

    def __init__(
        self, *, recipe: Recipe, embodiments: dict[str, EmbodimentSpec], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.recipe, self.embodiments, self.tokenizer = recipe, embodiments, tokenizer
        self.instructions = InstructionEncoder(tokenizer, recipe.max_tokens)
        first = _require_alike(embodiments, recipe.points)
        self.encoder = build_encoder(
            recipe,
            vocab_size=len(tokenizer),
            pad_id=self.instructions.pad,
            cameras=len(first.cameras),
            body=tool_pose(first) if recipe.points else None,
        )
        self.state_in = nn.ModuleDict({k: nn.Linear(e.state.dim, recipe.width) for k, e in embodiments.items()})
        relative = 3 * len(ROLES) if recipe.points else 0
        self.head = instantiate(
            recipe.head,
            context_dim=recipe.words_dim + self.encoder.points_dim + relative + recipe.width,
            token_dim=0 if recipe.points else self.encoder.width,
            action_horizon=recipe.action_horizon,
            action_dims={k: e.action.dim for k, e in embodiments.items()},
        )
        self.words_in = nn.Sequential(
            nn.LayerNorm(self.encoder.width), nn.Linear(self.encoder.width, recipe.words_dim), nn.Tanh()
        )
        for name, spec in embodiments.items():
            for kind, dim in (("state", spec.state.dim), ("action", spec.action.dim)):
                self.register_buffer(f"{kind}_offset_{name}", torch.zeros(dim))
                self.register_buffer(f"{kind}_scale_{name}", torch.ones(dim))
            self.register_buffer(f"action_active_{name}", torch.ones(spec.action.dim, dtype=torch.bool))

    def set_statistics(self, embodiment: str, statistics: Statistics) -> None:
        """Set the normalisation of one embodiment from its data; missing statistics are an error.

        Action dimensions that never change in the data are not modelled: they keep their constant.
        """
        for kind, mode in (("state", self.recipe.state_normalization), ("action", self.recipe.action_normalization)):
            normalizer = Normalizer(mode=mode, statistics=statistics[kind])
            self._buffer(f"{kind}_offset", embodiment).copy_(torch.from_numpy(np.asarray(normalizer.offset)))
            self._buffer(f"{kind}_scale", embodiment).copy_(torch.from_numpy(np.asarray(normalizer.scale)))
        action = statistics["action"]
        active = np.asarray(action.max > action.min)
        if not active.any():
            raise StoreError(f"embodiment {embodiment!r}: no action ever changes in the data, nothing to learn")
        self._buffer("action_active", embodiment).copy_(torch.from_numpy(active))

    def encode(
        self,
        images: UInt8[Tensor, "b n height width 3"],
        tokens: Int[Tensor, "b l"],
        state: Float[Tensor, "b s"],
    ) -> Encoding:
        """What the head sees of images and words."""
        return self.encoder(images, tokens, state)

    def loss(
        self,
        encoding: Encoding,
        state: Float[Tensor, "b s"],
        action: Float[Tensor, "b h a"],
        action_pad: Bool[Tensor, "b h"],
        embodiment: str,
        generator: torch.Generator,
    ) -> Float[Tensor, " b"]:
        """Loss of each window; padded steps and constant dimensions do not count."""
        offset, scale = self._buffer("action_offset", embodiment), self._buffer("action_scale", embodiment)
        active = self._buffer("action_active", embodiment)
        normalised = (action - offset) / scale
        context = self._context(encoding, state, embodiment, generator)
        return self.head.loss(context, normalised, ~action_pad, active, embodiment, generator)

    def sample(
        self,
        encoding: Encoding,
        state: Float[Tensor, "b s"],
        noise: Float[Tensor, "b h a"],
        embodiment: str,
    ) -> Float[Tensor, "b h a"]:
        """Action chunks in the embodiment's units, inside its limits; the same noise gives the same chunks."""
        offset, scale = self._buffer("action_offset", embodiment), self._buffer("action_scale", embodiment)
        active = self._buffer("action_active", embodiment)
        context = self._context(encoding, state, embodiment)
        actions = self.head.sample(context, noise, active, embodiment).float() * active * scale + offset
        spec = self.embodiments[embodiment].action
        if spec.low:
            actions = torch.maximum(actions, torch.tensor(spec.low, device=actions.device))
        if spec.high:
            actions = torch.minimum(actions, torch.tensor(spec.high, device=actions.device))
        return actions

    def _context(
        self, encoding: Encoding, state: Float[Tensor, "b s"], embodiment: str, noise: torch.Generator | None = None
    ) -> Context:
        offset, scale = self._buffer("state_offset", embodiment), self._buffer("state_scale", embodiment)
        body = self.state_in[embodiment]((state - offset) / scale)
        words = self.words_in(encoding.words)
        if noise is not None and self.training:
            draw = torch.randn(words.shape, generator=noise, device=noise.device).to(words)
            words = words + self.recipe.words_noise * draw
        parts = [words, body]
        readout = self.encoder.point_readout
        if readout is not None:
            # What matters for acting is where things are from the tool, not from the base.
            per_role = encoding.points.unflatten(1, (len(ROLES), -1))
            if noise is not None and self.training:
                draw = torch.randn(per_role.shape, generator=noise, device=noise.device).to(per_role)
                spread = torch.full(per_role.shape[-1:], self.recipe.points_noise * 2.0, device=per_role.device)
                spread[-3:] = self.recipe.points_noise / METRES
                per_role = per_role + spread * draw
            tool = state[:, None, self.encoder.body[:3]] / METRES
            centred = per_role.clone()
            centred[..., -3:] = (per_role[..., -3:] * METRES - readout.centre) / METRES
            parts += [centred.flatten(1), (per_role[..., -3:] - tool).flatten(1)]
        return Context(vector=torch.cat(parts, dim=1), tokens=encoding.tokens, mask=encoding.mask)

    def _buffer(self, name: str, embodiment: str) -> Tensor:
        self.spec(embodiment)
        return self.get_buffer(f"{name}_{embodiment}")

    def spec(self, embodiment: str) -> EmbodimentSpec:
        """The embodiment of that name; SpecMismatchError where the model was not built for it."""
        if embodiment not in self.embodiments:
            raise SpecMismatchError(
                f"this model knows no embodiment {embodiment!r}. {did_you_mean(embodiment, self.embodiments)}"
            )
        return self.embodiments[embodiment]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())


def _require_alike(embodiments: Mapping[str, EmbodimentSpec], points: bool) -> EmbodimentSpec:
    """The first embodiment, after a check that one encoder can serve all."""
    if not embodiments:
        raise SpecMismatchError("a model needs at least one embodiment")
    first = next(iter(embodiments.values()))
    for name, spec in embodiments.items():
        if "." in name:
            raise SpecMismatchError(f"embodiment {name!r} names layers of the model: use no '.' in it")
        if points and (spec.camera_names, tool_pose(spec)) != (first.camera_names, tool_pose(first)):
            raise SpecMismatchError(
                f"a model that points needs embodiments of the same cameras and tool pose: {first.name!r} has "
                f"{first.camera_names} and {first.state.names}, {name!r} has {spec.camera_names} and {spec.state.names}"
            )
    return first


POSE = ("x", "y", "z", *(f"rot6d_{k}" for k in range(6)), "gripper")
"""Elements of the state that pointing looks at, as far as there are any; robots of any number of joints share them."""


def tool_pose(spec: EmbodimentSpec) -> tuple[int, ...]:
    """Where the tool's pose stands in the state: x, y, z [m], then what else of `POSE` it has."""
    names = spec.state.names
    if any(axis not in names for axis in ("x", "y", "z")):
        raise SpecMismatchError(
            f"embodiment {spec.name!r}: a model that points needs the tool position x, y, z in the state, "
            f"got {names}; set model.points=false"
        )
    return tuple(names.index(name) for name in POSE if name in names)


def stack_images(
    images: Mapping[str, np.ndarray], spec: EmbodimentSpec, device: torch.device
) -> UInt8[Tensor, "b n height width 3"]:
    """Cameras of one size, in the spec's order: uint8 (b, n, height, width, 3)."""
    arrays = [images[name] for name in spec.camera_names]
    sizes = {a.shape[-3:-1] for a in arrays}
    if len(sizes) > 1:
        raise SpecMismatchError(f"cameras of different sizes {sorted(sizes)} cannot be stacked: resize them first")
    return torch.from_numpy(np.stack(arrays, axis=1)).to(device)
