"""The verb ``brachium benchmark``: a suite of others by its published protocol, beside the published figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .console import human_time, log, table
from .datasets.store import EpisodeStore
from .envs.record import RecordingOptions, make_source, record_from, recorded_seeds
from .errors import ConfigError, did_you_mean
from .hardware import hardware
from .identity import digest
from .policies.evaluate import evaluate, look_at
from .policies.intervals import mean_of_rates, rate
from .spec import EmbodimentSpec
from .stages import StageClock, read_json, train_once, write_json
from .vla.optim import HABITS, Optimization
from .vla.recipe import Recipe

TRIES = 20
"""Seeds that are tried for each demonstration before the expert is given up."""
EVALUATED = 1_000_000
"""Episodes are evaluated from this seed on; demonstrations have seeds below."""
CURVE_SEED = 5_000_000
"""First seed of the episodes by which success over training is shown; those of the result are others."""
TRAINED_ON = "trained_on.json"
OVER = {"episodes": "episodes", "groups": "groups of tasks"}
"""What a rate is over, and what it is called."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure.

    Attributes:
        name: Of the policy.
        success: Success rate [%], as the source gives it.
        source: Where it stands: paper and table.
        note: What is not as here: data, size, protocol.
        over: What the rate is over: ``episodes``, or ``groups``: the mean of the rates of groups of tasks.
    """

    name: str
    success: float
    source: str
    note: str = ""
    over: str = "episodes"

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ConfigError(f"published {self.name}: unknown over {self.over!r}. {did_you_mean(self.over, OVER)}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a suite is measured, and what others measured.

    Attributes:
        title: For people.
        rules: The published protocol, and what of ours differs, in a few sentences.
        suite: Task name -> environment factory.
        model: Recipe of the policy.
        optimization: How it is trained.
        executor: Turns chunks into actions.
        recording: Disturbances of the demonstrations.
        demos: Successful demonstrations a task.
        store: A store with demonstrations in place of recorded ones; where a suite has no experts.
        episodes: Evaluation episodes a task and seed.
        seeds: Evaluation seeds.
        seed: First seed of evaluation episodes.
        snapshots: Points of the curve of success over training; 0 for none.
        curve_episodes: Episodes a task of each point.
        tune: How the encoder is trained; see ``brachium train``.
        encoder: Pretrained model in place of one from scratch; see ``brachium train``.
        published: Figures of others.
        groups: Name -> tasks, where others give the mean of such groups' rates: ours is given both ways then.
    """

    title: str
    rules: str
    suite: Mapping[str, Callable[..., Any]]
    model: Recipe
    optimization: Optimization
    executor: Callable[..., Any]
    recording: RecordingOptions = field(default_factory=RecordingOptions)
    demos: int = 50
    store: str | None = None
    episodes: int = 10
    seeds: int = 3
    seed: int = 1_000_000
    snapshots: int = 3
    curve_episodes: int = 5
    tune: str = "full"
    encoder: str | None = None
    published: Sequence[Published] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low = {k: getattr(self, k) for k in ("demos", "episodes", "seeds", "curve_episodes") if getattr(self, k) < 1}
        if low or self.snapshots < 0:
            raise ConfigError(f"protocol: expected at least 1 (snapshots: 0), got {low or self.snapshots}")
        last = CURVE_SEED - self.episodes * self.seeds
        if not EVALUATED <= self.seed <= last:
            raise ConfigError(
                f"protocol.seed: expected {EVALUATED} to {last}, got {self.seed}: demonstrations have seeds below, "
                "episodes of the curve above"
            )
        strange = {task for tasks in self.groups.values() for task in tasks} ^ set(self.suite)
        if self.groups and strange:
            raise ConfigError(
                f"protocol.groups: expected each task of the suite in a group and no others, not so: "
                f"{sorted(strange)}. Without means over groups, type: ~protocol.groups"
            )


