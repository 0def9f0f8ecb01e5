"""A robot with everything round it: what it may not touch, its rules, its emergency stop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..spec import EmbodimentSpec
from .body import Body, body_of, own_embodiment
from .controller import Controller, Human, Listener
from .eyes import Freshness
from .inference import Inference
from .pacing import Timing
from .robot import Robot
from .safety.guard import Rules, SafetyGuard
from .safety.stop import EmergencyStop, SignalStop
from .safety.zones import Box, KeepOut, model_check
from .spec import MotionLimits


class Cell:
    """One robot, ready to be moved under one set of rules.

    Args:
        robot: The driver, not connected.
        timing, rules, freshness: Of every run.
        workspace, keep_out, table_height, margin: See `model_check`.
    """

    def __init__(
        self,
        robot: Robot,
        *,
        timing: Timing,
        rules: Rules,
        freshness: Freshness,
        workspace: Box | None,
        keep_out: Sequence[KeepOut],
        table_height: float | None,
        margin: float,
    ) -> None:
        self.robot, self.timing, self.freshness = robot, timing, freshness
        self.stop = EmergencyStop()
        self._rules = rules
        self._check = model_check(
            robot.spec,
            robot.model,
            workspace=workspace,
            keep_out=keep_out,
            table_height=table_height,
            margin=margin,
        )

    @property
    def limits(self) -> MotionLimits:
        """Of the robot under the rules."""
        return self._rules.tighten(self.robot.spec.limits)

    @property
    def is_simulated(self) -> bool:
        """Whether scenes can be set up and judged by the robot itself."""
        return hasattr(self.robot, "reset")

    def body(self, embodiment: EmbodimentSpec | None, control_hz: float = 10.0) -> Body:
        """What makes the robot an embodiment; its own axes, at a rate, where none is asked for.

        Raises:
            SpecMismatchError, RobotError: See `body_of`.
        """
        return body_of(self.robot, self.robot.spec, embodiment or own_embodiment(self.robot, control_hz))

    def guard(self) -> SafetyGuard:
        """A safety layer for one run."""
        return SafetyGuard(
            self.robot.spec, 1.0 / self.timing.control_hz, rules=self._rules, check=self._check, stop=self.stop
        )

    @contextlib.contextmanager
    def connected(self, seed: int = 0) -> Iterator[None]:
        """The robot connected; a simulated one in the scene of `seed`."""
        with self.robot:
            if self.is_simulated:
                self.robot.reset(seed)  # type: ignore[attr-defined]
            yield

    def signals(self) -> SignalStop:
        """Ctrl-C and SIGTERM press the emergency stop while the block runs."""
        return SignalStop(self.stop)

    def scene(self, seed: int) -> dict[str, Any]:
        """Set up the scene of `seed` where the robot is simulated, and have it judged; what the robot says of it."""
        robot: Any = self.robot
        if not self.is_simulated:
            return {}
        robot.release()
        robot.reset(seed)
        status: dict[str, Any] = robot.status
        robot.judge()
        return status

    def verdict(self) -> tuple[bool | None, str]:
        """Whether the task is done, and why not; None where nobody can tell."""
        if not self.is_simulated:
            return None, ""
        status = self.robot.status  # type: ignore[attr-defined]
        return bool(status["success"]), str(status["failure"])

    def controller(
        self,
        body: Body,
        inference: Inference | None,
        executor: Any,
        *,
        mode: str = "run",
        confirm: Any = None,
        human: Human | None = None,
        listener: Listener | None = None,
    ) -> Controller:
        """A control loop for one run, behind a safety layer of its own."""
        return Controller(
            self.robot,
            body,
            inference,
            executor,
            self.guard(),
            timing=self.timing,
            freshness=self.freshness,
            mode=mode,
            confirm=confirm,
            human=human,
            listener=listener,
        )
