"""The verb ``brachium train``: from episode stores to a checkpoint that proves itself."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..console import human_time, log, require_disk, silence, typed
from ..datasets.statistics import Statistics
from ..errors import ConfigError
from ..spec import Observation
from .build import build_model, extend_checkpoint, fit_tokenizers
from .checkpoint import Golden, load_checkpoint, make_golden, read_goldens, save_checkpoint
from .draws import RandomSource
from .ground import Grounding
from .heldout import evaluate_heldout
from .loop import TrainLoop
from .model import VLAModel
from .optim import Optimization
from .parallel import Processes, announced, join, launch, leave
from .policy_data import PolicyBatch, encoding_key
from .recipe import Recipe, trust
from .sources import MixedData, Source, open_sources, sampled_chunks, statistics_of
from .teach import is_pretrained_vision, teach_encoder
from .trackers import check_trackers
from .tuning import ActionWriter, Tuning, check_tuning

GOLDEN_FRAMES = 4


def train(
    *,
    store: str | list[str],
    model: Recipe,
    optimization: Optimization,
    out: str = "outputs/train",
    weights: list[float] | None = None,
    grounding: Grounding | None = None,
    encoder: str | None = None,
    init: str | None = None,
    tune: str = "frozen",
    lora_rank: int = 8,
    freeze: list[str] | None = None,
    insulate: bool = False,
    heldout: float = 0.1,
    env: Callable[..., Any] | None = None,
    evaluator: Callable[..., Any] | None = None,
    evaluate_every: int = 0,
    snapshot_every: int = 0,
    rollout_every: int = 0,
    track: list[str] | None = None,
    resume: bool = False,
    device: str = "auto",
    processes: int = 1,
    patience: float = 300.0,
) -> int:
    """Train a policy on the successful episodes of one or several stores.

    Stages: ground the encoder (if `grounding` is given), encode every frame once (if the encoder is frozen), train the
    head. Ctrl-C saves; the same command with ``resume=true`` continues to the same numbers, bit for bit.

    Args:
        store: Episode store with demonstrations, or several, of one or several embodiments: [STORE,STORE].
        model: Recipe of the model.
        optimization: How the head (and an encoder that is not frozen) is trained.
        out: Folder for the checkpoint, logs and caches.
        weights: Share of the windows of each store; null for the number of windows each has.
        grounding: Grounding stage; null to leave it out.
        encoder: Checkpoint or pretrained model (``brachium pretrain``) whose encoder and tokenizer are taken instead
            of grounding one.
        init: Checkpoint to go on from, with all its weights and its own recipe; embodiments it does not know are added.
        tune: How the encoder is trained with the head: ``frozen`` (the head alone, on encodings cached a frame),
            ``lora`` (low-rank adapters, merged at the end) or ``full``. With `init`, ``embodiment`` trains nothing but
            the parts of the embodiments that are new: for the others the model stays what it was, bit for bit.
        lora_rank: Rank of the adapters.
        freeze: Parts of the backbone that stay as they are all the same: [vision], connector, language, embeddings.
        insulate: Keep the head's gradient out of an encoder that is trained; it learns to say the actions as tokens.
        heldout: Share of episodes kept for the held-out loss.
        env: Environment whose spec must fit the store's, checked before anything runs; `evaluator` rolls out in it.
        evaluator: Called with `checkpoint`, `env` and `out` when training ends, if there is an `env`; null for none.
        evaluate_every: Steps between held-out losses; 0 for the end only.
        snapshot_every: Steps between checkpoints that are kept in ``snapshots`` of `out`, to see how success grows
            with training; 0 for none.
        rollout_every: Steps between evaluations in closed loop, of `evaluator` in `env`; 0 for the end only. Success is
            in the log, and in the report as a curve.
        track: Trackers that get a copy of the log of acting: [wandb], [trackio] or both.
        resume: Go on from what is saved in `out`.
        device: ``cpu``, ``cuda`` or ``auto``.
        processes: Processes of this machine that share the work (`optimization.parallel` says how), one for each GPU;
            of several machines, start the command with torchrun or Slurm on each.
        patience: How long they wait for each other at the start [s].
    """
    if processes > 1 and not announced():
        return launch(processes, typed())
    group, place = join(optimization.parallel, choose_device(device), patience)
    try:
        with silence() if not group.main else nullcontext():
            return _train(
                group=group,
                place=torch.device(place),
                store=store,
                model=model,
                optimization=optimization,
                out=out,
                weights=weights,
                grounding=grounding,
                encoder=encoder,
                init=init,
                tune=tune,
                lora_rank=lora_rank,
                freeze=freeze,
                insulate=insulate,
                heldout=heldout,
                env=env,
                evaluator=evaluator,
                evaluate_every=evaluate_every,
                snapshot_every=snapshot_every,
                rollout_every=rollout_every,
                track=track or (),
                resume=resume,
            )
    finally:
        leave()


def _train(
    *,
    group: Processes,
    place: torch.device,
    store: str | list[str],
    model: Recipe,
    optimization: Optimization,
    out: str,
    weights: list[float] | None,
    grounding: Grounding | None,
    encoder: str | None,
    init: str | None,
    tune: str,
    lora_rank: int,
    freeze: list[str] | None,
    insulate: bool,
    heldout: float,
    env: Callable[..., Any] | None,
    evaluator: Callable[..., Any] | None,
    evaluate_every: int,
    snapshot_every: int,
    rollout_every: int,
    track: Sequence[str],
    resume: bool,
) -> int:
    """Train in this process, which is alone or one of several."""
    begin = time.monotonic()
    trust(*model.packages)  # who typed the recipe trusts what it names
    check_tuning(tune, lora_rank, insulate=insulate, init=init is not None)
    check_trackers(track)
    if rollout_every and (env is None or evaluator is None):
        raise ConfigError("rollout_every rolls out in an environment: expected env=, for example env=tabletop/push")
    if init is not None and (encoder is not None or grounding is not None):
        raise ConfigError("init=CHECKPOINT brings its own encoder: leave encoder and grounding out")
    if grounding is not None and group.world > 1:
        raise ConfigError(
            f"grounding runs in one process, got {group.world}: ground an encoder first (brachium pretrain, or this "
            "command without processes=) and give it with encoder=CHECKPOINT grounding=null"
        )
    sources = open_sources(store, heldout)
    _check_env(env, sources)
    folder = Path(out)
    require_disk(folder, 200e6, "training")
    if (folder / "checkpoint").exists() and not resume:
        log(f"{folder}/checkpoint exists and will be replaced when training ends")
    notes: dict[str, Any] = {"seconds": {}}
    if init is not None:
        vla, fresh = extend_checkpoint(init, sources, optimization.seed)
        asked = int(model.head.get("max_delay", 0))
        if asked and asked != vla.max_delay:
            raise ConfigError(
                f"model.head.max_delay={asked}: {init} has max_delay={vla.max_delay}, and init=CHECKPOINT brings "
                "its own recipe"
            )
        statistics = statistics_of(sources, vla.recipe)
        if tune == "embodiment" and not fresh:
            raise ConfigError(f"tune=embodiment: {init} knows {list(statistics)} already; expected data of a new one")
    else:
        statistics = statistics_of(sources, model)
        fitted = fit_tokenizers(model, lambda mode, h: sampled_chunks(sources, statistics, mode, h, model.relative))
        learns, fresh = tune == "full", list(statistics)
        vla = build_model(fitted, sources, grounding, encoder, optimization.seed, learns=learns)
    if insulate and not vla.recipe.points:  # a model that points learns to say actions as location tokens instead
        vla.recipe = replace(vla.recipe, insulate=True)
        vla.check_insulation()
    vla = vla.to(place)
    for name in fresh:
        vla.set_statistics(name, statistics[name])
    notes["parameters"] = vla.parameter_count()
    if encoder is None and init is None:
        notes |= teach_encoder(vla, sources, grounding, folder, resume)
        if tune != "full" and grounding is None and not is_pretrained_vision(vla.recipe):
            log("the backbone has random weights and stays as it is: type tune=full to train it with the head")
    keys = [encoding_key(vla, source.store) for source in sources]
    tuning = Tuning(vla, tune, lora_rank, optimization.seed, fresh, freeze or ())
    with group.main_first():  # what the others need of the encodings is there when they look
        data = MixedData(
            sources,
            vla,
            weights=weights,
            batch_size=optimization.batch_size,
            seed=optimization.seed,
            cached=tune in ("frozen", "embodiment") and vla.recipe.points,
        )
    plain = copy.deepcopy(vla).cpu() if group.kind == "fsdp" else vla  # in one piece, for what looks at the whole
    _announce(vla, sources, data)
    if (snapshot_every or rollout_every) and tune == "lora":
        raise ConfigError(
            "snapshot_every and rollout_every need tune=full or frozen: adapters are merged when training ends"
        )

    def snapshot(step: int) -> None:
        noted = {**notes, "seconds": {"total": loop.spent}, "seed": optimization.seed, "init": init, "step": step}
        noted |= {"store": _noted(sources), "head": type(vla.head).__name__}
        target = folder / "snapshots" / f"{step:07d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(target, plain, _goldens(plain, sources, init, tune), noted)

    def rollout(step: int) -> dict[str, float]:
        snapshot(step)
        result = folder / "rollouts" / f"{step:07d}"
        assert evaluator is not None  # asked for above
        evaluator(
            checkpoint=str(folder / "snapshots" / f"{step:07d}"), env=env, out=str(result), videos=0, report=False
        )
        total = json.loads((result / "summary.json").read_text())["total"]
        low, high = total["ci95"]
        return {"success_rate": total["success_rate"], "success_low": low, "success_high": high}

    def evaluate() -> dict[str, float]:
        found = _evaluate(plain.to(place), data, statistics)
        if plain is not vla:
            plain.cpu()
        return found

    writers = {name: ActionWriter(vla, name) for name in statistics} if insulate and vla.recipe.points else {}
    loop = TrainLoop(
        name="act",
        module=vla,
        make_batch=data.make,
        make_share=data.make_share,
        loss=make_objective(vla, writers),
        options=optimization,
        folder=folder,
        resume=resume,
        evaluate=evaluate if data.testing else None,
        evaluate_every=evaluate_every,
        snapshot=snapshot,
        snapshot_every=snapshot_every,
        rollout=rollout,
        rollout_every=rollout_every,
        track=track,
        identity={
            "encoder_and_data": keys,
            "weights": weights,
            "recipe": {**vla.recipe.to_dict(), "backbone": None},
            "heldout": heldout,
            "tune": [tune, lora_rank if tune == "lora" else None, insulate, init, freeze],
        },
        explain=data.explain,
        processes=group,
        plain=plain,
    )
    metrics = loop.run()
    loop.use_average()
    loop.finish()
    if not group.main:
        return 0
    tuning.finish()
    notes["seconds"]["total"] = loop.earlier + time.monotonic() - begin
    notes |= {"metrics": metrics, "loader_wait": loop.wait_share, "seed": optimization.seed, "init": init}
    notes["statistics"] = {name: found.to_dict() for name, found in statistics.items()}
    checkpoint = _save(folder, plain.cpu(), sources, notes, tune)
    loop.saves.remove_here()
    if env is not None and evaluator is not None:
        evaluator(checkpoint=str(checkpoint), env=env, out=str(folder / "eval"))
    return 0


def _save(folder: Path, vla: VLAModel, sources: Sequence[Source], notes: dict[str, Any], tune: str) -> Path:
    """Save and prove the result; only then what a resumed run would need is removed."""
    notes |= {"store": _noted(sources), "head": type(vla.head).__name__}
    checkpoint = save_checkpoint(folder / "checkpoint", vla, _goldens(vla, sources, notes["init"], tune), notes)
    load_checkpoint(checkpoint)  # a checkpoint that cannot be loaded is no result
    log(f"{checkpoint}: saved and verified, {human_time(notes['seconds']['total'])}")
    return checkpoint


def _announce(vla: VLAModel, sources: Sequence[Source], data: MixedData) -> None:
    trained = sum(p.numel() for p in vla.parameters() if p.requires_grad) / 1e6
    names = ", ".join(dict.fromkeys(source.name for source in sources))
    log(
        f"training {type(vla.head).__name__} ({trained:.2f} M of {vla.parameter_count() / 1e6:.2f} M parameters) on "
        f"{sum(len(s.training) for s in sources)} episodes, {data.windows} windows of {names}"
    )


def make_objective(
    vla: VLAModel, writers: dict[str, ActionWriter]
) -> Callable[[list[PolicyBatch], torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """The head's loss over all windows, and with `writers` the insulated encoder's own.

    Of a share of the windows it is their part of the mean over all; the shares' sum is that mean.
    """

    def loss(batches: list[PolicyBatch], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        count = sum(batch.total for batch in batches)
        total = torch.zeros((), device=vla.device)
        parts: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        for batch in batches:
            share = len(batch.state) * batch.counts / count
            draws = batch.draws(generator)
            if writers:
                found, said = _insulated(vla, writers[batch.embodiment], batch, draws)
                parts["language"] = parts.get("language", torch.zeros_like(total)) + share * said.detach()
            else:
                encoding = batch.encode(vla)
                args = (batch.state, batch.action, batch.action_pad, batch.embodiment, draws, batch.executed)
                found = vla.loss(encoding, *args).mean()
            total = total + share * found
            if len(batches) > 1:
                name = f"loss/{batch.embodiment}"
                parts[name] = parts.get(name, torch.zeros_like(total)) + share * count * found.detach()
                rows[name] = rows.get(name, 0) + batch.total
        return total, {k: v / rows.get(k, 1) for k, v in parts.items()}

    return loss


def _insulated(
    vla: VLAModel, writer: ActionWriter, batch: PolicyBatch, generator: RandomSource
) -> tuple[Tensor, Tensor]:
    """The head's loss on features cut off from the encoder plus the encoder's of saying the actions; and the latter."""
    if batch.images is None or batch.tokens is None:
        raise RuntimeError("an encoder that is trained needs images and tokens")
    text, targets = writer.write(batch.tokens, batch.action, batch.action_pad)
    asked = nn.functional.pad(batch.tokens, (text.shape[1] - batch.tokens.shape[1], 0), value=vla.encoder.pad_id)
    features = vla.encoder.read(batch.images, torch.stack([asked, text], dim=1))
    encoding = vla.encoder.encoding(features, asked, batch.state).detach()
    args = (batch.state, batch.action, batch.action_pad, batch.embodiment, generator, batch.executed)
    each = vla.loss(encoding, *args)
    spoken = writer.loss(features.text[:, 1], targets)
    return each.mean() + spoken, spoken


def _evaluate(vla: VLAModel, data: MixedData, statistics: dict[str, Statistics]) -> dict[str, float]:
    """Held-out metrics: the mean over the stores, and of several embodiments that over each one's."""
    names = [part.store.embodiment.name for part in data.testing]
    found = [evaluate_heldout(vla, part, name, statistics[name]) for part, name in zip(data.testing, names)]

    def mean(some: list[dict[str, float]], suffix: str = "") -> dict[str, float]:
        return {f"{k}{suffix}": float(np.mean([m[k] for m in some])) for k in some[0]}

    metrics = mean(found)
    for name in dict.fromkeys(names) if len(set(names)) > 1 else ():
        metrics |= mean([m for m, owner in zip(found, names) if owner == name], f"/{name}")
    return metrics


