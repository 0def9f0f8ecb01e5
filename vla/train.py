"""The verb ``brachium train``: from an episode store to a checkpoint that proves itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..console import human_time, log, require_disk
from ..datasets.split import is_heldout
from ..datasets.statistics import Statistics, compute_statistics
from ..datasets.store import EpisodeStore
from ..errors import ConfigError, NotFoundError, SpecMismatchError, StoreError
from ..spec import Observation
from .checkpoint import Golden, load_checkpoint, make_golden, resolved_backbone, save_checkpoint, unshared
from .ground import Grounding, ground
from .loop import Optimization, TrainLoop
from .model import VLAModel, tool_pose
from .policy_data import PolicyBatch, PolicyData, cached_encodings, encoding_key, episode_key
from .pretrained import Pretrained, is_pretrained
from .recipe import Recipe
from .tokenizer import load_tokenizer, word_tokenizer
from .tuning import ActionWriter, Tuning, check_tuning

GOLDEN_FRAMES = 4
EVALUATED_WINDOWS, EVALUATED_AT_ONCE = 512, 128


def train(
    *,
    store: str,
    model: Recipe,
    optimization: Optimization,
    out: str = "outputs/train",
    grounding: Grounding | None = None,
    encoder: str | None = None,
    tune: str = "frozen",
    lora_rank: int = 8,
    insulate: bool = False,
    heldout: float = 0.1,
    env: Callable[..., Any] | None = None,
    evaluator: Callable[..., Any] | None = None,
    evaluate_every: int = 0,
    resume: bool = False,
    device: str = "auto",
) -> int:
    """Train a policy on the successful episodes of a store.

    Stages: ground the encoder (if `grounding` is given), encode every frame once (if the encoder is frozen), train the
    head. Ctrl-C saves; the same command with ``resume=true`` continues to the same numbers, bit for bit.

    Args:
        store: Episode store with demonstrations.
        model: Recipe of the model.
        optimization: How the head (and an encoder that is not frozen) is trained.
        out: Folder for the checkpoint, logs and caches.
        grounding: Grounding stage; null to leave it out.
        encoder: Checkpoint or pretrained model (``brachium pretrain``) whose encoder and tokenizer are taken instead
            of grounding one.
        tune: How the encoder is trained with the head: ``frozen`` (the head alone, on encodings cached a frame),
            ``lora`` (low-rank adapters, merged at the end) or ``full``.
        lora_rank: Rank of the adapters.
        insulate: Keep the head's gradient out of an encoder that is trained; it learns to say the actions as tokens.
        heldout: Share of episodes kept for the held-out loss.
        env: Environment whose spec must fit the store's, checked before anything runs; `evaluator` rolls out in it.
        evaluator: Called with `checkpoint`, `env` and `out` when training ends, if there is an `env`; null for none.
        evaluate_every: Steps between held-out losses; 0 for the end only.
        resume: Go on from what is saved in `out`.
        device: ``cpu``, ``cuda`` or ``auto``.
    """
    begin = time.monotonic()
    check_tuning(tune, lora_rank, insulate=insulate)
    data = EpisodeStore.open(store)
    episodes = usable_episodes(data)
    _check_env(env, data)
    folder = Path(out)
    require_disk(folder, 200e6, "training")
    if (folder / "checkpoint").exists() and not resume:
        log(f"{folder}/checkpoint exists and will be replaced when training ends")
    place = torch.device(choose_device(device))
    vla = _build(model, data, grounding, encoder, optimization.seed, learns=tune == "full").to(place)
    name = data.embodiment.name
    training, testing = _split(data, episodes, heldout)
    statistics = compute_statistics(data, episodes=training)
    vla.set_statistics(name, statistics)
    notes: dict[str, Any] = {"seconds": {}, "parameters": vla.parameter_count()}
    if encoder is None:
        notes |= _teach_encoder(vla, data, training, grounding, folder, resume)
    key = encoding_key(vla, data)
    tuning = Tuning(vla.encoder, tune, lora_rank, optimization.seed)
    encodings = None
    if tune == "frozen" and vla.recipe.points:
        encodings = cached_encodings(vla, data, Path(data.path) / "cache")
    options: dict[str, Any] = {"batch_size": optimization.batch_size, "seed": optimization.seed, "encodings": encodings}
    fit = PolicyData(data, training, vla, **options)
    test = PolicyData(data, testing, vla, **options) if len(testing) else None
    log(
        f"training {type(vla.head).__name__} ({sum(p.numel() for p in vla.parameters() if p.requires_grad) / 1e6:.2f} M"
        f" of {vla.parameter_count() / 1e6:.2f} M parameters) on {len(training)} episodes, {len(fit.windows)} windows"
    )
    loop = TrainLoop(
        name="act",
        module=vla,
        make_batch=fit.make,
        loss=_objective(vla, ActionWriter(vla, name) if insulate else None, name),
        options=optimization,
        folder=folder,
        resume=resume,
        evaluate=(lambda: evaluate_heldout(vla, test, name, statistics)) if test else None,
        evaluate_every=evaluate_every,
        identity={
            "encoder_and_data": key,
            "recipe": {**vla.recipe.to_dict(), "backbone": None},
            "heldout": heldout,
            "tune": [tune, lora_rank if tune == "lora" else None, insulate],
        },
    )
    metrics = loop.run()
    loop.use_average()
    tuning.finish()
    notes["seconds"]["total"] = loop.earlier + time.monotonic() - begin
    notes |= {
        "metrics": metrics,
        "loader_wait": loop.wait_share,
        "store": {"path": store, "fingerprint": data.fingerprint, "episodes": len(training)},
        "head": type(vla.head).__name__,
        "seed": optimization.seed,
        "statistics": statistics.to_dict(),
    }
    checkpoint = save_checkpoint(folder / "checkpoint", vla.cpu(), [_golden(vla, data, training)], notes)
    load_checkpoint(checkpoint)  # a checkpoint that cannot be loaded is no result
    (folder / "resume-act.safetensors").unlink(missing_ok=True)
    log(f"{checkpoint}: saved and verified, {human_time(notes['seconds']['total'])}")
    if env is not None and evaluator is not None:
        evaluator(checkpoint=str(checkpoint), env=env, out=str(folder / "eval"))
    return 0


def _objective(
    vla: VLAModel, writer: ActionWriter | None, embodiment: str
) -> Callable[[PolicyBatch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """The head's loss, and with a `writer` the insulated encoder's own."""

    def loss(batch: PolicyBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if writer is not None:
            return _insulated(vla, writer, batch, embodiment, generator)
        encoding = batch.encode(vla)
        each = vla.loss(encoding, batch.state, batch.action, batch.action_pad, embodiment, generator)
        return each.mean(), {}

    return loss


def _insulated(
    vla: VLAModel, writer: ActionWriter, batch: PolicyBatch, embodiment: str, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The head's loss on features cut off from the encoder, and the encoder's of saying the actions, from one pass."""
    if batch.images is None or batch.tokens is None:
        raise RuntimeError("an encoder that is trained needs images and tokens")
    text, targets = writer.write(batch.tokens, batch.action, batch.action_pad)
    asked = nn.functional.pad(batch.tokens, (text.shape[1] - batch.tokens.shape[1], 0), value=vla.encoder.pad_id)
    features = vla.encoder.read(batch.images, torch.stack([asked, text], dim=1))
    encoding = vla.encoder.encoding(features, asked, batch.state).detach()
    each = vla.loss(encoding, batch.state, batch.action, batch.action_pad, embodiment, generator)
    spoken = writer.loss(features.text[:, 1], targets)
    return each.mean() + spoken, {"language": spoken.detach()}


