"""The verbs ``push`` and ``pull``: a store to an object store or the Hugging Face Hub, and back.

Segments go first and the log last, so nobody ever sees an episode that is not whole; what is there already is not sent
again. The columns of the cache go along: a remote reader gets them as a whole instead of asking every segment.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..console import human_bytes, log, progress
from ..errors import ConfigError, NotFoundError, StoreError
from .layout import LOG, SEGMENTS, STAGING
from .remote import SCHEMES, RemoteStore, entry_path, newest_entry, object_store
from .segment_index import column_files
from .store import EpisodeStore

HUB = "hf://datasets/"


def push(*, store: str, to: str, threads: int = 16, private: bool = True, dry_run: bool = False) -> int:
    """Copy a store to an object store or the Hugging Face Hub; typed again, it sends what is new.

    Args:
        store: Folder of the store.
        to: Address of a folder: ``s3://bucket/path``, ``gs://``, ``az://``, ``file:///path``, or
            ``hf://datasets/NAME/REPOSITORY``.
        threads: Files at once.
        private: Make a new repository of the Hub private.
        dry_run: Say what would be sent, and send nothing.

    Raises:
        ConfigError: An address that cannot be written to.
        StoreError: Another store is there, or a transfer that fails.
    """
    opened = EpisodeStore.open(store)
    _require_address(to)
    if opened.is_part:
        raise ConfigError(f"a part of a store cannot be pushed: push {opened.path}, or `brachium filter` it first")
    if to.startswith(("http://", "https://")):
        raise ConfigError(f"{to} cannot be written to: push to s3://, gs://, az://, file:// or {HUB}NAME/REPOSITORY")
    _keep_columns(opened)
    files = list(_files(opened))
    size = human_bytes(sum((opened.path / f).stat().st_size for f in files))
    log(f"{store}: {opened.num_episodes} episodes, version {opened.version}, {len(files)} files, {size} -> {to}")
    if dry_run:
        log("dry run: nothing was sent")
        return 0
    if to.startswith(HUB):
        _push_to_hub(opened, to.removeprefix(HUB), files, private)
    else:
        _push_to_objects(opened, to, files, threads)
    log(f"{to}: holds version {opened.version}")
    return 0


def pull(*, source: str, out: str, threads: int = 16) -> int:
    """Copy a store from an object store or the Hugging Face Hub; interrupted and typed again, it goes on.

    Args:
        source: Address, as in ``push``; ``http://`` and ``https://`` too.
        out: Folder of the store: new, or an earlier version of it.
        threads: Files at once.

    Raises:
        ConfigError: No such kind of address.
        NotFoundError: No store there.
        StoreError: Another store is at `out`, or a transfer that fails.
    """
    _require_address(source)
    target = Path(out)
    if source.startswith(HUB):
        _pull_from_hub(source.removeprefix(HUB), target)
    else:
        _pull_from_objects(object_store(source), source, target, threads)
    opened = EpisodeStore.open(target)
    log(f"{out}: {opened.num_episodes} episodes, version {opened.version}. Check them: brachium verify store={out}")
    return 0


def _require_address(address: str) -> None:
    if not address.startswith((*SCHEMES, HUB)):
        raise ConfigError(f"expected an address that begins with {', '.join([*SCHEMES, HUB])}, got {address!r}")


def _keep_columns(store: EpisodeStore) -> None:
    """Put every column into the cache, however small, so that it can be sent."""
    for name in store.embodiments:
        part = store.of(name)
        part.steps.keep = True
        for field in part.schema.fields:
            part.steps.lowdim(field)
        for spec in part.schema.images:
            part.steps.images(spec.name)


def _files(store: EpisodeStore) -> Iterator[str]:
    """Every file that is sent, in the order in which it must arrive: the log comes last."""
    yield "zarr.json"
    yield f"{SEGMENTS}/zarr.json"
    for segment in store.segments:  # those of removed episodes too: older versions need them
        folder = store.path / SEGMENTS / segment
        yield from sorted(str(f.relative_to(store.path)) for f in folder.rglob("*") if f.is_file())
    for name in store.embodiments:
        part = store.of(name)
        columns = [(f, ("values",)) for f in part.schema.fields]
        for column, arrays in [*columns, *((s.name, ("offset", "length")) for s in part.schema.images)]:
            paths = [f"{part.steps.folder_of(column)}/{file}" for file in column_files(part.steps.ids, arrays)]
            yield from (path for path in paths if (store.path / path).is_file())
    checkpoints = sorted((store.path / LOG).glob("*.ckpt.parquet"))
    entries = sorted((store.path / LOG).glob("*.json"))
    for path in [*checkpoints, *entries]:
        if int(path.name[:20]) <= store.version:
            yield str(path.relative_to(store.path))


def _push_to_objects(store: EpisodeStore, to: str, files: list[str], threads: int) -> None:
    objects = object_store(to)
    try:
        _send(store, objects, to, files, threads)
    except StoreError:
        raise
    except Exception as error:  # of the network, or of the object store
        raise StoreError(f"cannot push to {to}: {error}. Typed again, it goes on") from error


def _send(store: EpisodeStore, objects: Any, to: str, files: list[str], threads: int) -> None:
    import obstore

    try:
        theirs = bytes(obstore.get(objects, "zarr.json").bytes())
        if theirs != (store.path / "zarr.json").read_bytes():
            raise StoreError(f"another store is at {to}: choose another address")
    except FileNotFoundError:
        pass

    def theirs_at(number: int) -> bytes | None:
        try:
            return bytes(obstore.get(objects, entry_path(number)).bytes())
        except FileNotFoundError:
            return None

    _require_same_history(store.path, store.version, theirs_at, to)
    logs = [f for f in files if f.startswith(f"{LOG}/")]

    def send(path: str) -> None:
        source = store.path / path
        try:
            if int(obstore.head(objects, path)["size"]) == source.stat().st_size:
                return
        except FileNotFoundError:
            pass
        obstore.put(objects, path, source)

    with progress(f"pushing to {to}", total=len(files), unit="files") as bar, ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(send, files[: len(files) - len(logs)]):
            bar.update(1)
        for path in logs:  # one after another: nobody may see an entry without those before it
            send(path)
            bar.update(1)


def _require_same_history(root: Path, version: int, theirs: Callable[[int], bytes | None], where: str) -> None:
    """Raise StoreError unless the log of a store at `root` goes on where the one that `theirs` gives ends."""
    newest = newest_entry(lambda number: theirs(number) is not None)
    common = min(newest, version)
    if common >= 0 and (root / entry_path(common)).read_bytes() != theirs(common):
        raise StoreError(
            f"{where} and {root} were both changed since they were the same: `brachium merge` a pulled copy with yours"
        )
    if newest > version:
        raise StoreError(f"{where} has version {newest}, and what it is to be has {version}: it is the newer one")


def _pull_from_objects(objects: Any, source: str, target: Path, threads: int) -> None:
    """Log and metadata through a remote reader, then the segments."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(RemoteStore(objects, folder, threads=threads)) as far,
    ):
        version = far.store.version
        far.fetch_all(entry_path(number) for number in range(version + 1))  # older versions can be opened, too
        mine = target / "zarr.json"
        if mine.exists() and mine.read_bytes() != (Path(folder) / "zarr.json").read_bytes():
            raise StoreError(f"another store is at {target}: choose another out=")
        if target.exists() and not mine.exists() and any(target.iterdir()):
            raise StoreError(f"{target} exists and is no episode store: choose another path")
        entries = {int(p.stem): p for p in (target / LOG).glob("*.json")}
        if entries:
            _require_same_history(
                Path(folder), version, lambda n: entries[n].read_bytes() if n in entries else None, str(target)
            )
        far.local = target
        for name in (LOG, SEGMENTS, STAGING):
            (target / name).mkdir(parents=True, exist_ok=True)
        far.fetch_all(["zarr.json", f"{SEGMENTS}/zarr.json"])
        segments = far.store.segments
        with progress(f"pulling {source}", total=len(segments), unit="segments") as bar:
            for segment in segments:
                far.pull_segment(segment)
                bar.update(1)
        _copy_log(Path(folder), target)


