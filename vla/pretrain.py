"""The verb ``brachium pretrain``: a small VLM from rendered scenes, first without labels, then by words and points.

1. *See*: the vision tower fills in hidden patches of unlabelled frames (SimMIM, Xie et al. 2022).
2. *Speak*: the whole model answers questions about scenes, token by token, and points at what commands name.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ..console import human_time, log, require_disk
from ..datasets.store import EpisodeStore
from ..errors import ConfigError
from .card import recipe_hash
from .encoder import Encoder, build_encoder, word_loss
from .ground import Grounding
from .grounding import grounding_loss, inside
from .looking import PatchNames, looking_loss
from .loop import TrainLoop
from .optim import Optimization
from .pretrain_data import SEEN, Mixture, PretrainBatch, corpus_of, names_of, record_all, same_body
from .pretrained import Pretrained, identity_of
from .probe import linear_probe
from .questions import IGNORE, blurred_targets, choices, language_loss, location_tokens, score
from .recipe import Recipe
from .tokenizer import subword_tokenizer
from .train import choose_device

MEAN, STD = 0.5, 0.25
"""Pixel normalisation, for any image."""
LOOK, MIDDLE, COUNTED = 0.5, 5.0, 20.0
"""Weights of the losses of where to look, of where the thing in a patch has its middle, and of how many middles lie in
it."""
AT_ONCE = 25
"""Scenes scored at once."""


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """The stage without labels.

    Attributes:
        optimization: How to train; a batch is of frames. None leaves the stage out.
        hidden: Share of patches that are hidden.
    """

    optimization: Optimization | None = None
    hidden: float = 0.6


def pretrain(
    *,
    model: Recipe,
    optimization: Optimization,
    seeing: Seeing,
    stores: Sequence[str] | None = None,
    tests: Mapping[str, str] | None = None,
    scenes: Mapping[str, Callable[..., Any]] | None = None,
    recorder: Callable[..., Any] | None = None,
    tables: Mapping[str, int] | None = None,
    init: str | None = None,
    out: str = "outputs/pretrain",
    vocabulary: int = 640,
    length: int = 32,
    sentences: int = 3,
    questions: int = 5,
    single: float = 0.25,
    blur: float = 1.0,
    watch: Sequence[int] = (1, 2),
    heldout: int = 300,
    evaluate_every: int = 0,
    resume: bool = False,
    device: str = "auto",
) -> int:
    """Pretrain a vision-language model on labelled scenes.

    Ctrl-C saves; the same command with ``resume=true`` continues to the same numbers. The result is a folder in Hugging
    Face's layout, ``OUT/model``, that ``brachium train encoder=OUT/model`` and ``brachium ask`` take.

    Args:
        model: Recipe of the model; its backbone is trained.
        optimization: How the stage with words is trained; a batch is of scenes.
        seeing: The stage without labels.
        stores: Episode stores of scenes with questions (``brachium record env=scenes``), of one or several robots;
            null records them first, into OUT/scenes.
        tests: Name -> store of scenes to score on, beside the held-out scenes of `stores`.
        scenes: Robot -> factory of scenes, for recording.
        recorder: Records scenes from a factory.
        tables: Robot -> number of tables to record; each is seen in several arm poses.
        init: Pretrained model to go on from, ``nano`` or a folder; its words and its architecture stay. Null for a
            fresh one.
        out: Folder.
        vocabulary: Subwords of the tokenizer, beside its location tokens.
        length: Tokens of a question with its answer.
        sentences: Commands a scene in a batch, to point at what they name.
        questions: Questions a scene in a batch.
        single: Share of steps that show questions with the first camera alone, so that one image is enough to ask.
        blur: Spread of a place's target over neighbouring location tokens; 0 for none.
        watch: Layers of the language model whose first head is led to what words stand for, and to what the next word
            is about.
        heldout: Scenes of each store kept for the scores.
        evaluate_every: Steps between scores; 0 for the end only.
        resume: Go on from what is saved in `out`.
        device: ``cpu``, ``cuda`` or ``auto``.
    """
    begin = time.monotonic()
    if not stores and not (scenes and recorder and tables):
        raise ConfigError("nothing to pretrain on: give stores=[SCENES]   (brachium record env=scenes out=SCENES)")
    _check_options(model, watch, heldout)
    folder, place = Path(out), torch.device(choose_device(device))
    require_disk(folder, 200e6, "pretraining")
    given = bool(stores)
    if not stores:
        assert scenes and recorder and tables  # noqa: PT018
        stores, tests = record_all(scenes, recorder, tables, folder / "scenes")
    opened = [EpisodeStore.open(path) for path in stores]
    others = {name: EpisodeStore.open(path) for name, path in (tests or {}).items()}
    recipe = replace(model, max_tokens=min(model.max_tokens, length))
    cameras, body = same_body([*opened, *others.values()])
    if init is None:
        tokenizer = subword_tokenizer(corpus_of(opened), size=vocabulary)
        encoder = _fresh(recipe, tokenizer, cameras, body, optimization.seed).to(place)
    else:
        begun = _continued(init, cameras, body)
        tokenizer, recipe, encoder = begun.tokenizer, begun.recipe, begun.encoder.to(place)
    mixture = partial(
        Mixture,
        tokenizer=tokenizer,
        max_tokens=recipe.max_tokens,
        length=length,
        questions=questions,
        options=Grounding(store="", optimization=optimization, sentences=sentences, word_dropout=0.05, heldout=heldout),
        grids=(encoder.backbone.token_grid, encoder.backbone.grid),
        names=names_of(opened),
        device=place,
    )
    data = mixture(opened)
    if seeing.optimization is not None:
        _see(encoder, data, seeing, folder, resume)
    if init is None:
        _fit_readout(encoder, data)
    tested = {"heldout": data} | {name: mixture([store], evaluation=True) for name, store in others.items()}
    with torch.random.fork_rng():
        torch.manual_seed(optimization.seed)
        patches = PatchNames(encoder.backbone.width, len(data.words)).to(place)
    blurred, priors = blurred_targets(tokenizer, blur).to(place), data.priors.table().to(place)

    def loss(batch: PretrainBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        alone = torch.rand((), generator=generator).item() < single
        return pretraining_loss(encoder, patches, batch, blurred, priors, watch=tuple(watch), alone=alone)

    settings = settings_of(
        model=model,
        seeing=seeing,
        vocabulary=vocabulary,
        length=length,
        sentences=sentences,
        questions=questions,
        single=single,
        blur=blur,
        watch=watch,
        heldout=heldout,
    )
    settings |= {} if init is None else {"init": identity_of(init)}
    fingerprints = [store.fingerprint for store in opened]
    loop = TrainLoop(
        name="speak",
        module=nn.ModuleDict({"encoder": encoder, "patches": patches}),
        make_batch=data.make,
        loss=loss,
        options=optimization,
        folder=folder,
        resume=resume,
        evaluate=lambda: evaluate_pretraining(encoder, tested),
        evaluate_every=evaluate_every,
        identity={"data": fingerprints, **settings},
    )
    log(
        f"pretraining {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters on "
        f"{sum(len(part.train) for part in data.parts)} scenes of {len(opened)} stores, {len(tokenizer)} tokens"
    )
    metrics = loop.run()
    loop.use_average()
    encoder.eval()
    blinded = {f"blind/{k}": v for k, v in evaluate_pretraining(encoder, {"heldout": data}, dark=True).items()}
    seconds = loop.earlier + time.monotonic() - begin
    notes = {
        "metrics": {**metrics, **blinded},
        "probe": linear_probe(encoder, data),
        "seconds": seconds,
        "machine": f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
        if place.type == "cpu"
        else torch.cuda.get_device_name(place),
        # stores that are recorded here have fresh ids every time: what was asked for stands for them
        "recipe": recipe_hash(fingerprints if given else dict(tables or {}), settings, optimization),
        "scenes": sum(len(part.train) for part in data.parts),
        "stores": {store.path.name: store.fingerprint for store in opened},
        "optimization": optimization.noted(),
        "seeing": None if seeing.optimization is None else seeing.optimization.noted(),
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }
    names = opened[0].embodiment.camera_names
    made = Pretrained(encoder=encoder.cpu(), tokenizer=tokenizer, recipe=recipe, cameras=names, notes=notes)
    path = made.save(folder / "model")
    Pretrained.load(path)  # what cannot be loaded is no result
    (folder / "scores.json").write_text(json.dumps(notes, indent=1, default=str) + "\n")
    for stage in ("see", "speak"):
        (folder / f"resume-{stage}.safetensors").unlink(missing_ok=True)
    log(f"{path}: saved and loaded again, {human_time(seconds)}")
    return 0


def settings_of(
    *,
    model: Recipe,
    seeing: Seeing,
    vocabulary: int,
    length: int,
    sentences: int,
    questions: int,
    single: float,
    blur: float,
    watch: Sequence[int],
    heldout: int,
) -> dict[str, Any]:
    """What a pretraining depends on beside its data and how its steps are taken, JSON-ready."""
    return {
        "backbone": dict(model.backbone),
        "max_tokens": min(model.max_tokens, length),
        "seeing": None if seeing.optimization is None else {**seeing.optimization.noted(), "hidden": seeing.hidden},
        "batch": [vocabulary, length, sentences, questions, single, blur, heldout, list(watch)],
        "weights": [LOOK, MIDDLE, COUNTED],
    }


def _check_options(model: Recipe, watch: Sequence[int], heldout: int) -> None:
    if len(watch) != 2 or heldout < 1:
        raise ConfigError(
            "expected two layers to watch, for what words stand for and for what the next is about, and at least one "
            f"scene held out of each store; got watch={list(watch)} and heldout={heldout}"
        )
    if not model.points or model.backbone.get("path"):
        raise ConfigError(
            "pretraining makes a new model that points: expected model.points=true and a backbone without path, got "
            f"points={model.points} and path={model.backbone.get('path')}. Type model=nano"
        )


def _fresh(recipe: Recipe, tokenizer: Any, cameras: int, body: tuple[int, ...], seed: int) -> Encoder:
    """A fresh encoder that normalises pixels the same way whatever the camera, so that any image may be asked about."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size, pad = len(tokenizer), int(tokenizer.pad_token_id)
        encoder = build_encoder(recipe, vocab_size=size, pad_id=pad, cameras=cameras, body=body)
    backbone: Any = encoder.backbone
    backbone.pixel_mean = torch.full_like(backbone.pixel_mean[..., :1, :1], MEAN)
    backbone.pixel_std = torch.full_like(backbone.pixel_std, STD)
    return encoder


