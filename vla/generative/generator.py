"""Flow matching over future frames, given the present one and an instruction: an editor of images, or a video model.

The flow is that of the action heads (`heads.flow`): t = 1 is noise, t = 0 is data, x_t = t noise + (1 - t) data, and
the field is noise - data. What the network says is the change from the present image to the data, from which the field
follows as (x_t - data) / t: most pixels stay as they are, and need not be learnt. The error of the data over t is
learnt, which weighs large times, where it is decided what happens, more than a loss on the field would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from ...errors import ConfigError
from ..heads.solvers import check_solver, integrate
from .frames import to_pixels, to_unit
from .reading import Reading
from .unet import UNet

LEAST = 0.05
"""Time below which the field is that of this time: at t = 0 it would divide by nothing."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How samples are drawn.

    Classifier-free guidance with two weights (InstructPix2Pix, Brooks et al. 2023, as SuSIE uses it)::

        v = v(-, -) + image (v(image, -) - v(-, -)) + text (v(image, text) - v(image, -))

    Attributes:
        image: Weight of the present image.
        text: Weight of the instruction.
        steps: Solver steps.
        solver: One of `heads.solvers.SOLVERS`.
    """

    image: float = 1.0
    text: float = 1.5
    steps: int = 6
    solver: str = "euler"

    def __post_init__(self) -> None:
        check_solver(self.solver, self.steps)

    @property
    def terms(self) -> tuple[tuple[bool, bool, float], ...]:
        """(told the image, told the text, weight of the field) of each field that counts; the weights sum to 1."""
        found = ((False, False, 1.0 - self.image), (True, False, self.image - self.text), (True, True, self.text))
        return tuple(term for term in found if abs(term[2]) > 1e-9)


class FrameGenerator(nn.Module):
    """Future frames from the present one and an instruction.

    Args:
        size: Side of the images [pixels].
        cameras: Number of cameras n; they are generated together, so that they show the same future.
        frames: Frames f; 1 for an editor.
        steps: Steps of control from one frame to the next.
        words: Size of the reading's summary.
        roles: Places that a reading marks.
        widths, patch: See `UNet`.
        words_dim: Values in -1..1 through which the summary reaches the network: what to do, not which sentence.
        drop: Share of training samples that are not told the image, and of those not told the text.
    """

    def __init__(
        self,
        *,
        size: int,
        cameras: int,
        frames: int,
        steps: int,
        words: int,
        roles: int = 2,
        widths: Sequence[int] = (48, 96, 160),
        patch: int = 2,
        words_dim: int = 8,
        drop: float = 0.07,
    ) -> None:
        super().__init__()
        if frames < 1 or steps < 1 or not 0.0 <= drop < 0.5:
            raise ConfigError(f"expected frames and steps from 1 and drop in [0, 0.5), got {frames}, {steps}, {drop}")
        self.size, self.cameras, self.frames, self.steps = size, cameras, frames, steps
        self.drop = drop
        self.words = nn.Sequential(nn.LayerNorm(words), nn.Linear(words, words_dim), nn.Tanh())
        pixels = 3 * cameras
        self.net = UNet(
            inputs=2 * pixels + roles * cameras,
            outputs=pixels,
            frames=frames,
            widths=widths,
            condition=words_dim + 2,
            patch=patch,
        )
        if size % self.net.scale:
            raise ConfigError(f"expected size to be a multiple of {self.net.scale} pixels, got {size}")

    def guess(
        self,
        x: Float[Tensor, "b f n 3 size size"],
        t: Float[Tensor, " b"],
        present: Float[Tensor, "b n 3 size size"],
        reading: Reading,
        seen: Bool[Tensor, " b"],
        told: Bool[Tensor, " b"],
    ) -> Float[Tensor, "b f n 3 size size"]:
        """The data that `x` at time t comes from, where `seen` given the image and where `told` the text."""
        shown = torch.where(seen[:, None, None, None, None], present, 0.0).flatten(1, 2)
        spots = reading.spots(self.size).to(x) * told[:, None, None, None]
        flags = torch.stack([seen, told], dim=1).to(x)
        condition = torch.cat([self.words(reading.words) * told[:, None], flags], dim=1)
        fixed = torch.cat([shown, spots], dim=1)[:, None].expand(-1, self.frames, -1, -1, -1)
        change = self.net(torch.cat([x.flatten(2, 3), fixed], dim=2), t, condition).float()
        return change.unflatten(2, (self.cameras, 3)) + shown.unflatten(1, (self.cameras, 3))[:, None]

    def loss(
        self,
        future: Float[Tensor, "b f n 3 size size"],
        present: Float[Tensor, "b n 3 size size"],
        reading: Reading,
        generator: torch.Generator,
    ) -> Float[Tensor, " b"]:
        """Error of the guessed data over t, each condition dropped for itself in a share of the samples."""
        b = len(future)
        noise = torch.randn(future.shape, generator=generator).to(future)
        t = (1.0 - (1.0 - LEAST) * torch.rand(b, generator=generator).pow(1.4)).to(future)
        dropped = torch.rand(2, b, generator=generator).to(future) < self.drop
        seen, told = ~dropped[0], ~dropped[1]
        at = t[:, None, None, None, None, None]
        found = self.guess(at * noise + (1.0 - at) * future, t, present, reading, seen, told & seen)
        return (found - future).square().flatten(1).mean(1) / t

    def field(
        self,
        x: Float[Tensor, "b f n 3 size size"],
        t: float,
        present: Float[Tensor, "b n 3 size size"],
        reading: Reading,
        guidance: Guidance,
    ) -> Float[Tensor, "b f n 3 size size"]:
        """The guided field; all that it takes is computed in one pass."""
        terms, b = guidance.terms, len(x)
        k = len(terms)
        index = torch.arange(b, device=x.device).repeat(k)
        flags = torch.tensor([term[:2] for term in terms], device=x.device).repeat_interleave(b, 0)
        times = x.new_full((k * b,), max(t, LEAST))
        guesses = self.guess(x[index], times, present[index], reading.rows(index), flags[:, 0], flags[:, 1])
        weights = torch.tensor([term[2] for term in terms], device=x.device)
        data = torch.einsum("k,kb...->b...", weights, guesses.unflatten(0, (k, b)))
        return (x - data) / max(t, LEAST)

    @torch.no_grad()
    def sample(
        self,
        present: UInt8[Tensor, "b n size size 3"],
        reading: Reading,
        noise: Float[Tensor, "b f n 3 size size"],
        guidance: Guidance,
    ) -> UInt8[Tensor, "b f n size size 3"]:
        """Draw future frames; the same noise gives the same frames."""
        now = to_unit(present)
        found = integrate(lambda x, t: self.field(x, t, now, reading, guidance), noise, guidance.steps, guidance.solver)
        return to_pixels(found)

    @torch.no_grad()
    def round_trip(
        self,
        future: UInt8[Tensor, "b f n size size 3"],
        present: UInt8[Tensor, "b n size size 3"],
        reading: Reading,
        noise: Float[Tensor, "b f n 3 size size"],
        level: float,
        steps: int,
    ) -> UInt8[Tensor, "b f n size size 3"]:
        """Frames carried part of the way to noise and back (SDEdit, Meng et al. 2022): what happens stays, and they
        look as if generated. `level` is how far, 0..1."""
        if not 0.0 < level <= 1.0:
            raise ConfigError(f"expected a level above 0 and up to 1, got {level}")
        now, guidance = to_unit(present), Guidance(text=1.0, steps=steps)
        x = level * noise + (1.0 - level) * to_unit(future)
        size = level / steps
        for k in range(steps):
            t = level - k * size
            x = x - size * self.field(x, t, now, reading, guidance)
        return to_pixels(x)

    def noise(self, count: int, generator: torch.Generator) -> Float[Tensor, "b f n 3 size size"]:
        """What samples are drawn from."""
        return torch.randn(count, self.frames, self.cameras, 3, self.size, self.size, generator=generator)


def inflated(editor: Mapping[str, Tensor], video: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an editor for a video model: what sees along time is the `video` model's own and begins as the
    identity, so that every frame begins as the one that the editor makes (as in Make-A-Video, Singer et al. 2022)."""
    found = dict(editor)
    if "net.place" in found and "net.place" in video:
        found["net.place"] = found["net.place"][-1:].expand(len(video["net.place"]), -1).clone()
    return found
