"""Where a published model is: a folder on this machine, or a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CheckpointError, did_you_mean

LAYOUT = "expected config.json, *.safetensors and tokenizer.json, as save_pretrained writes them"


def require_model_folder(source: str) -> None:
    """Refuse a folder that cannot be a model, before a library says it in its own words; let hub names pass.

    Raises:
        CheckpointError: `source` is a path to nothing, to a file, or to a folder without ``config.json``.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if source.count("/") <= 1 and not source.startswith((".", "~", "/")):
            return
        near = sorted(f.name for f in path.parent.iterdir()) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near) if near else f"{path.parent} is no folder either."
        raise CheckpointError(f"no model at {source}: no such folder. {hint}")
    if not path.is_dir():
        raise CheckpointError(f"{source} is a file, no folder of a model: {LAYOUT}")
    if not (path / "config.json").is_file():
        found = sorted(f.name for f in path.iterdir())
        shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise CheckpointError(f"{source} is no model: {LAYOUT}; got {shown or 'an empty folder'}")


def cannot_load(what: str, source: str, error: BaseException) -> str:
    """What to say when a library cannot load `what` (a tokenizer, a backbone) from `source`."""
    if Path(source).expanduser().is_dir():
        advice = LAYOUT
    else:
        advice = f"expected a folder, or a hub name that can be reached; without network, download {source!r} elsewhere"
    return f"cannot load {what} from {source!r}: {advice}.\nThe library says: {error}"


@contextmanager
def quiet() -> Iterator[None]:
    """Let `transformers` draw no progress bars meanwhile: a model this small is there before one could be read."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
