"""Pointing: readout tokens of a backbone look up, in every camera, the thing that the words name.

A query made from a readout token is compared with every patch of the vision map (as in CLIP-style open-vocabulary
detection, Minderer et al. 2022). The expected coordinate of the softmax (spatial softmax, Levine et al. 2016), moved by
at most a patch by what the attended features say, is the point. From the points, the visibilities, proprioception and
what is seen there a small network computes the position in the base frame: one camera alone does not tell a thing on
the table from one that is higher and nearer, but it shows what the thing stands on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones.base import BackboneFeatures

ROLES = ("object", "goal")
"""What is pointed at: the thing to act on, and where to (the same thing where a task has no goal)."""
METRES = 0.1
"""Unit in which positions are predicted [m]."""
LEAST_SPREAD = 0.05
"""Least standard deviation that a pose is scaled by. Scenes show a tool that points straight down; a hand in motion
tilts by a few hundredths, which must not come out as fifty standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Where the things named by b x k texts are.

    Attributes:
        logits: Score of every patch, (b, k, r, n, p).
        uv: Expected image coordinates, 0..1 from the left and top edges, (b, k, r, n, 2).
        visible: Logit that the thing is inside the image, (b, k, r, n).
        position: Position in the base frame [m], (b, k, r, 3).
    """

    logits: Float[Tensor, "b k r n p"]
    uv: Float[Tensor, "b k r n 2"]
    visible: Float[Tensor, "b k r n"]
    position: Float[Tensor, "b k r 3"]


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """What each readout after the first finds in the images of c cameras, for b x k texts.

    Attributes:
        logits, uv, visible: As of `Points`.
        seen: Vision features where it points, (b, k, r, c, v).
        role: What the words ask for, (b, k, r, d).
    """

    logits: Float[Tensor, "b k r c p"]
    uv: Float[Tensor, "b k r c 2"]
    visible: Float[Tensor, "b k r c"]
    seen: Float[Tensor, "b k r c v"]
    role: Float[Tensor, "b k r d"]


class PointReadout(nn.Module):
    """Points from backbone features.

    Args:
        width: Width of the readout states.
        vision_width: Width of the vision map.
        cameras: Number of cameras n.
        state_dim: Proprioception dimension s.
        tool: Indices of the tool position x, y, z [m] in the state.
        hidden: Width of the position network.
        appearance: Numbers that what is seen at the points is summed up in for it.
    """

    def __init__(
        self,
        *,
        width: int,
        vision_width: int,
        cameras: int,
        state_dim: int,
        tool: tuple[int, int, int],
        hidden: int = 256,
        appearance: int = 32,
    ) -> None:
        super().__init__()
        self.cameras, self.tool = cameras, list(tool)
        self.query = nn.Sequential(
            nn.Linear(width, 2 * vision_width), nn.GELU(), nn.Linear(2 * vision_width, cameras * vision_width)
        )
        self.key = nn.Linear(vision_width, vision_width)
        self.refine = nn.Linear(2 * vision_width, 3)
        self.appearance = nn.Linear(cameras * vision_width + width, appearance)
        self.position = nn.Sequential(
            nn.Linear(5 * cameras + state_dim + appearance, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 7),
        )
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.register_buffer("centre", torch.zeros(3))
        self.centre: Tensor

    @torch.no_grad()
    def fit(self, state: Float[Tensor, "b s"], centre: Float[Tensor, " 3"]) -> None:
        """Set the scaling of proprioception and the middle of the work space [m]."""
        self.state_mean, self.state_std = state.mean(0), state.std(0).clamp(min=LEAST_SPREAD)
        self.centre = centre.to(self.centre)

    def forward(self, features: BackboneFeatures, state: Float[Tensor, "b s"]) -> Points:
        """Point at what each readout after the first stands for; `state` is in the embodiment's units."""
        found = self.look_up(features, slice(None))
        position = self.locate(found, state.float())
        return Points(logits=found.logits, uv=found.uv, visible=found.visible, position=position)

    def look_up(self, features: BackboneFeatures, views: slice) -> Glimpse:
        """What is pointed at in images of some of the cameras, the only ones in `features`."""
        b, k = features.readout.shape[:2]
        vision = features.vision
        v = vision.shape[-1]
        roles = features.readout[:, :, 1:]
        query = self.query(roles).reshape(b, k, -1, self.cameras, v)[:, :, :, views]
        key = self.key(vision)
        # Eight bits of mantissa are too few for coordinates: half a pixel, a millimetre.
        with torch.autocast(vision.device.type, enabled=False):
            query, key, vision = query.float(), key.float(), vision.float()
            logits = torch.einsum("bkrnv,bnpv->bkrnp", query, key) * v**-0.5
            weights = logits.softmax(-1)
            seen = torch.einsum("bkrnp,bnpv->bkrnv", weights, vision)
            fine = self.refine(torch.cat([seen, query], dim=-1))
            rows, columns = features.grid
            cell = torch.tensor([1.0 / columns, 1.0 / rows], device=weights.device)
            uv = weights @ patch_centres(features.grid, weights) + fine[..., 1:].tanh() * cell
            return Glimpse(logits=logits, uv=uv, visible=fine[..., 0], seen=seen, role=roles.float())

    def locate(self, found: Glimpse, state: Float[Tensor, "b s"]) -> Float[Tensor, "b k r 3"]:
        """Position in the base frame: a mixture of a guess from the work space's middle and one from the tool.

        What a camera on the hand sees lies at an offset proportional to the height it looks from, hence the products.
        """
        shape = found.uv.shape[:3]
        body = ((state - self.state_mean) / self.state_std)[:, None, None].expand(*shape, -1)
        tool = state[:, None, None, self.tool].expand(*shape, -1)
        shown = found.visible.sigmoid()
        offset = (found.uv - 0.5) * shown[..., None]
        scaled = offset * (tool[..., None, 2:] / METRES)
        looks = self.appearance(torch.cat([(found.seen * shown[..., None]).flatten(-2), found.role], dim=-1))
        inputs = torch.cat([4.0 * offset.flatten(-2), scaled.flatten(-2), shown, body, looks], dim=-1)
        guess = self.position(inputs)
        near = guess[..., 6:].sigmoid()
        return near * (tool + METRES * guess[..., 3:6]) + (1.0 - near) * (self.centre + METRES * guess[..., :3])