def usable_episodes(data: EpisodeStore) -> list[int]:
    """Successful episodes (all, where none says if it succeeded), in an order that recording order has no say in."""
    labelled = any(episode.success is not None for episode in data.episodes)
    chosen = [e for e in data.episodes if e.success or not labelled]
    if not chosen:
        raise StoreError(
            f"{data.path} has no successful episode to train on ({data.num_episodes} in all).\n"
            f"See: brachium inspect store={data.path}"
        )
    return [e.index for e in sorted(chosen, key=episode_key)]


def _check_env(env: Callable[..., Any] | None, data: EpisodeStore) -> None:
    if env is None:
        return
    made = env()
    try:
        data.embodiment.require_same(made.spec_embodiment, f"store {data.path}", "environment")
    finally:
        made.close()


def _split(data: EpisodeStore, episodes: list[int], heldout: float) -> tuple[list[int], list[int]]:
    """Split by episode; each episode's side depends on itself alone."""
    if not 0.0 <= heldout < 1.0:
        raise ConfigError(f"expected heldout in [0, 1), got {heldout}")
    test = [i for i in episodes if is_heldout(episode_key(data.episodes[i]), heldout, 0)]
    training = [i for i in episodes if i not in set(test)]
    return (training, test) if training else (episodes, [])


