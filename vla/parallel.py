"""Several processes that train one model: who they are, how they share it, and how they part.

Started by ``torchrun`` or Slurm, or by ``brachium train processes=N``. Every process has the same code and the same
configuration; what differs is its rank. Gradients are the mean over processes of what each makes of its share of the
batch, so a share's loss is its part of the whole batch's times the number of processes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import BrachiumError, ConfigError
from ..hardware import cores
from .optim import HIDDEN

STARTED = ("RANK", "WORLD_SIZE")
"""What ``torchrun`` tells its processes."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: Number of this one.
        world: How many there are.
        kind: ``ddp`` or ``fsdp``; ``alone`` for a single process.
    """

    rank: int = 0
    world: int = 1
    kind: str = "alone"

    @property
    def main(self) -> bool:
        """Whether this one writes logs and files."""
        return self.rank == 0

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum of each value over all processes."""
        if self.world == 1 or not values:
            return dict(values)
        both = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64)
        dist.all_reduce(both, group=_talk())
        return dict(zip(sorted(values), both.tolist()))

    def any(self, flag: bool) -> bool:
        """Whether some process says so."""
        return self.total({"flag": float(flag)})["flag"] > 0 if self.world > 1 else flag

    def wait(self) -> None:
        """Go on when all are here; as long as it takes, for the others may be evaluating."""
        if self.world > 1:
            dist.barrier(group=_talk())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is run by the main process, then by the others, which find what it has written."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


ALONE = Processes()
_groups: dict[str, Any] = {}


def _talk() -> Any:
    """The group that small messages go through: on the CPU, and patient."""
    return _groups["talk"]


def announced() -> bool:
    """Whether this process was started as one of several."""
    # Of Slurm it must be the step's: an allocation's shell has SLURM_NTASKS too, and is one process.
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def join(kind: str, device: str, patience: float = 300.0) -> tuple[Processes, str]:
    """Meet the other processes, if there are any; returns them and this process's device.

    Args:
        kind: ``ddp`` or ``fsdp``.
        device: ``cpu`` or ``cuda``; each process of a machine gets a GPU of its own.
        patience: How long to wait for the others [s].

    Raises:
        BrachiumError: They did not come.
    """
    if not announced():
        return ALONE, device
    _from_slurm()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = device
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"expected a GPU for each process of this machine, got {torch.cuda.device_count()} for process "
                f"{local}. Type fewer processes, or device=cpu"
            )
        place = f"cuda:{local}"
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=patience))
            dist.monitored_barrier(dist.new_group(backend="gloo"), timeout=timedelta(seconds=patience))
            _groups["talk"] = dist.new_group(backend="gloo", timeout=timedelta(days=2))
        except (RuntimeError, ValueError) as error:  # of the store, the network, or a barrier nobody came to
            raise BrachiumError(
                f"too few processes: expected {world} (WORLD_SIZE), and process {rank} did not meet the others within "
                f"{patience:.0f} s: {str(error).splitlines()[0]}\nStart all of them, with the same MASTER_ADDR and "
                "MASTER_PORT, or as many as there are: torchrun --nproc-per-node N -m brachium train ..."
            ) from error
    return Processes(rank=rank, world=world, kind=kind), place


def leave() -> None:
    """Part from the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _groups.clear()


def _from_slurm() -> None:
    """What ``torchrun`` would have said, where Slurm started the processes."""
    if all(name in os.environ for name in STARTED):
        return
    given = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for name, theirs in given.items():
        os.environ.setdefault(name, os.environ.get(theirs, "0"))
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        os.environ["MASTER_ADDR"] = names.stdout.split()[0] if names.stdout.split() else "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))


def launch(processes: int, words: Sequence[str] | None) -> int:
    """Run the command that was typed in several processes of this machine; returns the exit code.

    Raises:
        ConfigError: What runs is not a typed command.
    """
    if words is None:
        raise ConfigError(
            f"processes={processes} starts the typed command again, and there is none. Start Python with torchrun"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    kept = [word for word in words if not word.startswith("processes=")]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what matters the processes say
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "brachium", *kept)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        rank, first = failures[0]
        code = first.exitcode
        if code in (2, 130):  # a mistake, or Ctrl-C: it has said so
            return code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise BrachiumError(
            f"process {rank} of {processes} {how}; the others were stopped. What was saved stays: the same command "
            "with resume=true goes on from it"
        ) from error
    except SignalException as error:  # Ctrl-C, or a kill of all of them: they have saved
        raise KeyboardInterrupt from error
    return 0


class Share(nn.Module):
    """A stage's loss as a module, which is what DDP and FSDP wrap.

    Args:
        module: What is trained.
        loss: See `TrainLoop`.
    """

    def __init__(self, module: nn.Module, loss: Any) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any, generator: Any) -> Any:
        """Loss and metrics of a share of a batch."""
        return self.loss(batch, generator)


def distribute(share: Share, processes: Processes, precision: str) -> Any:
    """The stage's loss, shared among processes.

    DDP keeps the whole model in each; FSDP2 (`fully_shard`) a part of every repeated layer, and of the rest. Weights
    are float32 in both; with ``bf16`` FSDP sends them in half that, and sums gradients in float32.
    """
    if processes.kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = next(share.parameters()).device
        for parameter in share.parameters():
            dist.broadcast(parameter.data, 0)
        mesh = init_device_mesh(device.type, (processes.world,))
        lower = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for module in repeated_layers(share):
            if getattr(module, "stays_whole", False):
                continue  # it gives something but its output, and FSDP would not know when that is learnt from
            fully_shard(module, mesh=mesh, mp_policy=lower)
        nothing = {parameter for parameter in share.parameters() if not parameter.numel()}
        fully_shard(share, mesh=mesh, mp_policy=lower, ignored_params=nothing)
        return share
    if processes.kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        device = next(share.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        # The parts of an embodiment that no window of a batch is of have no gradient.
        return DistributedDataParallel(share, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False)
    return share


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The layers that repeat: those whose weights' names `HIDDEN` finds, up to the number."""
    found: dict[str, None] = {}
    for name, _ in module.named_parameters():
        match = HIDDEN.search(f".{name}")
        if match:
            found[name[: match.end() - 2]] = None
    return [module.get_submodule(name) for name in found]


@contextmanager
def synced(share: Any, processes: Processes, now: bool) -> Iterator[None]:
    """Gradients of the block are exchanged, or kept for the next (`now` False)."""
    if processes.kind == "fsdp":
        share.set_requires_gradient_sync(now)
    with share.no_sync() if processes.kind == "ddp" and not now else nullcontext():
        yield


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is in parts, every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "nccl", "timed out", "gloo")
"""In the messages of a process that cannot reach another."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError) and any(word in text for word in LOST)