def patch_centres(grid: tuple[int, int], like: Tensor) -> Float[Tensor, "p 2"]:
    """Image coordinates (u, v) of the patch centres, row by row."""
    rows, columns = grid
    v = (torch.arange(rows, device=like.device, dtype=torch.float32) + 0.5) / rows
    u = (torch.arange(columns, device=like.device, dtype=torch.float32) + 0.5) / columns
    return torch.stack([u.repeat(rows), v.repeat_interleave(columns)], dim=1)


def patches_around(
    vision: Float[Tensor, "b n p v"], grid: tuple[int, int], uv: Float[Tensor, "b r n 2"]
) -> Float[Tensor, "b r n 9 v"]:
    """Vision features at points and one patch away from them, row by row, interpolated; zero outside the images."""
    b, n, _, v = vision.shape
    rows, columns = grid
    maps = vision.float().transpose(2, 3).reshape(b * n, v, rows, columns)
    steps = torch.arange(-1, 2, device=uv.device)
    beside = torch.stack([steps.repeat(3) / columns, steps.repeat_interleave(3) / rows], dim=1)
    places = (uv.float()[..., None, :] + beside).transpose(1, 2).reshape(b * n, -1, 1, 2)
    found = F.grid_sample(maps, 2.0 * places - 1.0, align_corners=False)
    return found.reshape(b, n, v, uv.shape[1], 9).permute(0, 3, 1, 4, 2)


def bilinear_target(uv: Float[Tensor, "*rest 2"], grid: tuple[int, int]) -> Float[Tensor, "*rest p"]:
    """Weights on the four patches around a point whose expected coordinate is the point (clamped to centres)."""
    rows, columns = grid
    size = torch.tensor([columns, rows], device=uv.device, dtype=uv.dtype)
    place = (uv * size - 0.5).clamp(min=0.0)
    place = torch.minimum(place, size - 1.0)
    corner = torch.minimum(place.floor(), size - 2.0).clamp(min=0.0)
    part = place - corner
    column, row = corner.long().unbind(-1)
    target = torch.zeros(*uv.shape[:-1], rows * columns, device=uv.device, dtype=uv.dtype)
    for right in (0, 1):
        for down in (0, 1):
            weight = (part[..., 0] if right else 1 - part[..., 0]) * (part[..., 1] if down else 1 - part[..., 1])
            patch = (row + down).clamp(max=rows - 1) * columns + (column + right).clamp(max=columns - 1)
            target.scatter_add_(-1, patch[..., None], weight[..., None])
    return target


def inside(label: Float[Tensor, "*rest 3"]) -> Bool[Tensor, "*rest"]:
    """Whether (u, v, depth) lies in the image and before the camera."""
    return (label[..., :2] > 0).all(-1) & (label[..., :2] < 1).all(-1) & (label[..., 2] > 0)


def grounding_loss(
    points: Points, objects: Float[Tensor, "b k r f"], grid: tuple[int, int]
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Cross-entropy on the patches, L1 on the expected point, visibility, and L1 on the position.

    Args:
        points: Predictions.
        objects: Labels: x, y, z [m], then u, v, depth for each of the n cameras; f = 3 + 3 n.
        grid: Rows and columns of patches.
    """
    label = objects[..., 3:].unflatten(-1, (-1, 3))
    seen = inside(label).float()
    uv = label[..., :2].clamp(0.0, 1.0)
    total = seen.sum().clamp(min=1.0)
    entropy = -(bilinear_target(uv, grid) * points.logits.log_softmax(-1)).sum(-1)
    cells = (entropy * seen).sum() / total
    shift = ((points.uv - uv).abs().sum(-1) * seen).sum() / total
    visible = F.binary_cross_entropy_with_logits(points.visible, seen)
    position = (points.position - objects[..., :3]).abs().mean() / METRES
    parts = {"cells": cells, "shift": shift, "visible": visible, "position": position}
    return cells + 5.0 * shift + visible + 2.0 * position, parts
