"""Flow matching by a diffusion transformer that attends to the backbone's states (GR00T N1, Bjorck et al. 2025).

Tokens of the noisy actions attend, in turn, to what the backbone has read and to each other; time modulates their norms
(DiT, Peebles & Xie 2023). Unlike an expert it needs no keys and values, so it fits any backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ..attention import attend
from .base import Context, HeadInputs
from .flow import FlowMatching, row_time, time_features


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the field needs of a context: tokens to attend to, which are real, and tokens beside the actions."""

    tokens: Float[Tensor, "b p w"]
    mask: Bool[Tensor, "b p"]
    state: Float[Tensor, "b k w"]


class DiTHead(FlowMatching):
    """Flow matching by a transformer with cross-attention.

    Args:
        inputs: What the head is built for.
        width: Width of the transformer.
        depth: Number of blocks; even ones attend to the backbone, odd ones to the actions.
        heads: Attention heads.
        steps, solver, draws, time_alpha, max_delay: See `FlowMatching`.
    """

    def __init__(
        self,
        *,
        inputs: HeadInputs,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        steps: int = 4,
        solver: str = "midpoint",
        draws: int = 2,
        time_alpha: float = 1.5,
        max_delay: int = 0,
    ) -> None:
        super().__init__(steps=steps, solver=solver, draws=draws, time_alpha=time_alpha, max_delay=max_delay)
        if width % heads or width % 2 or depth < 1:
            raise ConfigError(f"dit: expected an even width, a multiple of heads, got width={width}, heads={heads}")
        self.width = width
        self.see: nn.Module | None = None
        if inputs.token_dim:
            self.see = nn.Sequential(nn.LayerNorm(inputs.token_dim), nn.Linear(inputs.token_dim, width))
        self.state_in = nn.Linear(inputs.context_dim, width) if inputs.context_dim else None
        if self.see is None and self.state_in is None:
            raise ConfigError("this head would see nothing: give it the state (model.state=vector) or a backbone")
        dims = inputs.action_dims
        self.action_in = nn.ModuleDict({k: nn.Linear(a, width) for k, a in dims.items()})
        self.action_time = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.action_out = nn.ModuleDict({k: nn.Linear(width, a) for k, a in dims.items()})
        self.order = nn.Parameter(torch.randn(inputs.action_horizon, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        for layer in (self.modulation, *self.action_out.values()):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def prepare(self, context: Context, draws: int) -> Prepared:
        """Project what was read, once; each row is repeated for every draw."""
        b = len(context.vector)
        state = context.vector.new_zeros(b, 0, self.width)
        if self.state_in is not None:
            state = self.state_in(context.vector)[:, None]
        if self.see is not None and context.prefix is not None:
            tokens, mask = self.see(context.prefix.states), context.prefix.mask
        else:  # nothing but the vector to look at
            tokens, mask = state, torch.ones(b, state.shape[1], dtype=torch.bool, device=state.device)
        repeated = [x.repeat_interleave(draws, 0) for x in (tokens, mask, state)]
        return Prepared(tokens=repeated[0], mask=repeated[1], state=repeated[2])

    def velocity(
        self,
        prepared: Prepared,
        x: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        embodiment: str,
        given: Bool[Tensor, "b h"] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """The field at chunk `x` and time `t`; the time of rows that are given is that of data."""
        time = time_features(t, self.width)
        actions = self.action_in[embodiment](x)
        each = row_time(time, given, x.shape[1])
        actions = self.action_time(torch.cat([actions, each.expand_as(actions)], dim=2)) + self.order
        hidden = torch.cat([prepared.state, actions], dim=1)
        condition = F.silu(self.time(time))
        for number, block in enumerate(self.blocks):
            outside = number % 2 == 0
            hidden = block(hidden, condition, *((prepared.tokens, prepared.mask) if outside else (None, None)))
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        last = self.norm(hidden[:, -x.shape[1] :]) * (1.0 + scale) + shift
        return self.action_out[embodiment](last)


class DiTBlock(nn.Module):
    """Attention, to tokens given or to itself, then a feed-forward layer; both modulated (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Float[Tensor, "b q w"],
        condition: Float[Tensor, "b w"],
        tokens: Float[Tensor, "b p w"] | None,
        mask: Bool[Tensor, "b p"] | None,
    ) -> Float[Tensor, "b q w"]:
        """One step."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        inner = self.norm1(x) * (1.0 + scale1) + shift1
        query = self._split(self.query(inner))
        key, value = map(self._split, self.key_value(inner if tokens is None else tokens).chunk(2, dim=-1))
        seen = None if mask is None else mask[:, None].expand(-1, x.shape[1], -1)
        x = x + gate1 * self.out(attend(query, key, value, seen))
        return x + gate2 * self.mlp(self.norm2(x) * (1.0 + scale2) + shift2)

    def _split(self, x: Float[Tensor, "b q w"]) -> Float[Tensor, "b g q c"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
