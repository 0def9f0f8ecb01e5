"""The verb ``brachium record``: run experts (or draw scenes) in several processes, into an episode store."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..console import log, progress, require_disk
from ..datasets.schema import StoreSchema
from ..datasets.store import EpisodeStore
from ..datasets.writer import EpisodeWriter
from ..errors import BrachiumError, ConfigError, SpecMismatchError
from ..spec import DETAIL
from .demonstrations import ExpertDemonstrations
from .scenes import SceneSampler

BYTES_PER_EPISODE = 250_000
PIECES = 16
"""Pieces that a recording is cut into at least, where it is spread over a cluster."""
SEGMENT = 32
"""Episodes that are committed together; a kill loses at most these from each worker."""


@dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """How demonstrations are disturbed; see `ExpertDemonstrations`.

    Attributes:
        noise: Disturbance of the executed action, as a share of what the environment calls one of size 1.
        noisy: Share of the episodes that are disturbed.
        drop: Share of the episodes in which the gripper opens once by itself.
        stumble: Share of the episodes in which the arm goes astray once or twice.
        settle: Where success is judged at the last step, steps in a row in which it must hold for the episode to end
            before; 0 for never.
    """

    noise: float = 0.3
    noisy: float = 0.8
    drop: float = 0.1
    stumble: float = 0.5
    settle: int = 0

    def __post_init__(self) -> None:
        if self.settle < 0:
            raise ConfigError(f"recording: expected settle from 0, got {self.settle}")


def record(
    *,
    env: Callable[..., Any],
    out: str,
    episodes: int = 100,
    seed: int = 0,
    workers: int = 2,
    noise: float = 0.3,
    noisy: float = 0.8,
    drop: float = 0.1,
    stumble: float = 0.5,
    settle: int = 0,
    rollout: Any = None,
    keep_failures: bool = False,
    overwrite: bool = False,
) -> int:
    """Record expert demonstrations, or free labelled scenes, into an episode store.

    The store is made when it is missing and appended to otherwise. What it already has of this task and these seeds
    is kept and not recorded again, so an interrupted command is simply typed again.

    Args:
        env: A factory of environments with an expert, or of scene samplers.
        out: Folder of the store.
        episodes: Number of episodes (of tables, for scenes) that the store shall have of this task.
        seed: First seed; episode k has seed `seed` + k.
        workers: Processes.
        noise: Disturbance of the executed action, as a share of its largest step; labels stay clean.
        noisy: Share of the episodes that are disturbed.
        drop: Share of the episodes in which the gripper opens once by itself.
        stumble: Share of the episodes in which the arm goes astray once or twice.
        settle: Where success is judged at the last step, steps for which it must hold to end the episode; 0 for never.
        rollout: Where episodes are recorded: ``local``, in processes of this machine (``processes`` says how many of
            them itself), or ``ray``, on a cluster whose machines see the store at the same place. The episodes are the
            same.
        keep_failures: Also keep episodes in which the expert failed.
        overwrite: Delete an existing store first.
    """
    options = vars(RecordingOptions(noise=noise, noisy=noisy, drop=drop, stumble=stumble, settle=settle))
    return record_from(
        partial(make_source, env, options),
        out=out,
        episodes=episodes,
        seed=seed,
        workers=getattr(rollout, "workers", workers),
        cluster=rollout if hasattr(rollout, "map") else None,
        keep_failures=keep_failures,
        overwrite=overwrite,
    )


def record_from(
    make: Callable[[], Any],
    *,
    out: str,
    episodes: int,
    seed: int,
    workers: int,
    cluster: Any = None,
    keep_failures: bool = False,
    overwrite: bool = False,
) -> int:
    """Record the episodes of a source in several processes.

    Args:
        make: Makes the source in each process: it has a `name`, a `schema` and `record(seed)`, which gives episodes.
        cluster: Has ``map(function, shared, pieces)``, which does the pieces elsewhere; None for this machine.
        out, episodes, seed, workers, keep_failures, overwrite: See `record`.
    """
    if episodes < 1 or workers < 1:
        raise ConfigError(f"expected episodes and workers of at least 1, got episodes={episodes}, workers={workers}")
    source = make()
    store = _open_or_create(Path(out), source, overwrite)
    # adopt what a killed writer was about to commit, before we count what is there; of a seed that broke off, nothing
    EpisodeWriter(store, salvage="nothing").close()
    store = store.refresh()
    have = recorded_seeds(store, source.name)
    todo = [s for s in range(seed, seed + episodes) if s not in have]
    if not todo:
        log(f"{out}: has all {episodes} episodes of {source.name} already; nothing to record")
        return 0
    if len(todo) < episodes:
        log(f"{out}: has {episodes - len(todo)} of {episodes} episodes of {source.name}; recording the rest")
    require_disk(out, BYTES_PER_EPISODE * len(todo), "recording")
    if cluster is None:
        workers = min(workers, max(1, len(todo) // 8))
        failed = _run_workers(make, out, source.name, todo, workers, keep_failures)
    else:
        failed = _run_pieces(cluster, make, out, source.name, todo, keep_failures)
    if failed:
        log(f"{source.name}: failed in {failed} of {len(todo)} episodes; they are not kept")
    store = store.refresh()
    log(f"{out}: {store.num_episodes} episodes, {store.total_frames} frames")
    return 0


def make_source(env: Callable[..., Any], options: dict[str, Any]) -> Any:
    """What yields episodes for `env`: the sampler itself, or its expert's demonstrations."""
    made = env()
    if isinstance(made, SceneSampler):
        return made
    if hasattr(made, "expert_action"):
        return ExpertDemonstrations(made, **options)
    raise ConfigError(f"cannot record from {type(made).__name__}: expected an environment with an expert, or scenes")


