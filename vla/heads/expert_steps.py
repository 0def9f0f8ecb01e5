"""Sampling with an action expert: what does not change from step to step is computed before the first.

A chunk takes ten calls of the field, each of them a small network on few tokens, so that the time goes into the number
of operations rather than into arithmetic. Here queries, keys and values are one product, so are gate and feed-forward,
the actions' two linear layers are folded into one, what time adds is looked up, and masks, turns and norms are as the
kernels want them. The numbers are those of `ExpertHead.velocity` to the last digits; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import Turn
from ..fused import ACTIVATIONS
from .flow import time_features

if TYPE_CHECKING:
    from .expert import ExpertHead, ExpertLayer, Norm, Prepared


class ExpertSteps:
    """The field of an expert for one context, to be called at every step of the solver.

    Args:
        head: Whose field it is.
        prepared: What it needs of the context.
        embodiment: Whose actions.
    """

    def __init__(self, head: ExpertHead, prepared: Prepared, embodiment: str) -> None:
        self.head, self.prepared = head, prepared
        self.out: Any = head.action_out[embodiment]
        self.width, self.states = head.width, prepared.state.shape[1]
        self.joint, self.cross = prepared.joint[:, None], prepared.cross[:, None]
        self.behind, self.alone = (None if turn is None else rolled(turn) for turn in (prepared.behind, prepared.alone))
        self.layers = [_Layer(layer) for layer in head.layers]  # type: ignore[arg-type]
        self.last = _weight(head.norm)
        self.times: dict[float, Any] = {}
        enter: Any = head.action_in[embodiment]
        if head.modulated:
            self.weight, self.bias = enter.weight, enter.bias
        else:  # time_in sees the actions' tokens and then the time's features: two linear layers after each other
            first, second = head.time_in.weight.split(self.width, dim=1)
            self.weight, self.bias = first @ enter.weight, F.linear(enter.bias, first)
            self.of_time = second
        order = head.order
        self.order = order if order is None or head.modulated else F.linear(order, first)

    def __call__(
        self, x: Float[Tensor, "b h a"], t: float, given: Bool[Tensor, "b h"] | None = None
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t`; the time of rows that are given is that of data."""
        head, prepared = self.head, self.prepared
        hidden = F.linear(x, self.weight, self.bias)
        if self.order is not None:
            hidden = hidden + self.order
        told = self._at(t)
        if head.modulated:
            condition = told if given is None else self._by_row(told, self._at(0.0), given)
        else:
            row = told if given is None else torch.where(given[..., None], self._at(0.0), told)
            hidden = F.linear(F.silu(hidden + row), head.time_out.weight, head.time_out.bias)
            condition = [(None, None, None)] * (2 * len(self.layers) + 1)
        if self.states:
            hidden = torch.cat([prepared.state.to(hidden.dtype), hidden], dim=1)
        for number, layer in enumerate(self.layers):
            seen, turn = (self.cross, self.alone) if layer.crosses else (self.joint, self.behind)
            keys, values = prepared.keys[number], prepared.values[number]
            hidden = layer(hidden, keys, values, seen, turn, condition[2 * number], condition[2 * number + 1])
        scale, shift, _ = condition[-1]
        if self.states:
            hidden = hidden[:, self.states :]
            if given is not None and scale is not None:
                scale, shift = scale[:, self.states :], shift[:, self.states :]
        last = _norm(hidden, self.last, head.norm.eps, scale, shift)
        return F.linear(last.to(self.out.weight.dtype), self.out.weight, self.out.bias)

    def _at(self, t: float) -> Any:
        """What time adds to the tokens, (w,), or how it modulates every norm: (scale + 1, shift, gate), (w,) each."""
        if t not in self.times:
            head = self.head
            time = time_features(self.weight.new_full((1,), t, dtype=torch.float32), self.width)
            if not head.modulated:
                self.times[t] = F.linear(time.to(self.of_time.dtype), self.of_time, head.time_in.bias)[0]
            else:
                told = head.condition(time[:, None])[0, 0]
                norms = [n for layer in self.layers for n in layer.norms] + [head.norm]
                parts = [norm.dense(told).chunk(3) for norm in norms]
                self.times[t] = [(1.0 + scale.float(), shift.float(), gate) for scale, shift, gate in parts]
        return self.times[t]

    def _by_row(self, told: Any, data: Any, given: Bool[Tensor, "b h"]) -> list[Any]:
        """Modulations of every row; those given have the time of data, and the state's token that of the others."""
        rows = F.pad(given, (self.states, 0))[..., None]
        return [tuple(torch.where(rows, b, a) for a, b in zip(mine, theirs)) for mine, theirs in zip(told, data)]