def benchmark(
    *,
    protocol: Protocol,
    vector: Callable[..., Any],
    out: str | None = None,
    workers: int = 2,
    num_envs: int = 8,
    videos: int = 2,
    device: str = "auto",
) -> int:
    """Record (or reuse) -> train -> evaluate by a suite's published protocol -> a report beside the published figures.

    Everything lands in one folder. A second run reuses what is there and says so; an interrupted one goes on.

    Args:
        protocol: Which suite, how it is measured, and what others measured.
        vector: Makes a vector environment from factories.
        out: Folder for everything; null for one of the protocol's title below outputs/benchmark.
        workers: Recording processes.
        num_envs: Environments at once in evaluation.
        videos: Videos a task, failures first.
        device: Where it is trained and evaluated: ``cpu``, ``cuda`` or ``auto``.
    """
    from .vla.train import choose_device

    place = choose_device(device)
    _require_fitting(protocol, num_envs, workers)
    folder = Path(out or f"outputs/benchmark/{re.sub('[^a-z0-9]+', '_', protocol.title.lower())}")
    folder.mkdir(parents=True, exist_ok=True)
    clock = StageClock(folder / "seconds.json")
    log(f"brachium benchmark: {protocol.title}, {len(protocol.suite)} tasks, in {folder}")
    stores = _demonstrations(protocol, folder, clock, workers)
    request = _request(protocol, stores)
    run = folder / f"run-{protocol.optimization.seed}-{digest(request, length=8)}"
    episodes = protocol.episodes * protocol.seeds
    asked = f"eval-{digest(protocol.suite, protocol.executor, protocol.seed, episodes, length=8)}"
    with clock.stage("train", run) as stage:
        stage.reused = not _train(protocol, stores, run, request, clock, place)
    rolled: dict[str, Any] = {
        "executor": protocol.executor,
        "vector": vector,
        "suite": protocol.suite,
        "num_envs": num_envs,
        "splits": {"train": 1.0},
        "device": place,
        "report": False,
    }
    with clock.stage("curve", run) as stage:
        curve, stage.reused = _curve(protocol, run, rolled)
    with clock.stage(asked, run) as stage:
        evaluate(
            checkpoint=str(run / "checkpoint"),
            out=str(run / "eval"),
            episodes=episodes,
            seed=protocol.seed,
            videos=videos,
            **rolled,
        )
        summary = read_json(run / "eval" / "summary.json")
        stage.reused = not summary["this_run"]["episodes"]
    spent = {
        "record": sum(clock.only("record", store) for store in stores),
        "train": float(read_json(run / "checkpoint" / "meta.json")["seconds"]["total"]),
        "eval": clock.only(asked, run),
    }
    result = _result(protocol, run, stores, spent, curve)
    write_json(run / "result.json", result)
    shutil.copyfile(run / "result.json", folder / "result.json")
    from .policies.report import write_report

    told = {"title": f"the policy for {protocol.title}", "ranking": ranking(result)}
    report = write_report(run / "eval", run / "checkpoint", extra=result | told)
    shutil.copyfile(report, folder / "report.html")
    _farewell(protocol, result, folder)
    return 0


def _require_fitting(protocol: Protocol, num_envs: int, workers: int) -> None:
    """What would fail after hours of recording and training fails now."""
    if num_envs < 1 or workers < 1:
        raise ConfigError(f"expected num_envs and workers of at least 1, got {num_envs} and {workers}")
    spec: EmbodimentSpec | None = None
    for make in protocol.suite.values():
        _, spec, _ = look_at(make, spec)
    if protocol.store is not None and spec is not None:
        EpisodeStore.open(protocol.store).schema.embodiment.require_same(spec, f"store {protocol.store}", "the suite")
    if spec is not None:
        protocol.executor(_Untrained(action_horizon=protocol.model.action_horizon, embodiment=spec))


@dataclass(frozen=True, kw_only=True)
class _Untrained:
    """What an executor asks of a policy before there is one."""

    action_horizon: int
    embodiment: EmbodimentSpec


