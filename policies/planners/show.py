"""The verb ``brachium plan``: what an instruction means, the plan for it, and how it goes."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ...console import log, table
from ...errors import ConfigError
from ..page import write_html
from ..video import write_video
from .base import Ask, Done, Infeasible, PlanContext, scene_text
from .evaluate import load_policy, require_physics
from .events import event_rows
from .executing import observed
from .goals import Unclear
from .lm.base import LanguageModel
from .parser import GoalParser
from .runner import HierarchicalRunner
from .search import satisfied
from .symbolic import SymbolicPlanner
from .wiring import Factory, assemble


def plan(
    *,
    instruction: str,
    planner: Factory,
    env: Callable[..., gymnasium.Env[Any, Any]],
    goals: Factory | None = None,
    lm: Callable[[], LanguageModel] | None = None,
    affordance: Factory | None = None,
    fallback: Factory | None = None,
    checkpoint: str | None = None,
    executor: Callable[..., Any] | None = None,
    eyes: Factory | None = None,
    detector: Factory | None = None,
    things: Sequence[str] = (),
    drawer_open: bool = False,
    termination: str = "two_key",
    look_error: float = 0.05,
    look_every: int = 1,
    run: bool = True,
    seed: int = 0,
    out: str = "outputs/plan",
) -> int:
    """Say what an instruction means and how it would be done, then do it and show how it went.

    Args:
        instruction: What is to be done; may be typed without its name: brachium plan "put the red cube in the drawer".
        planner: What says what to do next.
        env: Long-horizon work that can be asked for.
        goals: What says what an instruction comes to.
        lm: Language model of planner and goals.
        affordance: What says how likely skills are to succeed.
        fallback: Planner that is asked when the first proposes nothing that may be done.
        checkpoint: Policy that carries out skills in a world with physics; scripted experts do when null.
        executor: Turns its chunks into actions.
        eyes: What reads scenes in a world with physics; the truth is told when null.
        detector: What sees whether a skill is done; the scene's literals say so when null.
        things: What is on the table; a table with a bit of everything when empty.
        drawer_open: Whether the drawer stands open at first.
        termination: ``two_key``, ``planner`` or ``goal``.
        look_error: Share of looks at success and at the end that are wrong.
        look_every: Steps between two looks at scene, success and end.
        run: Also do it; else only plan.
        seed: Of the table and of what befalls the work.
        out: Folder for the video, the report and the log.
    """
    begin = time.monotonic()
    folder = Path(out)
    world: Any = env().unwrapped
    if not hasattr(world, "ask"):
        raise ConfigError(f"expected an environment that can be asked for work; {type(world).__name__} cannot")
    require_physics(world, checkpoint, eyes, detector)
    if hasattr(world, "record"):
        world.record, world.images = run, False  # people look at the motion; no planner here looks at pictures
    model = None if lm is None else lm()
    runner, parts = assemble(
        world,
        planner=planner,
        goals=goals,
        lm=model,
        affordance=affordance,
        fallback=fallback,
        gate=None,
        options={"termination": termination, "look_every": look_every},
        look_error=look_error,
        policy=load_policy(checkpoint, executor, world.spec_embodiment),
        eyes=eyes,
        detector=detector,
    )
    observation, _ = world.ask(instruction, things, drawer_open=drawer_open, seed=seed)
    seen = observed(observation, world.spec_embodiment)
    scene = world.scene if runner.scenes is None else runner.scenes.estimate(seen, 0)
    context = PlanContext(instruction=instruction, observation=seen, scene=scene, begun=scene, seed=seed)
    print(f"table    {', '.join(thing.name for thing in world.scene.things if thing.kind != 'table')}")
    print(f"scene    {scene_text(scene)}{'' if scene.source == 'sim' else f'   ({scene.source})'}")
    told = _first(context, runner.planner, parts["goals"])
    print(f"meaning  {told['meaning']}")
    print(f"plan     {told['plan']}")
    log(f"first plan after {1e3 * (time.monotonic() - begin):.0f} ms")
    if not run:
        return 0 if told["feasible"] else 1
    ended, pictures = _execute(world, runner, seed, observation)
    holds = _holds(parts["goals"], context, world)
    events = runner.log(0)
    rows = event_rows(events)
    table("what happened", ["step", "what", "", "why"], rows)
    verdict = _verdict(ended, holds)
    print(f"verdict  {verdict}")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"instruction": instruction, **told, "verdict": verdict, "events": events}
    (folder / "plan.json").write_text(json.dumps(about, indent=1) + "\n")
    _report(folder, world, about, rows, pictures)
    return 0 if isinstance(ended, Done) and holds is not False else 1


def _first(context: PlanContext, planner: Any, goals: Any) -> dict[str, Any]:
    """What the instruction means, and the plan that it comes to."""
    meaning = ""
    if isinstance(goals, GoalParser):
        try:
            found = goals(context)
            meaning = " or ".join("; ".join(map(str, goal)) for goal in found[:3]) + (
                " or ..." if len(found) > 3 else ""
            )
        except Unclear as error:
            return {"meaning": f"unclear ({error.kind}): {error}", "plan": "-", "feasible": False}
    if isinstance(planner, SymbolicPlanner):
        steps = planner.plan(context)
        if isinstance(steps, Infeasible):
            return {"meaning": meaning, "plan": f"infeasible: {steps.reason}", "feasible": False}
        if isinstance(steps, Ask):
            return {"meaning": meaning, "plan": f"ask: {steps.question} {', '.join(steps.options)}", "feasible": False}
        said = "; ".join(f"{k}. {call.instruction}" for k, call in enumerate(steps, start=1))
        return {"meaning": meaning, "plan": said or "nothing is left to do", "feasible": True}
    best = planner.propose(context).candidates[:3]
    said = ", ".join(f"{getattr(c.subgoal, 'text', 'done')} ({c.score:.2f})" for c in best)
    return {"meaning": meaning, "plan": f"first {said}", "feasible": bool(best)}


def _execute(
    world: Any, runner: HierarchicalRunner, seed: int, state: dict[str, Any]
) -> tuple[Any, list[tuple[int, np.ndarray]]]:
    """How it ended, and a picture after each step of control."""
    runner.reset(0, seed)
    pictures = [(0, np.asarray(world.render()))] if world.render_mode else []
    over, moves = False, hasattr(world, "expert_action")
    while not over:
        action = runner.act([observed(state, world.spec_embodiment, world.scene.stamp)], [0])[0]
        if runner.ended(0) is not None:
            break
        state, _, terminated, truncated, _ = world.step(action)
        over = terminated or truncated
        if world.render_mode and (moves or action[0] >= 0.0):
            pictures.append((world.steps, np.asarray(world.render())))
    return runner.ended(0), pictures


def _holds(goals: Any, context: PlanContext, world: Any) -> bool | None:
    """Whether the goal holds now; None where nobody knows what it is."""
    try:
        return satisfied(world.scene.facts, goals(context))
    except Unclear:
        return None


def _verdict(ended: Any, holds: bool | None) -> str:
    truth = {True: "the goal holds", False: "the goal does not hold", None: "what was meant is not known"}[holds]
    if ended is None:
        return f"out of time; {truth}"
    if isinstance(ended, Done):
        return f"done: {ended.reason}; {truth}"
    if isinstance(ended, Ask):
        return f"asks: {ended.question} {', '.join(ended.options)}"
    return f"infeasible ({ended.kind}): {ended.reason}; the robot holds still"


def _report(
    folder: Path,
    world: Any,
    about: Mapping[str, Any],
    rows: Sequence[tuple[str, str, str, str]],
    pictures: Sequence[tuple[int, np.ndarray]],
) -> None:
    video = ""
    frames = list(getattr(world, "frames", [])) or [picture for _, picture in pictures]
    if frames:
        path = folder / "plan.mp4"
        write_video(path, frames, fps=float(world.metadata["render_fps"]))
        video = base64.b64encode(path.read_bytes()).decode()
        log(f"video: {path}")
    told = {0, *(int(step) for step, *_ in rows)}
    shown = {step: _jpeg(picture) for step, picture in pictures if step in told}
    content = {"about": about, "rows": rows, "video": video, "pictures": shown, "first": shown.get(0, "")}
    log(f"report: {write_html(folder / 'report.html', __package__, 'plan.html.jinja', content)}")


def _jpeg(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode()
