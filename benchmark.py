"""The verb ``brachium benchmark``: a suite of others by its published protocol, beside the published figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .console import human_time, log, table
from .datasets.store import EpisodeStore
from .envs.record import RecordingOptions, make_source, record_from, recorded_seeds
from .errors import ConfigError
from .hardware import hardware
from .identity import digest
from .policies.evaluate import evaluate
from .stages import StageClock, read_json, train_once, write_json
from .vla.loop import Optimization
from .vla.recipe import Recipe

TRIES = 20
"""Seeds that are tried for each demonstration before the expert is given up."""
CURVE_SEED = 5_000_000
"""First seed of the episodes by which success over training is shown; those of the result are others."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure.

    Attributes:
        name: Of the policy.
        success: Success rate [%], as the source gives it.
        source: Where it stands: paper and table.
        note: What is not as here: data, size, protocol.
    """

    name: str
    success: float
    source: str
    note: str = ""


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

    def __post_init__(self) -> None:
        low = {k: getattr(self, k) for k in ("demos", "episodes", "seeds", "curve_episodes") if getattr(self, k) < 1}
        if low or self.snapshots < 0:
            raise ConfigError(f"protocol: expected at least 1 (snapshots: 0), got {low or self.snapshots}")


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
    folder = Path(out or f"outputs/benchmark/{re.sub('[^a-z0-9]+', '_', protocol.title.lower())}")
    folder.mkdir(parents=True, exist_ok=True)
    clock = StageClock(folder / "seconds.json")
    log(f"brachium benchmark: {protocol.title}, {len(protocol.suite)} tasks, in {folder}")
    stores = _demonstrations(protocol, folder, clock, workers)
    request = _request(protocol, stores)
    run = folder / f"run-{protocol.optimization.seed}-{digest(request, length=8)}"
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
    with clock.stage("eval", run) as stage:
        evaluate(
            checkpoint=str(run / "checkpoint"),
            out=str(run / "eval"),
            episodes=protocol.episodes * protocol.seeds,
            seed=protocol.seed,
            videos=videos,
            **rolled,
        )
        summary = read_json(run / "eval" / "summary.json")
        stage.reused = not summary["this_run"]["episodes"]
    result = _result(protocol, run, stores, clock, curve, place)
    write_json(folder / "result.json", result)
    from .policies.report import write_report

    told = {"title": f"the policy for {protocol.title}", "ranking": ranking(result)}
    report = write_report(run / "eval", run / "checkpoint", extra=result | told)
    shutil.copyfile(report, folder / "report.html")
    _farewell(protocol, result, folder)
    return 0


def _demonstrations(protocol: Protocol, folder: Path, clock: StageClock, workers: int) -> list[Path]:
    """The stores to train on, one a task, with as many successes each as the protocol says."""
    if protocol.store is not None:
        EpisodeStore.open(protocol.store)
        return [Path(protocol.store)]
    targets = {
        name: folder / "demonstrations" / f"{name}-{digest(make, protocol.recording, protocol.demos, length=8)}"
        for name, make in protocol.suite.items()
    }
    with clock.stage("record") as stage:
        made = [_record(protocol.suite[name], target, protocol, workers) for name, target in targets.items()]
        stage.reused = not any(made)
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

    counts = ("log_every", "save_every")
    return {
        "model": protocol.model.to_dict(),
        "optimization": {k: v for k, v in vars(protocol.optimization).items() if k not in counts},
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
    make = partial(
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
    clock: StageClock,
    curve: list[dict[str, Any]],
    device: str,
) -> dict[str, Any]:
    """The machine-readable result; every figure is read from what the stages wrote."""
    from .policies.report_data import read_run

    summary, meta = read_json(run / "eval" / "summary.json"), read_json(run / "checkpoint" / "meta.json")
    rows = read_run(run / "eval", None).rows
    seeds = [
        [row for row in rows if 0 <= row["seed"] - protocol.seed - k * protocol.episodes < protocol.episodes]
        for k in range(protocol.seeds)
    ]
    rates = [100 * float(np.mean([bool(row["success"]) for row in mine])) for mine in seeds if mine]
    trained = float(meta["seconds"]["total"])
    last = {"step": protocol.optimization.steps, "seconds": trained, **_counts(summary["total"])}
    stages = {"record": clock.of("record", run), "train": trained, "eval": clock.of("eval", run)}
    return {
        "title": protocol.title,
        "rules": protocol.rules,
        **_counts(summary["total"]),
        "seeds": [round(each, 2) for each in rates],
        "seeds_mean": round(float(np.mean(rates)), 2),
        "seeds_std": round(float(np.std(rates, ddof=1)), 2) if len(rates) > 1 else 0.0,
        "tasks": {name: _counts(task) for name, task in summary["tasks"].items()},
        "curve": [*curve, last],
        "parameters": summary["parameters"],
        "head": summary["head"],
        "train_seed": summary["train_seed"],
        "demos": sum(EpisodeStore.open(store).num_episodes for store in stores),
        "seconds": {name: round(value, 1) for name, value in stages.items() if value},
        "hardware": hardware(device),
        "published": [vars(each) for each in protocol.published],
    }


def _counts(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: group[k] for k in ("episodes", "success", "success_rate", "ci95")}


def ranking(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ours among the published figures, best first."""
    ours = {
        "name": f"brachium: {result['head']}, {result['parameters'] / 1e6:.1f} M parameters",
        "success": 100 * result["success_rate"],
        "ci95": [100 * edge for edge in result["ci95"]],
        "source": f"this run: {human_time(result['seconds']['train'])} of training on {result['hardware']}",
        "note": f"{result['demos']} demonstrations, {len(result['seeds'])} evaluation seeds",
        "ours": True,
    }
    others = [{**each, "ci95": None, "ours": False} for each in result["published"]]
    return sorted([ours, *others], key=lambda row: -row["success"])


def _farewell(protocol: Protocol, result: Mapping[str, Any], folder: Path) -> None:
    rows = []
    for row in ranking(result):
        interval = f"[{row['ci95'][0]:.0f}, {row['ci95'][1]:.0f}]" if row["ci95"] else ""
        rows.append([row["name"], f"{row['success']:.1f}", interval, row["source"]])
    table(f"\n{protocol.title}", ["policy", "success [%]", "95 % interval", "source"], rows)
    curve = ", ".join(f"{100 * p['success_rate']:.0f} % after {human_time(p['seconds'])}" for p in result["curve"])
    print(f"\nOver training: {curve}")
    print(f"Report: {folder / 'report.html'}   (videos inside; open it in a browser)")
