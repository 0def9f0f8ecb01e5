"""What every adapter shares: an environment of another suite seen through our spec, one episode a seed."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ...errors import ConfigError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from ..tabletop import CHARSET, OPTIONS
from ..tasks.base import OUT_OF_TIME

MAX_INSTRUCTION = 256
ENDED = "ended by the environment"
"""Why an episode failed, beside `OUT_OF_TIME`."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """A task of a suite.

    Attributes:
        name: Of the task, as the suite spells it.
        max_steps: Length of an episode under the published protocol.
    """

    name: str
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one step came to, in the suite's own judgement.

    Attributes:
        success: Whether the task is done now.
        reward: The suite's own.
        failure: Why the episode is lost, in a few words; empty while it is not.
        over: Whether the suite itself has ended the episode: this step is the last.
    """

    success: bool
    reward: float = 0.0
    failure: str = ""
    over: bool = False


class SuiteEnv(gymnasium.Env[dict[str, Any], np.ndarray], ABC):
    """An environment of another suite.

    Observations: ``state`` float32 (s,), one uint8 image (height, width, 3) a camera, ``instruction`` (text). Actions:
    as in the spec, clipped to its limits. Reward: the suite's own. An episode terminates at success (or, where success
    is judged at the end, never) and is truncated after ``task.max_steps``. ``info`` has ``success``, ``task`` and, on
    steps, ``failure`` and ``holds``: whether success would be judged now.

    The same seed gives the same episode, bit for bit, whatever was run before.

    Args:
        task: What is done, and for how long.
        spec: What the robot sees, feels and accepts.
        judged: When success counts: ``ever`` (it ends the episode) or ``last`` (at the last step alone).
        images: Whether to render cameras; without them observations hold the state and instruction only.
        render_mode: As Gymnasium's.
        render_size: Edge of pictures for people [px].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's convention)
    splits = ("train",)
    """Kinds of instructions there are; published suites have one."""

    def __init__(
        self,
        *,
        task: SuiteTask,
        spec: EmbodimentSpec,
        judged: str = "ever",
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        if judged not in ("ever", "last"):
            raise ConfigError(f"unknown judged {judged!r}. {did_you_mean(judged, ('ever', 'last'))}")
        self.task, self.spec_embodiment, self.judged, self.images = task, spec, judged, images
        self.render_mode, self.render_size = render_mode, render_size
        self.metadata = {**type(self).metadata, "render_fps": round(spec.control_hz)}
        low = np.asarray(spec.action.low, np.float32) if spec.action.low else np.float32(-np.inf)
        high = np.asarray(spec.action.high, np.float32) if spec.action.high else np.float32(np.inf)
        self.action_space = spaces.Box(low, high, spec.action.shape, np.float32)
        parts: dict[str, spaces.Space[Any]] = {
            "state": spaces.Box(-np.inf, np.inf, spec.state.shape, np.float32),
            "instruction": spaces.Text(MAX_INSTRUCTION, min_length=0, charset=CHARSET),
        }
        if images:
            parts |= {c.name: spaces.Box(0, 255, c.shape, np.uint8) for c in spec.cameras}
        self.observation_space = spaces.Dict(parts)
        self.clips = (self.action_space.low, self.action_space.high)
        """What actions are clipped to."""
        self.instruction = ""
        self._steps: int | None = None

    @property
    @abstractmethod
    def disturbable(self) -> Disturbable:
        """What of an action may be disturbed in demonstrations."""

    @abstractmethod
    def begin(self, seed: int) -> str:
        """Start the episode of a seed; returns the instruction."""

    @abstractmethod
    def advance(self, action: np.ndarray) -> Outcome:
        """Apply one action (a,), float32 and inside the limits, for one control period."""

    @abstractmethod
    def read_state(self) -> np.ndarray:
        """Proprioception (s,)."""

    @abstractmethod
    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """What cameras see: name -> uint8 (height, width, 3), for each name's (height, width)."""

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now: an action (a,) in the spec's units."""
        raise ConfigError(
            f"{self.task.name}: there is no scripted expert for this task. Convert demonstrations of people (brachium "
            "convert --help), or record some by teleoperation; a benchmark takes them as protocol.store=FOLDER"
        )

    def other_instruction(self, rng: np.random.Generator) -> str:
        """An instruction of another task of the suite; for telling whether a policy listens."""
        raise ConfigError(f"{self.task.name}: this suite has one instruction only; control=shuffle says nothing here")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode. Options: ``split``, which has one value here, and ``misname`` (`other_instruction`)."""
        options = options or {}
        for option in options:
            if option not in OPTIONS:  # a typing error would silently evaluate something else
                raise ConfigError(f"unknown reset option {option!r}. {did_you_mean(str(option), OPTIONS)}")
        split = str(options.get("split", self.splits[0]))
        if split not in self.splits:
            raise ConfigError(f"{self.task.name}: no kind of instruction {split!r} here, only {list(self.splits)}")
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        self.instruction = self.begin(drawn)
        if options.get("misname"):
            self.instruction = self.other_instruction(np.random.default_rng([drawn, 0x315]))
        self._steps = 0
        return self._observe(), {"success": False, "task": self.task.name, "split": split}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Apply one action for one control period."""
        if self._steps is None:
            raise ConfigError("step() before reset(); call env.reset(seed=...) first")
        action = np.asarray(action, np.float32)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ConfigError(f"expected a finite action of shape {self.action_space.shape}, got {action}")
        box = self.action_space
        assert isinstance(box, spaces.Box)
        outcome = self.advance(np.clip(action, box.low, box.high))
        self._steps += 1
        late = self._steps >= self.task.max_steps
        success = outcome.success and (self.judged == "ever" or late or outcome.over)
        failed = bool(outcome.failure) and not success
        terminated = (success and self.judged == "ever") or failed or outcome.over
        truncated = late and not terminated
        failure = "" if success else outcome.failure or (ENDED if outcome.over else OUT_OF_TIME if truncated else "")
        info = {"success": success, "holds": outcome.success, "task": self.task.name, "failure": failure}
        return self._observe(), outcome.reward, terminated, truncated, info

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The first camera at `render_size`, for people: uint8 (size, size, 3)."""
        name = self.spec_embodiment.camera_names[0]
        height, width = self.spec_embodiment.cameras[0].shape[:2]
        scale = self.render_size / max(height, width)
        return self.pictures({name: (round(height * scale), round(width * scale))})[name]

    def _observe(self) -> dict[str, Any]:
        sizes = {c.name: (c.shape[0], c.shape[1]) for c in self.spec_embodiment.cameras}
        images = self.pictures(sizes) if self.images else {}
        return {"state": np.asarray(self.read_state(), np.float32), "instruction": self.instruction, **images}


def camera_features(
    sizes: Mapping[str, int | tuple[int, int]], known: tuple[str, ...], zoom: Mapping[str, float] | None = None
) -> tuple[FeatureSpec, ...]:
    """Specs of some cameras of a suite.

    Args:
        sizes: Camera name -> edge, or height and width [px].
        known: Cameras that there are.
        zoom: Camera -> how much nearer it looks than the suite's; it stands in the spec, for it is another view.

    Raises:
        ConfigError: Another camera, a size or a zoom that is none, or no camera.
    """
    found = []
    for name, by in (zoom or {}).items():
        if name not in sizes:
            raise ConfigError(f"zoom: no camera {name!r} among the cameras. {did_you_mean(str(name), sizes)}")
        if not 0.1 <= by <= 10.0:
            raise ConfigError(f"zoom.{name}: expected 0.1 to 10, got {by}")
    for name, size in sizes.items():
        if name not in known:
            raise ConfigError(f"cameras: no camera {name!r}. {did_you_mean(str(name), known)}")
        pair = (size, size) if isinstance(size, int) else tuple(size)
        if len(pair) != 2 or not all(isinstance(n, int) and 8 <= n <= 2048 for n in pair):
            raise ConfigError(f"cameras.{name}: expected a size from 8 to 2048 px, or [height, width], got {size!r}")
        by = (zoom or {}).get(name, 1.0)
        view = "" if by == 1.0 else f"zoom {by:g}"
        found.append(FeatureSpec(name=name, shape=(*pair, 3), dtype="uint8", frame=view))
    if not found:
        raise ConfigError(f"cameras: expected at least one of {list(known)}, got none")
    return tuple(found)


def require_suite(package: str, distribution: str, *, mujoco: bool = True) -> None:
    """Raise ConfigError where a suite is not installed, or MuJoCo is another than it needs, if it needs it."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package} is not installed. Type: pip install 'brachium[suites]'   (or: pip install {distribution})"
        )
    if mujoco:
        _require_mujoco(distribution)


def _require_mujoco(distribution: str) -> None:
    """MuJoCo 3.10 and later refuse scenes that these suites ship."""
    found = version("mujoco")
    if tuple(int(part) for part in found.split(".")[:2]) >= (3, 10):
        raise ConfigError(
            f"{distribution} does not run with MuJoCo {found}: expected 3.8. In a fresh environment (MuJoCo does not "
            "downgrade in place), type: pip install 'brachium[suites]'"
        )
