"""Checkpoints that prove themselves: weights, recipe, specs, statistics, tokenizer, and a golden batch.

A golden batch is a fixed input with the output the model gave when it was saved. Loading is strict, and recomputes it:
a model that loads but would act differently (another library version, a wrong normalisation, a swapped camera) is
refused. What a few inputs cannot show (a word they do not contain, a control rate) is found by checksums.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, NotFoundError
from ..spec import EmbodimentSpec, Guidance, Observation
from .encoder import Encoder, Encoding
from .model import VLAModel, stack_images
from .recipe import Recipe

FORMAT = 2
TOLERANCE = 1e-3
"""Largest difference of a golden action, as a share of the action's range in the data; of a golden loss, of 1 + it."""
FILES = ("meta.json", "recipe.json", "embodiments.json", "model.safetensors", "golden", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A fixed input for one embodiment and what the model answered.

    Attributes:
        embodiment: Name.
        observation: A batch of b observations.
        noise: float32 (b, h, n), n the model's `noise_dim`.
        actions: float32 (b, h, a), in the embodiment's units.
        losses: float32 (b,), of those actions. A head that chooses among tokens may choose otherwise where two are
            equally likely and the last digits differ; its losses do not.
    """

    embodiment: str
    observation: Observation
    noise: np.ndarray
    actions: np.ndarray
    losses: np.ndarray


@torch.no_grad()
def predict(
    model: VLAModel, embodiment: str, observation: Observation, noise: np.ndarray, guidance: Guidance | None = None
) -> np.ndarray:
    """Chunks float32 (b, h, a) for a batch of observations, in the embodiment's units."""
    encoding, state = _encode(model, embodiment, observation)
    chunk = model.sample(encoding, state, torch.from_numpy(noise).to(model.device), embodiment, guidance)
    return np.asarray(chunk.float().cpu().numpy())


@torch.no_grad()
def losses_of(model: VLAModel, embodiment: str, observation: Observation, actions: np.ndarray) -> np.ndarray:
    """Loss float32 (b,) of chunks (b, h, a), with fixed random draws."""
    encoding, state = _encode(model, embodiment, observation)
    chunk = torch.from_numpy(np.asarray(actions, np.float32)).to(model.device)
    padding = torch.zeros(chunk.shape[:2], dtype=torch.bool, device=model.device)
    generator = torch.Generator().manual_seed(0)
    each = model.loss(encoding, state, chunk, padding, embodiment, generator)
    return np.asarray(each.float().cpu().numpy())


def _encode(model: VLAModel, embodiment: str, observation: Observation) -> tuple[Encoding, Tensor]:
    spec, device = model.spec(embodiment), model.device
    images = stack_images(observation.images, spec, device)
    state = torch.from_numpy(np.array(observation.state, np.float32)).to(device)
    tokens = model.tokens(observation.instruction, state, embodiment)
    return model.encode(images, tokens, state, embodiment), state


def make_golden(model: VLAModel, embodiment: str, observation: Observation, seed: int = 0) -> Golden:
    """Compute the golden batch of a trained model."""
    rng = np.random.default_rng(seed)
    shape = (len(observation.state), model.recipe.action_horizon, model.noise_dim(embodiment))
    noise = rng.standard_normal(shape).astype(np.float32)
    model.eval()
    actions = predict(model, embodiment, observation, noise)
    return Golden(
        embodiment=embodiment,
        observation=observation,
        noise=noise,
        actions=actions,
        losses=losses_of(model, embodiment, observation, actions),
    )


def save_checkpoint(path: Path, model: VLAModel, goldens: Sequence[Golden], meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint folder; it appears whole or not at all, and replaces an older one of the same name.

    There must be a golden batch of every embodiment.
    """
    lacking = set(model.embodiments) - {golden.embodiment for golden in goldens}
    if lacking:
        raise CheckpointError(f"{path}: expected a golden batch of every embodiment, got none of {sorted(lacking)}")
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    recipe = {**model.recipe.to_dict(), "backbone": resolved_backbone(model.recipe, model.encoder)}
    _dump(temporary / "recipe.json", recipe)
    _dump(temporary / "embodiments.json", {k: v.to_dict() for k, v in model.embodiments.items()})
    model.tokenizer.save_pretrained(str(temporary / "tokenizer"))
    save_file(unshared(model.state_dict()), temporary / "model.safetensors")
    (temporary / "golden").mkdir()
    for golden in goldens:
        arrays = {f"image/{k}": v for k, v in golden.observation.images.items()}
        arrays |= {k: getattr(golden, k) for k in ("noise", "actions", "losses")} | {"state": golden.observation.state}
        save_file(
            {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()},
            temporary / "golden" / f"{golden.embodiment}.safetensors",
            {"instructions": json.dumps(list(golden.observation.instruction)), "embodiment": golden.embodiment},
        )
    _dump(temporary / "meta.json", {"format": FORMAT, **versions(), "sha256": checksums(temporary), **meta})
    replace_folder(path, temporary)
    return path


def replace_folder(path: Path, temporary: Path) -> None:
    """Put a finished folder in the place of another; a crash meanwhile leaves the old one beside it."""
    for file in temporary.rglob("*"):
        if file.is_file():
            share(file)
    old = _old(path)
    if path.exists():  # else a crash came between the two renames, and `old` is the only one
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def share(file: Path) -> None:
    """Let those read a file who may enter its folder: safetensors writes for the owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def resolved_backbone(recipe: Recipe, encoder: Encoder) -> dict[str, Any]:
    """The recipe's backbone with its whole configuration: weights are here, loading must not go back to the source."""
    backbone: Any = encoder.backbone
    if not hasattr(backbone, "resolved_config"):
        return dict(recipe.backbone)
    return {**recipe.backbone, "path": None, "config": {**backbone.resolved_config(), "_resolved": True}}


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which no two tensors share memory (tied embeddings do), as safetensors wants it."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        place = value.untyped_storage().data_ptr()
        result[key] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return result


def _old(path: Path) -> Path:
    """Where the checkpoint that is being replaced waits for a moment."""
    return path.with_name(path.name + ".old")


def load_checkpoint(path: str | Path, *, device: str = "cpu", verify: bool = True) -> VLAModel:
    """Load a checkpoint, strictly, and check that it reproduces its golden batch.

    Raises:
        NotFoundError: No checkpoint there.
        CheckpointError: Incomplete, damaged, edited, of another format, or the golden batch comes out differently.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not path.is_dir() and _old(path).is_dir():
        path = _old(path)
    if not path.is_dir():
        raise NotFoundError(
            f"no checkpoint at {path}. Type: brachium list checkpoints   (or train one: brachium train store=STORE)"
        )
    missing = [name for name in FILES if not (path / name).exists()]
    if "meta.json" not in missing:
        meta = read_meta(path)
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, got {meta.get('format')}: train anew")
    if missing:
        raise CheckpointError(f"{path} is no whole checkpoint: expected {list(FILES)}, missing {missing}")
    try:
        recipe = Recipe.from_dict(_load(path / "recipe.json"))
        embodiments = {k: EmbodimentSpec.from_dict(v) for k, v in _load(path / "embodiments.json").items()}
        tokenizer = AutoTokenizer.from_pretrained(str(path / "tokenizer"), trust_remote_code=False)
        model = recipe.build(embodiments, tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # whatever a damaged description or another version's leads to
        raise CheckpointError(f"{path}: cannot build the model: {type(error).__name__}: {error}") from error
    try:
        weights = load_file(path / "model.safetensors")
    except Exception as error:  # safetensors raises its own class for a damaged file
        raise CheckpointError(f"{path / 'model.safetensors'} is damaged: {error}") from error
    for name, value in weights.items():  # buffers that depend on the data have their size only now
        if name.endswith("pixel_mean"):
            model.encoder.backbone.pixel_mean = value.clone()
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights do not fit the recipe: {error}") from error
    model.eval()
    if verify:
        verify_golden(model, path)
        now = checksums(path)
        edited = [name for name, digest in meta.get("sha256", {}).items() if now.get(name) != digest]
        if edited:
            raise CheckpointError(f"{path}: {edited} are not the files that were saved; verify=False loads them anyway")
    return model.to(device)


def verify_golden(model: VLAModel, path: Path) -> dict[str, float]:
    """Recompute the golden batches on the CPU in float32.

    Returns:
        Embodiment -> the largest difference, as a share of the range.

    Raises:
        CheckpointError: One comes out differently, or is not there.
    """
    goldens = read_goldens(path)
    lacking = sorted(set(model.embodiments) - set(goldens))
    if lacking:
        raise CheckpointError(f"{path}: no golden batch of {lacking}: damaged")
    return {name: _verify(model, path, golden) for name, golden in goldens.items()}


def _verify(model: VLAModel, path: Path, golden: Golden) -> float:
    try:
        got = predict(model, golden.embodiment, golden.observation, golden.noise)
        losses = losses_of(model, golden.embodiment, golden.observation, golden.actions)
    except Exception as error:
        raise CheckpointError(f"{path}: the golden batch does not fit the model: {error}") from error
    scale = model.get_buffer(f"action_scale_{golden.embodiment}").cpu().numpy()
    worst = float((np.abs(got - golden.actions) / scale).max())
    apart = float((np.abs(losses - golden.losses) / (1.0 + np.abs(golden.losses))).max())
    worst = apart if model.head.discrete else float(np.max([worst, apart]))
    if not worst <= TOLERANCE:
        raise CheckpointError(
            f"{path}: the golden batch comes out differently: expected the saved actions and losses of "
            f"{golden.embodiment} within {TOLERANCE} of their range, got a difference of {worst:.3g}. The weights are "
            "not the ones saved, or a library computes otherwise: "
            f"saved with {read_meta(path).get('versions')}, running {versions()['versions']}."
        )
    return worst


def read_goldens(path: Path) -> dict[str, Golden]:
    """Read the golden batches of a checkpoint, by embodiment."""
    return {golden.embodiment: golden for golden in map(_read_golden, sorted((path / "golden").glob("*.safetensors")))}


def _read_golden(file: Path) -> Golden:
    from safetensors import safe_open

    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
            arrays = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        observation = Observation(
            images={k.removeprefix("image/"): v for k, v in arrays.items() if k.startswith("image/")},
            state=arrays["state"],
            instruction=tuple(json.loads(metadata["instructions"])),
        )
        return Golden(
            embodiment=metadata["embodiment"],
            observation=observation,
            noise=arrays["noise"],
            actions=arrays["actions"],
            losses=arrays["losses"],
        )
    except Exception as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """Read what was noted about a checkpoint: versions, data, metrics."""
    return _load(path / "meta.json")


def versions() -> dict[str, Any]:
    """Versions of what numbers depend on."""
    from importlib.metadata import version

    names = ("brachium", "torch", "transformers", "numpy")
    return {"versions": {name: version(name) for name in names}}


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but meta.json, by its name in the folder."""
    result = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "meta.json"):
        with file.open("rb") as opened:
            result[file.relative_to(path).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return result


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
