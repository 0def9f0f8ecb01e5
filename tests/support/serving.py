"""Parts of serving tests: a policy without a model, a server in a thread, and an openpi client written from its
published behaviour, with an encoder of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import msgpack
import numpy as np
from websockets.sync.client import connect as websocket_connect

from brachium.policies.access import Access
from brachium.policies.connection import _DIRECT
from brachium.policies.server import PolicyServer, new_loop
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec

SPEC = EmbodimentSpec(
    name="tiny",
    robot="tiny",
    control_hz=10.0,
    cameras=(
        FeatureSpec(name="front", shape=(8, 8, 3), dtype="uint8"),
        FeatureSpec(name="wrist", shape=(8, 8, 3), dtype="uint8"),
    ),
    state=FeatureSpec(name="state", shape=(3,), names=("x", "y", "z")),
    action=FeatureSpec(name="action", shape=(2,), names=("x", "grip"), gripper="open_is_1"),
)
HORIZON = 4


def connect(address, **options):
    """A bare websocket to the server; it is closed with the test."""
    return websocket_connect(address, **_DIRECT, proxy=None, **options)


class FormulaPolicy:
    """Chunks by a formula of everything that is asked, so that a mixed-up reply is a wrong one."""

    embodiment, action_horizon, noise_dim, takes_guidance = SPEC, HORIZON, 2, True

    def __init__(self, seconds=0.0, fail=None):
        self.seconds, self.fail, self.sizes, self.gate = seconds, fail, [], threading.Event()
        self.gate.set()

    @staticmethod
    def formula(observation, noise, guide=None):
        seen = sum(float(image.mean()) for image in observation.images.values())
        told = len(observation.instruction)
        rows = seen + told + float(observation.state.sum()) + np.arange(HORIZON)[:, None]
        led = 0.0 if guide is None else guide.actions * guide.weights[:, None]
        return (rows + noise + led).astype(np.float32)

    def predict(self, observations, noise, guidance=None):
        self.gate.wait(10.0)
        self.sizes.append(len(observations))
        time.sleep(self.seconds)
        if self.fail is not None and any(o.instruction == self.fail for o in observations):
            raise ValueError("secret of the server: /etc/passwd")
        guides = guidance if guidance is not None else [None] * len(observations)
        chunks = [self.formula(o, n, g) for o, n, g in zip(observations, noise, guides)]
        return ActionChunk(actions=np.stack(chunks), control_hz=10.0)


@contextlib.contextmanager
def served(
    policy=None, *, identity=None, request_format=None, batch=16, queue=64, executor=None, kind=PolicyServer, **access
):
    """A running server; yields (address, server)."""
    access = Access(**{"port": 0, "rate_hz": 1e6, **access})
    policy = policy or FormulaPolicy()
    server = kind(
        policy,
        identity=identity or {"name": "formula"},
        access=access,
        request_format=request_format,
        batch=batch,
        queue=queue,
        executor=None if executor is None else executor(policy),
    )
    ready, loop, where, failed = threading.Event(), new_loop(), [], []

    def tell(address):
        where.append(address)
        ready.set()

    def run():
        task = loop.create_task(server.serve(tell))
        server.task = task
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            failed.append(error)
            ready.set()
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20.0)
    if failed:
        raise failed[0]
    try:
        yield where[0], server
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(server.task.cancel)
        thread.join(10.0)


def openpi_pack(value):
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def openpi_unpack(value):
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


class OpenpiClient:
    """What openpi's client does: metadata first, then a reply a request; a text is an error."""

    def __init__(self, address, token=None):
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        self.websocket = connect(address, compression=None, max_size=None, additional_headers=headers)
        self.metadata = msgpack.unpackb(self.websocket.recv(timeout=5), object_hook=openpi_unpack)

    def infer(self, request):
        self.websocket.send(msgpack.packb(request, default=openpi_pack))
        reply = self.websocket.recv(timeout=5)
        if isinstance(reply, str):
            raise RuntimeError(f"Error in inference server:\n{reply}")
        return msgpack.unpackb(reply, object_hook=openpi_unpack)

    def close(self):
        self.websocket.close()
