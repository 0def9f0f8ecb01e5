"""The training loop: one optimiser, one schedule, averaged weights, log lines, and checkpoints to resume from."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..console import human_bytes, human_time, log
from ..datasets.loader import BatchLoader
from ..errors import BrachiumError, CheckpointError, ConfigError, DeviceMemoryError, DiskSpaceError
from .activations import keep_again, recompute
from .log import TrainLog
from .meter import Meter, peak_memory
from .optim import HABITS, Optimization, make_optimizers
from .parallel import ALONE, Processes, Share, distribute, is_lost, local, repeated_layers, synced, whole
from .parts import part
from .resume import Saves, say_failed
from .trackers import Trackers

COUNTED_FROM = 100
"""Steps of a run from which on counting its arithmetic, which takes one more, is worth the while."""


class _Stopped(KeyboardInterrupt):
    """The run has ended as it was asked to, and is saved."""


class TrainLoop:
    """Trains the parameters of `module` that require gradients.

    Every random draw of step i comes from a generator seeded with (seed, i) and every batch from a stateless sampler,
    so that a resumed run computes the very numbers the uninterrupted one would have. Several processes, and the parts
    that a step may be accumulated from, share out the same batch and the same draws.

    Args:
        name: Of the stage, for log lines.
        module: What is trained; averaged weights are kept for all its trained parameters.
        make_batch: Step -> batch, called ahead in threads.
        make_share: (step, index, count) -> share `index` of `count` of the step's batch; None for a stage that runs in
            one process, each step in one piece.
        loss: (batch, random numbers) -> loss and metrics to log; of a share, its part of the sum that is the batch's.
        options: Optimisation.
        folder: For logs and resumable saves.
        resume: Go on from the save in `folder` if there is one.
        evaluate: Called with the averaged weights in place after the last step and every `evaluate_every` steps;
            returns metrics to log.
        snapshot: Called with the step, with the averaged weights in place, every `snapshot_every` steps.
        snapshot_every: 0 for never.
        rollout: Step -> metrics of the averaged weights in closed loop, every `rollout_every` steps.
        rollout_every: 0 for never.
        track: Names of `trackers.TRACKERS` that are told what is logged.
        identity: What else the numbers depend on, JSON-ready (data, model); a save made with another is refused.
        explain: Step -> which data its batch was, for the error about a loss that is no number.
        processes: Who train together.
        plain: What `evaluate` and `snapshot` look at where `module` is in parts (FSDP): the same model in one piece,
            in the main process. None for `module`.

    Attributes:
        spent: Seconds of training, and `earlier`, those of them before the run was resumed.
    """

    def __init__(
        self,
        *,
        name: str,
        module: nn.Module,
        make_batch: Callable[[int], Any],
        loss: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]],
        options: Optimization,
        folder: Path,
        resume: bool,
        make_share: Callable[[int, int, int], Any] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        snapshot: Callable[[int], None] | None = None,
        snapshot_every: int = 0,
        rollout: Callable[[int], dict[str, float]] | None = None,
        rollout_every: int = 0,
        track: Sequence[str] = (),
        identity: Mapping[str, Any] | None = None,
        explain: Callable[[int], str] | None = None,
        processes: Processes = ALONE,
        plain: nn.Module | None = None,
    ) -> None:
        self.name, self.module, self.processes = name, module, processes
        self.options, self.folder, self.evaluate, self.evaluate_every = options, folder, evaluate, evaluate_every
        self.snapshot, self.snapshot_every, self.explain = snapshot, snapshot_every, explain
        self.rollout, self.rollout_every, self.track = rollout, rollout_every, track
        self._aside = 0.0
        self.plain = module if plain is None else plain
        self.count = processes.world * options.accumulate
        if self.count > 1 and make_share is None:
            raise ConfigError(
                f"{name} runs in one process, each step in one piece: expected optimization.accumulate=1 and no "
                f"torchrun, got accumulate={options.accumulate} and {processes.world} processes"
            )
        if self.count > options.batch_size:
            raise ConfigError(
                f"optimization.batch_size={options.batch_size} cannot be shared by {processes.world} processes in "
                f"{options.accumulate} parts each: expected at least {self.count}"
            )
        if processes.kind == "fsdp" and options.muon:
            raise ConfigError("optimization.muon needs whole matrices: expected parallel=ddp, or muon=0 with fsdp")
        self._make_batch, self._make_share = make_batch, make_share
        deciding = {k: v for k, v in options.noted().items() if k not in HABITS}
        self.identity = json.loads(json.dumps({**deciding, **dict(identity or {})}, default=_plainly))
        kept = module.state_dict()
        self.buffers = {k: b for k, b in module.named_buffers() if k in kept}  # running statistics among them
        self._layers = repeated_layers(module)
        self._prepare_layers()
        self.share = distribute(Share(module, loss), processes, options.precision)
        self.parameters = {k: p for k, p in module.named_parameters() if p.requires_grad and p.numel()}
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizers = make_optimizers(self.parameters, options)
        self.saves = Saves(folder, name, processes)
        self.step = self.saved = 0
        self.earlier = self.spent = 0.0
        self.wait_share = 0.0
        self._stopping = ""
        if resume:
            self._resume()
        else:  # or a later resume would go on from a run that has nothing to do with this one
            self.saves.remove()

    def _prepare_layers(self) -> None:
        if self.options.checkpointing:
            if not self._layers:
                raise ConfigError(f"{self.name}: optimization.checkpointing: this model has no repeated layers")
            recompute(self._layers)
        if self.options.compile:
            for layer in self._layers or [self.module]:
                layer.compile()

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return next(iter(self.parameters.values())).device

    def run(self) -> dict[str, float]:
        """Train to the last step; returns the last metrics. Ctrl-C and SIGTERM save before they end it."""
        options = self.options
        metrics: dict[str, float] = {}
        begin, first = time.monotonic(), self.step
        meter = Meter(self.device, options.precision, checkpointing=options.checkpointing)
        self.module.train()
        loader = BatchLoader(self._shares, self.step, options.steps - self.step, threads=1, prefetch=3)
        logger = self._logger() if self.processes.main else None
        try:
            with logger or nullcontext(), self._asked_to_stop():
                if self.step and self._due(self.snapshot_every):  # it may have been broken off
                    self._make_snapshot()
                if self.step and self._due(self.rollout_every) and self.rollout is not None:
                    metrics |= self._evaluated(logger, partial(self._rolled_out, self.rollout))
                for batches in loader:
                    if meter.flops is None and options.steps - first >= COUNTED_FROM and not options.compile:
                        self.count_arithmetic(batches, meter)
                    metrics_now, norm = self.update(batches)
                    now = max(time.monotonic() - begin - self._aside, 1e-9)
                    self.spent, self.wait_share = self.earlier + now, loader.wait_s / now
                    if self.step % options.log_every == 0 or self.step == options.steps:
                        metrics = self.processes.total({k: v.item() for k, v in metrics_now.items()})
                        if logger is not None:
                            rate = (self.step - first) / now
                            lr = options.learning_rate(self.step - 1)
                            logger.line(
                                self.step,
                                metrics,
                                {"grad": norm, "lr": lr, "samples_per_s": rate * options.batch_size},
                                rate=rate,
                                wait=self.wait_share,
                                mfu=meter.mfu(rate),
                                memory=meter.memory(),
                            )
                    if self._due(self.evaluate_every):
                        metrics |= self._evaluated(logger, self.evaluate)
                    if self._due(self.snapshot_every):
                        self._make_snapshot()
                    if self._due(self.rollout_every) and self.rollout is not None:
                        metrics |= self._evaluated(logger, partial(self._rolled_out, self.rollout))
                    if self._due(options.save_every):
                        self._save_if_room()
                    if self.processes.any(bool(self._stopping)):
                        self._leave_off()  # while more signals are but noted: who asked may lose patience
                        raise _Stopped
                metrics |= self._evaluated(logger, self.evaluate)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise self._explained(error) from error
        except _Stopped:
            raise
        except KeyboardInterrupt:
            self._leave_off()
            raise
        finally:
            loader.close()
        if self.processes.main:
            wait = f"loader wait {100 * self.wait_share:.1f} %"
            log(f"{self.name}: {self.step} steps in {human_time(self.spent)}, {wait}")
        return metrics

    def _leave_off(self) -> None:
        """Save, and say how to go on."""
        self.save()
        log(f"{self.name}: interrupted; saved step {self.step}. The same command with resume=true goes on from it")

    def _shares(self, step: int) -> list[Any]:
        """What this process computes of a step."""
        if self._make_share is None or self.count == 1:
            return [self._make_batch(step)]
        parts = self.options.accumulate
        return [self._make_share(step, self.processes.rank * parts + k, self.count) for k in range(parts)]

    def count_arithmetic(self, batches: Sequence[Any], meter: Meter) -> None:
        """Count a step's arithmetic, and leave no trace."""
        kept = {k: b.clone() for k, b in self.buffers.items()}

        def forward() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
                found: Tensor = self.share(batches[0], torch.Generator().manual_seed(0))[0]
                return found

        try:
            with synced(self.share, self.processes, self.processes.kind == "fsdp"):
                meter.count(forward, len(batches))
        finally:  # Ctrl-C saves what is here
            self.module.zero_grad(set_to_none=True)
            for key, value in kept.items():
                self.buffers[key].copy_(value)

    def update(self, batches: Sequence[Any]) -> tuple[dict[str, Tensor], float]:
        """One step: gradients of every share, then the optimiser's; metrics, this process's part, and the norm."""
        options, device = self.options, self.device
        for optimizer, times in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = times * group["times"] * options.learning_rate(self.step)
        metrics: dict[str, Tensor] = {}
        seed = options.seed * 1_000_003 + self.step
        for number, batch in enumerate(batches):
            index = self.processes.rank * options.accumulate + number
            torch.manual_seed(seed + 1_000_000_007 * index)  # dropout draws from the global generator
            last = number == len(batches) - 1
            with synced(self.share, self.processes, last):
                with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                    loss, parts = self.share(batch, torch.Generator().manual_seed(seed))
                with part("backward"):
                    (loss if self.processes.world == 1 else loss * self.processes.world).backward()
            for key, value in {"loss": loss, **parts}.items():
                metrics[key] = metrics[key] + value.detach() if key in metrics else value.detach()
        with part("clipping"):
            norm = whole(nn.utils.clip_grad_norm_(list(self.parameters.values()), options.grad_clip)).item()
        if not (math.isfinite(norm) and torch.isfinite(metrics["loss"])):
            told = "" if self.explain is None else f"\nIts batch: {self.explain(self.step)}"
            raise BrachiumError(
                f"{self.name}: the loss of step {self.step} is {metrics['loss'].item()}, its gradient {norm}; "
                f"stopped, and the save of step {self.saved} stays. Look at the data (brachium inspect), or lower "
                f"optimization.lr{told}"
            )
        with _uninterrupted():  # what Ctrl-C saves must be a whole step
            with part("optimizer"):
                for optimizer, _ in self.optimizers:
                    optimizer.step()
            self.step += 1
            with part("averaged weights"):
                self._update_average()
        return metrics, norm

    def _explained(self, error: BaseException) -> BaseException:
        """An error as one that says what to do; others as they are."""
        if _is_out_of_memory(error):
            return DeviceMemoryError(
                f"{self.name}: out of memory at step {self.step} on {self.device}. Lower optimization.batch_size "
                f"({self.options.batch_size} now), or raise optimization.accumulate ({self.options.accumulate} now: "
                "the same numbers in smaller parts), or type optimization.checkpointing=true; then model.head.draws, "
                "the image size or model.action_horizon. tune=frozen or tune=lora need less than tune=full.\n"
                f"Measured: {self._need()}"
            )
        if self.processes.world > 1 and is_lost(error):
            return BrachiumError(
                f"{self.name}: another of the {self.processes.world} processes was lost at step {self.step} "
                f"({str(error).splitlines()[0][:160]}). The save of step {self.saved} stays: the same command with "
                "resume=true goes on from it, with as many processes as there are"
            )
        return error

    def _need(self) -> str:
        """How much memory was used when there was no more, and how much of it does not depend on the batch."""
        held = [*self.parameters.values(), *self.average.values(), *self.buffers.values()]
        held += [v for o, _ in self.optimizers for state in o.state.values() for v in state.values()]
        fixed = sum(local(t).numel() * local(t).element_size() for t in held if isinstance(t, Tensor))
        gradients = sum(local(p).numel() * p.element_size() for p in self.parameters.values())
        if not any(o.state for o, _ in self.optimizers):
            fixed += 2 * gradients  # which the optimiser keeps from the first step on
        rows = -(-self.options.batch_size // self.count)
        return (
            f"{human_bytes(peak_memory(self.device))} were used: {human_bytes(fixed + gradients)} for weights, "
            f"averages, optimiser and gradients, the rest for the {rows} windows at once"
        )

    def _due(self, every: int) -> bool:
        """Whether something happens after this step; what happens at the end is not due before it."""
        return every > 0 and self.step % every == 0 and self.step < self.options.steps

    def use_average(self) -> None:
        """Put the averaged weights in place of the trained ones, in what `evaluate` looks at."""
        if self.plain is self.module and self.processes.kind != "fsdp":
            with torch.no_grad():
                for key, parameter in self.parameters.items():
                    parameter.copy_(self.average[key])
            return
        theirs = dict(self.plain.named_parameters()) if self.processes.main else {}
        with torch.no_grad():
            for key, value in self.average.items():
                full = whole(value)  # which all must ask for
                if self.processes.main:
                    theirs[key].copy_(full)
            for key, value in self.plain.named_buffers() if self.processes.main else ():
                if key in self.buffers:
                    value.copy_(self.buffers[key])

    def _update_average(self) -> None:
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            ours = [local(v) for v in self.average.values()]
            torch._foreach_lerp_(ours, [local(p.detach()) for p in self.parameters.values()], 1.0 - decay)

    def _logger(self) -> TrainLog:
        told = {**self.options.noted(), "folder": str(self.folder), "identity": self.identity}
        trackers = (
            partial(Trackers, self.track, self.folder, self.name, told, resumed=self.step > 0) if self.track else None
        )
        return TrainLog(self.folder, self.name, self.options.steps, self.step, trackers)

    def _evaluated(self, logger: TrainLog | None, evaluate: Callable[[], dict[str, float]] | None) -> dict[str, float]:
        """Evaluate with the averaged weights, then put the trained ones back; training's clock stands still."""
        if evaluate is None:
            return {}
        found: dict[str, float] = {}
        begin = time.monotonic()
        with self._averaged():
            if logger is not None:
                with torch.no_grad():
                    found = logger.evaluation(self.step, evaluate())
        self._aside += time.monotonic() - begin
        return found

    def _rolled_out(self, rollout: Callable[[int], dict[str, float]]) -> dict[str, float]:
        return {**rollout(self.step), "trained_s": self.spent}

    def _make_snapshot(self) -> None:
        if self.snapshot is not None:
            with self._averaged():
                if self.processes.main:
                    self.snapshot(self.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones; the others wait for the main process."""
        apart = self.plain is not self.module
        kept = {} if apart else {k: p.detach().clone() for k, p in self.parameters.items()}
        self.use_average()
        self.plain.eval()
        try:
            yield
        finally:
            with torch.no_grad(), _uninterrupted():
                for key, value in kept.items():
                    self.parameters[key].copy_(value)
            if not apart:
                self.module.train()
            self.processes.wait()

    def finish(self) -> None:
        """Leave the model as it came: layers run as they were written."""
        keep_again(self._layers)

    # -- saves ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _asked_to_stop(self) -> Iterator[None]:
        """SIGTERM, and among several processes Ctrl-C, end the run after the step: all must save the same one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [signal.SIGTERM] + ([signal.SIGINT] if self.processes.world > 1 else [])

        def note(number: int, frame: Any) -> None:
            self._stopping = signal.Signals(number).name

        before = [signal.signal(number, note) for number in wanted]
        try:
            yield
        finally:
            for number, old in zip(wanted, before):
                signal.signal(number, old)

    def _save_if_room(self) -> None:
        """A save on the way: where there is no room the work goes on."""
        try:
            self.save()
        except DiskSpaceError as error:
            if self.processes.main:
                say_failed(error)

    def save(self) -> None:
        """Write everything a resumed run needs; the old save stays until the new one is whole."""
        tensors = {f"weight/{k}": p.detach() for k, p in self.parameters.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        tensors |= {f"buffer/{k}": b for k, b in self.buffers.items()}
        names = {id(p): k for k, p in self.parameters.items()}
        for optimizer, _ in self.optimizers:
            for parameter, state in optimizer.state.items():
                tensors |= {f"optimizer/{names[id(parameter)]}/{k}": v for k, v in state.items()}
        metadata = {"step": str(self.step), "options": json.dumps(self.identity, sort_keys=True)}
        metadata["seconds"] = str(self.spent)
        self.saves.write(tensors, metadata)
        self.saved = self.step

    def _resume(self) -> None:
        path = self.saves.path
        if path is None:
            return
        metadata, shapes = self.saves.read_metadata()
        try:
            saved = {k: v for k, v in json.loads(metadata["options"]).items() if k not in HABITS}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}\nType resume=false to start anew.") from error
        changed = differences(saved, self.identity)
        if changed:
            raise CheckpointError(
                f"{path}: was trained with other options: "
                + ", ".join(f"{k}={was} against {now}" for k, was, now in changed)
                + ".\nGive the old options to resume, or resume=false to start anew."
            )
        lacking = [k for k, p in self.parameters.items() if shapes.get(f"weight/{k}") != tuple(p.shape)]
        if lacking:
            raise CheckpointError(
                f"{path}: was trained with another model: {len(lacking)} weights do not fit, for example "
                f"{lacking[:3]}.\nGive the old model to resume, or resume=false to start anew."
            )
        owner = {id(p): o for o, _ in self.optimizers for group in o.param_groups for p in group["params"]}
        into: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            into |= {f"weight/{key}": parameter.detach(), f"average/{key}": self.average[key]}
            prefix = f"optimizer/{key}/"
            state = {}
            for name, shape in shapes.items():
                if name.startswith(prefix):
                    like = parameter.detach() if shape == tuple(parameter.shape) else torch.zeros(shape)
                    state[name.removeprefix(prefix)] = into[name] = torch.zeros_like(like)
            owner[id(parameter)].state[parameter] = state
        into |= {f"buffer/{key}": buffer for key, buffer in self.buffers.items() if f"buffer/{key}" in shapes}
        self.saves.read(into)
        self.step = self.saved = int(metadata["step"])
        self.earlier = self.spent = float(metadata.get("seconds", 0.0))
        if self.processes.main:
            log(f"{self.name}: resumed at step {self.step}")


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of plain values differ: (dotted key, old, new)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    return [] if old == new else [(prefix.removesuffix("."), old, new)]


def _plainly(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


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
