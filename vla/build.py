"""The model that training begins with: fresh, on a pretrained encoder, or a checkpoint with more embodiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..console import log
from ..datasets.store import EpisodeStore
from ..errors import ConfigError, NotFoundError, SpecMismatchError
from ..spec import EmbodimentSpec
from .checkpoint import load_checkpoint, resolved_backbone
from .encoder import Encoder
from .ground import Grounding
from .model import VLAModel, tool_pose
from .pretrained import Pretrained, is_pretrained
from .recipe import Recipe, instantiate
from .sources import Source, embodiments_of
from .tokenizer import load_tokenizer, word_tokenizer

KINDS = ("state", "action")
Chunks = Callable[[str, int], Sequence[Tensor]]
"""(normalisation mode, horizon) -> normalised chunks of each embodiment."""


def fit_tokenizers(recipe: Recipe, chunks: Chunks) -> Recipe:
    """The recipe with what its action tokenizers learn from the data."""
    for part in ("head", "speech"):
        node = getattr(recipe, part)
        if node is None or "tokenizer" not in node:
            continue
        made = instantiate(node["tokenizer"])
        learnt = made.fit(chunks(recipe.action_normalization, recipe.action_horizon))
        if learnt is not None:
            kept = {k: v for k, v in node["tokenizer"].items() if k != "path"}
            changed: dict[str, Any] = {part: {**node, "tokenizer": {**kept, **learnt}}}
            recipe = replace(recipe, **changed)
    return recipe


def extend_checkpoint(path: str, sources: Sequence[Source], seed: int) -> tuple[VLAModel, list[str]]:
    """A checkpoint's model with the sources' embodiments added to its own; and the names of the new ones.

    Raises:
        SpecMismatchError: An embodiment of a source has the name of one of the checkpoint's, but differs.
    """
    old = load_checkpoint(path)
    embodiments = dict(old.embodiments)
    fresh = []
    first = next(iter(old.embodiments.values()))
    for name, spec in embodiments_of(sources).items():
        if name in embodiments:
            spec.require_same(embodiments[name], f"the data of {name}", f"checkpoint {path}")
        else:
            if _sees_by_camera(old) and spec.camera_names != first.camera_names:
                raise SpecMismatchError(
                    f"checkpoint {path} knows what each of {first.camera_names} looks like on average; {name} has "
                    f"{spec.camera_names}. Train one for both from the start: store=[STORE,STORE]"
                )
            embodiments[name] = spec
            fresh.append(name)
    recipe = replace(old.recipe, backbone=resolved_backbone(old.recipe, old.encoder))
    model = recipe.build(embodiments, old.tokenizer, seed=seed)
    model.encoder = old.encoder
    lacking, surplus = model.load_state_dict(old.state_dict(), strict=False)
    strangers = sorted(set(lacking) - owned_by(model, fresh))
    if surplus or strangers:
        raise SpecMismatchError(f"{path}: cannot take more embodiments: {[*surplus, *strangers][:3]} have no owner")
    return model, fresh


def owned_by(model: VLAModel, embodiments: Sequence[str]) -> set[str]:
    """Names of the weights and buffers that belong to some embodiments alone.

    They are what the model and its head keep in a `ModuleDict` or `ParameterDict` by embodiment, and the statistics.
    """
    everybody, found = set(model.embodiments), set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleDict, nn.ParameterDict)) and set(module.keys()) == everybody:
            for name in embodiments:
                own = module[name]
                inner = [f".{k}" for k in own.state_dict()] if isinstance(own, nn.Module) else [""]
                found |= {f"{path}.{name}{k}" for k in inner}
    found |= {f"{kind}_{what}_{name}" for kind in KINDS for what in ("offset", "scale") for name in embodiments}
    return found | {f"action_active_{name}" for name in embodiments}


def build_model(
    recipe: Recipe,
    sources: Sequence[Source],
    grounding: Grounding | None,
    encoder: str | None,
    seed: int,
    *,
    learns: bool,
) -> VLAModel:
    """A fresh model; with `encoder`, its encoder and tokenizer are taken from a checkpoint or pretrained model.

    A fresh encoder that points must be grounded, unless it `learns` to point from the demonstrations alone.
    """
    embodiments = embodiments_of(sources)
    if encoder is not None and is_pretrained(encoder):
        return _on_pretrained(recipe, embodiments, Pretrained.load(encoder), encoder, seed)
    if encoder is not None:
        return _on_encoder(recipe, embodiments, encoder, seed)
    path = recipe.backbone.get("path")
    if recipe.points and grounding is None and path:
        log(f"nothing to ground {path} on: the head reads its tokens (model.points=false)")
        recipe = replace(recipe, points=False)
    if recipe.points and grounding is None and not learns:
        raise ConfigError(
            "a model that points must be grounded first: give grounding.store=SCENES (brachium record env=scenes), "
            "or encoder=nano, or learn all of it with tune=full, or set model.points=false"
        )
    if path:
        return recipe.build(embodiments, load_tokenizer(str(path)), seed=seed)
    corpus = [episode.instruction for source in sources for episode in source.store.episodes]
    if grounding is not None:
        for episode in EpisodeStore.open(grounding.store).episodes:
            corpus += [sentence["text"] for sentence in episode.meta.get("sentences", ())]
    tokenizer = word_tokenizer(corpus)
    model = recipe.build(embodiments, tokenizer, seed=seed)
    if grounding is not None:  # what grounding gives must not depend on the seed of what comes after
        model.encoder = recipe.build(embodiments, tokenizer, seed=grounding.optimization.seed).encoder
    return model


def _sees_by_camera(model: VLAModel) -> bool:
    """Whether a model's encoder is tied to its cameras: it points, or has a mean image of each."""
    backbone: Any = model.encoder.backbone
    return model.recipe.points or len(getattr(backbone, "pixel_mean", ())) > 1