def _build(
    recipe: Recipe, data: EpisodeStore, grounding: Grounding | None, encoder: str | None, seed: int, *, learns: bool
) -> VLAModel:
    """A fresh model; with `encoder`, its encoder and tokenizer are taken from a checkpoint.

    A fresh encoder that points must be grounded, unless it `learns` to point from the demonstrations alone.
    """
    embodiments = {data.embodiment.name: data.embodiment}
    if encoder is not None and is_pretrained(encoder):
        return _on_pretrained(recipe, data, Pretrained.load(encoder), encoder, seed)
    if encoder is not None:
        if not Path(encoder).exists():
            raise NotFoundError(
                f"no checkpoint or pretrained model at {encoder}. Type encoder=nano (it ships with brachium), "
                "or see: brachium list checkpoints"
            )
        source = load_checkpoint(encoder)
        theirs = next(iter(source.embodiments.values()))
        fits = not source.recipe.points or tool_pose(theirs) == tool_pose(data.embodiment)
        if theirs.camera_names != data.embodiment.camera_names or not fits:
            raise SpecMismatchError(
                f"encoder {encoder} was trained for cameras {theirs.camera_names} and state {theirs.state.names}; "
                f"store {data.path} has {data.embodiment.camera_names} and {data.embodiment.state.names}"
            )
        recipe = replace(recipe, backbone=source.recipe.backbone, points=source.recipe.points)
        model = recipe.build(embodiments, source.tokenizer, seed=seed)
        model.encoder = source.encoder
        return model
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
    corpus = [episode.instruction for episode in data.episodes]
    if grounding is not None:
        for episode in EpisodeStore.open(grounding.store).episodes:
            corpus += [sentence["text"] for sentence in episode.meta.get("sentences", ())]
    tokenizer = word_tokenizer(corpus)
    model = recipe.build(embodiments, tokenizer, seed=seed)
    if grounding is not None:  # what grounding gives must not depend on the seed of what comes after
        model.encoder = recipe.build(embodiments, tokenizer, seed=grounding.optimization.seed).encoder
    return model


def _on_pretrained(recipe: Recipe, data: EpisodeStore, given: Pretrained, path: str, seed: int) -> VLAModel:
    """A fresh model on a pretrained encoder."""
    pose = list(tool_pose(data.embodiment))
    if (data.embodiment.camera_names, pose) != (given.cameras, given.encoder.body):
        raise SpecMismatchError(
            f"pretrained model {path} was trained for cameras {given.cameras} and the tool's pose at "
            f"{given.encoder.body} of the state; store {data.path} has {data.embodiment.camera_names} and {pose}"
        )
    recipe = replace(recipe, backbone=resolved_backbone(given.recipe, given.encoder), points=True)
    model = recipe.build({data.embodiment.name: data.embodiment}, given.tokenizer, seed=seed)
    model.encoder = given.encoder
    return model


def _teach_encoder(
    vla: VLAModel, data: EpisodeStore, training: list[int], grounding: Grounding | None, folder: Path, resume: bool
) -> dict[str, Any]:
    """What a new encoder learns before the head: to ground, or at least how bright pixels are. Returns notes."""
    if grounding is None:
        _fit_pixels(vla, data, training)
        readout = vla.encoder.point_readout
        if readout is not None:
            state = torch.from_numpy(data.lowdim("state")[data.episode_frames(training)].astype(np.float32))
            body = state[:, vla.encoder.body].to(vla.device)
            readout.fit(body, body[:, :3].mean(0))
        return {}
    begin = time.monotonic()
    metrics = _ground_once(vla, grounding, Path(grounding.out or folder), resume)
    return {"grounding": metrics, "seconds": {"ground": time.monotonic() - begin}}


