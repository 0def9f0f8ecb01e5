"""A trained model as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import SpecMismatchError, did_you_mean
from ..spec import ActionChunk, EmbodimentSpec, Guidance, Observation
from ..vla.accelerate import MULTIPLE, PLAIN, Acceleration, sampler_of
from ..vla.checkpoint import load_checkpoint, read_meta
from ..vla.model import VLAModel


class VLAPolicy:
    """Predicts chunks with a `VLAModel`.

    The model always runs on batches of `batch_size` rows, filled up where there are fewer: kernels may round
    differently for other batch sizes, and an episode must not depend on how many others run beside it. A server, which
    would rather be quick, gives several sizes, and takes the smallest that will do.

    Args:
        model: Loaded model.
        embodiment: Name of the embodiment to act for; the only one when None.
        batch_size: Rows of every forward pass; or sizes to choose from.
        acceleration: How chunks are made faster; None for not at all. It changes the model.
    """

    def __init__(
        self,
        model: VLAModel,
        *,
        embodiment: str | None = None,
        batch_size: int | Sequence[int] = 8,
        acceleration: Acceleration | None = None,
    ) -> None:
        names = list(model.embodiments)
        name = names[0] if embodiment is None and len(names) == 1 else embodiment
        if name not in model.embodiments:
            raise SpecMismatchError(f"which embodiment? got {embodiment!r}. {did_you_mean(str(embodiment), names)}")
        self.model, self.name = model.eval(), str(name)
        self._sizes = sorted([batch_size] if isinstance(batch_size, int) else batch_size)
        self.embodiment: EmbodimentSpec = model.embodiments[self.name]
        self.action_horizon = model.recipe.action_horizon
        self.noise_dim = model.noise_dim(self.name)
        self.takes_guidance = model.takes_guidance
        self._predict = sampler_of(self.model, self.name, acceleration)
        self.accelerated = acceleration not in (None, PLAIN)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        embodiment: str | None = None,
        like: EmbodimentSpec | None = None,
        device: str = "cpu",
        batch_size: int | Sequence[int] = 8,
        acceleration: Acceleration | None = None,
    ) -> VLAPolicy:
        """Load and verify a checkpoint (its golden batches must come out).

        Args:
            path: Folder of the checkpoint.
            embodiment: Name of the embodiment to act for.
            like: Or what the robot or environment is: the embodiment that means the same is taken.
            device: Where the model runs.
            batch_size: Rows of every forward pass; or sizes to choose from.
            acceleration: How chunks are made faster, once the checkpoint has proved itself; None for not at all.

        Raises:
            SpecMismatchError: None of the model's embodiments fits, with every difference to the nearest.
        """
        model = load_checkpoint(path, device=device)
        if like is not None and embodiment is None:
            known = model.embodiments
            fits = [name for name, spec in known.items() if not spec.differences(like)]
            if not fits:
                nearest = min(known.values(), key=lambda spec: len(spec.differences(like)))
                nearest.require_same(like, f"checkpoint {path}", "environment")
            embodiment = like.name if like.name in fits else fits[0]
        return cls(model, embodiment=embodiment, batch_size=batch_size, acceleration=acceleration)

    def warm_up(self) -> None:
        """Predict for every size of a batch and for prompts of several lengths, free and guided in both ways.

        What is compiled or recorded for them then is there.
        """
        rng, horizon, length = np.random.default_rng(0), self.action_horizon, self.model.recipe.max_tokens
        weights = np.zeros(horizon, np.float32)
        weights[0] = 1.0
        still = np.zeros((horizon, self.embodiment.action.dim), np.float32)
        plans = [Guidance(actions=still, weights=weights, gradient=gradient) for gradient in ("vjp", "identity")]
        for size in self._sizes:
            noise = rng.standard_normal((size, horizon, self.noise_dim), np.float32)
            for words in range(1, length + 1, MULTIPLE):
                seen = [Observation.fake(self.embodiment, rng, "do " * words) for _ in range(size)]
                self.predict(seen, noise)
                for plan in plans if self.takes_guidance else ():
                    self.predict(seen, noise, [plan] * size)

    @staticmethod
    def describe(path: str | Path) -> dict[str, object]:
        """What was noted when the checkpoint was saved: head, parameters, data, versions."""
        return read_meta(Path(path))

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """Chunks (n, h, a) for n observations and noise (n, h, noise_dim), in the embodiment's units.

        Rows with and without guidance run in batches of their own: each comes out as it would alone.
        """
        guides = list(guidance) if guidance is not None else [None] * len(observations)
        chunks = np.zeros((len(observations), self.action_horizon, self.embodiment.action.dim), np.float32)
        for rows in _alike(guides):
            for start in range(0, len(rows), self._sizes[-1]):
                part = rows[start : start + self._sizes[-1]]
                size = next(size for size in self._sizes if size >= len(part))
                full = part + [part[-1]] * (size - len(part))
                stacked = Observation.stack([observations[k] for k in full])
                stacked.check(self.embodiment, "policy input")
                led = [guide for k in full if (guide := guides[k]) is not None]
                guide = Guidance.stack(led) if led else None
                draws = np.asarray(noise[full], np.float32)
                chunks[part] = self._predict(stacked, draws, guide)[: len(part)]
        return ActionChunk(
            actions=chunks,
            control_hz=self.embodiment.control_hz,
            timestamp=max(o.timestamp for o in observations),
        )


def _alike(guides: Sequence[Guidance | None]) -> list[list[int]]:
    """Rows that can share a batch: those without guidance, and those of each kind of it."""
    groups: dict[object, list[int]] = {}
    for k, guide in enumerate(guides):
        groups.setdefault(None if guide is None else (guide.limit, guide.gradient), []).append(k)
    return list(groups.values())
