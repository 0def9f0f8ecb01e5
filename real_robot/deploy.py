"""The verb ``brachium deploy``: a policy, a robot, and everything between them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..console import human_time, log, require_disk, table
from ..errors import BrachiumError, ConfigError, NotFoundError
from ..policies.executor import ChunkExecutor
from ..policies.intervals import rate
from ..policies.remote import RemotePolicy
from .body import body_of
from .controller import MODES, Controller, Outcome
from .deploy_report import write_report
from .eyes import Freshness
from .inference import Inference
from .live import LiveView
from .pacing import Timing
from .policy_process import PolicyProcess
from .preflight import preflight, show
from .robot import Robot
from .run_log import RunLog
from .safety.guard import Rules, SafetyGuard
from .safety.stop import EmergencyStop, SignalStop
from .safety.zones import Box, KeepOut, model_check


def deploy(
    *,
    policy: str,
    robot: Robot,
    executor: Callable[..., ChunkExecutor],
    timing: Timing,
    rules: Rules,
    freshness: Freshness,
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
    stop = EmergencyStop()
    check = model_check(
        robot.spec,
        robot.model,
        workspace=workspace,
        keep_out=keep_out,
        table_height=table_height,
        margin=margin,
    )
    simulated = hasattr(robot, "reset")
    if not simulated and not instruction:
        raise ConfigError("what is the robot to do? Type: instruction='put the red cube in the bowl'")
    with contextlib.ExitStack() as stack:
        remote = stack.enter_context(_policy(policy, token, authority, device, threads))
        body = body_of(robot, robot.spec, remote.embodiment)
        acting = executor(remote)
        guard = SafetyGuard(robot.spec, 1.0 / timing.control_hz, rules=rules, check=check, stop=stop)
        if simulated:
            robot.connect()
            stack.callback(robot.disconnect)
            robot.reset(seed)  # type: ignore[attr-defined]
        else:
            robot.connect()
            stack.callback(robot.disconnect)
        checks = preflight(
            robot,
            body,
            remote,
            guard,
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
        rows: list[dict[str, Any]] = []
        stack.enter_context(SignalStop(stop))
        for number in range(episodes):
            controller = Controller(
                robot,
                body,
                inference,
                acting,
                SafetyGuard(robot.spec, 1.0 / timing.control_hz, rules=rules, check=check, stop=stop),
                timing=timing,
                freshness=freshness,
                mode=mode,
                confirm=_enter_pressed if mode == "step" else None,
                listener=logbook,
            )
            rows.append(_run(controller, robot, logbook, instruction, seconds, seed + number, number, episodes))
            _write(folder, rows, policy, remote, acting, timing, delay_ms, mode)
            if stop.why or rows[-1]["ending"] not in ("done", "time"):
                break
        if logbook is not None:
            logbook.flush()
    _print(rows)
    if report:
        log(f"report: {write_report(folder, checks)}")
    stopped = rows[-1]["ending"] not in ("done", "time")
    if stopped:
        log(f"the robot was stopped: {rows[-1]['ending']}: {rows[-1]['why']}")
    return 1 if stopped else 0


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
    robot: Any,
    logbook: RunLog | None,
    instruction: str | None,
    seconds: float,
    seed: int,
    number: int,
    episodes: int,
) -> dict[str, Any]:
    """One run, and the row about it."""
    told, limit, done, status = instruction or "", seconds, None, {}
    if hasattr(robot, "reset"):
        robot.release()
        robot.reset(seed)
        status = robot.status
        told, limit = instruction or status["instruction"], min(seconds, status["max_s"])
        robot.judge()

        def done() -> str:
            now = robot.status
            return "success" if now["success"] else now["failure"]

    if logbook is not None:
        logbook.begin(told, {"seed": seed, "robot": robot.spec.name, "mode": controller.mode}, ("deploy",))
    title = f"{told!r} on {robot.spec.name} ({number + 1} of {episodes})"
    try:
        with LiveView(controller, title):
            outcome = controller.run(told, seconds=limit, done=done, seed=seed)
    except BaseException:
        if logbook is not None:
            logbook.end(None)
        raise
    success: bool | None = None
    failure = ""
    if done is not None:
        status = robot.status
        success = bool(status["success"])
        failure = "" if success else (status["failure"] or "out of time")
    if logbook is not None:
        logbook.end(success)
    return _row(outcome, told, seed, success, failure)


def _row(outcome: Outcome, told: str, seed: int, success: bool | None, failure: str) -> dict[str, Any]:
    """What is written about a run."""
    telemetry = outcome.telemetry
    return {
        "instruction": told,
        "seed": seed,
        "success": success,
        "failure": failure,
        "ending": outcome.ending,
        "why": outcome.why,
        "seconds": round(outcome.seconds, 3),
        **telemetry.summary(),
        "interventions": [asdict(entry) for entry in outcome.interventions],
        "samples": telemetry.samples(),
    }


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    policy: str,
    remote: RemotePolicy,
    executor: ChunkExecutor,
    timing: Timing,
    delay_ms: float,
    mode: str,
) -> None:
    """The figures of all runs so far, in one file that is whole at any moment."""
    judged = [row for row in rows if row["success"] is not None]
    summary = {
        "policy": policy,
        "identity": dict(remote.identity),
        "embodiment": remote.embodiment.name,
        "executor": type(executor).__name__,
        "control_hz": timing.control_hz,
        "delay_ms": delay_ms,
        "mode": mode,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "total": rate(sum(bool(row["success"]) for row in judged), len(judged)) if judged else None,
        "runs": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".summary.json.partial"
    temporary.write_text(json.dumps(summary) + "\n")
    temporary.replace(folder / "summary.json")


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [
        (
            row["instruction"][:44],
            "" if row["success"] is None else ("success" if row["success"] else row["failure"]),
            row["ending"],
            f"{row['seconds']:.1f} s",
            f"{row['rate_hz']:.1f} Hz",
            f"{row['period_error_ms'].get('p99', 0):.2f} ms",
            f"{row['inference_ms'].get('p50', 0):.0f} ms",
            str(row["starved_ticks"]),
            str(len(row["interventions"])),
        )
        for row in rows[-12:]
    ]
    columns = [
        "instruction",
        "task",
        "ending",
        "time",
        "rate",
        "period error p99",
        "inference",
        "starved",
        "interventions",
    ]
    table(f"{len(rows)} runs" if len(rows) > 1 else "run", columns, shown)
    judged = [row for row in rows if row["success"] is not None]
    if judged:
        found = rate(sum(bool(row["success"]) for row in judged), len(judged))
        low, high = found["ci95"]
        spent = human_time(sum(row["seconds"] for row in judged))
        print(
            f"success {found['success']}/{found['episodes']} = {100 * found['success_rate']:.0f} % "
            f"[{100 * low:.0f}, {100 * high:.0f}] in {spent}"
        )


def _enter_pressed() -> bool:
    """Whether a line waits on standard input."""
    import select
    import sys

    try:
        ready, _, _ = select.select([sys.stdin], [], [], 0.0)
    except (OSError, ValueError) as error:
        raise BrachiumError("mode=step needs a terminal to press Enter on") from error
    return bool(ready) and bool(sys.stdin.readline())
