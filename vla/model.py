"""The whole model: encoder, per-embodiment input layers, head, and normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..datasets.normalize import Normalizer
from ..datasets.statistics import Statistics
from ..errors import ConfigError, SpecMismatchError, StoreError, did_you_mean
from ..spec import EmbodimentSpec, Guidance
from .backbones.resize import Images
from .draws import RandomSource, normal
from .encoder import Encoding, build_encoder
from .grounding import METRES, ROLES
from .heads.base import Context, HeadInputs
from .heads.flow import FlowMatching
from .heads.solvers import Guide
from .parts import part
from .recipe import Recipe, instantiate
from .relative import shared_elements
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
        self.instructions = InstructionEncoder(
            tokenizer, recipe.max_tokens, recipe.prompt, recipe.special_tokens, recipe.clean
        )
        first = _require_alike(embodiments, recipe)
        self.encoder = build_encoder(
            recipe,
            vocab_size=len(tokenizer),
            pad_id=self.instructions.pad,
            cameras=len(first.cameras),
            body=tool_pose(first) if recipe.points else None,
        )
        wide = self.encoder.width
        self.state_in = nn.ModuleDict()
        if recipe.state != "prompt":
            into = wide if recipe.state == "prefix" else recipe.width
            self.state_in.update(
                {k: nn.Linear(self._padded(e.state.dim, "state"), into) for k, e in embodiments.items()}
            )
        self.soft_prompts = nn.ParameterDict()
        if recipe.soft_prompts:
            self.soft_prompts.update(
                {k: nn.Parameter(torch.randn(recipe.soft_prompts, wide) * 0.02) for k in embodiments}
            )
        inputs = self._head_inputs()
        self.head = instantiate(recipe.head, inputs=inputs)
        if self.max_delay >= recipe.action_horizon:
            raise ConfigError(
                f"model.head.max_delay={self.max_delay}: expected less than the chunk's {recipe.action_horizon} steps, "
                "or nothing would be left to learn"
            )
        self.speech = None if recipe.speech is None else instantiate(recipe.speech, inputs=inputs)
        self.check_insulation()
        self.words_in: nn.Module | None = None
        self.around_in: nn.Module | None = None
        if recipe.points:
            self.words_in = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, recipe.words_dim), nn.Tanh())
        if recipe.surround:
            seen = self.encoder.backbone.vision_width
            self.around_in = Surround(seen, len(ROLES) * len(first.cameras) * 9, recipe.surround)
        for name, spec in embodiments.items():
            for kind, dim in (("state", spec.state.dim), ("action", spec.action.dim)):
                self.register_buffer(f"{kind}_offset_{name}", torch.zeros(dim))
                self.register_buffer(f"{kind}_scale_{name}", torch.ones(dim))
            self.register_buffer(f"action_active_{name}", torch.ones(spec.action.dim, dtype=torch.bool))
            act, seen = shared_elements(spec, recipe.relative)
            limits = [
                spec.action.low or [-torch.inf] * spec.action.dim,
                spec.action.high or [torch.inf] * spec.action.dim,
            ]
            for key, value in (
                ("action_low", torch.tensor(limits[0], dtype=torch.float32)),
                ("action_high", torch.tensor(limits[1], dtype=torch.float32)),
                ("relative_action", torch.tensor(act, dtype=torch.long)),
                ("relative_state", torch.tensor(seen, dtype=torch.long)),
            ):  # on the device beforehand: a chunk that is captured as a graph cannot copy from the host
                self.register_buffer(f"{key}_{name}", value, persistent=False)

    def check_insulation(self) -> None:
        """Raise ConfigError for a head that cannot be insulated: one that goes on reading by the backbone's layers."""
        if self.recipe.insulate and getattr(self.head, "goes_on", False):
            raise ConfigError(
                f"{type(self.head).__name__} goes on reading with the backbone's own layers, so its gradient reaches "
                "them: insulate=true needs a head beside the language model (flow, dit, pi0, pi05, smolvla ...)"
            )

    def _head_inputs(self) -> HeadInputs:
        recipe, backbone = self.recipe, self.encoder.backbone
        fixed = recipe.width if recipe.state == "vector" else 0
        dims = {k: self._padded(e.action.dim, "action") for k, e in self.embodiments.items()}
        common: dict[str, Any] = {"action_horizon": recipe.action_horizon, "action_dims": dims}
        if recipe.points:
            pointed = self.encoder.points_dim + 3 * len(ROLES) + recipe.surround
            return HeadInputs(context_dim=fixed + recipe.words_dim + pointed, **common)
        return HeadInputs(
            context_dim=fixed,
            token_dim=self.encoder.width,
            layers=backbone.layers,
            vocabulary=backbone.vocabulary,
            **common,
        )

    def _padded(self, dim: int, kind: str) -> int:
        pad = self.recipe.state_pad if kind == "state" else self.recipe.action_pad
        return max(pad, dim)

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

    @property
    def reads(self) -> frozenset[str]:
        """What of the backbone its heads need: ``states``, ``keys`` (and values, of every layer), both or neither."""
        return frozenset().union(*(READS[head.reads] for head in (self.head, self.speech) if head is not None))

    def tokens(
        self,
        instructions: Iterable[str],
        state: Float[Tensor, "b s"],
        embodiment: str,
        *,
        multiple: int | None = None,
    ) -> Int[Tensor, "b l"]:
        """The prompts as token ids, on the model's device; `state` is in the embodiment's units.

        All prompts have the recipe's length, or with `multiple` the least multiple of it that the longest needs.
        """
        told = None
        if self.recipe.state == "prompt":
            told = self._normalised("state", state, embodiment).detach().cpu().numpy()
        found = self.instructions(instructions, told)
        if multiple is not None:
            longest = found.shape[1] - int((found != self.instructions.pad).any(0).argmax())  # padded on the left
            found = found[:, -min(found.shape[1], -(-longest // multiple) * multiple) :]
        return torch.from_numpy(found).to(self.device)

    def encode(
        self,
        images: Images,
        tokens: Int[Tensor, "b l"],
        state: Float[Tensor, "b s"],
        embodiment: str,
        *,
        image_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Encoding:
        """What the head sees of images, words and, where the backbone reads it, the state.

        Args:
            images, tokens, state: Of the observations; `tokens` come from the method of that name.
            embodiment: Whose they are.
            image_mask: False at cameras that are not there.
        """
        if self.recipe.points:
            with part("encoder"):
                return self.encoder(images, tokens, state)
        extra = []
        if embodiment in self.soft_prompts:
            extra.append(self.soft_prompts[embodiment].expand(len(tokens), -1, -1))
        if self.recipe.state == "prefix":
            extra.append(self._body(state, embodiment)[:, None])
        with part("encoder"):
            return self.encoder(
                images,
                tokens,
                state,
                image_mask=image_mask,
                extra=torch.cat(extra, dim=1) if extra else None,
                keep="keys" in self.reads,
                states="states" in self.reads,
            )

    def loss(
        self,
        encoding: Encoding,
        state: Float[Tensor, "b s"],
        action: Float[Tensor, "b h a"],
        action_pad: Bool[Tensor, "b h"],
        embodiment: str,
        generator: RandomSource,
        executed: Float[Tensor, "b h a"] | None = None,
    ) -> Float[Tensor, " b"]:
        """Loss of each window; padded steps and constant dimensions do not count.

        `executed` is what the robot did where it was disturbed and `action` says what would have been right; heads
        with a `max_delay` go on from it.
        """
        normalised, active = self.normalised_action(action, embodiment, state)
        context = self.context(encoding, state, embodiment, generator)
        seen = context.detach() if self.recipe.insulate else context
        more = {}
        if executed is not None and self.max_delay:
            more["executed"] = self.normalised_action(executed, embodiment, state)[0]
        with part("head"):
            each = self.head.loss(seen, normalised, ~action_pad, active, embodiment, generator, **more)
        if self.speech is not None:
            said = self.speech.loss(context, normalised, ~action_pad, active, embodiment, generator)
            each = each + self.recipe.speech_weight * said
        return each

    def sample(
        self,
        encoding: Encoding,
        state: Float[Tensor, "b s"],
        noise: Float[Tensor, "b h n"],
        embodiment: str,
        guidance: Guidance | None = None,
    ) -> Float[Tensor, "b h a"]:
        """Action chunks in the embodiment's units, inside its limits; the same noise gives the same chunks.

        The last axis of `noise` is `noise_dim`. With `guidance`, (b, h, a) in the embodiment's units, they agree with
        the plan that is being executed.

        Raises:
            ConfigError: Guidance for a head that takes none.
        """
        guide = None if guidance is None else self.guide(guidance, embodiment, state)
        return self.chunk(encoding, state, noise, embodiment, guide)

    def chunk(
        self,
        encoding: Encoding,
        state: Float[Tensor, "b s"],
        noise: Float[Tensor, "b h n"],
        embodiment: str,
        guide: Guide | None = None,
    ) -> Float[Tensor, "b h a"]:
        """What `sample` does, of tensors on the model's device alone."""
        offset, scale = self._buffer("action_offset", embodiment), self._buffer("action_scale", embodiment)
        spec, active = self.embodiments[embodiment].action, self._buffer("action_active", embodiment)
        context = self.context(encoding, state, embodiment)
        more = {} if guide is None else {"guide": guide}
        with part("head"):
            found = self.head.sample(context, noise, _widen(active, noise.shape[-1]), embodiment, **more).float()
        actions = found[..., : spec.dim] * active * scale + offset + self.origin(state, embodiment)
        return actions.clamp(self._buffer("action_low", embodiment), self._buffer("action_high", embodiment))

    @property
    def max_delay(self) -> int:
        """Most first steps of a chunk that may be given in sampling because the head was trained so; 0 for none."""
        return getattr(self.head, "max_delay", 0)

    @property
    def takes_guidance(self) -> bool:
        """Whether chunks can be led to agree with a plan (real-time chunking)."""
        return isinstance(self.head, FlowMatching)

    def guide(self, guidance: Guidance, embodiment: str, state: Float[Tensor, "b s"]) -> Guide:
        """Guidance of normalised actions."""
        if not self.takes_guidance:
            raise ConfigError(
                f"{type(self.head).__name__} cannot be guided: real-time chunking needs a flow-matching head (flow, "
                "dit, pi0, pi05, smolvla ...). Type: executor=ensemble or executor=receding"
            )
        actions = torch.from_numpy(np.asarray(guidance.actions, np.float32)).to(self.device)
        target, _ = self.normalised_action(actions, embodiment, state)
        weight = torch.from_numpy(np.asarray(guidance.weights, np.float32)).to(self.device)
        return Guide(target=target, weight=weight, limit=guidance.limit, gradient=guidance.gradient)

    def noise_dim(self, embodiment: str) -> int:
        """Dimensions of the noise that `sample` takes: the action's, or what it is padded to."""
        return self._padded(self.spec(embodiment).action.dim, "action")

    def normalised_action(
        self, action: Float[Tensor, "b h a"], embodiment: str, state: Float[Tensor, "b s"]
    ) -> tuple[Float[Tensor, "b h n"], Bool[Tensor, " n"]]:
        """Actions as heads see them, padded, and which dimensions count; `state` is what the chunks begin in."""
        active, wide = self._buffer("action_active", embodiment), self.noise_dim(embodiment)
        action = action - self.origin(state, embodiment)
        return _widen(self._normalised("action", action, embodiment), wide), _widen(active, wide)

    def origin(self, state: Float[Tensor, "b s"], embodiment: str) -> Float[Tensor, "b 1 a"]:
        """What chunks that begin in `state` are relative to: zero but for the recipe's `relative` elements."""
        origin = state.new_zeros(len(state), 1, self.spec(embodiment).action.dim)
        if self.recipe.relative:
            seen = state[:, self._buffer("relative_state", embodiment)]
            origin.index_copy_(2, self._buffer("relative_action", embodiment), seen[:, None])
        return origin

    def _normalised(self, kind: str, value: Tensor, embodiment: str) -> Tensor:
        return (value - self._buffer(f"{kind}_offset", embodiment)) / self._buffer(f"{kind}_scale", embodiment)

    def _body(self, state: Float[Tensor, "b s"], embodiment: str) -> Float[Tensor, "b w"]:
        normalised = self._normalised("state", state, embodiment)
        return self.state_in[embodiment](_widen(normalised, self._padded(state.shape[-1], "state")))

    def context(
        self, encoding: Encoding, state: Float[Tensor, "b s"], embodiment: str, noise: RandomSource | None = None
    ) -> Context:
        """What the head conditions on; with `noise`, in training, what is pointed at is blurred."""
        self.spec(embodiment)
        parts = [self._body(state, embodiment)] if self.recipe.state == "vector" else [state[:, :0]]
        if self.words_in is None:
            backbone: Any = self.encoder.backbone
            return Context(vector=torch.cat(parts, dim=1), prefix=encoding.prefix, backbone=backbone)
        words = self.words_in(encoding.words)
        if noise is not None and self.training:
            draw = normal(noise, tuple(words.shape)).to(words)
            words = words + self.recipe.words_noise * draw
        parts.insert(0, words)
        readout = self.encoder.point_readout
        if readout is not None:
            # What matters for acting is where things are from the tool, not from the base.
            per_role = encoding.points.unflatten(1, (len(ROLES), -1))
            if noise is not None and self.training:
                draw = normal(noise, tuple(per_role.shape)).to(per_role)
                spread = torch.full(per_role.shape[-1:], self.recipe.points_noise * 2.0, device=per_role.device)
                spread[-3:] = self.recipe.points_noise / METRES
                per_role = per_role + spread * draw
            tool = state[:, None, self.encoder.body[:3]] / METRES
            centred = per_role.clone()
            centred[..., -3:] = (per_role[..., -3:] * METRES - readout.centre) / METRES
            parts += [centred.flatten(1), (per_role[..., -3:] - tool).flatten(1)]
        if self.around_in is not None and encoding.around is not None:
            around = self.around_in(encoding.around.float())
            if noise is not None and self.training:
                draw = normal(noise, tuple(around.shape)).to(around)
                around = around + self.recipe.surround_noise * draw
            parts.append(around)
        return Context(vector=torch.cat(parts, dim=1))

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


class Surround(nn.Module):
    """What is seen around points, in a few values from -1 to 1.

    Args:
        width: Of the vision features.
        patches: Of all points and cameras together.
        values: Number of values.
        each: Values that every patch is summed up in, by the same layer.
    """

    def __init__(self, width: int, patches: int, values: int, each: int = 16) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, each), nn.GELU())
        self.all = nn.Sequential(nn.Linear(patches * each, values), nn.Tanh())

    def forward(self, around: Float[Tensor, "b a"]) -> Float[Tensor, "b c"]:
        """Sum up patches in one row."""
        return self.all(self.patch(around.unflatten(1, (-1, self.width))).flatten(1))


READS = {"nothing": (), "states": ("states",), "keys": ("keys",), "layers": ("states", "keys")}
"""What of a prefix a head needs, by its word for it (`ActionHead.reads`)."""


def _widen(x: Tensor, dim: int) -> Tensor:
    """The last axis padded with zeros (False) to `dim`."""
    return nn.functional.pad(x, (0, dim - x.shape[-1]))


def _require_alike(embodiments: Mapping[str, EmbodimentSpec], recipe: Recipe) -> EmbodimentSpec:
    """The first embodiment, after a check that one model can serve all."""
    if not embodiments:
        raise SpecMismatchError("a model needs at least one embodiment")
    first = next(iter(embodiments.values()))
    for name, spec in embodiments.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(nn.ModuleDict, name):
            raise SpecMismatchError(
                f"embodiment {name!r} names layers and files of the model: use letters, digits, '_' and '-', no '.', "
                "and no word that means something to torch (type, keys, items ...)"
            )
        for feature, pad in ((spec.state, recipe.state_pad), (spec.action, recipe.action_pad)):
            if pad and feature.dim > pad:
                raise SpecMismatchError(
                    f"embodiment {name!r}: {feature.name} has {feature.dim} dimensions, but the model pads to {pad}: "
                    f"set model.{feature.name}_pad to at least {feature.dim}, or to 0"
                )
        if recipe.points and len({c.shape[:2] for c in spec.cameras}) > 1:
            raise SpecMismatchError(
                f"a model that points needs cameras of one size, embodiment {name!r} has "
                f"{[c.shape[:2] for c in spec.cameras]}: set model.points=false, or record at one size"
            )
        if recipe.points and (spec.camera_names, tool_pose(spec)) != (first.camera_names, tool_pose(first)):
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


def stack_images(images: Mapping[str, np.ndarray], spec: EmbodimentSpec, device: torch.device) -> Images:
    """Cameras in the spec's order: uint8 (b, n, height, width, 3), or a tuple, one each, where their sizes differ."""
    arrays = [images[name] for name in spec.camera_names]
    if len({a.shape[-3:-1] for a in arrays}) > 1:
        return tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
    return torch.from_numpy(np.stack(arrays, axis=1)).to(device)
