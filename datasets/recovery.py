"""What a new writer does about writers that died: adopt finished segments, drop torn ones."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import time
from pathlib import Path
from typing import Any

from ..errors import StoreError
from . import commitlog
from .layout import JOURNAL, KEY, LOG, SEGMENTS, STAGING, crc32c, read_json
from .staging import MAGIC, segment_actions

GRACE_S = 60.0
"""A staging folder without a readable journal header is left alone for so long [s]: its writer may be starting."""


def _header(journal: Path) -> dict[str, Any] | None:
    """Return the header of a journal, or None when it is not there or not whole."""
    try:
        with open(journal, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            length, checksum = struct.unpack("<II", file.read(8))
            body = file.read(length)
    except (OSError, struct.error):
        return None
    if len(body) != length or crc32c(body) != checksum or body[:1] != b"H":
        return None
    header: dict[str, Any] = json.loads(body[1:])
    return header


def _lock_of_dead_writer(journal: Path) -> int | None:
    """Return a descriptor that locks the journal, or None when its writer lives or is on another machine."""
    header = _header(journal)
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


def recover(root: Path) -> int:
    """Tidy up after dead writers of this machine. Every committed episode is safe without it.

    A folder in ``staging/`` is torn and dropped. A folder in ``segments/`` that still has its journal was finished
    but maybe not committed: it is committed now, with the labels its writer gave.

    Returns:
        Number of segments adopted.
    """
    for folder in sorted((root / STAGING).glob("*")):
        fd = _lock_of_dead_writer(folder / JOURNAL)
        if fd is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(fd)
        elif _header(folder / JOURNAL) is None and _age(folder) > GRACE_S:
            shutil.rmtree(folder, ignore_errors=True)
    for temporary in (root / LOG).glob(".tmp-*"):
        if _age(temporary) > GRACE_S:
            temporary.unlink(missing_ok=True)
    adopted = 0
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
        actions = segment_actions(folder.name, attributes)
    except (StoreError, KeyError, TypeError):
        return False
    commitlog.commit(root, actions, after=state.version)
    return True
