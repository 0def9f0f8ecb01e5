"""Flow matching by an action expert that attends, layer by layer, to what the language model attended to.

The expert is a narrower transformer beside the language model. In a *joint* layer its tokens attend to the language
model's keys and values of the same layer and to each other, as if both were one sequence (pi0, Black et al. 2024); as
nothing before ever looks at the expert's tokens, the language model runs once for any number of calls. In a *cross*
layer they attend to those keys and values alone, through projections of their own (SmolVLA, Shukor et al. 2025). Time
enters with the actions, or modulates every norm (adaRMS, pi0.5, Black et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, did_you_mean
from ..attention import LayerShape, Turn, additive, attend, block_mask
from ..fused import ACTIVATIONS, linear
from .base import Context, HeadInputs
from .expert_steps import ExpertSteps, StepPlan
from .flow import FlowMatching, row_time, time_features

TIMES = ("fused", "modulated")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the field needs of a context at every call, computed once.

    Attributes:
        keys, values: What each layer of the expert looks at; a cross layer's are projected already.
        state: The state's token, or none.
        joint, cross: Who sees whom, made additive.
        behind, alone: Turn queries to positions after the prefix, and to positions from 0; None without rotary.
    """

    keys: tuple[Float[Tensor, "b g p c"], ...]
    values: tuple[Float[Tensor, "b g p c"], ...]
    state: Float[Tensor, "b k w"]
    joint: Float[Tensor, "b q m"]
    cross: Float[Tensor, "b q p"]
    behind: Turn | None
    alone: Turn | None


