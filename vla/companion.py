"""Small nets on a frozen pretrained model, in folders of their own that bring the model along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError
from .checkpoint import replace_folder
from .pretrained import Pretrained, identity_of

MODEL = "model"
"""Folder of the pretrained model in a companion's."""


def save_companion(
    path: str | Path,
    net: nn.Module,
    model: Pretrained,
    *,
    about: str,
    weights: str,
    meta: Mapping[str, Any],
    more: str = "",
) -> Path:
    """Write the folder; it appears whole or not at all.

    Args:
        path: Folder.
        net: Whose weights are written.
        model: The pretrained model; it is written too, so that the folder can go anywhere.
        about, weights: Names of the files of `meta` and of the weights.
        meta: What the net is built from, and notes.
        more: Text of a further ``meta.json``; empty for none.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(net.state_dict(), temporary / weights)
    told = {**meta, "identity": identity_of(model.save(temporary / MODEL))}
    (temporary / about).write_text(json.dumps(told, indent=1, default=str) + "\n")
    if more:
        (temporary / "meta.json").write_text(more)
    replace_folder(path, temporary)
    return path


def load_companion[Net: nn.Module](
    path: str | Path, build: Callable[[dict[str, Any]], Net], *, about: str, weights: str, what: str
) -> tuple[Net, dict[str, Any], Pretrained]:
    """The net for evaluation, what was noted, and the pretrained model.

    Args:
        path: Folder.
        build: Makes the net from what was noted.
        about, weights: Names of its files.
        what: What it should be, and which verb makes it, for messages.

    Raises:
        CheckpointError: Incomplete or damaged, or the pretrained model in it is not the one it was trained on.
    """
    path = Path(path)
    try:
        meta = json.loads((path / about).read_text())
        net = build(meta)
        net.load_state_dict(load_file(path / weights))
        identity = str(meta["identity"])
        meta["notes"] = dict(meta["notes"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no {what} made, or made by another version: {error}") from error
    model = Pretrained.load(path / MODEL)
    if identity_of(path / MODEL) != identity:
        raise CheckpointError(f"{path}: its pretrained model is another than it was trained on")
    return net.eval(), meta, model
