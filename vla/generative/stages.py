"""How each part of a subgoal system is trained: the batches of a step, and the loss of a batch.

Every draw of step i comes from a generator seeded with (seed, i), as `vla.loop` wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...console import progress as progress_bar
from ...datasets.sampler import ShuffledSampler
from .frames import FrameData, to_unit
from .generator import FrameGenerator
from .reading import Reading
from .system import SubgoalSystem

Objective = Callable[[Any, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
AT_ONCE = 64
"""Frames generated at once."""
NEAR = 2
"""Steps to a goal that says how the arm was disturbed on its way; later the expert has put it right again."""
LEVELS = (0.4, 0.9)
"""How far frames are carried to noise on their round trip, drawn evenly."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to the inputs of the policy in training.

    Attributes:
        observation: Factor of the noise on the robot's state; 0 for none.
        goal: Factor of changes to goals, drawn for themselves; 0 for none.
        round_trips: Share of goals that are taken from a round trip through the generator.
        words: Noise on the summary of instructions.
        places: Noise on the places that they name, as a share of the image.
    """

    observation: float = 1.0
    goal: float = 1.0
    round_trips: float = 0.5
    words: float = 0.3
    places: float = 0.01


class Stages:
    """Batches and losses of a system's parts.

    Args:
        system: What is trained.
        data: Frames.
        own, other: Each frame read with its own instruction, and with one of another episode.
        augmentation: Of the policy's inputs and the generator's readings.
        goals: Steps that goals of the policy lie ahead, 1 to this many.
        spread: The editor's targets lie its steps ahead, give or take so many.
    """

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        data: FrameData,
        own: Reading,
        other: Reading,
        augmentation: Augmentation,
        goals: int,
        spread: int,
    ) -> None:
        self.system, self.data = system, data
        self.own, self.other = own.of(system.views), other.of(system.views)
        self.augmentation, self.goals, self.spread = augmentation, goals, spread
        self._samplers: dict[tuple[int, int], ShuffledSampler] = {}
        self.made: Tensor | None = None
        """Round trips: every frame as the generator would have made it."""
        self.patches: np.ndarray | None = None
        """What every frame looks like to the policy, in half precision; computed when it is asked for where None."""

    def drawn(self, step: int, seed: int, batch_size: int) -> tuple[np.ndarray, np.random.Generator]:
        """Frames of a step, and the generator of what else is drawn."""
        if (batch_size, seed) not in self._samplers:
            self._samplers[batch_size, seed] = self.data.sampler(batch_size, seed)
        chosen = self._samplers[batch_size, seed].batch(step)
        return self.data.training[chosen], np.random.default_rng([seed, step])

    # -- generator -----------------------------------------------------------------------------------------------------

    def futures(self, now: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Frames (b, f) that the generator learns to make; without `rng` at their exact steps."""
        model: FrameGenerator = self.system.generator
        steps = model.steps * (1 + np.arange(model.frames))[None]
        if rng is not None and self.spread:
            steps = steps + rng.integers(-self.spread, self.spread + 1, (len(now), 1))
        return self.data.ahead(now[:, None], steps)

    def frames(self, now: np.ndarray, future: np.ndarray, reading: Reading) -> dict[str, Any]:
        """Images and readings of some frames and what comes after them."""
        index = torch.from_numpy(now)
        small = self.data.small
        return {
            "present": small[index],
            "future": small[torch.from_numpy(future)],
            "reading": reading.rows(index),
        }

    def generator_batch(self, step: int, seed: int, batch_size: int) -> dict[str, Any]:
        """A batch of the generator."""
        now, rng = self.drawn(step, seed, batch_size)
        return self.frames(now, self.futures(now, rng), self.own)

    def generator_loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See `FrameGenerator.loss`."""
        reading = batch["reading"].jittered(generator, self.augmentation.words, self.augmentation.places)
        each = self.system.generator.loss(to_unit(batch["future"]), to_unit(batch["present"]), reading, generator)
        return each.mean(), {}

    def testing(self, count: int) -> np.ndarray:
        """Frames of held-out episodes, evenly spaced; of training where nothing is held out."""
        pool = self.data.testing if len(self.data.testing) else self.data.training
        return pool[np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(int)]

    def generator_error(self, count: int = 128) -> dict[str, float]:
        """Held-out loss with fixed draws."""
        now = self.testing(count)
        batch = self.frames(now, self.futures(now, None), self.own)
        generator = torch.Generator().manual_seed(0)
        args = (to_unit(batch["future"]), to_unit(batch["present"]), batch["reading"], generator)
        return {"loss": float(self.system.generator.loss(*args).mean())}

    def make_round_trips(self, seed: int, steps: int = 2) -> None:
        """Carry every frame to noise and back once, told what a frame before it shows."""
        model, data = self.system.generator.eval(), self.data
        made = data.small.clone()
        order = np.random.default_rng([seed, 0x517]).permutation(len(data.owner))
        if model.frames > 1:  # every frame is one of several of a clip: fewer clips do
            order = order[: max(1, len(order) * 2 // model.frames)]
        with progress_bar("generating goals of training", total=len(order), unit="frames") as bar:
            for start in range(0, len(order), AT_ONCE):
                rng = np.random.default_rng([seed, start])
                now = order[start : start + AT_ONCE]
                future = self.futures(now, rng)
                batch = self.frames(now, future, self.own)
                noise = model.noise(len(now), torch.Generator().manual_seed(seed * 1_000_003 + start))
                level = float(rng.uniform(*LEVELS))
                with torch.autocast("cpu", torch.bfloat16):
                    found = model.round_trip(batch["future"], batch["present"], batch["reading"], noise, level, steps)
                made[torch.from_numpy(future.reshape(-1))] = found.flatten(0, 1)
                bar.update(len(now))
        self.made = made

    def see(self, path: Path) -> None:
        """Compute what every frame looks like to the policy, into a file: it is too much for memory."""
        data, count = self.data, len(self.data.owner)
        cameras = len(data.store.embodiment.camera_names)
        shape = (count, cameras, self.system.reader.grid[0] ** 2, self.system.reader.vision)
        seen = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        with progress_bar("vision", total=count, unit="frames") as bar:
            for start in range(0, count, AT_ONCE):
                rows = np.arange(start, min(start + AT_ONCE, count))
                seen[rows] = self.system.see(data.images(rows)).half().numpy()
                bar.update(len(rows))
        self.patches = seen

    def looks(self, now: np.ndarray) -> Float[Tensor, "b c p v"]:
        """What some frames look like to the policy."""
        if self.patches is None:
            return self.system.see(self.data.images(now))
        return torch.from_numpy(self.patches[now]).float()

    # -- policy --------------------------------------------------------------------------------------------------------

    def policy_batch(self, step: int, seed: int, batch_size: int) -> dict[str, Any]:
        """A batch of the policy: goals are later frames of the same episode (hindsight).

        What leads to a near goal is what was executed, disturbances and all; a goal farther away was reached although
        the arm was disturbed, and what leads there is what was right.
        """
        now, rng = self.drawn(step, seed, batch_size)
        steps = rng.integers(1, self.goals + 1, len(now))
        goal = torch.from_numpy(self.data.ahead(now, steps))
        images = self.data.small[goal]
        if self.made is not None:
            generated = torch.from_numpy(rng.random(len(now)) < self.augmentation.round_trips)
            images = torch.where(generated[:, None, None, None, None], self.made[goal], images)
        return self.acting(now, images, np.where(steps <= NEAR, steps, 0))

    def acting(
        self, now: np.ndarray, goal: UInt8[Tensor, "b n size size 3"], done: np.ndarray | None = None
    ) -> dict[str, Any]:
        """What the policy sees and should do at some frames; `done` as in `FrameData.chunk`."""
        actions, real = self.data.chunk(now, self.system.policy.action_horizon, done)
        state = self.data.state[torch.from_numpy(now)]
        return {"patches": self.looks(now), "goal": goal, "state": state, "actions": actions, "real": real}

    def policy_loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See `GoalPolicy.loss`."""
        changes = self.augmentation
        each = self.system.policy.loss(
            **batch, generator=generator, augment=changes.observation, goal_augment=changes.goal
        )
        return each.mean(), {}

    def policy_error(self, count: int = 256) -> dict[str, float]:
        """Held-out error of the first action towards true goals, against what was right, in standard deviations.

        ``action_error`` with the right goal, ``shuffled_error`` with the goals of other frames: without a gap between
        the two the policy does not look at its goal.
        """
        now, policy = self.testing(count), self.system.policy
        steps = np.random.default_rng(0).integers(1, self.goals + 1, len(now))
        goal = self.data.small[torch.from_numpy(self.data.ahead(now, steps))]
        batch = self.acting(now, goal)
        found = {"action_error": goal, "shuffled_error": goal.roll(len(now) // 2, 0)}
        return {name: self._first_action_error(policy, batch, images) for name, images in found.items()}

    @staticmethod
    def _first_action_error(policy: Any, batch: dict[str, Any], goal: Tensor) -> float:
        noise = torch.zeros_like(batch["actions"])
        chunk = policy.predict(batch["patches"], goal, batch["state"], noise)
        scaled: Float[Tensor, "b a"] = ((chunk - batch["actions"]) / policy.get_buffer("action_scale"))[:, 0]
        return float(scaled[:, policy.get_buffer("active")].abs().mean())

    # -- progress ------------------------------------------------------------------------------------------------------

    def progress_batch(self, step: int, seed: int, batch_size: int) -> dict[str, Any]:
        """Half of the pairs are true futures of their instruction; the others in turn are futures of another
        instruction, of the present itself, the past, and other scenes."""
        now, rng = self.drawn(step, seed, batch_size)
        return self.judged(now, rng)

    def judged(self, now: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Some frames with candidates and whether they are progress."""
        steps = self.system.generator.steps * self.system.generator.frames
        later = self.data.ahead(now, np.maximum(1, steps + rng.integers(-2, 3, len(now))))
        kind = np.where(rng.random(len(now)) < 0.5, 0, rng.integers(1, 6, len(now)))
        moved = later > now  # at the end of an episode the future is the present, and no past of it
        kind = np.where(~moved & (kind > 1) & (kind < 4), 0, kind)
        first, second = np.where(kind == 3, later, now), np.where(kind == 3, now, later)
        second = np.where(kind == 2, now, np.where(kind == 4, np.roll(later, 1), second))
        wrong = torch.from_numpy((kind == 1) | (kind == 5))
        index = torch.from_numpy(first)
        own, other = self.own.rows(index), self.other.rows(index)
        chosen = {
            name: torch.where(wrong.reshape(-1, *[1] * (getattr(own, name).ndim - 1)), getattr(other, name), value)
            for name, value in vars(own).items()
        }
        small = self.data.small if self.made is None else self.made
        return {
            "present": self.data.small[index],
            "later": torch.where(
                torch.from_numpy(rng.random(len(now)) < 0.5)[:, None, None, None, None],
                small[torch.from_numpy(second)],
                self.data.small[torch.from_numpy(second)],
            ),
            "reading": Reading(**chosen),
            "label": torch.from_numpy((kind == 0).astype(np.float32)),
        }

    def progress_loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ProgressFilter.loss`."""
        reading = batch["reading"].jittered(generator, self.augmentation.words, self.augmentation.places)
        each = self.system.progress.loss(batch["present"], batch["later"], reading, batch["label"], generator)
        return each.mean(), {}

    def progress_error(self, count: int = 512) -> dict[str, float]:
        """Held-out accuracy."""
        batch = self.judged(self.testing(count), np.random.default_rng(0))
        logits = self.system.progress(to_unit(batch["present"]), to_unit(batch["later"]), batch["reading"])
        return {"accuracy": float(((logits > 0) == (batch["label"] > 0.5)).float().mean())}