def _continued(init: str, cameras: int, body: tuple[int, ...]) -> Pretrained:
    """A pretrained model to go on from, with room for the cameras and the pose of these scenes."""
    begun = Pretrained.load(init)
    if (len(begun.cameras), tuple(begun.encoder.body)) != (cameras, body):
        raise ConfigError(
            f"init={init} has {len(begun.cameras)} cameras and the tool pose at {begun.encoder.body} of the state, "
            f"these scenes {cameras} and {list(body)}: leave init out"
        )
    begun.encoder.train().requires_grad_(True)
    return begun


def _see(encoder: Encoder, data: Mixture, seeing: Seeing, folder: Path, resume: bool) -> None:
    """Train the vision tower to fill in hidden patches."""
    options = seeing.optimization
    assert options is not None
    backbone: Any = encoder.backbone
    rows, columns = backbone.grid
    side = backbone.image_size // rows
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        painter = nn.Linear(backbone.vision_width, 3 * side * side).to(data.device)
    tower = nn.ModuleDict({"vision": backbone.vlm.model.vision_model, "painter": painter})

    def loss(images: UInt8[Tensor, "b n h w 3"], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = backbone.normalise(images).flatten(0, 1)
        hidden = torch.rand(len(pixels), rows * columns, generator=generator).to(pixels.device) < seeing.hidden
        mask = hidden.reshape(-1, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
        guess = painter(backbone.look(pixels.masked_fill(mask, 0.0)))
        true = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        error = (guess.float() - true).abs().mean(-1)
        return (error * hidden).sum() / hidden.sum().clamp(min=1), {}

    log(f"seeing: filling in {100 * seeing.hidden:.0f} % of the patches of unlabelled frames")
    loop = TrainLoop(
        name="see",
        module=tower,
        make_batch=lambda step: data.frames(step, options.batch_size),
        loss=loss,
        options=options,
        folder=folder,
        resume=resume,
        identity={"hidden": seeing.hidden, "data": [part.store.fingerprint for part in data.parts]},
    )
    loop.run()
    loop.save()  # the next stage may be interrupted: what comes here again finds this one finished
    loop.use_average()


def _fit_readout(encoder: Encoder, data: Mixture) -> None:
    """Scale proprioception, and find the middle of the work space."""
    readout = encoder.point_readout
    assert readout is not None
    states = np.concatenate([part.state[part.train][:, data.body] for part in data.parts])
    positions = np.concatenate([part.objects[part.train][..., :3].reshape(-1, 3) for part in data.parts])
    centre = positions[np.isfinite(positions).all(-1)].mean(0)
    readout.fit(torch.from_numpy(states).to(data.device), torch.from_numpy(centre).to(data.device))


def pretraining_loss(
    encoder: Encoder,
    patches: PatchNames,
    batch: PretrainBatch,
    blurred: Float[Tensor, "w w"],
    priors: Float[Tensor, "c w"],
    *,
    watch: tuple[int, ...],
    alone: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Points, named words, answers, and what covers patches, from one pass; with `alone`, the first camera's only."""
    images, targets, k = batch.scenes.images, batch.targets, batch.commands
    if alone:
        images, batch, k = images[:, :1], batch.questions_only(), 0
        targets = targets.masked_fill(~batch.one_view[..., None], IGNORE)
    features = encoder.read(images, batch.texts, watch)
    spoken = _language(encoder, features.text[:, k:], targets, blurred, priors, batch.priors)
    looked, shares = looking_loss(features.attention, batch.looks)
    named, middle, counted = patches(features.tokens, batch.looks)
    value = spoken + LOOK * looked + named + MIDDLE * middle + COUNTED * counted
    parts = {"language": spoken, "patches": named, "middle": middle, "counted": counted}
    parts = {name: part.detach() for name, part in parts.items()}
    parts |= {f"look{number}": share for number, share in zip(watch, shares)}
    if not alone:
        points, words = encoder.points_of(features.first_texts(k), batch.scenes.state)
        pointed, shown = grounding_loss(points, batch.scenes.objects, features.grid)
        value = value + pointed + word_loss(words, batch.scenes.clean_tokens, encoder.pad_id)
        parts |= {name: shown[name] for name in ("cells", "shift", "position")}
    return value, parts


def _language(
    encoder: Encoder,
    states: Float[Tensor, "b q l d"],
    targets: Int[Tensor, "b q l"],
    blurred: Float[Tensor, "w w"],
    priors: Float[Tensor, "c w"],
    rows: Int[Tensor, "b q l"],
) -> Float[Tensor, ""]:
    keep = targets != IGNORE
    backbone: Any = encoder.backbone
    if not bool(keep.any()):
        return states.float().sum() * 0.0
    return language_loss(backbone.next_words(states[keep]).float() + priors[rows[keep]], targets[keep], blurred)


@torch.no_grad()
def evaluate_pretraining(encoder: Encoder, tests: Mapping[str, Mixture], *, dark: bool = False) -> dict[str, float]:
    """Accuracy by kind of question, and pixel errors of pointing at visible things, on each set of scenes.

    Args:
        encoder: Model.
        tests: Name -> scenes; the held-out ones of each are used.
        dark: Show nothing: what is still right, text alone gives.
    """
    result: dict[str, float] = {}
    for name, mixture in tests.items():
        predicted: list[list[int]] = []
        wanted: list[list[int]] = []
        kinds: list[str] = []
        errors: list[list[Tensor]] = [[] for _ in mixture.parts[0].spec.cameras]
        for which, part in enumerate(mixture.parts):
            for start in range(0, len(part.heldout), AT_ONCE):
                scenes = part.heldout[start : start + AT_ONCE]
                batch = mixture.batch(which, scenes, None)
                images = batch.scenes.images
                if dark:
                    images = torch.full_like(images, round(255 * MEAN))  # what normalisation takes for nothing
                features, k = encoder.read(images, batch.texts), batch.commands
                points, _ = encoder.points_of(features.first_texts(k), batch.scenes.state)
                backbone: Any = encoder.backbone
                found = choices(backbone.next_words(features.text[:, k:]), batch.targets)
                predicted += found[0]
                wanted += found[1]
                kinds += [kind for row in batch.kinds for kind in row]
                label = batch.scenes.objects[..., 3:].unflatten(-1, (-1, 3))
                seen = inside(label) & (part.visible(scenes, batch.scenes) >= SEEN)
                for view, camera in enumerate(part.spec.cameras):
                    size = torch.tensor([camera.shape[1], camera.shape[0]], device=label.device)
                    error = ((points.uv - label[..., :2]) * size).norm(dim=-1)[..., view]
                    errors[view].append(error[seen[..., view]].cpu())
        scores = score(predicted, wanted, kinds, location_tokens(mixture.tokenizer))
        for k, camera in enumerate(mixture.parts[0].spec.cameras):
            flat = torch.cat(errors[k])
            if len(flat):
                median, tail = flat.quantile(torch.tensor([0.5, 0.9])).tolist()
                scores |= {f"px/{camera.name}": median, f"px_p90/{camera.name}": tail}
        result |= {f"{name}/{key}": value for key, value in scores.items()}
    return result