def recorded_seeds(store: EpisodeStore, task: str) -> set[int]:
    """Seeds of the episodes of `task` in a store."""
    return {int(e.meta["seed"]) for e in store.episodes if e.meta.get("task") == task and "seed" in e.meta}


def _open_or_create(path: Path, source: Any, overwrite: bool) -> EpisodeStore:
    if overwrite and path.exists():
        import shutil

        EpisodeStore.open(path)  # refuses to delete what is no store
        shutil.rmtree(path)
    if not path.exists():
        return EpisodeStore.create(path, source.schema)
    store = EpisodeStore.open(path)
    _require_details(store, source.schema)
    store.schema.require_same(source.schema, f"store {path}", f"environment {source.name}")
    return store


def _require_details(store: EpisodeStore, wanted: StoreSchema) -> None:
    """Raise SpecMismatchError, with what to type, where nothing but pictures in detail is another."""
    mine, theirs = (
        {m.name.removesuffix(DETAIL): m.shape[0] for m in schema.maps if m.name.endswith(DETAIL)}
        for schema in (store.schema, wanted)
    )
    if mine != theirs and not store.schema.differences(replace(wanted, maps=store.schema.maps)):
        words = " ".join(f"env.details.{name}={mine.get(name, 0)}" for name in sorted({*mine, *theirs}))
        raise SpecMismatchError(
            f"store {store.path} has pictures in detail of {mine or 'nothing'}, the environment of "
            f"{theirs or 'nothing'}. Type: {words}"
        )


