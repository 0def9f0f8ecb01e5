"""Reads whole scenes from a pretrained model's vision: which things are there, what each is in or on, and the drawer.

One query a thing of a known universe attends to the patches of all cameras (as DETR's object queries do, Carion et al.
2020); a thing's name is its color and its kind, so that what is learnt of one color serves all kinds. Where things are
is a choice among the things that are there, the table and the gripper. What is there is said by the queries too, or
better, where a camera is seen in detail, by where each thing is seen in it (`Spotter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from ..errors import ConfigError
from .companion import load_companion, save_companion
from .pretrained import Pretrained

FILES = {"about": "reader.json", "weights": "reader.safetensors"}
CELL = 8
"""Edge of the cells of a picture in detail at which things are looked for [px]."""
SHARP = 2.0
"""How much more the likelier of two cells counts where a thing seems to be than their odds say: there are hundreds."""
TABLE, GRIPPER = "table", "gripper"
"""Places beside the things themselves."""


@dataclass(frozen=True, kw_only=True)
class Universe:
    """The things that a reader can tell of.

    Attributes:
        names: Of all things, such as ``red cube`` and ``drawer``.
        movable: Kinds that can be moved.
        holders: Kinds that things can be in or on.
        stackable: Kinds that only their own kind can be on.
    """

    names: tuple[str, ...]
    movable: tuple[str, ...] = ("cube", "cylinder", "ball")
    holders: tuple[str, ...] = ("bowl", "zone", "drawer", "cube")
    stackable: tuple[str, ...] = ("cube",)

    def kind(self, name: str) -> str:
        """The last word of a name."""
        return name.rsplit(" ", 1)[-1]

    def color(self, name: str) -> str:
        """The words before; empty where there are none."""
        return name.rpartition(" ")[0]

    def may_hold(self) -> np.ndarray:
        """Bool (n, n): whether thing j can be under or around thing i."""
        kinds = [self.kind(name) for name in self.names]
        found = np.zeros((len(kinds), len(kinds)), bool)
        for i, own in enumerate(kinds):
            for j, other in enumerate(kinds):
                stacks = other not in self.stackable or own == other
                found[i, j] = i != j and own in self.movable and other in self.holders and stacks
        return found


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader says of b scenes of n things: logits.

    ``present`` (b, n); ``place`` (b, n, n + 2), of every thing as a holder, then the table and the gripper; ``open``
    (b,) of the drawer. ``spots``: by camera that is seen in detail, where each thing is, as `Spotter` says; where there
    are any, they say what is there.
    """

    present: Float[Tensor, "b n"]
    place: Float[Tensor, "b n m"]
    open: Float[Tensor, " b"]
    spots: Mapping[str, Tensor] = field(default_factory=dict)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.each = nn.MultiheadAttention(width, heads, batch_first=True)
        self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        x = self.norms[0](queries)
        queries = queries + self.each(x, x, x, need_weights=False)[0]
        queries = queries + self.look(self.norms[1](queries), keys, keys, need_weights=False)[0]
        return queries + self.mlp(self.norms[2](queries))


