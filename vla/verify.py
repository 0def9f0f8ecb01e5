"""Checkpoints proven on demand: what ``brachium verify`` does with a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from ..console import human_time, log, table
from .checkpoint import TOLERANCE, load_checkpoint, read_goldens, read_meta, verify_golden, versions


def verify_checkpoint(path: str | Path) -> int:
    """Load a checkpoint strictly, replay its golden batches, and compare every file with its checksum.

    Raises:
        CheckpointError: What does not hold.
    """
    path, begin = Path(path), time.monotonic()
    model = load_checkpoint(path)  # strict; replays the golden batches; compares the checksums
    worst, goldens = verify_golden(model, path), read_goldens(path)
    meta = read_meta(path)
    rows = [
        [name, str(len(goldens[name].actions)), str(tuple(goldens[name].actions.shape[1:])), f"{value:.2e}"]
        for name, value in worst.items()
    ]
    table("golden batches", ["embodiment", "inputs", "chunk", "largest difference, share of range"], rows)
    changed = [
        f"{name} {old} -> {new}"
        for name, new in versions()["versions"].items()
        if (old := meta.get("versions", {}).get(name)) != new
    ]
    log("libraries are those it was saved with" if not changed else f"libraries that changed: {', '.join(changed)}")
    log(
        f"{path}: {model.parameter_count() / 1e6:.2f} M weights, {len(meta.get('sha256', {}))} files as they were "
        f"saved, golden batches within {TOLERANCE} ({human_time(time.monotonic() - begin)})"
    )
    return 0
