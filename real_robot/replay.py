"""The verb ``brachium replay``: the actions of a recorded episode on a robot, behind the same safety layer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..console import log, table
from ..datasets.store import EpisodeStore
from ..errors import ConfigError, StoreError
from ..policies.executor import RecedingHorizon
from ..spec import ActionChunk, EmbodimentSpec, Guidance, Observation
from .cell import Cell
from .deploy_summary import Summary, run_row
from .eyes import Freshness
from .inference import Inference
from .live import LiveView
from .pacing import Timing
from .preflight import preflight, show
from .robot import Robot
from .run_log import RunLog
from .safety.guard import Rules
from .safety.zones import Box, KeepOut

CHUNK = 16


class RecordedPolicy:
    """Answers with the actions that were recorded for the time since its first observation; the last one is held.

    Args:
        embodiment: Whose actions they are.
        actions: float32 (n, a).
        times: When each was taken, from the episode's beginning, float64 (n,) [s].
        pace: Share of the recorded speed. Deltas cannot be slowed: their sum is the way.
    """

    noise_dim, takes_guidance, action_horizon = 1, False, CHUNK

    def __init__(
        self, embodiment: EmbodimentSpec, actions: np.ndarray, times: np.ndarray, *, pace: float = 1.0
    ) -> None:
        if not 0.0 < pace <= 1.0:
            raise ConfigError(f"expected pace above 0 and at most 1, got {pace}")
        if pace < 1.0 and embodiment.action.reference == "delta":
            raise ConfigError("pace=1 is the only one for delta actions: their sum is the way")
        self.embodiment = embodiment
        self._actions, self._times = np.asarray(actions, np.float32), np.asarray(times, float) / pace
        self._begin: float | None = None

    @property
    def seconds(self) -> float:
        """Length of the episode [s]."""
        return float(self._times[-1]) + 1.0 / self.embodiment.control_hz

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """Rows as they were executed at these times after the first observation."""
        chunks = []
        for observation in observations:
            self._begin = observation.timestamp if self._begin is None else self._begin
            moments = observation.timestamp - self._begin + np.arange(CHUNK) / self.embodiment.control_hz
            chunks.append(self._rows(moments))
        return ActionChunk(actions=np.stack(chunks), control_hz=self.embodiment.control_hz)

    def _rows(self, moments: np.ndarray) -> np.ndarray:
        """Absolute targets between those recorded; of deltas the one whose time it is, and none after the last."""
        if self.embodiment.action.reference == "absolute":
            columns = [np.interp(moments, self._times, column) for column in self._actions.T]
            rows = np.stack(columns, axis=1).astype(np.float32)
            if self.embodiment.action.gripper != "none":
                rows[:, -1] = self._actions[self._at(moments), -1]
            return rows
        rows = self._actions[self._at(moments)].copy()
        apart = np.abs(self._times[self._at(moments)] - moments)
        over = apart > 0.75 / self.embodiment.control_hz  # after the end, and where nothing was recorded
        rows[over, : rows.shape[1] - (self.embodiment.action.gripper != "none")] = 0.0
        return rows

    def _at(self, moments: np.ndarray) -> np.ndarray:
        half = 0.5 / self.embodiment.control_hz
        return np.clip(np.searchsorted(self._times, moments + half, side="right") - 1, 0, len(self._times) - 1)


def replay(
    *,
    store: str,
    robot: Robot,
    timing: Timing,
    rules: Rules,
    freshness: Freshness,
    episode: int = 0,
    pace: float = 1.0,
    reach: float = 0.3,
    workspace: Box | None = None,
    keep_out: Sequence[KeepOut] = (),
    table_height: float | None = 0.0,
    margin: float = 0.0,
    keep: bool = True,
    out: str = "outputs/replay",
) -> int:
    """Send the actions of a recorded episode to a robot: does it still do what it did?

    A simulated robot is put into the scene of the episode. The robot must stand near where the episode begins. The exit
    code is 0 when the episode was replayed to its end, 1 when something stopped the robot.

    Args:
        store: Episode store with the episode.
        robot: The driver, whose embodiment must be the store's.
        timing: Rate of commands, and patience.
        rules: What the safety layer insists on.
        freshness: How old pictures may be.
        episode: Its index (``brachium inspect`` lists them).
        pace: Share of the recorded speed, for absolute actions.
        reach: How far each state may be from the episode's first one at the start, in its unit.
        workspace: Box that the tool stays in, where there is a model of the robot.
        keep_out: Zones that no part of the robot touches.
        table_height: Top of the table in the base frame [m]; null for no table.
        margin: Distance kept from the table and between parts of the robot [m].
        keep: Write what happened into an episode store.
        out: Folder for it and the figures.
    """
    source = EpisodeStore.open(store)
    if not 0 <= episode < source.num_episodes:
        raise StoreError(f"{store}: expected an episode from 0 to {source.num_episodes - 1}, got {episode}")
    recorded, about = source.episode(episode), source.episodes[episode]
    cell = Cell(
        robot,
        timing=timing,
        rules=rules,
        freshness=freshness,
        workspace=workspace,
        keep_out=keep_out,
        table_height=table_height,
        margin=margin,
    )
    policy = RecordedPolicy(source.embodiment, recorded.action, recorded.timestamp, pace=pace)
    body, folder, seed = cell.body(source.embodiment), Path(out), int(about.meta.get("seed", 0))
    told = about.instruction or "(no instruction)"
    summary = Summary(policy=f"{store} episode {episode}", control_hz=timing.control_hz, delay_ms=0.0, mode="replay")
    with contextlib.ExitStack() as stack:
        stack.enter_context(cell.connected(seed))
        show(preflight(robot, body, None, cell.guard(), control_hz=timing.control_hz, freshness=freshness))
        cell.scene(seed)
        _require_start(body.state(robot.read().position), recorded.state[0], source.embodiment, reach)
        inference = Inference(policy)
        stack.callback(inference.close)
        logbook = RunLog(folder / "store", body.embodiment, robot.spec, source="replay") if keep else None
        if logbook is not None:
            stack.callback(logbook.close)
            logbook.begin(about.instruction or told, {"seed": seed, "replay_of": about.id}, ("replay",))
        stack.enter_context(cell.signals())
        controller = cell.controller(body, inference, RecedingHorizon(policy, execute_horizon=4), listener=logbook)
        with LiveView(controller, f"replay of episode {episode}: {told!r}"):
            try:
                outcome = controller.run(told, seconds=policy.seconds)
            except BaseException:
                if logbook is not None:
                    logbook.end(None, ("interrupted",))
                raise
        ended = body.state(robot.read().position) if outcome.ending == "time" else None
        success, failure = cell.verdict()
        if logbook is not None:
            logbook.end(success, () if outcome.ending == "time" else ("interrupted",))
            logbook.flush()
    summary.add(run_row(outcome, told, seed, success, failure), folder)
    summary.show()
    names = source.embodiment.state.names
    if names and ended is not None:
        off = np.abs(ended - recorded.state[-1])
        rows = [(name, f"{recorded.state[-1][k]:.3f}", f"{off[k]:.3f}") for k, name in enumerate(names)]
        table("where it ended", ["state", "recorded", "off by"], rows)
    if outcome.ending != "time":
        log(f"the robot was stopped: {outcome.ending}: {outcome.why}")
        return 1
    return 0


def _require_start(here: np.ndarray, there: np.ndarray, embodiment: EmbodimentSpec, reach: float) -> None:
    """Refuse an episode that begins elsewhere: the robot would go the straight way, through whatever is there."""
    off = np.abs(np.asarray(here, float) - np.asarray(there, float))
    if (off > reach).any():
        worst = int(off.argmax())
        name = embodiment.state.names[worst] if embodiment.state.names else f"state {worst}"
        raise ConfigError(
            f"the episode begins elsewhere: {name} is {here[worst]:.3f}, was {there[worst]:.3f}, and {reach} apart are "
            "allowed. Bring the robot there first"
        )