class ExpertHead(FlowMatching):
    """Flow matching by an action expert.

    Args:
        inputs: What the head is built for; the backbone must give keys and values.
        width: Width of the expert.
        mlp: Width of its gated feed-forward layers.
        heads: Query heads; None for as many as the language model has.
        every: The expert has a layer for every so many layers of the language model.
        joint_every: Of the layers that it has, number 0, `joint_every`, ... are joint, the others
            cross; 1 for all joint (pi0), 2 to alternate (SmolVLA).
        time: ``fused`` with the actions, or ``modulated`` (adaRMS).
        state_token: Whether the context's vector stands before the actions as a token, in a block of its own (pi0).
        two_way: Whether actions see later ones (pi0), or are causal (SmolVLA).
        norm_offset: What norms add to their weights: 1 in Gemma's, 0 in Llama's.
        activation: Of the feed-forward layers: ``gelu_tanh`` or ``silu``.
        eps: Of the norms.
        steps, solver, draws, time_alpha, max_delay, fills: See `FlowMatching`.
    """

    reads = "keys"

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        width: int = 256,
        mlp: int = 1024,
        heads: int | None = None,
        every: int = 1,
        joint_every: int = 1,
        time: str = "fused",
        state_token: bool = True,
        two_way: bool = True,
        norm_offset: float = 1.0,
        activation: str = "gelu_tanh",
        eps: float = 1e-6,
        steps: int = 10,
        solver: str = "euler",
        draws: int = 1,
        time_alpha: float = 1.5,
        max_delay: int = 0,
        fills: bool = False,
    ) -> None:
        super().__init__(
            steps=steps, solver=solver, draws=draws, time_alpha=time_alpha, max_delay=max_delay, fills=fills
        )
        shape = inputs.require_prefix("expert")
        if time not in TIMES:
            raise ConfigError(f"unknown time {time!r}. {did_you_mean(time, TIMES)}")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {activation!r}. {did_you_mean(activation, ACTIVATIONS)}")
        heads = heads or shape.heads
        if heads % shape.groups or min(every, joint_every) < 1 or width % 2:
            raise ConfigError(
                f"expert: expected heads as a multiple of the {shape.groups} key heads, every and joint_every from 1 "
                f"and an even width, got heads={heads}, every={every}, joint_every={joint_every}, width={width}"
            )
        if state_token and not inputs.context_dim:
            raise ConfigError("expert: state_token=true needs model.state=vector, for there is no state otherwise")
        self.width, self.every, self.two_way, self.modulated = width, every, two_way, time == "modulated"
        self.horizon = inputs.action_horizon
        self.plans: dict[str, StepPlan] = {}  # of who accelerates: its weights stay as they are
        self.layers = nn.ModuleList(
            [
                ExpertLayer(
                    shape,
                    width,
                    mlp,
                    heads,
                    cross=number % joint_every != 0,
                    modulated=self.modulated,
                    offset=norm_offset,
                    activation=activation,
                    eps=eps,
                )
                for number in range(-(-shape.count // every))
            ]
        )
        self.norm = Norm(width, eps, norm_offset, self.modulated)
        self.state_in: nn.Module | None = None
        if state_token:  # a vector of the right width is the token (pi0's state encoder is the model's own)
            same = inputs.context_dim == width
            self.state_in = nn.Identity() if same else nn.Linear(inputs.context_dim, width)
        self.action_in = nn.ModuleDict({k: nn.Linear(a, width) for k, a in inputs.action_dims.items()})
        self.action_out = nn.ModuleDict({k: nn.Linear(width, a) for k, a in inputs.action_dims.items()})
        self.time_in = nn.Linear(width if self.modulated else 2 * width, width)
        self.time_out = nn.Linear(width, width)
        # Where positions are not in the keys the actions must learn their own.
        self.order = None if shape.rotary else nn.Parameter(torch.randn(inputs.action_horizon, width) * 0.02)

    def prepare(self, context: Context, draws: int) -> Prepared:
        """Repeat what was read for every draw."""
        if context.backbone is None or context.prefix is None or not context.prefix.keys:
            raise ConfigError("expert: expected the keys and values of a backbone, got none")
        rotary, prefix = context.backbone.rotary, context.prefix
        taken = [prefix.keys[:: self.every], prefix.values[:: self.every]]
        pairs = [layer.look(k, v) for layer, k, v in zip(self.layers, *taken)]
        prefix = replace(prefix, keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))
        prefix = prefix.repeat(draws) if draws > 1 else prefix
        b, device = len(prefix.mask), prefix.mask.device
        state = context.vector.new_zeros(b, 0, self.width)
        if self.state_in is not None:
            state = self.state_in(context.vector)[:, None].repeat_interleave(draws, 0)
        count, h = state.shape[1], self.horizon
        steps = torch.arange(h, device=device) * (not self.two_way)
        own = torch.cat([torch.full((count,), -1, device=device), steps]).expand(b, -1)
        known = torch.cat([torch.full_like(prefix.mask, -2, dtype=torch.long), own], dim=1)
        real = torch.cat([prefix.mask, prefix.mask.new_ones(own.shape)], dim=1)
        after = torch.arange(count + h, device=device).expand(b, -1)
        return Prepared(
            keys=prefix.keys,
            values=prefix.values,
            state=state,
            joint=additive(block_mask(own, known, real), prefix.states.dtype),
            cross=additive(prefix.mask[:, None].expand(-1, count + h, -1), prefix.states.dtype),
            behind=None if rotary is None else rotary.at(prefix.next[:, None] + after),
            alone=None if rotary is None else rotary.at(after),  # a cross layer's queries count from 0
        )

    def velocity(
        self,
        prepared: Prepared,
        x: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        embodiment: str,
        given: Bool[Tensor, "b h"] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t`; the time of rows that are given is that of data."""
        states = prepared.state.shape[1]
        hidden, condition = self._enter(x, t, embodiment, given)
        if condition is not None and given is not None and states:  # the state's token has the time of rows not given
            own = self.condition(time_features(t, self.width)[:, None]).expand(-1, states, -1)
            condition = torch.cat([own, condition], dim=1)
        hidden = torch.cat([prepared.state.to(hidden.dtype), hidden], dim=1)
        for layer, key, value in zip(self.layers, prepared.keys, prepared.values):
            seen, turn = (prepared.cross, prepared.alone) if layer.cross else (prepared.joint, prepared.behind)
            hidden = layer(hidden, condition, key, value, seen, turn)
        last, _ = self.norm(hidden[:, states:], None if condition is None else condition[:, -x.shape[1] :])
        return self.action_out[embodiment](last.to(self.action_out[embodiment].weight.dtype))

    def _enter(
        self,
        x: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        embodiment: str,
        given: Bool[Tensor, "b h"] | None,
    ) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b n w"] | None]:
        """Tokens of the noisy actions, and what modulates the norms: one condition for all, or one a row."""
        actions = self.action_in[embodiment](x)
        if self.order is not None:
            actions = actions + self.order
        time = row_time(time_features(t, self.width), given, x.shape[1])
        if self.modulated:
            return actions, self.condition(time)
        both = torch.cat([actions, time.expand_as(actions).to(actions.dtype)], dim=2)
        return self.time_out(F.silu(self.time_in(both))), None

    def steps_of(self, context: Context, embodiment: str) -> ExpertSteps:
        """The same field for sampling, all that does not change from step to step computed before the first."""
        return ExpertSteps(self.plan_of(embodiment), self.prepare(context, 1))

    def plan_of(self, embodiment: str) -> StepPlan:
        """What the steps of every chunk share; anew for every chunk, as weights may change in between."""
        return self.plans.get(embodiment) or StepPlan(self, embodiment)

    def condition(self, time: Float[Tensor, "b n w"]) -> Float[Tensor, "b k w"]:
        """What modulates the norms, of a time's features."""
        return F.silu(self.time_out(F.silu(self.time_in(time))))


class ExpertLayer(nn.Module):
    """One transformer layer of the expert; the names are those of `transformers`' Gemma and Llama layers.

    Args:
        shape: Of the language model's layers.
        width, mlp, heads, offset, activation, eps, modulated: See `ExpertHead`.
        cross: Attend to the language model alone, through projections of its keys and values.
    """

    def __init__(
        self,
        shape: LayerShape,
        width: int,
        mlp: int,
        heads: int,
        *,
        cross: bool,
        modulated: bool,
        offset: float,
        activation: str,
        eps: float,
    ) -> None:
        super().__init__()
        self.cross, self.heads, self.groups = cross, heads, shape.groups
        c, keys = shape.head_dim, shape.groups * shape.head_dim
        self.input_layernorm = Norm(width, eps, offset, modulated)
        self.q_proj = nn.Linear(width, heads * c, bias=False)
        self.k_proj = nn.Linear(keys if cross else width, keys, bias=False)
        self.v_proj = nn.Linear(keys if cross else width, keys, bias=False)
        self.o_proj = nn.Linear(heads * c, width, bias=False)
        self.post_attention_layernorm = Norm(width, eps, offset, modulated)
        self.gate_proj = nn.Linear(width, mlp, bias=False)
        self.up_proj = nn.Linear(width, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, width, bias=False)
        self.activation = activation

    def look(
        self, key: Float[Tensor, "b g p c"], value: Float[Tensor, "b g p c"]
    ) -> tuple[Float[Tensor, "b g p c"], Float[Tensor, "b g p c"]]:
        """What the layer makes of the language model's keys and values: the same, or projections (cross)."""
        if not self.cross:
            return key, value
        return (
            _split(self.k_proj(key.transpose(1, 2).flatten(2)), self.groups),
            _split(self.v_proj(value.transpose(1, 2).flatten(2)), self.groups),
        )

    def forward(
        self,
        x: Float[Tensor, "b q w"],
        condition: Float[Tensor, "b n w"] | None,
        key: Float[Tensor, "b g p c"],
        value: Float[Tensor, "b g p c"],
        seen: Float[Tensor, "b q k"],
        turn: Turn | None,
    ) -> Float[Tensor, "b q w"]:
        """Attend to what `look` made of keys and values (in a joint layer also to each other), then feed forward."""
        inner, gate = self.input_layernorm(x, condition)
        query = _split(self.q_proj(inner), self.heads)
        if turn is not None:
            query = turn(query)
        if not self.cross:
            own = _split(self.k_proj(inner), self.groups)
            key = torch.cat([key, own if turn is None else turn(own)], dim=2)
            value = torch.cat([value, _split(self.v_proj(inner), self.groups)], dim=2)
        x = _add(x, self.o_proj, attend(query, key, value, seen), gate)
        inner, gate = self.post_attention_layernorm(x, condition)
        opened = linear(inner, self.gate_proj, activation=self.activation)
        return _add(x, self.down_proj, linear(inner, self.up_proj, times=opened), gate)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019), in float32; modulated, a condition gives scale, shift and a gate (adaRMS).

    Args:
        width: Of the input.
        eps: Added to the mean square.
        offset: Added to the weight.
        modulated: Whether a condition of the same width takes the weight's place; its layer starts at zero.
    """

    def __init__(self, width: int, eps: float, offset: float, modulated: bool) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        if modulated:
            self.dense = nn.Linear(width, 3 * width)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)
        else:
            self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(
        self, x: Float[Tensor, "b q w"], condition: Float[Tensor, "b n w"] | None
    ) -> tuple[Float[Tensor, "b q w"], Float[Tensor, "b n w"] | None]:
        """The normalised input, and the gate of the residual (None without a condition)."""
        exact = x.float()
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        if condition is None:
            return (normed * (self.offset + self.weight.float())).to(x.dtype), None
        scale, shift, gate = self.dense(condition).chunk(3, dim=-1)
        return (normed * (1.0 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


def _split(x: Float[Tensor, "b q gc"], groups: int) -> Float[Tensor, "b g q c"]:
    return x.unflatten(2, (groups, -1)).transpose(1, 2)


def _add(x: Tensor, layer: nn.Module, y: Tensor, gate: Tensor | None) -> Tensor:
    """The residual: ``x`` plus the layer of ``y``, as far as its gate is open."""
    return linear(y, layer, plus=x) if gate is None else x + layer(y) * gate