def _demonstrations(protocol: Protocol, folder: Path, clock: StageClock, workers: int) -> list[Path]:
    """The stores to train on, one a task, with as many successes each as the protocol says."""
    if protocol.store is not None:
        return [Path(protocol.store)]
    shared = (protocol.recording, protocol.demos, __version__, version("mujoco"))
    targets = {
        name: folder / "demonstrations" / f"{name}-{digest(make, *shared, length=8)}"
        for name, make in protocol.suite.items()
    }
    for name, target in targets.items():
        with clock.stage("record", target) as stage:
            stage.reused = not _record(protocol.suite[name], target, protocol, workers)
    return list(targets.values())


def _record(make: Callable[..., Any], store: Path, protocol: Protocol, workers: int) -> bool:
    """Record one task until it has enough successes; whether anything was to record. Failed seeds are passed over."""
    source = partial(make_source, make, vars(protocol.recording))
    name, tried, wanted = source().name, 0, protocol.demos
    have = len(recorded_seeds(EpisodeStore.open(store), name)) if store.exists() else 0
    if have >= wanted:
        log(f"{store}: has all {wanted} demonstrations of {name} already")
        return False
    while have < wanted:
        if tried >= TRIES * wanted:
            raise ConfigError(
                f"{name}: the expert succeeded in {have} of {tried} episodes. Type: protocol.recording.noise=0"
            )
        if tried:
            log(f"{name}: has {have} of {wanted} demonstrations; trying {wanted - have} more seeds")
        count = wanted if not tried else wanted - have
        record_from(source, out=str(store), episodes=count, seed=tried, workers=workers)
        tried += count
        have = len(recorded_seeds(EpisodeStore.open(store), name))
    return True


def _request(protocol: Protocol, stores: Sequence[Path]) -> dict[str, Any]:
    """What decides the weights. Each request has a folder of its own, so nothing that was trained is lost."""
    from .vla.pretrained import identity_of

    return {
        "model": protocol.model.to_dict(),
        "optimization": {k: v for k, v in protocol.optimization.noted().items() if k not in HABITS},
        "data": [EpisodeStore.open(store).fingerprint for store in stores],
        "tune": protocol.tune,
        "encoder": identity_of(protocol.encoder) if protocol.encoder else None,
    }


