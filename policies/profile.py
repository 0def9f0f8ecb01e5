"""The verb ``brachium profile``: where the time of a chunk and of a training step goes, and where it must go."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..console import human_bytes, log, require_disk, table
from ..errors import ConfigError, did_you_mean
from ..hardware import hardware
from ..spec import EmbodimentSpec, Observation
from ..vla.accelerate import PLAIN, Acceleration, QuickSampler, sampler_of
from ..vla.checkpoint import load_checkpoint
from ..vla.device_limits import bandwidth, peak_flops
from ..vla.loop import TrainLoop
from ..vla.meter import forget_peak_memory, peak_memory
from ..vla.model import VLAModel, stack_images
from ..vla.optim import Optimization
from ..vla.policy_data import PolicyBatch
from ..vla.profiling import Profile, profile_pass
from ..vla.recipe import Recipe, trust
from ..vla.tokenizer import word_tokenizer
from ..vla.train import choose_device, make_objective
from ..vla.tuning import Tuning, check_tuning
from .profile_plot import draw

PASSES = ("chunk", "step")
TITLES = {"chunk": "a chunk", "step": "a training step"}
TEXT = "put the red cube in the bowl"
AFTER = ("backward", "clipping", "optimizer", "averaged weights")
"""Parts of a step that come after its forward pass."""
WARM = 3
"""Passes before any is timed."""


def profile(
    *,
    optimization: Optimization,
    checkpoint: str | None = None,
    model: Recipe | None = None,
    env: Callable[..., Any] | None = None,
    embodiment: str | None = None,
    passes: Sequence[str] = PASSES,
    batch_size: int = 1,
    acceleration: Acceleration | None = None,
    tune: str = "full",
    lora_rank: int = 8,
    repeats: int = 20,
    trace: bool = False,
    device: str = "auto",
    out: str = "outputs/profile",
) -> int:
    """Measure where the time of a chunk and of a training step goes, and how long each part must take at least.

    Tables are printed, and written with the plots (``profile.png``) and all numbers (``profile.json``) to `out`. What
    they say, and what to do about it, is in ``docs/performance.md``. Inputs are random: they cost what real ones do.

    Args:
        optimization: Of the training step; its batch size counts.
        checkpoint: Folder of a checkpoint.
        model: Or a recipe, with random weights where its backbone names no path.
        env: Environment whose robot and cameras the recipe is built for.
        embodiment: Name of the checkpoint's embodiment; the only one when null.
        passes: What is measured, of ``chunk`` and ``step``.
        batch_size: Observations of a chunk: one for a robot, more for a server or many environments.
        acceleration: How chunks are made faster: ``plain``, ``compiled``, ``bf16``, ``gpu`` or ``fp8``.
        tune: What a step trains: ``full``, ``lora`` or ``frozen``.
        lora_rank: Rank of the adapters.
        repeats: How often each pass is timed.
        trace: Write torch's traces too, for Perfetto (ui.perfetto.dev).
        device: ``cpu``, ``cuda`` or ``auto``.
        out: Folder for tables and plots.
    """
    if (checkpoint is None) == (model is None):
        raise ConfigError("expected either a checkpoint or a model. Type: checkpoint=FOLDER, or for example model=octo")
    unknown = [name for name in passes if name not in PASSES]
    if unknown or not passes:
        hint = did_you_mean(str(unknown[0]), PASSES) if unknown else ""
        raise ConfigError(f"passes: expected some of {list(PASSES)}, got {list(passes)}. {hint}")
    if batch_size < 1 or repeats < 1:
        raise ConfigError(f"expected batch_size and repeats of at least 1, got {batch_size} and {repeats}")
    check_tuning(tune, lora_rank, insulate=False)
    if optimization.compile:
        raise ConfigError("optimization.compile: nobody can count inside what is compiled: expected false")
    place = torch.device(choose_device(device))
    hurry = acceleration or PLAIN
    hurry.check(place)
    folder = Path(out)
    require_disk(folder, 50e6, "profiling")
    folder.mkdir(parents=True, exist_ok=True)
    made = _load(checkpoint, model, env, place)
    name = _embodiment(made, embodiment)
    found: dict[str, Profile] = {}
    noted: dict[str, Any] = {"model": checkpoint or type(made.head).__name__, "embodiment": name}
    noted["checkpointing"] = optimization.checkpointing
    noted |= {"hardware": hardware(place.type), "weights": made.parameter_count(), "limits": {}, "memory": {}}
    for what in ("step", "chunk"):  # sampling may change the model for good
        if what not in passes:
            continue
        precision = optimization.precision if what == "step" else hurry.precision
        limits = peak_flops(place, "float32" if precision == "float32" else "bf16"), bandwidth(place)
        log(f"profiling {TITLES[what]} ({precision}, {repeats} times)")
        trace_to = folder / f"{what}.trace.json" if trace else None
        forget_peak_memory(place)
        if what == "step":
            found[what] = _profile_step(made, name, optimization, tune, lora_rank, repeats, limits, trace_to)
        else:
            found[what] = _profile_chunk(made, name, batch_size, hurry, repeats, limits, trace_to)
        noted["limits"][what] = {"flops_per_s": limits[0], "bytes_per_s": limits[1]}
        noted["memory"][what] = peak_memory(place)
    counts = {"chunk": batch_size, "step": optimization.batch_size}
    for what in passes:
        _print(what, found[what], noted, counts[what])
    noted["passes"] = {what: found[what].to_dict() | {"count": counts[what]} for what in passes}
    (folder / "profile.json").write_text(json.dumps(noted, indent=1) + "\n")
    draw({TITLES[what]: found[what] for what in passes}, noted["hardware"], folder / "profile.png")
    log(f"{folder / 'profile.png'}, {folder / 'profile.json'}" + (", *.trace.json" if trace else ""))
    return 0


def _load(
    checkpoint: str | None, model: Recipe | None, env: Callable[..., Any] | None, place: torch.device
) -> VLAModel:
    """The checkpoint's model, or one of the recipe for the environment's robot."""
    if checkpoint is not None:
        return load_checkpoint(checkpoint, device=str(place))
    if model is None or env is None:
        raise ConfigError("a recipe is built for a robot and its cameras: expected an env. Type: env=tabletop/push")
    trust(*model.packages)
    world = env()
    try:
        spec: EmbodimentSpec = world.spec_embodiment
    finally:
        world.close()
    with place:  # billions of random numbers are made where they are wanted
        return model.build({spec.name: spec}, word_tokenizer([TEXT])).to(place)


def _embodiment(model: VLAModel, asked: str | None) -> str:
    names = list(model.embodiments)
    if asked is None and len(names) == 1:
        return names[0]
    if asked not in names:
        raise ConfigError(f"which embodiment? got {asked!r}. {did_you_mean(str(asked), names)}")
    return str(asked)


def random_observation(spec: EmbodimentSpec, count: int) -> Observation:
    """Observations of noise."""
    rng = np.random.default_rng(0)
    return Observation(
        images={c.name: rng.integers(0, 256, (count, *c.shape), dtype=np.uint8) for c in spec.cameras},
        state=rng.standard_normal((count, spec.state.dim)).astype(np.float32),
        instruction=(TEXT,) * count,
    )


Limits = tuple[float | None, float | None]


def _profile_chunk(
    model: VLAModel,
    name: str,
    count: int,
    acceleration: Acceleration,
    repeats: int,
    limits: Limits,
    trace: Path | None,
) -> Profile:
    """A chunk from observation to actions, as a policy computes it."""
    observation = random_observation(model.embodiments[name], count)
    shape = (count, model.recipe.action_horizon, model.noise_dim(name))
    noise = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def runs(how: Acceleration) -> Callable[[], Any]:
        plain = acceleration == PLAIN
        predict = sampler_of(model.eval(), name, how) if plain else QuickSampler(model, name, how).predict
        return lambda: predict(observation, noise, None)

    kinds = [replace(acceleration, compile=False, graph=False), replace(acceleration, graph=False), acceleration]
    made = {how: runs(how) for how in dict.fromkeys(kinds)}
    for each in made.values():
        for _ in range(WARM):
            each()
    counted, parted, run = (made[how] for how in kinds)
    return profile_pass(
        run,
        model.device,
        repeats=repeats,
        flops_per_s=limits[0],
        bytes_per_s=limits[1],
        parted=parted if acceleration.graph else None,
        counted=counted,
        trace=trace,
    )


def make_step(
    model: VLAModel, name: str, optimization: Optimization, tune: str, rank: int, folder: Path
) -> tuple[TrainLoop, list[Any], Tuning]:
    """A loop whose ``update`` of the batches is a training step; the tuning puts the model in order afterwards.

    Args:
        model: It is trained from here on.
        name: Embodiment.
        optimization: Its batch size and parts count.
        tune, rank: See `Tuning`.
        folder: For logs.
    """
    tuning = Tuning(model, tune, rank)
    parts = optimization.accumulate
    batches = [[_batch(model, name, max(1, optimization.batch_size // parts), tune)] for _ in range(parts)]
    loop = TrainLoop(
        name="act",
        module=model,
        make_batch=lambda step: None,
        make_share=lambda step, index, count: None,
        loss=make_objective(model, {}),
        options=optimization,
        folder=folder,
        resume=False,
    )
    model.train()
    return loop, batches, tuning


def _profile_step(
    model: VLAModel,
    name: str,
    optimization: Optimization,
    tune: str,
    rank: int,
    repeats: int,
    limits: Limits,
    trace: Path | None,
) -> Profile:
    """A step of training, less the reading of its batch."""
    with tempfile.TemporaryDirectory() as folder:
        loop, batches, tuning = make_step(model, name, optimization, tune, rank, Path(folder))

        def run() -> None:
            loop.update(batches)

        for _ in range(WARM):
            run()
        found = profile_pass(
            run,
            model.device,
            repeats=repeats,
            flops_per_s=limits[0],
            bytes_per_s=limits[1],
            trace=trace,
        )
        loop.finish()
    tuning.finish()
    model.zero_grad(set_to_none=True)
    model.eval()
    return found


def _batch(model: VLAModel, name: str, count: int, tune: str) -> PolicyBatch:
    """Windows of noise; where the encoder is frozen and its encodings are cached, encoded."""
    spec, device = model.embodiments[name], model.device
    observation = random_observation(spec, count)
    state = torch.from_numpy(np.asarray(observation.state)).to(device)
    images = stack_images(observation.images, spec, device)
    tokens = model.tokens(observation.instruction, state, name)
    batch = PolicyBatch(
        embodiment=name,
        state=state,
        action=torch.randn(count, model.recipe.action_horizon, spec.action.dim, device=device),
        action_pad=torch.zeros(count, model.recipe.action_horizon, dtype=torch.bool, device=device),
        previous=torch.zeros(count, spec.action.dim, device=device),
        first=torch.zeros(count, dtype=torch.bool, device=device),
        images=images,
        tokens=tokens,
    )
    if tune == "frozen" and model.recipe.points:  # as in training
        with torch.no_grad():
            return replace(batch, encoding=batch.encode(model), images=None, tokens=None)
    return batch


def _print(what: str, found: Profile, noted: dict[str, Any], count: int) -> None:
    """Tables for people."""
    total, floor = found.median_ms, found.floor_ms
    rows = []
    for name, part in found.parts.items():
        rows.append(
            [
                name,
                part.calls or "",
                f"{part.ms:.2f}",
                f"{100 * part.ms / total:.0f} %",
                f"{part.flops / 1e9:.2f}" if part.flops else "",
                f"{part.bytes / 1e6:.1f}",
                "" if part.floor_ms is None else f"{part.floor_ms:.2f}",
                part.bound if part.far is not None else "",
                "" if part.far is None else f"{part.far:.1f}",
            ]
        )
    columns = ["part", "calls", "ms", "share", "GFLOP", "MB", "floor [ms]", "bound by", "times the floor"]
    flops = sum(part.flops for part in found.parts.values())
    if noted["checkpointing"]:  # what is computed again is no progress
        flops -= sum(part.flops for name, part in found.parts.items() if name not in AFTER)
    table(f"{TITLES[what]} of {count} on {noted['hardware']}", columns, rows)
    print()
    kinds = sorted(found.kinds.items(), key=lambda row: -row[1])
    shares = [[kind, f"{ms:.2f}", f"{100 * ms / total:.0f} %"] for kind, ms in kinds if ms >= 0.0005]
    table("kinds of operations", ["kind", "ms", "share"], shares)
    said = f"\n{TITLES[what]}: median {total:.2f} ms, p99 {found.p99_ms:.2f} ms"
    if floor:
        said += f", floor {floor:.2f} ms ({total / floor:.1f} times)"
    peak = noted["limits"][what]["flops_per_s"]
    if what == "step" and peak:
        said += f", {1e3 * count / total:.1f} windows/s, MFU {100 * flops / (total / 1e3) / peak:.0f} %"
    print(f"{said}, memory {human_bytes(noted['memory'][what])}\n")
