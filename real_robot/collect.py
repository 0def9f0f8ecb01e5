"""The verb ``brachium record robot=... teleop=...``: a person shows, an episode store keeps it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import human_time, log, require_disk, table
from ..datasets.store import EpisodeStore
from ..datasets.writer import EpisodeWriter
from ..errors import ConfigError
from .cell import Cell
from .eyes import Freshness
from .live import LiveView
from .pacing import Timing
from .preflight import preflight, show
from .robot import Robot
from .run_log import RunLog
from .safety.guard import Rules
from .safety.zones import Box, KeepOut
from .teleop.pilot import Pilot, Reach
from .teleop.teleoperator import Teleoperator

TAG = "teleop"


def collect(
    *,
    robot: Robot,
    teleop: Teleoperator,
    out: str,
    timing: Timing,
    rules: Rules,
    freshness: Freshness,
    reach: Reach,
    instruction: str | None = None,
    subtasks: Sequence[str] = (),
    episodes: int = 10,
    seconds: float = 60.0,
    seed: int = 0,
    control_hz: float = 10.0,
    workspace: Box | None = None,
    keep_out: Sequence[KeepOut] = (),
    table_height: float | None = 0.0,
    margin: float = 0.0,
) -> int:
    """Record demonstrations of a person into an episode store: on a robot, or on a simulated one.

    Every motion goes through the safety layer. An episode begins when the person first moves and ends by a key
    (success, failure, discard), by success where the robot is simulated, or when time is up. What is in the store is
    kept; the same command typed again goes on.

    Args:
        robot: The driver.
        teleop: The device.
        out: Folder of the store; made where it is missing.
        timing: Rate of commands, and patience.
        rules: What the safety layer insists on.
        freshness: How old pictures may be; steps with older ones are not recorded.
        reach: How fast the device moves the robot.
        instruction: What is shown; a simulated robot has instructions of its own.
        subtasks: Names of the parts of the task; the key `mark` begins the next.
        episodes: Number of episodes that the store shall have of this instruction (of these seeds, where simulated).
        seconds: Longest episode [s].
        seed: First scene where the robot is simulated.
        control_hz: Rate of the recorded steps, of a robot whose embodiment does not say [Hz].
        workspace: Box that the tool stays in, where there is a model of the robot.
        keep_out: Zones that no part of the robot touches.
        table_height: Top of the table in the base frame [m]; null for no table.
        margin: Distance kept from the table and between parts of the robot [m].
    """
    if episodes < 1 or not seconds > 0 or not 0 < control_hz <= timing.control_hz:
        raise ConfigError("expected episodes of at least 1, seconds above 0 and control_hz up to timing.control_hz")
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
    if not cell.is_simulated and not instruction:
        raise ConfigError("what is shown? Type: instruction='put the red cube in the bowl'")
    body = cell.body(None, control_hz)
    pilot = Pilot(teleop, robot.spec, robot.model, reach=reach, always=True, limits=cell.limits)
    path = Path(out)
    require_disk(path.parent, 200e6, "recording")
    todo = _todo(path, instruction, seed, episodes, cell.is_simulated)
    if not todo:
        log(f"{out}: has all {episodes} episodes already; nothing to record")
        return 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(teleop)  # a device that is not there is told before the robot is connected
        stack.enter_context(cell.connected(todo[0]))
        show(
            preflight(
                robot,
                body,
                None,
                cell.guard(),
                control_hz=timing.control_hz,
                freshness=freshness,
                instruction=instruction or "",
            )
        )
        logbook = RunLog(path, body.embodiment, robot.spec, source="teleop")
        stack.callback(logbook.close)
        stack.enter_context(cell.signals())
        table(f"{teleop.name} moves {robot.spec.name}", ["key", "meaning"], teleop.describe())
        kept, kind = 0, ""
        while todo:
            kind = _episode(cell, body, pilot, logbook, todo[0], instruction, subtasks, seconds, len(todo))
            if kind in ("success", "failure", "kept"):
                kept += 1
                todo.pop(0)
            logbook.flush()
            if kind in ("stop", "stopped") or cell.stop.why or logbook.failed:
                break
    log(f"{out}: {kept} episodes more" + (f", {len(todo)} to go: type the same command again" if todo else ""))
    if pilot.failed:
        log(f"the device: {pilot.failed}")
    return 1 if pilot.failed or logbook.failed or kind == "stopped" else 0


def _todo(path: Path, instruction: str | None, seed: int, episodes: int, simulated: bool) -> list[int]:
    """Seeds of the episodes that the store lacks."""
    wanted = list(range(seed, seed + episodes))
    if not path.exists():
        return wanted
    store = EpisodeStore.open(path)
    EpisodeWriter(store, salvage="nothing").close()  # what a killed recording was about to commit
    mine = [e for e in store.refresh().episodes if TAG in e.tags and "interrupted" not in e.tags]
    if simulated:
        have = {int(e.meta["seed"]) for e in mine if "seed" in e.meta}
        return [one for one in wanted if one not in have]
    return wanted[sum(e.instruction == instruction for e in mine) :]


def _episode(
    cell: Cell,
    body: Any,
    pilot: Pilot,
    logbook: RunLog,
    seed: int,
    instruction: str | None,
    subtasks: Sequence[str],
    seconds: float,
    left: int,
) -> str:
    """One episode; how it ended: ``success``, ``failure``, ``kept`` (nobody said), ``discard``, ``stop`` (the person
    ends the session) or ``stopped`` (the robot)."""
    status = cell.scene(seed)
    told = instruction or status["instruction"]
    meta = {"seed": seed, "robot": cell.robot.spec.name, "teleop": True, "subtasks": list(subtasks)}
    pilot.restart()
    logbook.begin(told, meta, (TAG,))
    said: list[str] = []

    def done() -> str:
        while pilot.events:
            event = pilot.events.popleft()
            if event == "mark":
                number = logbook.mark()
                name = subtasks[number] if number < len(subtasks) else str(number)
                log(f"subtask {name}")
            else:
                said.append(event)
                return event
        success, failure = cell.verdict()
        if success or failure:
            said.append("success" if success else "failure")
            return said[-1]
        return ""

    controller = cell.controller(body, None, None, human=pilot, listener=logbook)
    try:
        with LiveView(controller, f"{told!r}: move to begin ({left} to go)"):
            outcome = controller.run(told, seconds=seconds, done=done)
    except BaseException:
        logbook.end(None, ("interrupted",))
        raise
    steps, kind = logbook.steps, said[-1] if said else "kept"
    if kind == "discard" or not steps:
        logbook.discard()
        kind = kind if kind == "stop" else "discard"
    elif outcome.ending in ("done", "time") and kind != "stop":
        logbook.end({"success": True, "failure": False}.get(kind))
    else:
        logbook.end(None, ("interrupted",))
    log(f"{told!r}: {kind}, {steps} steps in {human_time(outcome.seconds)}, {len(outcome.interventions)} interventions")
    if outcome.ending not in ("done", "time"):
        log(f"the robot was stopped: {outcome.ending}: {outcome.why}")
        return "stopped"
    return kind