def _train(
    protocol: Protocol,
    stores: Sequence[Path],
    run: Path,
    request: Mapping[str, Any],
    clock: StageClock,
    device: str,
) -> bool:
    from .vla.train import train

    steps = protocol.optimization.steps
    every = -(-steps // (protocol.snapshots + 1)) if protocol.snapshots else 0
    train_here = partial(
        train,
        store=[str(store) for store in stores],
        weights=[1.0] * len(stores),  # else tasks that take long would be learnt better than those that are hard
        model=protocol.model,
        optimization=protocol.optimization,
        encoder=protocol.encoder,
        tune=protocol.tune,
        heldout=0.02,
        snapshot_every=every,
        out=str(run),
        resume=True,
        device=device,
    )

    def make() -> None:
        note = run / TRAINED_ON  # reports are made anew later, and elsewhere
        here = {*read_json(note).get("hardware", ()), hardware(device)}
        write_json(note, {"hardware": sorted(here)})
        train_here()

    return train_once(run, request, clock, make)


def _curve(protocol: Protocol, run: Path, rolled: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Success of the snapshots, oldest first, and whether all of it was there already."""
    points, reused = [], True
    found = [path for path in sorted((run / "snapshots").glob("*")) if path.name.isdigit()]  # not what a kill left
    for path in found if protocol.snapshots else []:
        out = run / "curve" / path.name
        log(f"success after {int(path.name)} steps of training:")
        evaluate(
            checkpoint=str(path),
            out=str(out),
            episodes=protocol.curve_episodes,
            seed=CURVE_SEED,
            videos=0,
            **rolled,
        )
        summary, meta = read_json(out / "summary.json"), read_json(path / "meta.json")
        reused = reused and not summary["this_run"]["episodes"]
        points.append({"step": int(path.name), "seconds": meta["seconds"]["total"], **_counts(summary["total"])})
    return points, reused


def _result(
    protocol: Protocol,
    run: Path,
    stores: Sequence[Path],
    spent: Mapping[str, float],
    curve: list[dict[str, Any]],
) -> dict[str, Any]:
    """The machine-readable result; every figure is read from what the stages wrote."""
    from .policies.report_data import read_run

    summary = read_json(run / "eval" / "summary.json")
    rows = read_run(run / "eval", None).rows
    seeds = [
        [row for row in rows if 0 <= row["seed"] - protocol.seed - k * protocol.episodes < protocol.episodes]
        for k in range(protocol.seeds)
    ]
    rates = [100 * float(np.mean([bool(row["success"]) for row in mine])) for mine in seeds if mine]
    last = {"step": protocol.optimization.steps, "seconds": spent["train"], **_counts(summary["total"])}
    tasks = {name: _counts(task) for name, task in summary["tasks"].items()}
    return {
        "title": protocol.title,
        "rules": protocol.rules,
        **_counts(summary["total"]),
        **({"groups": _grouped(protocol.groups, tasks)} if protocol.groups else {}),
        "seeds": [round(each, 2) for each in rates],
        "tasks": tasks,
        "curve": [*curve, last],
        "parameters": summary["parameters"],
        "head": summary["head"],
        "train_seed": summary["train_seed"],
        "demos": sum(EpisodeStore.open(store).num_episodes for store in stores),
        "seconds": {name: round(value, 1) for name, value in spent.items() if value},
        "hardware": ", then ".join(read_json(run / TRAINED_ON).get("hardware", ["hardware not noted"])),
        "published": [vars(each) for each in protocol.published],
        "command": summary["command"],
        "settings": {
            "seed": protocol.seed,
            "demos_per_task": protocol.demos,
            "recording": vars(protocol.recording),
            "optimization": protocol.optimization.noted(),
            "execute_horizon": getattr(protocol.executor, "keywords", {}).get("execute_horizon"),
        },
    }


def _grouped(groups: Mapping[str, Sequence[str]], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the groups' rates, with its interval, and the rates."""
    counts = {
        name: (sum(tasks[task]["success"] for task in mine), sum(tasks[task]["episodes"] for task in mine))
        for name, mine in groups.items()
    }
    mean, low, high = mean_of_rates(list(counts.values()))
    return {"success_rate": mean, "ci95": [low, high], "rates": {name: rate(*each) for name, each in counts.items()}}


def _counts(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: group[k] for k in ("episodes", "success", "success_rate", "ci95")}


def ranking(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ours among the published figures, best first; where some are means over groups of tasks, those come first, for
    the two cannot be compared."""
    several = "groups" in result
    ours = {
        "name": f"brachium: {result['head']}, {result['parameters'] / 1e6:.1f} M parameters",
        "source": f"this run: {human_time(result['seconds']['train'])} of training on {result['hardware']}",
        "note": f"{result['demos']} demonstrations, one training, {len(result['seeds'])} evaluation seeds",
        "ours": True,
    }
    counted = {"episodes": result, **({"groups": result["groups"]} if several else {})}
    mine = [
        {**ours, "success": 100 * each["success_rate"], "ci95": [100 * edge for edge in each["ci95"]], "over": over}
        for over, each in counted.items()
    ]
    others = [{"over": "episodes", **each, "ci95": None, "ours": False} for each in result["published"]]
    rows = sorted([*mine, *others], key=lambda row: (row["over"] == "episodes", -row["success"]))
    for row in rows if several else ():
        row["name"] += f" (rate over {OVER[row['over']]})"
    return rows


def _farewell(protocol: Protocol, result: Mapping[str, Any], folder: Path) -> None:
    rows = []
    for row in ranking(result):
        interval = f"[{row['ci95'][0]:.0f}, {row['ci95'][1]:.0f}]" if row["ci95"] else ""
        rows.append([row["name"], f"{row['success']:.1f}", interval, row["source"]])
    table(f"\n{protocol.title}", ["policy", "success [%]", "95 % interval", "source"], rows)
    curve = ", ".join(f"{100 * p['success_rate']:.0f} % after {human_time(p['seconds'])}" for p in result["curve"])
    print(f"\nOver training: {curve}")
    print(f"Report: {folder / 'report.html'}   (videos inside; open it in a browser)")
