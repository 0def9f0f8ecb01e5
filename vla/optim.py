"""How a model is optimised: schedules, groups of parameters, and the optimisers that share them out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

HIDDEN = re.compile(r"\.(layers|blocks)\.\d+\.")
"""In the names of weights of repeated layers."""


HABITS = ("log_every", "save_every", "accumulate", "checkpointing", "compile", "parallel")
"""Options that change no weights, but for the order of sums: a run may be resumed with others."""
LATER = ("schedule", "groups", "accumulate", "checkpointing", "compile", "parallel")
"""Options that are newer than some models and saves, which say nothing of them where they are as they always were."""
SCHEDULES = ("cosine", "constant", "inverse_sqrt")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a stage is optimised.

    Attributes:
        steps: Optimiser steps.
        batch_size: Windows (or scenes) a step.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        schedule: What comes after the warm-up: ``cosine`` down to `final_lr`, ``constant``, or ``inverse_sqrt``, which
            falls with the root of the step (Vaswani et al. 2017) and knows no last step.
        final_lr: Share of `lr` at the end of the cosine.
        muon: Learning rate, as a multiple of `lr`, with which Muon (Jordan et al. 2024) trains the matrices of
            repeated layers (`HIDDEN`); AdamW trains the rest, and with 0 everything.
        weight_decay: Decoupled weight decay on matrices.
        groups: Parameters with options of their own: regular expression on the name -> ``lr`` as a multiple of the
            schedule's, ``weight_decay``, or both. The first that is found in a name decides, as in
            ``optimization.groups={backbone: {lr: 0.1}}``.
        grad_clip: Largest norm of the gradient.
        ema: Decay of the averaged weights that are saved and used; ramps up as (1 + step) / (10 + step).
        precision: ``bf16`` or ``float32`` compute; weights, their gradients' sums and averages are float32 in both.
        accumulate: Parts that a step's batch is computed in, one after the other; gradients are those of the whole.
        checkpointing: Keep no activations of repeated layers and compute them again for the gradient (Chen et al.
            2016): about a third more time for a fraction of the memory.
        compile: Compile repeated layers (`torch.compile`).
        parallel: How several processes share the work: ``ddp``, each with the whole model, or ``fsdp``, each with a
            part of weights, averages and optimiser (FSDP2).
        log_every: Steps between log lines.
        save_every: Steps between resumable saves.
        seed: Of sampling, noise and initial weights.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    final_lr: float = 0.02
    muon: float = 0.0
    weight_decay: float = 0.01
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    grad_clip: float = 1.0
    ema: float = 0.99
    precision: str = "bf16"
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    parallel: str = "ddp"
    log_every: int = 50
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optimization.{name}: expected at least 1, got {getattr(self, name)}")
        choices = {"precision": ("bf16", "float32"), "schedule": SCHEDULES, "parallel": PARALLEL}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                wanted = " or ".join((", ".join(known[:-1]), known[-1]))
                raise ConfigError(f"optimization.{name}: expected {wanted}, got {getattr(self, name)!r}")
        for pattern, own in self.groups.items():
            strange = sorted(set(own) - {"lr", "weight_decay"})
            if strange or any(value < 0 for value in own.values()):
                raise ConfigError(
                    f"optimization.groups.{pattern}: expected lr (a multiple of the schedule's) and weight_decay, from "
                    f"0, got {dict(own)}"
                )
        low = min(self.warmup, self.seed, self.muon)
        if self.lr <= 0 or self.grad_clip <= 0 or not 0 <= self.ema < 1 or low < 0:
            raise ConfigError(
                "optimization: expected lr and grad_clip above 0, ema in [0, 1), warmup, seed and muon from 0, got "
                f"lr={self.lr}, grad_clip={self.grad_clip}, ema={self.ema}, warmup={self.warmup}, seed={self.seed}, "
                f"muon={self.muon}"
            )

    def noted(self) -> dict[str, Any]:
        """The options as they are noted beside what was trained with them: all but newer ones that change nothing."""
        plain = {option.name: option for option in fields(self)}
        defaults: dict[str, Any] = {name: plain[name].default for name in LATER} | {"groups": {}}
        return {k: v for k, v in vars(self).items() if k not in LATER or v != defaults[k]}

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then the schedule."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "inverse_sqrt":
            return float(self.lr * (max(self.warmup, 1) / (step + 1)) ** 0.5)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], options: Optimization
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimisers that share the parameters out, each with its learning rate as a multiple of the schedule's.

    A group of `options.groups` has its own multiple in its ``times``.

    Raises:
        ConfigError: A group that no parameter is in.
    """
    hidden = {k: p for k, p in parameters.items() if options.muon and p.ndim == 2 and HIDDEN.search(k)}
    rest = {k: p for k, p in parameters.items() if k not in hidden}
    patterns = [re.compile(pattern) for pattern in options.groups]
    owners = {k: next((g for g, pattern in enumerate(patterns) if pattern.search(k)), -1) for k in parameters}
    empty = [pattern for g, pattern in enumerate(options.groups) if g not in owners.values()]
    if empty:
        known = sorted({name.partition(".")[0] for name in parameters})
        raise ConfigError(
            f"optimization.groups: no trained parameter's name has {empty[0]!r} in it; they begin with "
            + ", ".join(known)
        )
    own = [{}, *options.groups.values()]

    def grouped(some: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        found = []
        for g, settings in enumerate(own, start=-1):
            decay = settings.get("weight_decay", options.weight_decay)
            for wide, value in ((True, decay), (False, settings.get("weight_decay", 0.0))):
                chosen = [p for k, p in some.items() if owners[k] == g and (p.ndim >= 2) == wide]
                if chosen or (g == -1 and some is rest):  # the common groups are there even when they are empty
                    found.append({"params": chosen, "weight_decay": value, "times": settings.get("lr", 1.0)})
        return found

    made: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(grouped(rest), lr=options.lr, betas=(0.9, 0.95), fused=True), 1.0)
    ]
    if hidden:  # steps are scaled to the size that AdamW's have (Liu et al. 2025), so that one schedule fits both
        muon = torch.optim.Muon(
            grouped(hidden),
            lr=options.muon * options.lr,
            weight_decay=options.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        made.append((muon, options.muon))
    return made
