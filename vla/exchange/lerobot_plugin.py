"""A folder by which LeRobot runs a checkpoint, with the plugin ``lerobot_policy_brachium`` (see integrations/).

It refers to the checkpoint and holds no weights: LeRobot would read a ``model.safetensors`` in its own way, and a
checkpoint's folder proves itself by the checksums of all its files. Nothing of LeRobot is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError, NotFoundError, SpecMismatchError, did_you_mean
from ..checkpoint import read_meta
from ..model import VLAModel

KIND = "brachium"
OPTIONS = ("embodiment", "n_action_steps", "seed", "temperature", "batch_size", "instruction", "device")
N_ACTION_STEPS = 4


def identity_of(checkpoint: str | Path) -> str:
    """64 hex digits that tell a checkpoint from any other: the checksum of the checksums of its files.

    Raises:
        NotFoundError: No checkpoint there.
        CheckpointError: It has no checksums.
    """
    path = Path(checkpoint)
    if not (path / "meta.json").is_file():
        raise NotFoundError(f"no checkpoint at {path}. Where it lies now: --policy.checkpoint=FOLDER")
    sums = read_meta(path).get("sha256")
    if not sums:
        raise CheckpointError(f"{path}: expected checksums of its files in meta.json, got none")
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def write_plugin(
    model: VLAModel,
    checkpoint: str | Path,
    out: str | Path,
    options: Mapping[str, Any],
    robot: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json and the two processors' files.

    Args:
        model: The loaded checkpoint.
        checkpoint: Its folder.
        out: Folder to write.
        options: Some of `OPTIONS`.
        robot: What a driver says of LeRobot's keys: ``axes``, ``camera_keys``, ``fit``; None for environments whose
            states and actions are the embodiment's own.

    Raises:
        ConfigError: An option that does not exist, or a folder that holds a checkpoint.
        SpecMismatchError: No such embodiment, or a camera that the robot lacks.
    """
    source, folder = Path(checkpoint).resolve(), Path(out)
    if folder.resolve() == source or source in folder.resolve().parents or (folder / "meta.json").exists():
        raise ConfigError(f"out={out}: expected a folder of its own, got one with a checkpoint")
    if unknown := [key for key in options if key not in OPTIONS]:
        raise ConfigError(f"options: no option {unknown[0]!r}. {did_you_mean(str(unknown[0]), OPTIONS)}")
    names = list(model.embodiments)
    name = options.get("embodiment") or (names[0] if len(names) == 1 else None)
    if name not in model.embodiments:
        raise SpecMismatchError(f"options.embodiment={name}: which? {did_you_mean(str(name), names)}")
    config = _config(model, str(name), dict(options), dict(robot or {}))
    config |= {"checkpoint": str(source), "identity": identity_of(source)}
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "config.json", config)
    device = {"registry_name": "device_processor", "config": {"device": config["device"], "float_dtype": None}}
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    batch = {"registry_name": "to_batch_processor", "config": {}}
    after = {**device, "config": {"device": "cpu", "float_dtype": None}}
    _dump(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": [rename, batch, device]})
    _dump(folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": [after]})
    return folder


def _config(model: VLAModel, name: str, options: dict[str, Any], robot: dict[str, Any]) -> dict[str, Any]:
    spec, horizon = model.embodiments[name], model.recipe.action_horizon
    steps = int(options.get("n_action_steps", min(N_ACTION_STEPS, horizon)))
    if not 1 <= steps <= horizon:
        raise ConfigError(f"options.n_action_steps={steps}: expected 1 to {horizon}, the length of a chunk")
    axes, keys = robot.get("axes") or [], dict(robot.get("camera_keys") or {})
    if robot and (lacking := [camera for camera in spec.camera_names if camera not in keys]):
        raise SpecMismatchError(f"the robot has cameras {sorted(keys)}, the checkpoint ({name}) also sees {lacking}")
    state, action = (len(axes) or feature.dim for feature in (spec.state, spec.action))
    visual = {
        f"observation.images.{keys.get(camera.name, camera.name)}": {
            "type": "VISUAL",
            "shape": [3, camera.shape[0], camera.shape[1]],
        }
        for camera in spec.cameras
    }
    return {
        "type": KIND,
        "device": "cpu",
        "push_to_hub": False,
        "seed": 1000,
        **options,
        "embodiment": name,
        "chunk_size": horizon,
        "n_action_steps": steps,
        "input_features": {"observation.state": {"type": "STATE", "shape": [state]}, **visual},
        "output_features": {"action": {"type": "ACTION", "shape": [action]}},
        "action_feature_names": [axis["key"] for axis in axes] or list(spec.action.names) or None,
        "axes": json.dumps(axes) if axes else "",
        "camera_keys": {camera: key for camera, key in keys.items() if camera in spec.camera_names},
        "fit": {k: v for k, v in dict(robot.get("fit") or {}).items() if k in spec.camera_names},
    }


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
