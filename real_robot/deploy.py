"""The verb ``brachium deploy``: a policy, a robot, and everything between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..console import log, require_disk, table
from ..errors import BrachiumError, ConfigError, NotFoundError
from ..policies.executor import ChunkExecutor
from ..policies.remote import RemotePolicy
from .cell import Cell
from .controller import MODES, Controller
from .deploy_report import write_report
from .deploy_summary import Summary, run_row
from .eyes import Freshness
from .inference import Inference
from .live import LiveView
from .pacing import Timing
from .policy_process import PolicyProcess
from .preflight import preflight, show
from .robot import Robot
from .run_log import RunLog
from .safety.guard import Rules
from .safety.zones import Box, KeepOut
from .teleop.pilot import Pilot, Reach
from .teleop.teleoperator import Teleoperator


def deploy(
    *,
    policy: str,
    robot: Robot,
    executor: Callable[..., ChunkExecutor],
    timing: Timing,
    rules: Rules,
    freshness: Freshness,
    reach: Reach,
    teleop: Teleoperator | None = None,
    instruction: str | None = None,
    seconds: float = 30.0,
    episodes: int = 1,
    seed: int = 1_000_000,
    mode: str = "run",
    workspace: Box | None = None,
    keep_out: Sequence[KeepOut] = (),
    table_height: float | None = 0.0,
    margin: float = 0.0,
    token: str | None = None,
    authority: str | None = None,
    device: str = "auto",
    threads: int | None = 1,
    under_way: int = 1,
    delay_ms: float = 0.0,
    keep: bool = True,
    report: bool = True,
    out: str = "outputs/deploy",
) -> int:
    """Run a policy on a robot: preflight, control loop, safety layer, log and report.

    Nothing moves before the preflight has passed. Ctrl-C brings the robot to rest and ends the run; what was done is
    kept. The exit code is 0 when every run ended by itself, 1 when something stopped the robot.

    Args:
        policy: Folder of a checkpoint, which is then served from a process of its own, or the address of a policy
            server (``ws://HOST:PORT``).
        robot: The driver.
        executor: When to ask for chunks, and what overlapping ones amount to.
        timing: Rate of commands, and patience.
        rules: What the safety layer insists on.
        freshness: How old what the policy sees may be.
        reach: How fast a person's device moves the robot.
        teleop: Device by which a person takes over at any moment and gives back by letting go; what they do is recorded
            as a correction (DAgger), and their keys say how the run went.
        instruction: What to do; a simulated robot has instructions of its own.
        seconds: Time of a run; a simulated robot's tasks have times of their own [s].
        episodes: Runs, one after another.
        seed: Of the first run's draws, and scene where the robot is simulated.
        mode: ``run``; ``shadow``: the policy runs and the robot does not move; ``step``: each chunk waits for Enter.
        workspace: Box that the tool stays in, where there is a model of the robot.
        keep_out: Zones that no part of the robot touches.
        table_height: Top of the table in the base frame [m]; null for no table.
        margin: Distance kept from the table and between parts of the robot [m].
        token: What the policy server asks for.
        authority: PEM file of the authority that its certificate is from.
        device: Where a checkpoint's model runs: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of a checkpoint's model.
        under_way: Requests to the policy at once.
        delay_ms: Hold every answer of the policy back for so long, to see what it costs [ms].
        keep: Write the runs into an episode store.
        report: Write a report.
        out: Folder for the store, the figures and the report.
    """
    if mode not in MODES:
        raise ConfigError(f"expected mode to be one of {MODES}, got {mode!r}")
    if episodes < 1 or under_way < 1 or delay_ms < 0 or not seconds > 0:
        raise ConfigError("expected episodes and under_way of at least 1, delay_ms of at least 0 and seconds above 0")
    folder = Path(out)
    require_disk(folder, 100e6, "the log of a run")
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
    if mode == "step" and teleop is not None:
        raise ConfigError("mode=step asks for Enter, which a device's keys would take: type teleop=null")
    pilot = None if teleop is None else Pilot(teleop, robot.spec, robot.model, reach=reach, limits=cell.limits)
    if not cell.is_simulated and not instruction:
        raise ConfigError("what is the robot to do? Type: instruction='put the red cube in the bowl'")
    summary = Summary(policy=policy, control_hz=timing.control_hz, delay_ms=delay_ms, mode=mode)
    with contextlib.ExitStack() as stack:
        if teleop is not None:
            stack.enter_context(teleop)  # a device that is not there is told before anything is loaded or connected
        remote = stack.enter_context(_policy(policy, token, authority, device, threads))
        body, acting = cell.body(remote.embodiment), executor(remote)
        stack.enter_context(cell.connected(seed))
        checks = preflight(
            robot,
            body,
            remote,
            cell.guard(),
            control_hz=timing.control_hz,
            delay_s=delay_ms * 1e-3,
            freshness=freshness,
            instruction=instruction or "",
        )
        show(checks)
        inference = Inference(
            remote, seed=seed, under_way=under_way, delay_s=delay_ms * 1e-3, temperature=acting.temperature
        )
        stack.callback(inference.close)
        logbook = RunLog(folder / "store", remote.embodiment, robot.spec) if keep else None
        if logbook is not None:
            stack.callback(logbook.close)
        if teleop is not None:
            table(f"{teleop.name} takes over", ["key", "meaning"], teleop.describe())
        summary.of(remote, acting)
        stack.enter_context(cell.signals())
        for number in range(episodes):
            controller = cell.controller(
                body,
                inference,
                acting,
                mode=mode,
                confirm=_enter_pressed if mode == "step" else None,
                human=pilot,
                listener=logbook,
            )
            row = _run(controller, cell, pilot, logbook, instruction, seconds, seed + number, (number, episodes))
            summary.add(row, folder)
            if cell.stop.why or row["ending"] not in ("done", "time") or row["said"] == "stop":
                break
        if logbook is not None:
            logbook.flush()
    summary.show()
    if report:
        log(f"report: {write_report(folder, checks)}")
    last = summary.rows[-1]
    stopped = last["ending"] not in ("done", "time")
    if stopped:
        log(f"the robot was stopped: {last['ending']}: {last['why']}")
    lost = pilot.failed if pilot is not None else ""
    if lost:
        log(f"the device: {lost}")
    return 1 if stopped or lost or (logbook is not None and logbook.failed) else 0


@contextlib.contextmanager
def _policy(
    where: str, token: str | None, authority: str | None, device: str, threads: int | None
) -> Iterator[RemotePolicy]:
    """The policy behind an address, or a checkpoint in a process of its own."""
    with contextlib.ExitStack() as stack:
        if "://" in where:
            remote = RemotePolicy(where, token=token, authority=authority)
        else:
            if not Path(where).is_dir():
                raise NotFoundError(
                    f"policy={where}: expected the folder of a checkpoint or an address such as ws://127.0.0.1:8000. "
                    "Type: brachium list checkpoints"
                )
            log(f"loading {where} in a process of its own")
            process = stack.enter_context(PolicyProcess(where, device=device, threads=threads))
            remote = RemotePolicy(process.address, token=process.token)
        try:
            yield remote
        finally:
            remote.close()


def _run(
    controller: Controller,
    cell: Cell,
    pilot: Pilot | None,
    logbook: RunLog | None,
    instruction: str | None,
    seconds: float,
    seed: int,
    place: tuple[int, int],
) -> dict[str, Any]:
    """One run, the `place[0]`-th of `place[1]`, and the row about it."""
    status = cell.scene(seed)
    told, limit = instruction or "", seconds
    if status:
        told, limit = instruction or status["instruction"], min(seconds, status["max_s"])
    if pilot is not None:
        pilot.restart()
    said: list[str] = []

    def done() -> str:
        while pilot is not None and pilot.events:
            event = pilot.events.popleft()
            if event == "mark" and logbook is not None:
                logbook.mark()
            elif event != "mark":
                said.append(event)
                return event
        success, failure = cell.verdict()
        return "success" if success else failure

    if logbook is not None:
        about = {"seed": seed, "robot": cell.robot.spec.name, "mode": controller.mode}
        tags = ("deploy", "shadow") if controller.mode == "shadow" else ("deploy",)
        logbook.begin(told, about, tags)
    title = f"{told!r} on {cell.robot.spec.name} ({place[0] + 1} of {place[1]})"
    try:
        with LiveView(controller, title):
            outcome = controller.run(told, seconds=limit, done=done, seed=seed)
    except BaseException:
        if logbook is not None:
            logbook.end(None, ("interrupted",))
        raise
    word = said[-1] if said else ""
    success, failure = cell.verdict()
    if success is None:
        success = {"success": True, "failure": False}.get(word)
    failure = "" if success is not False else (failure or ("a person said so" if word else "out of time"))
    if logbook is not None and word == "discard":
        logbook.discard()
    elif logbook is not None:
        logbook.end(success)
    return {**run_row(outcome, told, seed, success, failure), "said": word}


def _enter_pressed() -> bool:
    """Whether a line waits on standard input."""
    import select
    import sys

    try:
        ready, _, _ = select.select([sys.stdin], [], [], 0.0)
    except (OSError, ValueError) as error:
        raise BrachiumError("mode=step needs a terminal to press Enter on") from error
    return bool(ready) and bool(sys.stdin.readline())