def _copy_log(source: Path, target: Path) -> None:
    """The log last: entries in order, each under its name at once."""
    for path in sorted((source / LOG).iterdir(), key=lambda p: (p.suffix == ".json", p.name)):
        there = target / LOG / path.name
        if not there.exists():
            temporary = there.with_name(f".tmp-{path.name}")
            temporary.write_bytes(path.read_bytes())
            temporary.replace(there)


def _push_to_hub(store: EpisodeStore, repository: str, files: Iterable[str], private: bool) -> None:
    """One commit of the Hub: it appears as a whole."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        have = set(api.list_repo_files(repository, repo_type="dataset"))
        if "zarr.json" in have:
            theirs = Path(api.hf_hub_download(repository, "zarr.json", repo_type="dataset")).read_bytes()
            if theirs != (store.path / "zarr.json").read_bytes():
                raise StoreError(f"another store is at {HUB}{repository}: choose another repository")
            _require_same_history(
                store.path,
                store.version,
                lambda n: (
                    Path(api.hf_hub_download(repository, entry_path(n), repo_type="dataset")).read_bytes()
                    if entry_path(n) in have
                    else None
                ),
                f"{HUB}{repository}",
            )
        new = [CommitOperationAdd(f, store.path / f) for f in files if f not in have]
        if new:
            message = f"Version {store.version}: {store.num_episodes} episodes"
            api.create_commit(repository, new, commit_message=message, repo_type="dataset")
    except StoreError:
        raise
    except Exception as error:  # of the network, or of the Hub
        raise StoreError(f"cannot push to {HUB}{repository}: {error}. Type: hf auth login") from error


def _pull_from_hub(repository: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    if target.exists() and any(target.iterdir()) and not (target / "zarr.json").exists():
        raise StoreError(f"{target} exists and is no episode store: choose another path")
    try:
        snapshot_download(repository, repo_type="dataset", local_dir=target)
    except Exception as error:  # of the network, or of the Hub
        raise NotFoundError(f"cannot pull {HUB}{repository}: {error}") from error
    for name in (LOG, SEGMENTS, STAGING):
        (target / name).mkdir(exist_ok=True)
