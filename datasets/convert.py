"""The verb ``brachium convert``: foreign episode data into an episode store."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ..console import log, progress
from ..errors import ConfigError, SpecMismatchError, StoreError, did_you_mean
from ..spec import EmbodimentSpec
from .derive import require_free
from .formats.base import EpisodeImporter, ImportedEpisode
from .layout import disk_errors, fsync_dir
from .schema import StoreSchema
from .store import EpisodeStore
from .writer import EpisodeWriter

SEGMENT = 64
"""Episodes that share a segment."""
UNLABELLED = ("refuse", "keep", "skip")
PLACE = "source_index"
"""Key in an episode's meta: its number in the source, by which an interrupted conversion goes on."""


def convert(
    *, source: str, out: str, data: EpisodeImporter, unlabelled: str = "refuse", overwrite: bool = False
) -> dict[str, Any]:
    """Convert foreign episode data into a new store. JPEG frames keep their bytes; nothing is re-encoded.

    The store appears under its name when it is complete. An interrupted conversion goes on where it was when the same
    command is typed again; until then its part lies beside the target, in a hidden folder.

    Args:
        source: Folder or file of the foreign data.
        out: Folder of the new store.
        data: Importer of the format, from ``conf/data/``.
        unlabelled: What to do with episodes without an instruction: ``refuse`` the data, ``keep`` or ``skip`` them.
        overwrite: Replace an episode store at `out`.

    Returns:
        ``{"store": path, "episodes": n, "frames": n, "instructions": {text: episodes}}``.

    Raises:
        NotFoundError: Nothing at `source`.
        StoreError: Damaged data, or something at `out` already.
        SpecMismatchError: Data that does not fit the importer's embodiment, or an embodiment that leaves things open.
        DiskSpaceError: No space; typed again, it goes on.
    """
    if unlabelled not in UNLABELLED:
        raise ConfigError(f"no unlabelled={unlabelled!r}. {did_you_mean(unlabelled, UNLABELLED)}")
    target, origin = Path(out), Path(source)
    require_free(target, overwrite=overwrite)
    total = data.count(origin)
    embodiment = data.embodiment_of(origin)
    require_meaning(embodiment)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.converting"
    request = {"source": os.fspath(origin.resolve()), "data": _described(data), "unlabelled": unlabelled}
    with _locked(work), disk_errors(target):
        try:
            store = _begin(work, StoreSchema(embodiment=embodiment), request)
            _convert(store, data, origin, unlabelled, total)
            store = store.refresh()
            if not store.num_episodes:
                raise StoreError(f"{source} holds no episodes with steps")
        except KeyboardInterrupt:
            log(f"stopped; type the same command to go on, or delete {work}")
            raise
        except (StoreError, SpecMismatchError):  # of the data: it would come again
            shutil.rmtree(work, ignore_errors=True)
            raise
        instructions = Counter(store.instructions)
        (work / REQUEST).unlink()
        if overwrite and target.exists():
            shutil.rmtree(target)
        work.rename(target)
        fsync_dir(target.parent)
    log(f"{store.num_episodes} episodes, {store.total_frames} steps -> {target}")
    log(f"Look at them: brachium inspect store={target}")
    return {
        "store": str(target),
        "episodes": store.num_episodes,
        "frames": store.total_frames,
        "instructions": dict(instructions),
    }


REQUEST = "request.json"


def require_meaning(embodiment: EmbodimentSpec) -> None:
    """Raise SpecMismatchError unless it says what every element of state and action is, and in what unit.

    Foreign data seldom does. What nobody said is not guessed: a policy trained on centimetres drives a robot in metres.
    """
    open_lines = [
        f"embodiment.{feature.name}.{key}"
        for feature in (embodiment.state, embodiment.action)
        for key in ("names", "units")
        if len(getattr(feature, key)) != feature.dim
    ]
    if open_lines:
        raise SpecMismatchError(
            "the data does not say what its numbers mean, and nothing is guessed. Give these lines in conf/data/*.yaml,"
            f" one entry an element: {', '.join(open_lines)}. See conf/data/bridge.yaml"
        )


def _described(data: EpisodeImporter) -> str:
    """What an importer was told, as text that stays the same for the same."""
    told = asdict(data) if is_dataclass(data) and not isinstance(data, type) else repr(data)
    return json.dumps([type(data).__qualname__, told], sort_keys=True, default=str)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Nobody else converts into the same place meanwhile; the kernel lets go of the lock however we end."""
    path = work.with_name(f"{work.name}.lock")
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                break
            os.close(fd)  # who held it has just taken the file away
        except FileNotFoundError:
            os.close(fd)
        except OSError as error:
            os.close(fd)
            raise StoreError(f"another conversion writes to {work}: wait for it, or choose another out=") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # ours: nobody else can hold it
        os.close(fd)


def _begin(work: Path, schema: StoreSchema, request: dict[str, Any]) -> EpisodeStore:
    """The store to fill: that of an interrupted conversion with the same request, or a new one."""
    note = work / REQUEST
    asked = None
    with contextlib.suppress(OSError, ValueError):
        asked = json.loads(note.read_text())
    if asked == request:
        EpisodeWriter(EpisodeStore.open(work), salvage="finished").close()
        store = EpisodeStore.open(work)
        log(f"going on with an interrupted conversion: {store.num_episodes} episodes are there")
        return store
    shutil.rmtree(work, ignore_errors=True)
    store = EpisodeStore.create(work, schema)
    temporary = note.with_suffix(".partial")
    temporary.write_text(json.dumps(request))
    temporary.replace(note)
    return store


def _convert(store: EpisodeStore, data: EpisodeImporter, source: Path, unlabelled: str, total: int | None) -> None:
    first = max((int(e.meta[PLACE]) for e in store.episodes), default=-1) + 1
    with (
        EpisodeWriter(store, episodes_per_segment=SEGMENT, source=source.name, salvage="finished") as writer,
        progress(f"converting {source}", total=total, unit="episodes") as bar,
    ):
        bar.update(first)
        for number, episode in enumerate(data.read(source, first), start=first):
            _write(writer, episode, number, unlabelled)
            bar.update(1)


def _write(writer: EpisodeWriter, episode: ImportedEpisode, number: int, unlabelled: str) -> None:
    silent = not episode.instruction.strip()
    if silent and unlabelled == "skip":
        return
    if silent and unlabelled == "refuse":
        raise StoreError(
            f"episode {number} has no instruction ({dict(episode.meta) or 'nothing else is noted of it'}). "
            "Type unlabelled=keep to take such episodes all the same, or unlabelled=skip to leave them out"
        )
    begun = False
    try:
        for step in episode.steps:
            if not begun:
                words = None if silent else episode.instruction
                writer.begin(words, tags=episode.tags, meta={**episode.meta, PLACE: number})
                begun = True
            writer.step(step.images, state=step.state, action=step.action, timestamp=step.timestamp)
    except SpecMismatchError as error:
        raise SpecMismatchError(f"episode {number}: {error}") from error
    if begun:
        writer.end(episode.success)