class Spotter(nn.Module):
    """Where each thing is seen in a picture in detail: logits at an eighth of its size (CenterNet, Zhou et al. 2019).

    What is at a place is told by what is around it alone, wherever that is: every thing of every scene teaches it, and
    there is no whole scene to learn by heart.

    Args:
        size: Edge of the picture [px], a multiple of `CELL`.
        names: Number of things.
        width: Channels.

    Raises:
        ConfigError: Another size.
    """

    def __init__(self, size: int, names: int, width: int = 96) -> None:
        super().__init__()
        if size < 4 * CELL or size % CELL:
            raise ConfigError(f"a picture in detail: expected a multiple of {CELL} px from {4 * CELL} on, got {size}")
        self.size = size
        halves = [(3, width // 6), (width // 6, width // 3), (width // 3, 2 * width // 3)]
        layers: list[nn.Module] = []
        for inputs, outputs in halves:
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GELU()]
        layers += [nn.Conv2d(2 * width // 3, width, 3, 1, 1), nn.GELU(), nn.Conv2d(width, width, 3, 1, 1), nn.GELU()]
        self.layers, self.out = nn.Sequential(*layers), nn.Conv2d(width, names, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, -4.6)  # hardly anything is anywhere

    def features(self, pictures: UInt8[Tensor, "b height width 3"]) -> Float[Tensor, "b channels rows columns"]:
        """What is seen around every cell."""
        x = (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)
        return self.layers(x)

    def forward(self, pictures: UInt8[Tensor, "b height width 3"]) -> Float[Tensor, "b n rows columns"]:
        """Logits of every thing at every cell."""
        return self.out(self.features(pictures))


class ReaderNet(nn.Module):
    """Queries of things over patches.

    Args:
        universe: The things.
        vision: Width of the patches.
        patches: Of each camera.
        body: Size of the tool's pose.
        details: Cameras seen in detail too, and the size of these pictures [px].
        near: Queries know where their thing is seen in detail, and what is seen around it.
        width, depth, heads: Of the layers.
    """

    def __init__(
        self,
        universe: Universe,
        *,
        vision: int,
        patches: Mapping[str, int],
        body: int,
        details: Mapping[str, int] | None = None,
        near: bool = True,
        width: int = 96,
        depth: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        colors = sorted({universe.color(name) for name in universe.names})
        kinds = sorted({universe.kind(name) for name in universe.names})
        self.color, self.kind = nn.Embedding(len(colors), width), nn.Embedding(len(kinds), width)
        index = [[colors.index(universe.color(n)), kinds.index(universe.kind(n))] for n in universe.names]
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.register_buffer("may_hold", torch.from_numpy(universe.may_hold()), persistent=False)
        self.index: Tensor
        self.may_hold: Tensor
        self.register_buffer("body_mean", torch.zeros(body))
        self.register_buffer("body_std", torch.ones(body))
        self.body_mean: Tensor
        self.body_std: Tensor
        self.own = nn.Parameter(0.02 * torch.randn(len(universe.names), width))
        self.patches, self.details = dict(patches), dict(details or {})
        self.at = nn.Parameter(0.02 * torch.randn(sum(self.patches.values()), width))
        self.patch = nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, width))
        self.body = nn.Linear(body, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.present, self.open = nn.Linear(width, 1), nn.Linear(width, 1)
        self.held, self.holds = nn.Linear(width, width), nn.Linear(width, width)
        self.apart = nn.Linear(width, 2)
        drawers = [k for k, name in enumerate(universe.names) if universe.kind(name) == "drawer"]
        self.drawer = drawers[0] if drawers else 0
        count = len(universe.names)
        self.spotters = nn.ModuleDict({name: Spotter(size, count) for name, size in self.details.items()})
        self.spotted: nn.Linear | None = None
        if self.details:
            self.spotted = nn.Linear(1, 1)
            nn.init.ones_(self.spotted.weight)
            nn.init.zeros_(self.spotted.bias)
        self.spotted_near = nn.ModuleDict()
        for name, spotter in self.spotters.items() if near else ():
            assert isinstance(spotter, Spotter)
            near_it = nn.Linear(spotter.out.in_channels + 3, width)
            nn.init.zeros_(near_it.weight)  # who goes on from a reader begins as it is
            nn.init.zeros_(near_it.bias)
            self.spotted_near[name] = near_it

    def forward(
        self, patches: Float[Tensor, "b p v"], body: Float[Tensor, "b s"], details: Mapping[str, Tensor] | None = None
    ) -> Reading:
        """Logits; places that cannot be are minus infinity. Pictures in detail are (b, size, size, 3), by camera."""
        pose = self.body((body - self.body_mean) / self.body_std)[:, None]
        seen = self.patch(patches) + self.at
        keys = torch.cat([seen, pose], dim=1)
        queries = (self.color(self.index[:, 0]) + self.kind(self.index[:, 1]) + self.own).expand(len(patches), -1, -1)
        around = self._features(details or {})
        spots = {name: self._spotter(name).out(features) for name, features in around.items()}
        for name, near in self.spotted_near.items():  # detached: where a thing is seen is learnt from where it is
            queries = queries + near(_seen_near(spots[name].detach(), around[name].detach()))
        for layer in self.layers:
            queries = layer(queries, keys)
        x = self.norm(queries)
        among = self.held(x) @ self.holds(x).transpose(1, 2) * x.shape[-1] ** -0.5
        among = among.masked_fill(~self.may_hold, -torch.inf)
        place = torch.cat([among, self.apart(x)], dim=2)
        present = self.there(spots) if spots else self.present(x)[..., 0]
        return Reading(present=present, place=place, open=self.open(x[:, self.drawer])[:, 0], spots=spots)

    def _features(self, details: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._spotter(name).features(details[name]) for name in self.details}

    def _spotter(self, name: str) -> Spotter:
        found = self.spotters[name]
        assert isinstance(found, Spotter)
        return found

    def there(self, spots: Mapping[str, Tensor]) -> Float[Tensor, "b n"]:
        """Logits of what is there, by where it is seen best."""
        assert self.spotted is not None
        best = torch.stack([spot.flatten(2).amax(2) for spot in spots.values()]).amax(0)
        return self.spotted(best[..., None])[..., 0]


def _seen_near(
    spots: Float[Tensor, "b n rows columns"], features: Float[Tensor, "b channels rows columns"]
) -> Float[Tensor, "b n channels_and_3"]:
    """What is seen where each thing seems to be, that place (-1..1 from the left and the top), and how surely it is."""
    rows, columns = spots.shape[2:]
    share = (SHARP * spots.flatten(2)).softmax(2)
    y, x = torch.meshgrid(torch.linspace(-1.0, 1.0, rows), torch.linspace(-1.0, 1.0, columns), indexing="ij")
    at = torch.stack([x, y], dim=2).to(spots).flatten(0, 1)
    sure = spots.flatten(2).amax(2, keepdim=True).sigmoid()
    return torch.cat([share @ features.flatten(2).transpose(1, 2), share @ at, sure], dim=2)


@dataclass(frozen=True, kw_only=True)
class SceneReader:
    """A trained reader with the model whose vision it reads.

    Attributes:
        net: The reader.
        universe: The things.
        model: Pretrained model, frozen.
        notes: Data and scores.
    """

    net: ReaderNet
    universe: Universe
    model: Pretrained
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def details(self) -> Mapping[str, int]:
        """Cameras that it sees in detail, and the size of these pictures [px]."""
        return self.net.details

    def save(self, path: str | Path) -> Path:
        """Write the folder; it appears whole or not at all."""
        patch: Any = self.net.patch[1]
        meta = {
            "universe": vars(self.universe),
            "vision": patch.in_features,
            "patches": self.net.patches,
            "details": self.net.details,
            "near": bool(self.net.spotted_near),
            "body": len(self.net.body_mean),
            "width": self.net.at.shape[1],
            "depth": len(self.net.layers),
            "notes": dict(self.notes),
        }
        return save_companion(path, self.net, self.model, **FILES, meta=meta)

    @classmethod
    def load(cls, path: str | Path) -> SceneReader:
        """Load a folder that `save` wrote; errors as of `load_companion`."""

        def build(told: dict[str, Any]) -> ReaderNet:
            vision, body, width, depth = (int(told[key]) for key in ("vision", "body", "width", "depth"))
            patches, details = ({str(k): int(v) for k, v in told[key].items()} for key in ("patches", "details"))
            return ReaderNet(
                _universe(told),
                vision=vision,
                patches=patches,
                body=body,
                details=details,
                near=bool(told.get("near")),
                width=width,
                depth=depth,
            )

        net, meta, model = load_companion(path, build, **FILES, what="scene reader that brachium train-reader")
        return cls(net=net, universe=_universe(meta), model=model, notes=meta["notes"])

    @torch.no_grad()
    def read(
        self, images: Sequence[np.ndarray], state: np.ndarray, details: Mapping[str, np.ndarray] | None = None
    ) -> Reading:
        """What is seen now: a reading of one scene.

        Args:
            images: uint8 (height, width, 3), one a camera, in the order of the model's cameras.
            state: float32 (s,), in the embodiment's units.
            details: uint8 (size, size, 3), the cameras that the net sees in detail.
        """
        if len(images) != len(self.model.cameras):
            raise ConfigError(f"expected an image of each of {list(self.model.cameras)}, got {len(images)}")
        patches = self.model.patches(torch.from_numpy(np.stack(images))[None]).flatten(1, 2)
        body = torch.from_numpy(np.asarray(state, np.float32))[None, self.model.encoder.body]
        lacking = [name for name in self.details if name not in (details or {})]
        if lacking:
            raise ConfigError(f"expected pictures in detail of {dict(self.details)} [px], got none of {lacking}")
        closer = {name: torch.from_numpy(np.asarray((details or {})[name]))[None] for name in self.details}
        return self.net(patches, body, closer)


def _universe(told: Mapping[str, Any]) -> Universe:
    return Universe(**{key: tuple(value) for key, value in told["universe"].items()})


def reading_loss(
    reading: Reading,
    present: Bool[Tensor, "b n"],
    place: Tensor,
    is_open: Float[Tensor, " b"],
    hidden: Bool[Tensor, "b n"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropies of what is there, of what holds what is there, and of the drawer.

    Args:
        reading: What was said.
        present: What is there.
        place: Index (b, n) of what holds a thing: a thing, n for the table, n + 1 for the gripper; -1 for unknown.
        is_open: One for open, zero for closed; NaN where there is no drawer or it is half-way.
        hidden: What is there and cannot be seen: nothing is to be learnt of whether it is there.
    """
    binary = nn.functional.binary_cross_entropy_with_logits
    each = binary(reading.present, present.float(), reduction="none")
    there = each.mean() if hidden is None else each[~hidden].mean()
    candidates = torch.cat([present, torch.ones_like(present[:, :2])], dim=1)
    logits = reading.place.masked_fill(~candidates[:, None], -torch.inf)
    known = place >= 0
    held = nn.functional.cross_entropy(logits[known], place[known]) if bool(known.any()) else there * 0.0
    sure = is_open.isfinite()
    drawer = binary(reading.open[sure], is_open[sure]) if bool(sure.any()) else there * 0.0
    parts = {"present": there.detach(), "place": held.detach(), "drawer": drawer.detach()}
    return 4.0 * there + held + 0.3 * drawer, parts


def spot_loss(spots: Float[Tensor, "b n rows columns"], uv: Float[Tensor, "b n 2"]) -> Tensor:
    """Focal loss of where things are seen, by the thing (Zhou et al. 2019, 1904.07850, equation 1).

    Args:
        spots: Logits.
        uv: Where each thing is, 0..1 from the left and the top; NaN where it is not seen.
    """
    rows, columns = spots.shape[2:]
    scale = torch.tensor([columns, rows], dtype=uv.dtype)
    inside = (uv.isfinite() & (uv >= 0) & (uv < 1)).all(2)
    cell = torch.where(inside[..., None], uv * scale, -9.0).floor()
    apart_x = torch.arange(columns) - cell[..., :1]
    apart_y = torch.arange(rows) - cell[..., 1:]
    near = torch.exp(-0.5 * (apart_y.square()[..., None] + apart_x.square()[..., None, :]))
    near = near * inside[..., None, None]
    p = spots.sigmoid()
    right = nn.functional.logsigmoid(spots) * (1 - p) ** 2 * (near == 1.0)
    wrong = nn.functional.logsigmoid(-spots) * p**2 * (1 - near) ** 4 * (near < 1.0)
    return -(right.sum() + wrong.sum()) / inside.sum().clamp(min=1)