def _on_encoder(recipe: Recipe, embodiments: Mapping[str, EmbodimentSpec], encoder: str, seed: int) -> VLAModel:
    """A fresh model on the encoder of a checkpoint."""
    if not Path(encoder).exists():
        raise NotFoundError(
            f"no checkpoint or pretrained model at {encoder}. Type encoder=nano (it ships with brachium), "
            "or see: brachium list checkpoints"
        )
    source = load_checkpoint(encoder)
    theirs = next(iter(source.embodiments.values()))
    by_camera = _sees_by_camera(source)
    for name, spec in embodiments.items():
        fits = not source.recipe.points or tool_pose(theirs) == tool_pose(spec)
        if (by_camera and theirs.camera_names != spec.camera_names) or not fits:
            raise SpecMismatchError(
                f"encoder {encoder} was trained for cameras {theirs.camera_names} and state {theirs.state.names}; "
                f"{name} has {spec.camera_names} and {spec.state.names}"
            )
    recipe = replace(recipe, backbone=source.recipe.backbone, points=source.recipe.points)
    model = recipe.build(embodiments, source.tokenizer, seed=seed)
    return _with_encoder(model, source.encoder)


def _on_pretrained(
    recipe: Recipe, embodiments: Mapping[str, EmbodimentSpec], given: Pretrained, path: str, seed: int
) -> VLAModel:
    """A fresh model on a pretrained encoder; one that does not point takes its vision and language alone."""
    theirs: Any = given.encoder.backbone
    if not recipe.points:
        resolved = resolved_backbone(given.recipe, given.encoder)
        own = {k: v for k, v in recipe.backbone.items() if k not in ("path", "config", "_target_")}
        recipe = replace(recipe, backbone={**resolved, **own})
        model = recipe.build(embodiments, given.tokenizer, seed=seed)
        backbone: Any = model.encoder.backbone
        if len(theirs.pixel_mean) > 1:  # a mean image a camera
            _require_cameras(embodiments, given, path)
        backbone.pixel_mean, backbone.pixel_std = theirs.pixel_mean.clone(), theirs.pixel_std.clone()
        lacking, _ = backbone.vlm.load_state_dict(theirs.vlm.state_dict(), strict=False)  # layers may be cut off
        if lacking:
            raise SpecMismatchError(f"pretrained model {path} lacks {lacking[:3]}: model.backbone is another model")
        return model
    _require_cameras(embodiments, given, path)
    for name, spec in embodiments.items():
        pose = list(tool_pose(spec))
        if pose != given.encoder.body:
            raise SpecMismatchError(
                f"pretrained model {path} was trained for the tool's pose at {given.encoder.body} of the state; "
                f"{name} has it at {pose}"
            )
    recipe = replace(recipe, backbone=resolved_backbone(given.recipe, given.encoder), points=True)
    model = recipe.build(embodiments, given.tokenizer, seed=seed)
    return _with_encoder(model, given.encoder)


def _with_encoder(model: VLAModel, encoder: Encoder) -> VLAModel:
    """A model on another encoder, whose encodings hold what this model's head is told."""
    encoder.surround = model.encoder.surround
    model.encoder = encoder
    return model


def _require_cameras(embodiments: Mapping[str, EmbodimentSpec], given: Pretrained, path: str) -> None:
    for name, spec in embodiments.items():
        if spec.camera_names != given.cameras:
            raise SpecMismatchError(
                f"pretrained model {path} was trained for cameras {given.cameras}; {name} has {spec.camera_names}"
            )
