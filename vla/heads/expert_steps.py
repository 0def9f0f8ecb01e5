"""Sampling with an action expert: what does not change from step to step is computed before the first.

A chunk takes ten calls of the field, each of them a small network on few tokens, so that the time goes into the number
of operations rather than into arithmetic. Here queries, keys and values are one product, so are gate and feed-forward,
the actions' two linear layers are folded into one, what time adds is looked up, and masks, turns and norms are as the
kernels want them. The numbers are those of `ExpertHead.velocity` to the last digits; a test holds the two together.

What a step computes (`step`) is a function of tensors alone, so that it may be compiled once for all chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..attention import turned_by
from ..fused import ACTIVATIONS, joined_weight
from .flow import time_features

if TYPE_CHECKING:
    from .expert import ExpertHead, Norm, Prepared

Modulation = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of a norm: (scale + 1, shift, gate), or three times None."""
PLAIN: Modulation = (None, None, None)
Step = Callable[..., Tensor]


class LayerKind(NamedTuple):
    """What a layer is, in plain numbers."""

    crosses: bool
    heads: int
    groups: int
    eps: float
    activation: str


class LayerWeights(NamedTuple):
    """The weights of a layer, as a step uses them; norms without modulation have one, others none."""

    read: Tensor
    feed: Tensor
    back: Tensor
    down: Tensor
    before: Tensor | None
    after: Tensor | None


class StepWeights(NamedTuple):
    """The weights of a step."""

    enter: Tensor
    enter_bias: Tensor
    order: Tensor | None
    time: tuple[Tensor, Tensor] | None
    layers: tuple[LayerWeights, ...]
    last: Tensor | None
    out: Tensor
    out_bias: Tensor


class Seen(NamedTuple):
    """What a step sees of the context: keys and values of every layer, the state's token, masks and turns."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    state: Tensor
    joint: Tensor
    cross: Tensor
    behind: tuple[Tensor, Tensor] | None
    alone: tuple[Tensor, Tensor] | None


class StepPlan:
    """What the steps of every chunk share: weights, joined where they read the same, and what time adds.

    Args:
        head: Whose field it is.
        embodiment: Whose actions.

    Attributes:
        step: (x, told, condition, seen) -> velocity; `step` with this plan's weights, perhaps compiled.
    """

    def __init__(self, head: ExpertHead, embodiment: str) -> None:
        self.head = head
        enter: Any = head.action_in[embodiment]
        out: Any = head.action_out[embodiment]
        order: Tensor | None = head.order
        if head.modulated:
            weight, bias, time = enter.weight, enter.bias, None
        else:  # time_in sees the actions' tokens and then the time's features: two linear layers after each other
            first, second = head.time_in.weight.split(head.width, dim=1)
            weight, bias = first @ enter.weight, F.linear(enter.bias, first)
            self.of_time = second
            time = (head.time_out.weight, head.time_out.bias)
            order = None if order is None else F.linear(order, first)
        layers: list[Any] = list(head.layers)
        self.kinds = tuple(
            LayerKind(layer.cross, layer.heads, layer.groups, layer.input_layernorm.eps, layer.activation)
            for layer in layers
        )
        self.weights = StepWeights(
            enter=weight,
            enter_bias=bias,
            order=order,
            time=time,
            layers=tuple(_weights(layer) for layer in layers),
            last=_weight(head.norm),
            out=out.weight,
            out_bias=out.bias,
        )
        self.norms: list[Any] = [n for each in layers for n in (each.input_layernorm, each.post_attention_layernorm)]
        self.norms.append(head.norm)
        self.times: dict[float, Any] = {}
        self.step: Step = self._plain

    def _plain(self, x: Tensor, told: Tensor | None, condition: Sequence[Modulation], seen: Seen) -> Tensor:
        return step(self.weights, self.kinds, self.head.norm.eps, x, told, condition, seen)

    def at(self, t: float) -> Any:
        """What time adds to the tokens, (w,), or how it modulates every norm: `Modulation`, (w,) each."""
        if t not in self.times:
            head, width = self.head, self.head.width
            time = time_features(self.weights.enter.new_full((1,), t, dtype=torch.float32), width)
            if not head.modulated:
                self.times[t] = F.linear(time.to(self.of_time.dtype), self.of_time, head.time_in.bias)[0]
            else:
                told = head.condition(time[:, None])[0, 0]
                parts = [norm.dense(told).chunk(3) for norm in self.norms]
                self.times[t] = tuple((1.0 + scale.float(), shift.float(), gate) for scale, shift, gate in parts)
        return self.times[t]


class ExpertSteps:
    """The field of an expert for one context, to be called at every step of the solver.

    Args:
        plan: What the steps of every chunk share.
        prepared: What they need of the context.
    """

    def __init__(self, plan: StepPlan, prepared: Prepared) -> None:
        self.plan, self.states = plan, prepared.state.shape[1]
        behind, alone = (None if turn is None else turn.whole for turn in (prepared.behind, prepared.alone))
        self.seen = Seen(
            keys=prepared.keys,
            values=prepared.values,
            state=prepared.state,
            joint=prepared.joint[:, None],
            cross=prepared.cross[:, None],
            behind=behind,
            alone=alone,
        )

    def __call__(
        self, x: Float[Tensor, "b h a"], t: float, given: Bool[Tensor, "b h"] | None = None
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t`; the time of rows that are given is that of data."""
        plan = self.plan
        told = plan.at(t)
        if not plan.head.modulated:
            row = told if given is None else torch.where(given[..., None], plan.at(0.0), told)
            return plan.step(x, row, (PLAIN,) * len(plan.norms), self.seen)
        condition = told if given is None else self._by_row(told, plan.at(0.0), given)
        return plan.step(x, None, condition, self.seen)

    def _by_row(self, told: Any, data: Any, given: Bool[Tensor, "b h"]) -> tuple[Any, ...]:
        """Modulations of every row; those given have the time of data, and the state's token that of the others."""
        rows = F.pad(given, (self.states, 0))[..., None]
        return tuple(tuple(torch.where(rows, b, a) for a, b in zip(mine, theirs)) for mine, theirs in zip(told, data))