def _check_env(env: Callable[..., Any] | None, sources: Sequence[Source]) -> None:
    """The environment must fit one of the embodiments."""
    if env is None:
        return
    made = env()
    try:
        spec = made.spec_embodiment
        fits = [s for s in sources if not s.store.embodiment.differences(spec)]
        if not fits:
            nearest = next((s for s in sources if s.name == spec.name), sources[0])
            nearest.store.embodiment.require_same(spec, f"store {nearest.store.path}", "environment")
    finally:
        made.close()


def _noted(sources: Sequence[Source]) -> dict[str, Any]:
    """What the data was; of one store plainly."""
    each = [
        {"path": str(s.store.path), "fingerprint": s.store.fingerprint, "episodes": len(s.training)} for s in sources
    ]
    if len(each) == 1:
        return each[0]
    joined = {k: ", ".join(str(e[k]) for e in each) for k in ("path", "fingerprint")}
    return {**joined, "episodes": sum(e["episodes"] for e in each), "sources": each}


def _goldens(vla: VLAModel, sources: Sequence[Source], init: str | None, tune: str) -> list[Golden]:
    """A golden batch of every embodiment.

    Those without data here have the checkpoint's inputs: answered anew, or with ``embodiment``, which must change
    nothing for them, with the checkpoint's own answers, which loading then proves.
    """
    found = {source.name: _golden(vla, source) for source in reversed(sources)}
    if init is not None:
        for name, golden in read_goldens(Path(init)).items():
            if name not in found:
                found[name] = golden if tune == "embodiment" else make_golden(vla, name, golden.observation)
    return list(found.values())


def _golden(vla: VLAModel, source: Source) -> Golden:
    data = source.store
    frames = data.episode_frames(list(source.training))
    frames = frames[np.linspace(0, len(frames) - 1, GOLDEN_FRAMES).astype(int)]
    owners, _ = data.locate(frames)
    observation = Observation(
        images={name: data.read_images(name, frames) for name in data.embodiment.camera_names},
        state=data.lowdim("state")[frames],
        instruction=tuple(data.episodes[int(k)].instruction for k in owners),
    )
    return make_golden(vla, data.embodiment.name, observation)


def choose_device(device: str) -> str:
    """``auto`` as what is there; a ConfigError where what is asked for is not."""
    if device != "auto":
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError("device=cuda: no CUDA device here. Type device=cpu, or see: brachium doctor")
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
