"""The verb ``brachium serve``: a checkpoint behind a policy server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import log
from ..errors import CheckpointError, ConfigError, did_you_mean
from .access import Access
from .executor import ChunkExecutor
from .harness import HarnessServer
from .request import RequestFormat
from .server import PolicyServer, run

if TYPE_CHECKING:
    from ..vla.accelerate import Acceleration

SPEAKS = ("openpi", "harness")
"""Protocols: brachium's own, which is openpi's with more, and the public vla-evaluation harness's."""
BATCHES = (1, 2, 4, 8, 16)
"""Sizes of batches that the model runs on."""


def serve(
    *,
    checkpoint: str,
    access: Access,
    request_format: RequestFormat | None = None,
    embodiment: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    batch: int = 16,
    queue: int = 64,
    executor: Callable[..., ChunkExecutor] | None = None,
    speaks: str = "openpi",
    acceleration: Acceleration | None = None,
) -> int:
    """Serve a checkpoint to brachium's and openpi's clients until interrupted.

    The address is printed on standard output once the policy is warm: ``ready ws://127.0.0.1:8000``.

    Args:
        checkpoint: Folder of the checkpoint.
        access: Address, token, TLS and limits.
        request_format: Where requests of clients other than brachium's hold images, state and prompt.
        embodiment: Which of the checkpoint's robots; the only one when null.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of the model; null leaves it to torch.
        batch: Most requests that are answered together.
        queue: Most requests that wait.
        executor: Answer with single actions by an executor on the server, one lane a client; null answers with chunks,
            which clients execute by themselves.
        speaks: ``openpi`` (brachium's clients and openpi's) or ``harness``, the protocol of the vla-evaluation
            harness, which takes single actions: it needs an executor, and a request_format such as harness_libero.
        acceleration: How chunks are made faster: ``plain``, ``compiled``, ``bf16``, ``gpu`` or ``fp8``; null for not.
            The address is printed when all sizes of batches are compiled and recorded.
    """
    if speaks not in SPEAKS:
        raise ConfigError(f"unknown speaks {speaks!r}. {did_you_mean(speaks, SPEAKS)}")
    if speaks == "harness" and executor is None:
        raise ConfigError("speaks=harness answers with single actions. Type: executor=receding")
    access.tls()  # its mistakes come before the model is loaded
    import torch

    from .vla_policy import VLAPolicy

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"expected threads of at least 1, got {threads}")
        torch.set_num_threads(threads)
    where = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [size for size in BATCHES if size < batch] + [batch]
    policy = VLAPolicy.from_checkpoint(
        checkpoint, embodiment=embodiment, device=where, batch_size=sizes, acceleration=acceleration
    )
    made = PolicyServer if speaks == "openpi" else HarnessServer
    server = made(
        policy,
        identity=identity_of(Path(checkpoint)),
        access=access,
        request_format=request_format,
        batch=batch,
        queue=queue,
        executor=None if executor is None else executor(policy),
    )
    log(
        f"serving {checkpoint} ({policy.embodiment.name}, chunks of {policy.action_horizon}) on {where}; Ctrl-C ends it"
    )

    def ready(address: str) -> None:
        print(f"ready {address}", flush=True)

    run(_until_orphaned(server, ready))
    return 0


async def _until_orphaned(server: PolicyServer, ready: Any) -> None:
    """Serve; a server that a run started for itself (``BRACHIUM_PARENT``) ends with it."""
    parent = os.environ.get("BRACHIUM_PARENT")
    work = asyncio.create_task(server.serve(ready))
    while parent is not None and not work.done():
        await asyncio.wait([work], timeout=0.5)
        if os.getppid() != int(parent):
            work.cancel()
            return
    await work


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from others: its name, the checksum of its weights, and what was noted about it."""
    from ..vla.checkpoint import read_meta

    meta = read_meta(checkpoint)
    digest = meta.get("sha256", {}).get("model.safetensors")
    if digest is None:
        raise CheckpointError(f"{checkpoint}: expected the checksum of its weights in meta.json, got none")
    kept = {key: meta[key] for key in ("head", "parameters", "seed") if isinstance(meta.get(key), (str, int, float))}
    return {"name": checkpoint.resolve().parent.name, "sha256": digest, **kept}
