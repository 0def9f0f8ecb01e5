"""The training loop: one optimiser, one schedule, averaged weights, log lines, and checkpoints to resume from."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..console import human_time, log
from ..datasets.loader import BatchLoader
from ..errors import BrachiumError, CheckpointError, ConfigError, DeviceMemoryError
from .log import TrainLog

HIDDEN = re.compile(r"\.(layers|blocks)\.\d+\.")
"""In the names of weights of repeated layers."""


HABITS = ("log_every", "save_every")
"""Options that change no weights: a run may be resumed with others."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a stage is optimised.

    Attributes:
        steps: Optimiser steps.
        batch_size: Windows (or scenes) a step.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        final_lr: Share of `lr` at the end of the cosine.
        muon: Learning rate, as a multiple of `lr`, with which Muon (Jordan et al. 2024) trains the matrices of
            repeated layers (`HIDDEN`); AdamW trains the rest, and with 0 everything.
        weight_decay: Decoupled weight decay on matrices.
        grad_clip: Largest norm of the gradient.
        ema: Decay of the averaged weights that are saved and used; ramps up as (1 + step) / (10 + step).
        precision: ``bf16`` or ``float32`` compute; weights are float32 in both.
        log_every: Steps between log lines.
        save_every: Steps between resumable saves.
        seed: Of sampling, noise and initial weights.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    final_lr: float = 0.02
    muon: float = 0.0
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.99
    precision: str = "bf16"
    log_every: int = 50
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optimization.{name}: expected at least 1, got {getattr(self, name)}")
        if self.precision not in ("bf16", "float32"):
            raise ConfigError(f"optimization.precision: expected bf16 or float32, got {self.precision!r}")
        low = min(self.warmup, self.seed, self.muon)
        if self.lr <= 0 or self.grad_clip <= 0 or not 0 <= self.ema < 1 or low < 0:
            raise ConfigError(
                "optimization: expected lr and grad_clip above 0, ema in [0, 1), warmup, seed and muon from 0, got "
                f"lr={self.lr}, grad_clip={self.grad_clip}, ema={self.ema}, warmup={self.warmup}, seed={self.seed}, "
                f"muon={self.muon}"
            )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class TrainLoop:
    """Trains the parameters of `module` that require gradients.

    Every random draw of step i comes from a generator seeded with (seed, i) and every batch from a stateless sampler,
    so that a resumed run computes the very numbers the uninterrupted one would have.

    Args:
        name: Of the stage, for log lines.
        module: What is trained; averaged weights are kept for all its trained parameters.
        make_batch: Step -> batch, called ahead in threads.
        loss: (batch, generator) -> loss and metrics to log.
        options: Optimisation.
        folder: For logs and resumable saves.
        resume: Go on from the save in `folder` if there is one.
        evaluate: Called with the averaged weights in place after the last step and every `evaluate_every` steps;
            returns metrics to log.
        snapshot: Called with the step, with the averaged weights in place, every `snapshot_every` steps.
        snapshot_every: 0 for never.
        identity: What else the numbers depend on, JSON-ready (data, model); a save made with another is refused.

    Attributes:
        spent: Seconds of training, and `earlier`, those of them before the run was resumed.
    """

    def __init__(
        self,
        *,
        name: str,
        module: nn.Module,
        make_batch: Callable[[int], Any],
        loss: Callable[[Any, torch.Generator], tuple[Tensor, dict[str, Tensor]]],
        options: Optimization,
        folder: Path,
        resume: bool,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        snapshot: Callable[[int], None] | None = None,
        snapshot_every: int = 0,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.module, self.make_batch, self.loss = name, module, make_batch, loss
        self.options, self.folder, self.evaluate, self.evaluate_every = options, folder, evaluate, evaluate_every
        self.snapshot, self.snapshot_every = snapshot, snapshot_every
        deciding = {k: v for k, v in vars(options).items() if k not in HABITS}
        self.identity = {**deciding, **json.loads(json.dumps(dict(identity or {}), default=str))}
        self.parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        kept = module.state_dict()
        self.buffers = {k: b for k, b in module.named_buffers() if k in kept}  # running statistics among them
        self.optimizers = _optimizers(self.parameters, options)
        self.step = 0
        self.earlier = self.spent = 0.0
        self.wait_share = 0.0
        if resume:
            self._resume()
        else:  # or a later resume would go on from a run that has nothing to do with this one
            self._save_file.unlink(missing_ok=True)

    def run(self) -> dict[str, float]:
        """Train to the last step; returns the last metrics. Ctrl-C saves before it is raised."""
        options, device = self.options, next(iter(self.parameters.values())).device
        bf16 = options.precision == "bf16"
        metrics: dict[str, float] = {}
        begin, first = time.monotonic(), self.step
        self.module.train()
        loader = BatchLoader(self.make_batch, self.step, options.steps - self.step, threads=1, prefetch=3)
        try:
            with TrainLog(self.folder, self.name, options.steps, self.step) as logger:
                if self.step and self.snapshot and self._due(self.snapshot_every):  # it may have been broken off
                    with self._averaged():
                        self.snapshot(self.step)
                for batch in loader:
                    for optimizer, times in self.optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = times * options.learning_rate(self.step)
                    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
                    torch.manual_seed(options.seed * 1_000_003 + self.step)  # dropout draws from the global generator
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        loss, parts = self.loss(batch, generator)
                    self.module.zero_grad(set_to_none=True)
                    loss.backward()
                    norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), options.grad_clip)
                    if not torch.isfinite(loss) or not torch.isfinite(norm):
                        raise BrachiumError(
                            f"{self.name}: the loss of step {self.step} is {loss.item()}, its gradient {norm.item()}; "
                            "stopped. Look at the data (brachium inspect), or lower optimization.lr"
                        )
                    with _uninterrupted():  # what Ctrl-C saves must be a whole step
                        for optimizer, _ in self.optimizers:
                            optimizer.step()
                        self.step += 1
                        self._update_average()
                    now = max(time.monotonic() - begin, 1e-9)
                    self.spent, self.wait_share = self.earlier + now, loader.wait_s / now
                    if self.step % options.log_every == 0 or self.step == options.steps:
                        metrics = {"loss": loss.item(), **{k: v.item() for k, v in parts.items()}}
                        logger.line(
                            self.step,
                            metrics,
                            {"grad": norm.item(), "lr": options.learning_rate(self.step - 1)},
                            rate=(self.step - first) / now,
                            wait=self.wait_share,
                        )
                    if self.evaluate and self._due(self.evaluate_every):
                        metrics |= logger.evaluation(self.step, self._evaluated())
                    if self.snapshot and self._due(self.snapshot_every):
                        with self._averaged():
                            self.snapshot(self.step)
                    if self._due(options.save_every):
                        self.save()
                if self.evaluate:
                    metrics |= logger.evaluation(self.step, self._evaluated())
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"{self.name}: out of memory at step {self.step} on {device}. Lower optimization.batch_size "
                f"({options.batch_size} now), then model.head.draws, the image size or model.action_horizon; "
                "tune=frozen or tune=lora need less than tune=full"
            ) from error
        except KeyboardInterrupt:
            self.save()
            log(f"{self.name}: interrupted; saved step {self.step}. The same command with resume=true goes on from it")
            raise
        finally:
            loader.close()
        log(f"{self.name}: {self.step} steps in {human_time(self.spent)}, loader wait {100 * self.wait_share:.1f} %")
        return metrics

    def _due(self, every: int) -> bool:
        """Whether something happens after this step; what happens at the end is not due before it."""
        return every > 0 and self.step % every == 0 and self.step < self.options.steps

    def use_average(self) -> None:
        """Put the averaged weights in place of the trained ones."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.average[key])

    def _update_average(self) -> None:
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [p.detach() for p in self.parameters.values()], 1.0 - decay
            )

    def _evaluated(self) -> dict[str, float]:
        """Evaluate with the averaged weights, then put the trained ones back."""
        with self._averaged(), torch.no_grad():
            return self.evaluate() if self.evaluate else {}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones."""
        kept = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.use_average()
        self.module.eval()
        try:
            yield
        finally:
            with torch.no_grad(), _uninterrupted():
                for key, parameter in self.parameters.items():
                    parameter.copy_(kept[key])
            self.module.train()

    @property
    def _save_file(self) -> Path:
        return self.folder / f"resume-{self.name}.safetensors"

    def save(self) -> None:
        """Write everything a resumed run needs; the old save stays until the new one is whole."""
        tensors = {f"weight/{k}": p.detach() for k, p in self.parameters.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        tensors |= {f"buffer/{k}": b for k, b in self.buffers.items()}
        names = {id(p): k for k, p in self.parameters.items()}
        for optimizer, _ in self.optimizers:
            for parameter, state in optimizer.state.items():
                tensors |= {f"optimizer/{names[id(parameter)]}/{k}": v for k, v in state.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._save_file.with_suffix(".partial")
        metadata = {"step": str(self.step), "options": json.dumps(self.identity, sort_keys=True)}
        metadata["seconds"] = str(self.spent)
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        temporary.replace(self._save_file)

    def _resume(self) -> None:
        if not self._save_file.exists():
            return
        from safetensors import safe_open

        try:
            with safe_open(self._save_file, "pt") as file:
                metadata = file.metadata()
            saved = {k: v for k, v in json.loads(metadata["options"]).items() if k not in HABITS}
            tensors = load_file(self._save_file)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._save_file} is damaged: {error}\nType resume=false to start anew.") from error
        changed = [k for k in sorted({*saved, *self.identity}) if saved.get(k) != self.identity.get(k)]
        if changed:
            raise CheckpointError(
                f"{self._save_file}: was trained with other options: "
                + ", ".join(f"{k}={saved.get(k)} against {self.identity.get(k)}" for k in changed)
                + ".\nGive the old options to resume, or resume=false to start anew."
            )
        shapes = {k.removeprefix("weight/"): v.shape for k, v in tensors.items() if k.startswith("weight/")}
        lacking = [k for k, p in self.parameters.items() if shapes.get(k) != p.shape]
        if lacking:
            raise CheckpointError(
                f"{self._save_file}: was trained with another model: {len(lacking)} weights do not fit, for example "
                f"{lacking[:3]}.\nGive the old model to resume, or resume=false to start anew."
            )
        owner = {id(p): o for o, _ in self.optimizers for group in o.param_groups for p in group["params"]}
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{key}"])
                self.average[key].copy_(tensors[f"average/{key}"])
                prefix = f"optimizer/{key}/"
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                owner[id(parameter)].state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
            for key, buffer in self.buffers.items():
                if f"buffer/{key}" in tensors:
                    buffer.copy_(tensors[f"buffer/{key}"])
        self.step = int(metadata["step"])
        self.earlier = self.spent = float(metadata.get("seconds", 0.0))
        log(f"{self.name}: resumed at step {self.step}")


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _optimizers(
    parameters: Mapping[str, nn.Parameter], options: Optimization
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimisers that share the parameters out, each with its learning rate as a multiple of the schedule's."""
    hidden = {k: p for k, p in parameters.items() if options.muon and p.ndim == 2 and HIDDEN.search(k)}
    rest = {k: p for k, p in parameters.items() if k not in hidden}
    matrices, vectors = ([p for p in rest.values() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    made: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True), 1.0)
    ]
    if hidden:  # steps are scaled to the size that AdamW's have (Liu et al. 2025), so that one schedule fits both
        muon = torch.optim.Muon(
            list(hidden.values()),
            lr=options.muon * options.lr,
            weight_decay=options.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        made.append((muon, options.muon))
    return made


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)
