"""The verb ``brachium demo``: record, inspect, train, evaluate, report - the whole way in one command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .console import human_time, log, table
from .corrections import Corrections, drives, record_corrections
from .datasets.inspect import inspect_store
from .datasets.store import EpisodeStore
from .envs.record import record
from .errors import NotFoundError
from .policies.evaluate import evaluate
from .stages import StageClock, read_json, train_once, write_json
from .vla.ground import Grounding
from .vla.optim import Optimization
from .vla.pretrained import find_pretrained, identity_of
from .vla.recipe import Recipe

STAGES = ("record", "train", "correct", "eval")


def demo(
    *,
    suite: Mapping[str, Callable[..., Any]],
    scenes: Callable[..., Any],
    model: Recipe,
    grounding: Grounding,
    encoder: str | None,
    optimization: Optimization,
    executor: Callable[..., Any],
    vector: Callable[..., Any],
    corrections: Corrections,
    out: str = "outputs/demo",
    tables: int = 2500,
    demos: int = 200,
    episodes: int = 100,
    workers: int = 2,
    num_envs: int = 8,
    videos: int = 4,
    device: str = "auto",
) -> int:
    """Demonstrations -> episode store -> trained policy -> closed loop in simulation -> report.

    Everything lands in one folder. A second run reuses what is there and says so; an interrupted one goes on.

    Args:
        suite: Task name -> environment factory.
        scenes: Factory of labelled scenes for grounding.
        model: Recipe of the model.
        grounding: Grounding stage; only without `encoder`.
        encoder: Pretrained model that sees and reads: ``nano``, which comes with brachium, or a folder that ``brachium
            pretrain`` made; null grounds a fresh one here.
        optimization: Training of the head.
        executor: Turns chunks into actions.
        vector: Makes a vector environment from factories.
        corrections: Rounds in which an expert corrects the policy where it goes, and it is trained on.
        out: Folder for everything.
        tables: Tables drawn for grounding; each is seen in several arm poses.
        demos: Demonstrations a task.
        episodes: Evaluation episodes a task.
        workers: Recording processes.
        num_envs: Environments at once in evaluation.
        videos: Videos a task.
        device: ``cpu``, ``cuda`` or ``auto``.
    """
    if encoder is not None and model.backbone.get("path"):
        log(f"model.backbone.path={model.backbone['path']} takes the place of encoder={encoder}")
        encoder = None
    if encoder is not None:
        find_pretrained(encoder)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    clock = StageClock(folder / "seconds.json")
    head = str(model.head["_target_"]).rpartition(".")[2].removesuffix("Head").lower()
    run = folder / f"{head}-{optimization.seed}"
    log(f"brachium demo: {', '.join(suite)} in {folder}")
    with clock.stage("record") as stage:
        before = _fingerprints(folder)
        if encoder is None:
            record(env=scenes, out=str(folder / "scenes"), episodes=tables, workers=workers)
        for make in suite.values():
            record(env=make, out=str(folder / "store"), episodes=demos, workers=workers)
        stage.reused = _fingerprints(folder) == before
    inspect_store(store=str(folder / "store"), out=str(folder / "inspect"))
    grounding = replace(grounding, store=str(folder / "scenes"), out=str(folder / "grounding"))
    drafts = [folder / "rounds" / f"{run.name}-{k}" for k in range(corrections.rounds)]
    begin, *later = [*drafts, run]  # what rounds of corrections begin from stands beside their result
    training = _Training([folder / "store"], model, grounding, encoder, None, optimization)
    with clock.stage("train", begin) as stage:
        stage.reused = not training.run(begin, clock, device)
    for draft, following in zip(drafts, later):
        corrected = draft.with_name(f"{draft.name}-store")
        with clock.stage("correct", following) as stage:
            stage.reused = not _correct(suite, draft / "checkpoint", corrected, executor, corrections, workers)
        training = training.further(draft / "checkpoint", corrected, corrections.steps)
        with clock.stage("train", following) as stage:
            stage.reused = not training.run(following, clock, device)
    with clock.stage("eval", run) as stage:
        evaluate(
            checkpoint=str(run / "checkpoint"),
            executor=executor,
            vector=vector,
            suite=suite,
            out=str(run / "eval"),
            episodes=episodes,
            num_envs=num_envs,
            videos=videos,
            report=False,
        )
        summary = json.loads((run / "eval" / "summary.json").read_text())
        stage.reused = not summary["this_run"]["episodes"]
    result = collect_result(folder, run, clock, drafts)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    from .policies.report import write_report

    report = write_report(run / "eval", run / "checkpoint", extra=result)
    shutil.copyfile(report, folder / "report.html")
    _farewell(folder, run, result)
    return 0


@dataclass(frozen=True)
class _Training:
    """What is trained on what; `init` is the checkpoint that a round of corrections goes on from."""

    stores: Sequence[Path]
    model: Recipe
    grounding: Grounding
    encoder: str | None
    init: Path | None
    optimization: Optimization

    def further(self, init: Path, store: Path, steps: int) -> _Training:
        """The next round: from a checkpoint, on what is corrected as well."""
        longer = replace(self.optimization, steps=steps)
        return replace(self, init=init, stores=[*self.stores, store], optimization=longer)

    def run(self, run: Path, clock: StageClock, device: str) -> bool:
        """Train unless the same request on the same data is answered by the checkpoint there; whether it did."""
        from .vla.train import train

        grounding, encoder = self.grounding, self.encoder
        request = {
            "model": self.model.to_dict(),
            "grounding": None if encoder else {"options": grounding.optimization.noted(), "said": grounding.sentences},
            "encoder": identity_of(encoder) if encoder else None,
            "init": None if self.init is None else json.loads((self.init.parent / "request.json").read_text()),
            "optimization": self.optimization.noted(),
            "data": [EpisodeStore.open(path).fingerprint for path in self.stores],
            "scenes": None if encoder else EpisodeStore.open(grounding.store).fingerprint,
        }
        begin = {"init": str(self.init)} if self.init else {"grounding": None if encoder else grounding}
        make = partial(
            train,
            store=[str(path) for path in self.stores],
            model=self.model,
            encoder=None if self.init else encoder,
            optimization=self.optimization,
            out=str(run),
            resume=True,
            device=device,
            **begin,
        )
        return train_once(run, request, clock, make)


def _correct(
    suite: Mapping[str, Callable[..., Any]],
    checkpoint: Path,
    store: Path,
    executor: Callable[..., Any],
    corrections: Corrections,
    workers: int,
) -> bool:
    """Record a round of corrections; whether there was anything to record."""
    note, told = store.with_suffix(".json"), drives(checkpoint, executor, corrections.max_delay)
    wanted = {"policy": told, "suite": list(suite), "episodes": corrections.episodes}
    found = read_json(note)
    if found == {**wanted, "done": True} and store.exists():
        log(f"{store}: has the corrections of this policy already; reusing them")
        return False
    store.parent.mkdir(parents=True, exist_ok=True)
    # before anything is removed: a kill must not leave half a store as whole
    write_json(note, {**wanted, "done": False})
    if store.exists() and found.get("policy") != told:
        log(f"{store}: was recorded with another policy; starting anew")
        shutil.rmtree(store)
    for make in suite.values():
        record_corrections(
            policy=str(checkpoint),
            env=make,
            executor=executor,
            out=str(store),
            episodes=corrections.episodes,
            workers=workers,
            max_delay=corrections.max_delay,
        )
    write_json(note, {**wanted, "done": True})
    return True


def _fingerprints(folder: Path) -> dict[str, str | None]:
    """What the two stores hold; None for one that is not there yet."""
    found: dict[str, str | None] = {}
    for name in ("store", "scenes"):
        try:
            found[name] = EpisodeStore.open(folder / name).fingerprint
        except NotFoundError:
            found[name] = None
    return found


def collect_result(folder: Path, run: Path, clock: StageClock, drafts: Sequence[Path] = ()) -> dict[str, Any]:
    """The machine-readable result; every figure is read from what the stages wrote."""
    summary = json.loads((run / "eval" / "summary.json").read_text())
    keys = ("episodes", "success", "success_rate", "ci95")
    spent = {name: clock.of(name, run) + sum(clock.only(name, draft) for draft in drafts) for name in STAGES}
    seconds = {name: round(value, 1) for name, value in spent.items() if value}
    return {
        **{k: summary["total"][k] for k in keys},
        "tasks": {name: {k: task[k] for k in keys} for name, task in summary["tasks"].items()},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "embodiment": EpisodeStore.open(folder / "store").embodiment.name,
        "demos": EpisodeStore.open(folder / "store").num_episodes,
        "corrections": sum(EpisodeStore.open(f"{draft}-store").num_episodes for draft in drafts),
        "parameters": summary["parameters"],
        "head": summary["head"],
        "seed": summary["train_seed"],
    }


def _farewell(folder: Path, run: Path, result: Mapping[str, Any]) -> None:
    rows = []
    for name, part in [*result["tasks"].items(), ("all", result)]:
        low, high = part["ci95"]
        share = f"{100 * part['success_rate']:.0f} %"
        rows.append([name, f"{part['success']}/{part['episodes']}", share, f"[{100 * low:.0f}, {100 * high:.0f}] %"])
    seconds = result["seconds"]
    times = ", ".join(f"{name} {human_time(seconds[name])}" for name in STAGES if name in seconds)
    shown = f"{result['demos']} demonstrations"
    if result["corrections"]:
        shown += f" and {result['corrections']} corrections"
    shown += f": {human_time(seconds['total'])} ({times})"
    table(
        f"\n{result['head']}, {result['parameters'] / 1e6:.1f} M parameters, {shown}",
        ["task", "success", "rate", "95 % interval"],
        rows,
    )
    print(f"\nReport: {folder / 'report.html'}   (videos inside; open it in a browser)")
    print("Next:")
    where = f"env=tabletop/push embodiment@env.embodiment={result['embodiment']}"
    print(f"  brachium eval checkpoint={run / 'checkpoint'} {where} executor=ensemble")
    print("  brachium demo model/head=tokenized")
    print(f"  brachium train store={folder / 'store'} encoder={run / 'checkpoint'} optimization.steps=8000")
