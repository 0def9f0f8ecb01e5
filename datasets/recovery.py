"""What a new writer does about writers that died: commits what they finished, saves what they began."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from pathlib import Path

from ..console import log
from ..errors import BrachiumError, ConfigError, did_you_mean
from . import commitlog
from .journal import read_header, read_journal
from .layout import JOURNAL, KEY, LOG, SEGMENTS, STAGING, read_json
from .staging import COPY, TORN, StagingSegment, segment_actions

GRACE_S = 60.0
"""A staging folder without a readable journal header is left alone for so long [s]: its writer may be starting."""
SALVAGE = ("torn", "finished", "nothing")


def recover(root: Path, salvage: str = "torn") -> int:
    """Tidy up after dead writers of this machine. Every committed episode is safe without it.

    A folder in ``segments/`` that still has its journal was finished but maybe not committed: it is committed now, with
    the labels its writer gave. Of a folder in ``staging/`` the journal says what is whole.

    Args:
        root: Folder of the store.
        salvage: ``torn``: episodes that were finished, and the whole steps of the one that was not; ``finished``:
            the former; ``nothing``: drop the folder.

    Returns:
        Number of segments adopted.

    Raises:
        ConfigError: Another `salvage`.
    """
    if salvage not in SALVAGE:
        raise ConfigError(f"no salvage={salvage!r}. {did_you_mean(salvage, SALVAGE)}")
    adopted = 0
    for folder in sorted((root / STAGING).glob("*")):
        fd = _lock_of_dead_writer(folder / JOURNAL)
        if fd is not None:
            try:
                adopted += _salvage(root, folder, salvage)
            finally:
                os.close(fd)
        elif read_header(folder / JOURNAL) is None and _age(folder) > GRACE_S:
            shutil.rmtree(folder, ignore_errors=True)
    for temporary in (root / LOG).glob(".tmp-*"):
        if _age(temporary) > GRACE_S:
            temporary.unlink(missing_ok=True)
    for journal in sorted((root / SEGMENTS).glob(f"*/{JOURNAL}")):
        fd = _lock_of_dead_writer(journal)
        if fd is None:
            continue
        try:
            adopted += _adopt(root, journal.parent)
            journal.unlink(missing_ok=True)
        finally:
            os.close(fd)
    return adopted


def _lock_of_dead_writer(journal: Path) -> int | None:
    """Return a descriptor that locks the journal, or None when its writer lives or is on another machine."""
    header = read_header(journal)
    if header is None or header.get("host") != socket.gethostname():
        return None
    try:
        fd = os.open(journal, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _salvage(root: Path, folder: Path, salvage: str) -> bool:
    """Publish and commit what is whole in a staging folder; drop it where nothing is. Whether there was something.

    Died in the middle of this, it is begun again by the next one: publishing may be repeated.
    """
    found = read_journal(folder / JOURNAL) if salvage != "nothing" else None
    segment = None
    if found is not None and not found[0].get(COPY):
        header, episodes = found
        try:
            segment = StagingSegment.salvaged(folder, header, episodes, torn=salvage == "torn")
        except (KeyError, TypeError, ValueError) as error:  # of a version that wrote other journals
            log(f"{folder} was left by a writer that died, and cannot be read: {error!r}")
            return False
    if segment is None or not segment.episodes:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    try:
        actions = segment.publish()
    except BrachiumError as error:
        log(f"{folder} was left by a writer that died, and cannot be saved: {error}. Delete it, or save it by hand")
        return False
    commitlog.commit(root, actions, after=commitlog.read_log(root).version)
    (segment.folder / JOURNAL).unlink(missing_ok=True)
    torn = sum(TORN in episode["tags"] for episode in segment.episodes)
    log(
        f"{root}: saved {len(segment.episodes)} episodes, {segment.frames} steps, of a writer that died"
        + (f"; {torn} broke off and has the tag 'torn'" if torn else "")
    )
    return True


def _age(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0


def _adopt(root: Path, folder: Path) -> bool:
    state = commitlog.read_log(root)
    if folder.name in state.segments:
        return False
    try:
        attributes = read_json(folder / "zarr.json", "segment metadata")["attributes"][KEY]
        if attributes.get(COPY):  # its episodes are where they were, or were removed since
            shutil.rmtree(folder, ignore_errors=True)
            return False
        actions = segment_actions(folder.name, attributes)
    except (BrachiumError, KeyError, TypeError):
        return False
    commitlog.commit(root, actions, after=state.version)
    for path in folder.glob("images/*/c/*/0/0/0.partial"):  # what a video was made of
        path.unlink(missing_ok=True)
    return True