def step(
    weights: StepWeights,
    kinds: Sequence[LayerKind],
    eps: float,
    x: Float[Tensor, "b h a"],
    told: Tensor | None,
    condition: Sequence[Modulation],
    seen: Seen,
) -> Float[Tensor, "b h a"]:
    """The field at chunk `x`.

    Args:
        weights, kinds: Of the expert, by layer.
        eps: Of the last norm.
        x: The chunk.
        told: What time adds to its tokens, where it does not modulate the norms.
        condition: How it does: of the two norms of every layer, and of the last.
        seen: What there is to see.
    """
    hidden = F.linear(x, weights.enter, weights.enter_bias)
    if weights.order is not None:
        hidden = hidden + weights.order
    if weights.time is not None and told is not None:
        hidden = F.linear(F.silu(hidden + told), *weights.time)
    states = seen.state.shape[1]
    if states:
        hidden = torch.cat([seen.state.to(hidden.dtype), hidden], dim=1)
    for number, (kind, layer) in enumerate(zip(kinds, weights.layers)):
        mask, turn = (seen.cross, seen.alone) if kind.crosses else (seen.joint, seen.behind)
        before, after = condition[2 * number], condition[2 * number + 1]
        hidden = _layer(kind, layer, hidden, seen.keys[number], seen.values[number], mask, turn, before, after)
    scale, shift, _ = condition[-1]
    if states:
        hidden = hidden[:, states:]
        if scale is not None and shift is not None and scale.dim() > 1:
            scale, shift = scale[:, states:], shift[:, states:]
    last = _norm(hidden, weights.last, eps, scale, shift)
    return F.linear(last.to(weights.out.dtype), weights.out, weights.out_bias)


def _layer(
    kind: LayerKind,
    weights: LayerWeights,
    x: Float[Tensor, "b q w"],
    key: Float[Tensor, "b g p c"],
    value: Float[Tensor, "b g p c"],
    mask: Float[Tensor, "b 1 q k"],
    turn: tuple[Tensor, Tensor] | None,
    before: Modulation,
    after: Modulation,
) -> Float[Tensor, "b q w"]:
    """Attend, feed forward."""
    b, q = x.shape[:2]
    own = 0 if kind.crosses else kind.groups
    inner = _norm(x, weights.before, kind.eps, *before[:2])
    mixed = F.linear(inner, weights.read).view(b, q, kind.heads + 2 * own, -1).transpose(1, 2)
    turned = mixed[:, : kind.heads + own]
    if turn is not None:
        turned = turned_by(turned, *turn)
    query = turned[:, : kind.heads]
    if own:
        key = torch.cat([key, turned[:, kind.heads :]], dim=2)
        value = torch.cat([value, mixed[:, kind.heads + own :]], dim=2)
    found = shared_attention(query, key, value, mask).transpose(1, 2).reshape(b * q, -1)
    x = _onto(x, found, weights.back, before[2])
    inner = _norm(x, weights.after, kind.eps, *after[:2])
    gate, up = F.linear(inner, weights.feed).chunk(2, dim=-1)
    return _onto(x, (ACTIVATIONS[kind.activation][0](gate) * up).view(b * q, -1), weights.down, after[2])


def shared_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """`attention.attend`'s kernel with a mask that fits already."""
    share = query.shape[1] // key.shape[1]
    own = query.device.type == "cpu"
    if share > 1 and not own:
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=own and share > 1)


def _weights(layer: Any) -> LayerWeights:
    """The weights of an `ExpertLayer`."""
    read = [layer.q_proj] if layer.cross else [layer.q_proj, layer.k_proj, layer.v_proj]
    return LayerWeights(
        read=joined_weight(read),
        feed=joined_weight([layer.gate_proj, layer.up_proj]),
        back=layer.o_proj.weight.t(),
        down=layer.down_proj.weight.t(),
        before=_weight(layer.input_layernorm),
        after=_weight(layer.post_attention_layernorm),
    )


def _weight(norm: Norm) -> Tensor | None:
    return None if hasattr(norm, "dense") else norm.offset + norm.weight.float()


def _norm(x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    exact = x.float()
    if scale is None or shift is None:
        return F.rms_norm(exact, exact.shape[-1:], weight, eps).to(x.dtype)
    return torch.addcmul(shift, F.rms_norm(exact, exact.shape[-1:], None, eps), scale).to(x.dtype)


def _onto(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """The residual: `x` plus the product, as far as its gate is open."""
    if gate is None:
        return torch.addmm(x.reshape(-1, x.shape[-1]), y, weight).view(x.shape)
    return torch.addcmul(x, (y @ weight).view(x.shape), gate.to(x.dtype))