def _run_workers(
    make: Callable[[], Any],
    out: str,
    name: str,
    seeds: Sequence[int],
    workers: int,
    keep_failures: bool,
) -> int:
    """Split the seeds over processes and follow their progress; returns how many episodes failed."""
    context = multiprocessing.get_context("spawn")  # a fork with an open OpenGL context hangs
    messages: Any = context.Queue()
    stop = context.Event()
    processes = [
        context.Process(
            target=_worker,
            args=(make, out, seeds[k::workers], keep_failures, messages, stop),
            daemon=True,
        )
        for k in range(workers)
    ]
    failed = frames = 0
    try:
        for process in processes:
            process.start()
        with progress(f"recording {name}", total=len(seeds), unit="episodes") as bar:
            while bar.done < len(seeds):
                try:
                    kind, value = messages.get(timeout=1.0)
                except queue.Empty:
                    dead = [p for p in processes if p.exitcode not in (None, 0)]
                    if dead:
                        raise BrachiumError(
                            f"a recording process died with exit code {dead[0].exitcode}; "
                            "what was committed is kept: type the same command again to go on"
                        ) from None
                    continue
                if kind == "error":
                    raise BrachiumError(value)
                failed += int(kind == "failed")
                frames += value
                bar.update(1, frames=frames)
        for process in processes:
            process.join()
    except BaseException:
        stop.set()  # workers finish their episode and commit what they have
        deadline = time.monotonic() + 10.0
        for process in processes:
            if process.pid is not None:
                process.join(max(0.1, deadline - time.monotonic()))
                process.terminate()
        raise
    return failed


def _run_pieces(
    cluster: Any, make: Callable[[], Any], out: str, name: str, seeds: Sequence[int], keep_failures: bool
) -> int:
    """Record some seeds at a time wherever there is room; returns how many episodes failed."""
    size = max(1, min(SEGMENT, len(seeds) // PIECES))
    pieces = [tuple(seeds[k : k + size]) for k in range(0, len(seeds), size)]
    failed = frames = 0
    with progress(f"recording {name}", total=len(seeds), unit="episodes") as bar:
        for piece, (lost, recorded) in cluster.map(_piece, (make, str(Path(out).resolve()), keep_failures), pieces):
            failed += lost
            frames += recorded
            bar.update(len(piece), frames=frames)
    return failed


def _piece(how: tuple[Callable[[], Any], str, bool], seeds: Sequence[int]) -> tuple[int, int]:
    """Record the episodes of `seeds`, perhaps once more; returns how many failed, and the number of frames."""
    make, out, keep_failures = how
    source = make()
    store = EpisodeStore.open(out)
    EpisodeWriter(store, salvage="nothing").close()  # of who has died over them
    have = recorded_seeds(store.refresh(), source.name)
    failed = frames = 0
    with EpisodeWriter(
        EpisodeStore.open(out), episodes_per_segment=sys.maxsize, source=source.name, salvage="nothing"
    ) as writer:
        for seed in seeds:
            for episode in source.record(seed) if seed not in have else ():
                if episode.success is False and not keep_failures:
                    failed += 1
                    continue
                write_episode(writer, episode)
                frames += len(episode.steps)
    return failed, frames


def _worker(
    make: Callable[[], Any],
    out: str,
    seeds: Sequence[int],
    keep_failures: bool,
    messages: Any,
    stop: Any,
) -> None:
    """Record the episodes of `seeds`; tells the parent of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks us to stop
    _end_with_parent()
    try:
        source = make()
        # Commits fall between seeds, never between the episodes of one: a seed is in the store whole or not at all.
        with EpisodeWriter(
            EpisodeStore.open(out), episodes_per_segment=sys.maxsize, source=source.name, salvage="nothing"
        ) as writer:
            waiting = 0
            for seed in seeds:
                if stop.is_set():
                    return
                if waiting >= SEGMENT:
                    writer.flush()
                    waiting = 0
                for episode in source.record(seed):
                    if episode.success is False and not keep_failures:
                        messages.put(("failed", 0))
                        continue
                    write_episode(writer, episode)
                    waiting += 1
                    frames = len(episode.steps)
                if episode.success is not False or keep_failures:
                    messages.put(("done", frames))
    except Exception as error:
        messages.put(("error", f"recording failed in a worker: {type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """End this process at once when the command is killed; else it would record on, beside the same command again."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)  # the store is whole at any moment; what is not committed is recorded again

    threading.Thread(target=watch, daemon=True).start()


def write_episode(writer: EpisodeWriter, episode: Any) -> None:
    """Write one recorded episode."""
    writer.begin(episode.instruction, tags=episode.tags, meta=episode.meta)
    for step in episode.steps:
        writer.step(images=step.images, state=step.state, action=step.action, extras=step.extras or None)
    writer.end(episode.success)
