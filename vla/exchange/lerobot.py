"""Policies that LeRobot and openpi wrote, as checkpoints here, and back.

Nothing of LeRobot is imported: a policy there is ``config.json``, ``model.safetensors`` and the statistics of its
processors. Weights are translated one by one, and a name or shape that does not fit is an error that lists it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...console import log
from ...datasets.statistics import FieldStatistics, Statistics
from ...errors import CheckpointError, NotFoundError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ..model import VLAModel
from ..recipe import Recipe
from .pi import Pi0, Pi0Fast, Pi05
from .smolvla import SmolVLA
from .weights import require_fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS: dict[str, type[Any]] = {made.kind: made for made in (Pi0, Pi05, Pi0Fast, SmolVLA)}
CAMERA, STATE, ACTION = "observation.images.", "observation.state", "action"
TIED = ("lm_head.weight", "embed_tokens.weight")


def read_lerobot(
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    control_hz: float,
    embodiment: EmbodimentSpec | None = None,
    options: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
) -> VLAModel:
    """A policy of LeRobot (or openpi's PyTorch port) as a model.

    Args:
        path: Folder with ``config.json`` (LeRobot) and ``model.safetensors``.
        tokenizer: Of the language model; their files name one, and do not hold it.
        control_hz: Rate that the policy was trained for [Hz]; their files do not say.
        embodiment: Whose policy it is; made up from the features they name where not given.
        options: What to take in place of their configuration, as `vision_heads` for towers of unusual shape, or `type`
            and `chunk_size` where there is no configuration.
        statistics: To normalise with, in place of those in their files.

    Raises:
        NotFoundError: No such folder.
        CheckpointError: Of a kind not known, damaged, without statistics, or weights that do not fit.
    """
    folder = Path(path)
    config = {**read_config(folder), **(options or {})}
    tensors = _tie(read_tensors(folder))
    kind = kind_of(config, tensors)
    spec = embodiment or made_up_spec(config, control_hz)
    recipe = Recipe(**_worded(kind.recipe(tensors), tokenizer))
    model = recipe.build({spec.name: spec}, tokenizer)
    load_translated(model, kind, tensors, spec.name, str(folder))
    model.set_statistics(spec.name, statistics or read_statistics(folder, spec))
    return model.eval()


def kind_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The kind that a configuration names, or that the weights' names give away."""
    name = config.get("type")
    if name is None:
        expert = any("gemma_expert" in key for key in tensors)
        name = "smolvla" if any(key.startswith("vlm_with_expert.") for key in tensors) else "pi0_fast"
        if expert:
            name = "pi0" if "state_proj.weight" in tensors else "pi05"
    if name not in KINDS:
        raise CheckpointError(f"policies of type {name!r} cannot be converted. {did_you_mean(str(name), KINDS)}")
    return KINDS[name](config)


def load_translated(model: VLAModel, kind: Any, tensors: Mapping[str, Tensor], embodiment: str, source: str) -> None:
    """Put their weights in place of a model's; all must be there, and fit."""
    translation = kind.translation(embodiment)
    own = {k: v for k, v in model.state_dict().items() if translation.theirs(k) is not None}
    dead = set(kind.dead(tensors))
    expected = {translation.theirs(k): v for k, v in own.items()}
    found = {k: v for k, v in tensors.items() if k not in dead}
    require_fit(expected, found, source)
    lacking, surplus = model.load_state_dict({translation.ours(k): v for k, v in found.items()}, strict=False)
    if surplus or [k for k in lacking if k in own]:
        raise CheckpointError(f"{source}: weights were not loaded: {surplus}")


def write_lerobot(model: VLAModel, path: str | Path, kind: str, options: Mapping[str, Any]) -> Path:
    """A model that was read with `read_lerobot`, or has the same parts, as a policy of LeRobot.

    Args:
        model: With one embodiment.
        path: Folder to write.
        kind: ``pi0``, ``pi05``, ``pi0_fast`` or ``smolvla``.
        options: Their configuration, but for the features, which are the embodiment's.
    """
    if kind not in KINDS:
        raise CheckpointError(f"cannot write policies of type {kind!r}. {did_you_mean(kind, KINDS)}")
    if len(model.embodiments) != 1:
        raise CheckpointError(f"a policy of LeRobot has one embodiment, this model {list(model.embodiments)}")
    (name, spec), folder = next(iter(model.embodiments.items())), Path(path)
    made = KINDS[kind](options)
    translation = made.translation(name)
    state = model.state_dict()
    buffers = {key for key, _ in model.named_buffers()}
    unknown = [k for k in state if translation.theirs(k) is None and k not in buffers and k != READOUTS]
    if unknown:
        raise CheckpointError(f"a {kind} has no place for {len(unknown)} weights of this model, such as {unknown[:3]}")
    tensors = {theirs: v for k, v in state.items() if (theirs := translation.theirs(k)) is not None}
    _require_kind(model, made, tensors)
    tensors |= made.dead(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {f"model.{k}": v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(whole, folder / "model.safetensors")
    config = {**options, "type": kind, "chunk_size": model.recipe.action_horizon, **_features(spec)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_statistics(model, name, folder)
    return folder


READOUTS = "encoder.backbone.readouts"
FREE = ("steps", "solver", "draws", "time_alpha", "tokenizer", "heads", "eps", "begin", "preamble", "end", "last")
"""Options of a head that a policy there need not share, or that its weights decide."""


def _require_kind(model: VLAModel, kind: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError unless a model computes what a policy of that kind would with these weights."""
    try:
        wanted = kind.recipe(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"a {kind.kind} has no place for the weights of this model: {error}") from error
    own = model.recipe
    pairs = {f"head.{k}": (own.head.get(k), v) for k, v in wanted["head"].items() if k not in FREE}
    pairs |= {f"backbone.{k}": (own.backbone.get(k), wanted["backbone"].get(k)) for k in ("fit", "two_way", "scale")}
    pairs |= {k: (getattr(own, k), wanted[k]) for k in ("state", "prompt") if k in wanted}
    if own.head.get("max_delay"):
        log(f"a {kind.kind} knows no max_delay: it is left out, and chunks do not go on from rows that are given there")
    apart = [f"{k} is {mine!r} here and {theirs!r} there" for k, (mine, theirs) in pairs.items() if mine != theirs]
    if apart:
        raise CheckpointError(f"a {kind.kind} has no place for this model: {'; '.join(apart)}")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``; empty where there is none (openpi)."""
    if not folder.is_dir():
        raise NotFoundError(f"no policy at {folder}: expected a folder with config.json and model.safetensors")
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in float32, by their names without ``model.`` before them."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{folder} is no policy: expected model.safetensors, got {_listing(folder)}")
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return {k.removeprefix("model."): v.float() if v.is_floating_point() else v for k, v in loaded.items()}


def made_up_spec(config: Mapping[str, Any], control_hz: float) -> EmbodimentSpec:
    """The embodiment that the features of a configuration tell of; they have no units."""
    features = {**config.get("input_features", {}), **config.get("output_features", {})}
    cameras = tuple(
        FeatureSpec(name=key.removeprefix(CAMERA), shape=(*feature["shape"][1:], 3), dtype="uint8")
        for key, feature in features.items()
        if feature["type"] == "VISUAL" and "empty_camera" not in key
    )
    missing = [key for key in (STATE, ACTION) if key not in features]
    if missing or not cameras:
        raise CheckpointError(
            f"the configuration names no {missing or 'camera'}: say whose policy it is (embodiment=...)"
        )
    names = config.get("action_feature_names")
    return EmbodimentSpec(
        name=str(config.get("type", "policy")),
        robot="unknown",
        control_hz=control_hz,
        cameras=cameras,
        state=FeatureSpec(name="state", shape=tuple(features[STATE]["shape"])),
        action=FeatureSpec(name="action", shape=tuple(features[ACTION]["shape"]), names=tuple(names or ())),
    )


def read_statistics(folder: Path, spec: EmbodimentSpec) -> Statistics:
    """Statistics of a policy's processors (LeRobot) or assets (openpi); none is an error."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in sorted(folder.glob("*normalizer_processor*.safetensors")):
        for key, value in load_file(file).items():
            name, _, statistic = key.rpartition(".")
            found.setdefault(name, {})[statistic] = value.double().numpy()
    for file in sorted(folder.rglob("norm_stats.json")):
        for name, values in json.loads(file.read_text()).get("norm_stats", {}).items():
            key = ACTION if name.startswith("action") else STATE if name == "state" else name
            found.setdefault(key, {}).update({k: np.asarray(v, np.float64) for k, v in values.items()})
    fields = {}
    for key, feature in ((STATE, spec.state), (ACTION, spec.action)):
        if key not in found:
            raise CheckpointError(
                f"{folder} has no statistics of {key}: expected *normalizer_processor.safetensors or norm_stats.json. "
                "A base model has none for your robot: train on your data first, or give store=STORE to take them from"
            )
        fields[feature.name] = _statistics(found[key], feature.dim, key)
    return Statistics(fields=fields)


def _statistics(values: Mapping[str, np.ndarray], dim: int, key: str) -> FieldStatistics:
    cut = {k: np.asarray(v, np.float64).reshape(-1)[:dim] for k, v in values.items() if np.size(v) >= dim}
    if "mean" not in cut or "std" not in cut:
        raise CheckpointError(f"statistics of {key}: expected mean and std of {dim} values, got {sorted(values)}")
    low, high = cut["mean"] - cut["std"], cut["mean"] + cut["std"]
    return FieldStatistics(
        mean=cut["mean"],
        std=cut["std"],
        min=cut.get("min", cut.get("q01", low)),
        max=cut.get("max", cut.get("q99", high)),
        q01=cut.get("q01", cut.get("min", low)),
        q99=cut.get("q99", cut.get("max", high)),
        count=int(np.ravel(values["count"])[0]) if "count" in values else 0,
    )


def _write_statistics(model: VLAModel, name: str, folder: Path) -> None:
    """What normalisation needs, under LeRobot's names; min and max, or mean and std, as the model normalises."""
    tensors: dict[str, Tensor] = {}
    for key, kind, mode in (
        (STATE, "state", model.recipe.state_normalization),
        (ACTION, "action", model.recipe.action_normalization),
    ):
        offset, scale = model.get_buffer(f"{kind}_offset_{name}"), model.get_buffer(f"{kind}_scale_{name}")
        low, high = offset - scale, offset + scale
        tensors |= {f"{key}.mean": offset, f"{key}.std": scale}
        names = {"quantile": ("q01", "q99"), "min_max": ("min", "max"), "mean_std": ()}[mode]
        tensors |= {f"{key}.{statistic}": value for statistic, value in zip(names, (low, high))}
    for side in ("preprocessor_step_0_normalizer_processor", "postprocessor_step_0_unnormalizer_processor"):
        save_file({k: v.clone() for k, v in tensors.items()}, folder / f"policy_{side}.safetensors")


def _features(spec: EmbodimentSpec) -> dict[str, Any]:
    cameras = {f"{CAMERA}{c.name}": {"type": "VISUAL", "shape": [3, c.shape[0], c.shape[1]]} for c in spec.cameras}
    return {
        "input_features": {**cameras, STATE: {"type": "STATE", "shape": [spec.state.dim]}},
        "output_features": {ACTION: {"type": "ACTION", "shape": [spec.action.dim]}},
    }


def _tie(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Word embedding and output layer, where a file holds but one of them because they are one."""
    for key in [k for k in tensors if k.endswith(TIED) and "expert.lm_head" not in k]:
        for other in _other_ends(key):
            tensors.setdefault(other, tensors[key])
    return tensors


def _other_ends(key: str) -> list[str]:
    if key.endswith("lm_head.weight"):
        start = key.removesuffix("lm_head.weight")
        inner = "text_model" if "vlm_with_expert" in key else "language_model"
        return [f"{start}model.{inner}.embed_tokens.weight"]
    return [key[: key.index("model.")] + "lm_head.weight"]


def _worded(recipe: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """For an action that is said in the language model's vocabulary: its tokenizer, and the words around it as tokens.

    The tokenizer by its content, not its name: a checkpoint must not look for it elsewhere.
    """
    head = recipe["head"]
    if "skip" in head:
        from ..action_tokens.fast import FastTokenizer

        node = head["tokenizer"]
        head["tokenizer"] = {"_target_": node["_target_"], **(FastTokenizer(path=node["path"]).fit([]) or {})}

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        lacking = [name for name in ("bos", "eos") if getattr(tokenizer, f"{name}_token_id") is None]
        if lacking:
            raise CheckpointError(
                f"pi0_fast: expected a tokenizer with begin and end tokens, got one without {lacking}"
            )
        head |= {"begin": [int(tokenizer.bos_token_id)], "preamble": ids("Action: ")}
        head |= {"end": [*ids("|"), int(tokenizer.eos_token_id)], "last": int(tokenizer.vocab_size) - 1}
    return recipe


def _listing(folder: Path) -> str:
    return ", ".join(sorted(f.name for f in folder.iterdir())[:6]) or "an empty folder"