class _Layer:
    """One layer of the expert."""

    def __init__(self, layer: ExpertLayer) -> None:
        self.crosses, self.groups, self.heads = layer.cross, layer.groups, layer.heads
        read = [layer.q_proj] if layer.cross else [layer.q_proj, layer.k_proj, layer.v_proj]
        self.read = joined_weight(read)
        self.feed = joined_weight([layer.gate_proj, layer.up_proj])
        self.back, self.down = layer.o_proj.weight.t(), layer.down_proj.weight.t()
        self.norms: tuple[Any, Any] = (layer.input_layernorm, layer.post_attention_layernorm)
        self.weights = tuple(_weight(norm) for norm in self.norms)
        self.eps = layer.input_layernorm.eps
        self.activate = ACTIVATIONS[layer.activation][0]

    def __call__(
        self,
        x: Float[Tensor, "b q w"],
        key: Float[Tensor, "b g p c"],
        value: Float[Tensor, "b g p c"],
        seen: Float[Tensor, "b 1 q k"],
        turn: tuple[Tensor, Tensor] | None,
        before: tuple[Any, Any, Any],
        after: tuple[Any, Any, Any],
    ) -> Float[Tensor, "b q w"]:
        """Attend, feed forward."""
        b, q = x.shape[:2]
        inner = _norm(x, self.weights[0], self.eps, *before[:2])
        heads = self.heads + (0 if self.crosses else 2 * self.groups)
        mixed = F.linear(inner, self.read).view(b, q, heads, -1).transpose(1, 2)
        turned = mixed[:, : self.heads + (0 if self.crosses else self.groups)]
        if turn is not None:
            turned = roll(turned, *turn)
        query = turned[:, : self.heads]
        if not self.crosses:
            key = torch.cat([key, turned[:, self.heads :]], dim=2)
            value = torch.cat([value, mixed[:, self.heads + self.groups :]], dim=2)
        found = shared_attention(query, key, value, seen).transpose(1, 2).reshape(b * q, -1)
        x = _onto(x, found, self.back, before[2])
        inner = _norm(x, self.weights[1], self.eps, *after[:2])
        gate, up = F.linear(inner, self.feed).chunk(2, dim=-1)
        return _onto(x, (self.activate(gate) * up).view(b * q, -1), self.down, after[2])


def shared_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """`attention.attend`'s kernel with a mask that fits already."""
    share = query.shape[1] // key.shape[1]
    own = query.device.type == "cpu"
    if share > 1 and not own:
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=own and share > 1)


def joined_weight(layers: Sequence[nn.Module]) -> Float[Tensor, "m n"]:
    """The weights of linear layers that read the same, as one matrix in one piece of memory.

    They are moved there the first time, and each layer's weight is a part of it from then on: training changes both,
    and no memory is taken twice. Where weights are not this process's own (sharded), it is a copy.
    """
    weights: list[Any] = [layer.weight for layer in layers]
    first, size = weights[0], sum(w.numel() for w in weights)
    if len(weights) == 1:
        return first
    if torch.compiler.is_compiling():
        return torch.cat(weights)
    shape = (size // first.shape[1], first.shape[1])
    starts = [first.storage_offset() + sum(w.numel() for w in weights[:k]) for k in range(len(weights))]
    beside = all(
        w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and w.storage_offset() == start
        and w.is_contiguous()
        for w, start in zip(weights, starts)
    )
    if beside:
        return (
            first.as_strided(shape, (shape[1], 1))
            if first.requires_grad
            else first.data.as_strided(shape, (shape[1], 1))
        )
    whole = torch.cat([w.detach() for w in weights])
    if all(type(w) is nn.Parameter for w in weights):
        for w, part in zip(weights, whole.split([len(w) for w in weights])):
            w.data = part
    return whole


def rolled(turn: Turn) -> tuple[Float[Tensor, "b 1 q c"], Float[Tensor, "b 1 q c"]]:
    """Cosines and signed sines for `roll`."""
    return torch.cat([turn.cos, turn.cos], dim=-1), torch.cat([-turn.sin, turn.sin], dim=-1)


def roll(x: Float[Tensor, "b g q c"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b g q c"]:
    """What `Turn` does, in three operations."""
    exact = x.float()
    return torch.addcmul(exact * cos, exact.roll(exact.shape[-1] // 2, dims=-1), sin).to(x.dtype)


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