def _ground_once(vla: VLAModel, grounding: Grounding, folder: Path, resume: bool) -> Mapping[str, float]:
    """Ground, or take the finished result of an earlier run with the same options, data and words."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    done = folder / "grounded.safetensors"
    wanted = {
        "options": vars(grounding.optimization),
        "store": EpisodeStore.open(grounding.store).fingerprint,
        "sentences": grounding.sentences,
        "word_dropout": grounding.word_dropout,
        "heldout": grounding.heldout,
        "words": sorted(vla.tokenizer.get_vocab()),
        "max_tokens": vla.recipe.max_tokens,
        "backbone": dict(vla.recipe.backbone),
    }
    if done.exists():
        try:
            with safe_open(done, "pt") as file:
                saved = json.loads(file.metadata()["grounding"])
        except Exception:  # damaged, or something else: ground anew
            saved = {"wanted": None}
        if saved["wanted"] == json.loads(json.dumps(wanted, default=str)):
            weights = load_file(done)
            vla.encoder.backbone.pixel_mean = weights["backbone.pixel_mean"].to(vla.device)
            vla.encoder.load_state_dict(weights)
            log(f"{done}: grounding is done already; reusing it")
            return dict(saved["metrics"])
    metrics = ground(vla, grounding, folder, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = done.with_suffix(".partial")
    note = json.dumps({"wanted": wanted, "metrics": metrics}, default=str)
    save_file(unshared(vla.encoder.state_dict()), temporary, {"grounding": note})
    temporary.replace(done)
    (folder / "resume-ground.safetensors").unlink(missing_ok=True)
    return metrics


def _fit_pixels(vla: VLAModel, data: EpisodeStore, episodes: list[int]) -> None:
    """Pixel statistics from the demonstrations, for a backbone trained from scratch without grounding."""
    if vla.recipe.backbone.get("path"):
        return
    frames = data.episode_frames(episodes)
    frames = frames[:: max(1, len(frames) // 256)]
    images = [data.read_images(name, frames) for name in data.embodiment.camera_names]
    vla.encoder.backbone.fit_pixels(torch.from_numpy(np.stack(images, axis=1)).to(vla.device))


def _golden(vla: VLAModel, data: EpisodeStore, episodes: list[int]) -> Golden:
    frames = data.episode_frames(episodes)
    frames = frames[np.linspace(0, len(frames) - 1, GOLDEN_FRAMES).astype(int)]
    owners, _ = data.locate(frames)
    observation = Observation(
        images={name: data.read_images(name, frames) for name in data.embodiment.camera_names},
        state=data.lowdim("state")[frames],
        instruction=tuple(data.episodes[int(k)].instruction for k in owners),
    )
    return make_golden(vla, data.embodiment.name, observation)


@torch.no_grad()
def evaluate_heldout(vla: VLAModel, data: PolicyData, embodiment: str, statistics: Statistics) -> dict[str, float]:
    """Loss and action error on held-out episodes, beside two trivial baselines.

    The errors are mean absolute differences over real steps and dimensions, as a share of each dimension's scale:
    ``action_error`` of a sampled chunk, ``mean_error`` of always answering the mean training action, ``last_error``
    of going on with the action before the window.
    """
    count = min(EVALUATED_WINDOWS, len(data.windows))
    chosen = np.linspace(0, len(data.windows) - 1, count).astype(int)
    mean = torch.as_tensor(np.asarray(statistics["action"].mean), dtype=torch.float32, device=vla.device)
    scale = vla.get_buffer(f"action_scale_{embodiment}")
    noise, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(0)
    sums = dict.fromkeys(("loss", "action_error", "mean_error", "last_error"), 0.0)
    elements = 0.0
    for first in range(0, count, EVALUATED_AT_ONCE):
        batch = data.batch(chosen[first : first + EVALUATED_AT_ONCE])
        encoding = batch.encode(vla)
        each = vla.loss(encoding, batch.state, batch.action, batch.action_pad, embodiment, draws)
        shape = (*batch.action.shape[:2], vla.noise_dim(embodiment))
        drawn = torch.randn(shape, generator=noise).to(batch.action.device)
        real = (~batch.action_pad)[:, :, None] & vla.get_buffer(f"action_active_{embodiment}")
        guesses = {
            "action_error": vla.sample(encoding, batch.state, drawn, embodiment),
            "mean_error": mean,
            "last_error": torch.where(batch.first[:, None], mean, batch.previous)[:, None],
        }
        sums["loss"] += float(each.sum())
        for name, guess in guesses.items():
            sums[name] += float((((guess - batch.action).abs() / scale) * real).sum())
        elements += float(real.sum())
    return {name: total / (count if name == "loss" else max(elements, 1.0)) for name, total in sums.items()}


def choose_device(device: str) -> str:
    """``auto`` as what is there; a ConfigError where what is asked for is not."""
    if device != "auto":
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError("device=cuda: no CUDA device here. Type device=cpu, or see: brachium doctor")
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
