"""The protocol of the public vla-evaluation harness (allenai/vla-evaluation-harness): its benchmarks, in their own
containers and by their maintainers' tools, evaluate a policy that brachium serves.

The harness is the client. It says hello, begins an episode, sends one observation a step and waits for one action; maps
of msgpack hold ``type``, ``payload``, ``seq`` and ``timestamp``, arrays are maps with ``__ndarray__``, pictures maps
with ``__image__`` (raw, PNG or JPEG). An executor here turns chunks into single actions, a lane a client.
"""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from ..console import log
from ..errors import BrachiumError, ServerError, WireError
from .batching import Job
from .server import REFUSED, PolicyServer, _Session
from .wire import MAX_DIMS, decode

VERSION = 1
"""Of the protocol."""
MOST_PIXELS = 4 * 2**20
"""Pixels that are unpacked of one message: a picture of a few kilobytes may stand for many."""
KINDS = "biuf"
_PICTURES = {"png": "PNG", "jpeg": "JPEG"}


class HarnessServer(PolicyServer):
    """A policy server that speaks the harness's protocol; made like a `PolicyServer` with an executor."""

    async def _client(self, connection: ServerConnection) -> None:
        if len(self._sessions) >= self.access.clients:  # several were let in at once
            await connection.close(REFUSED, "too many clients")
            return
        session = _Session(lane=next(self._lanes), allowance=2.0 * self.access.rate_hz)
        self._sessions.add(session)
        self.metrics.clients.set(len(self._sessions))
        try:
            async for data in connection:
                await self._message(connection, session, data)
        except ConnectionClosed:
            pass
        finally:
            self._sessions.discard(session)
            if self._executor is not None:
                self._executor.forget(session.lane)
            self.metrics.clients.set(len(self._sessions))

    async def _message(self, connection: ServerConnection, session: _Session, data: str | bytes) -> None:
        """Do what one message asks for; what is wrong with it is answered, and the connection stays."""
        seq = 0
        try:
            if isinstance(data, str):
                raise WireError("expected a binary message, got text")
            kind, payload, seq = unpack(data, limit=self.access.message_bytes)
            if kind == "hello":
                await connection.send(pack("hello", self._hello(payload), seq))
            elif kind == "episode_start":
                session.began = False
            elif kind == "observation":
                if not session.spend(self.access.rate_hz):
                    raise ServerError(f"too many requests: {self.access.rate_hz:g} a second are allowed")
                action = await self._act(session, self._wanted(payload))
                await connection.send(pack("action", {"actions": action}, seq))
                self.metrics.requests.inc()
            elif kind == "error":
                log(f"policy server: the harness reports: {str(payload)[:200]}")
        except BrachiumError as error:
            self.metrics.refused.labels("message" if isinstance(error, WireError) else "policy").inc()
            with contextlib.suppress(ConnectionClosed):
                await connection.send(pack("error", {"error": str(error)}, seq))
        except ConnectionClosed:
            raise
        except Exception as error:  # of the model: the harness learns that, the log learns why
            log(f"policy server: {type(error).__name__}: {error}")
            self.metrics.refused.labels("error").inc()
            with contextlib.suppress(ConnectionClosed):
                await connection.send(pack("error", {"error": "the policy failed; see the server's log"}, seq))

    def _wanted(self, payload: dict[str, Any]) -> dict[str, Any]:
        """What the policy reads of an observation, unpacked; whatever else a message holds is left packed."""
        form = self.request_format
        keys = [*form.image_keys(self.policy.embodiment).values(), *form.state, form.prompt]
        pixels = sum(_pixels(_at(payload, key)) for key in keys)
        if pixels > MOST_PIXELS:
            raise WireError(f"expected pictures of at most {MOST_PIXELS} pixels together, got {pixels}")
        return {key: unpack_arrays(value) for key in keys if (value := _at(payload, key)) is not None}

    def _hello(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Who serves; the specs' conventions are this policy's own, told in words."""
        spec = self.policy.embodiment
        return {
            "harness_version": str(payload.get("harness_version", "")),
            "protocol_version": VERSION,
            "model_server": "brachium",
            "capabilities": {},
            "identity": self.identity,
            "embodiment": spec.to_dict(),
        }

    async def _act(self, session: _Session, payload: dict[str, Any]) -> np.ndarray:
        """The action (a,) of one step."""
        assert self._batcher is not None
        observation = self.request_format.read(payload, self.policy.embodiment)
        seed = None if session.began else int(session.rng.integers(2**31))
        session.began = True
        noise = np.zeros((self.policy.action_horizon, self.policy.noise_dim), np.float32)  # the executor draws its own
        begin = time.monotonic()
        answer = await self._batcher.ask(Job(observation=observation, noise=noise, lane=session.lane, seed=seed))
        self.metrics.model.observe(answer.seconds)
        self.metrics.total.observe(time.monotonic() - begin)
        return np.ascontiguousarray(answer.actions[0], np.float32)


def pack(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    """A message to the harness."""
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    packed: bytes = msgpack.packb(message, default=_pack, use_bin_type=True)
    return packed


def unpack(data: bytes, *, limit: int) -> tuple[str, dict[str, Any], int]:
    """Kind, payload and number of a message of the harness; arrays and pictures are still maps (`unpack_arrays`).

    Raises:
        WireError: It is none.
    """
    message = decode(data, limit=limit)
    if not isinstance(message, dict) or not {"type", "payload", "seq"} <= message.keys():
        raise WireError("expected a map with type, payload and seq, as the vla-evaluation harness sends")
    kind, payload, seq = message["type"], message["payload"], message["seq"]
    if not isinstance(kind, str) or not isinstance(payload, dict) or type(seq) is not int or not 0 <= seq < 2**63:
        raise WireError("expected type to be a text, payload a map and seq a number")
    return kind, payload, seq


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise WireError(f"cannot send {type(value).__name__}")


def unpack_arrays(value: Any) -> Any:
    """Maps that stand for arrays and pictures as such, at any depth.

    Raises:
        WireError: What a map says of its array or picture is not so.
    """
    if isinstance(value, dict):
        if "__image__" in value:
            return _image(value)
        return _array(value) if "__ndarray__" in value else {key: unpack_arrays(each) for key, each in value.items()}
    return [unpack_arrays(each) for each in value] if isinstance(value, list) else value


def _array(value: dict[str, Any]) -> np.ndarray:
    data, shape = value.get("data"), value.get("shape")
    try:
        dtype = np.dtype(str(value.get("dtype")))
    except TypeError as error:
        raise WireError(f"expected the type of an array, got {str(value.get('dtype'))[:20]!r}") from error
    sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**31 for n in shape) and len(shape) <= MAX_DIMS
    if dtype.kind not in KINDS or not sizes or not isinstance(data, bytes):
        raise WireError(f"expected an array of numbers, got type {dtype} and shape {str(shape)[:60]}")
    count = 1
    for n in shape or []:
        count *= n
    if len(data) != count * dtype.itemsize:
        raise WireError(f"expected {count * dtype.itemsize} bytes for shape {shape} {dtype}, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _image(value: dict[str, Any]) -> np.ndarray:
    """A picture uint8 (height, width, 3)."""
    form = value.get("format")
    if form == "raw":
        return _array(value)
    if form not in _PICTURES or not isinstance(value.get("data"), bytes):
        raise WireError(f"expected a picture as raw, {' or '.join(_PICTURES)}, got {str(form)[:20]!r}")
    with _opened(value) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise WireError(f"expected a picture of at most {MOST_PIXELS} pixels, got {picture.size}")
        try:
            return np.asarray(picture.convert("RGB"))
        except Exception as error:  # whatever a damaged file makes Pillow raise
            raise WireError(f"expected a {form} picture, got one that is damaged") from error


def _opened(value: dict[str, Any]) -> Any:
    """A packed picture of which no more than the header is read."""
    from PIL import Image

    form = str(value.get("format"))
    try:
        return Image.open(io.BytesIO(value["data"]), formats=[_PICTURES[form]])
    except Exception as error:
        raise WireError(f"expected a {form} picture, got {len(value['data'])} bytes that are none") from error


def _pixels(value: Any) -> int:
    """How many pixels a packed picture would come to; 0 for anything else."""
    if not isinstance(value, dict) or value.get("format") not in _PICTURES or not isinstance(value.get("data"), bytes):
        return 0
    with _opened(value) as picture:
        return int(picture.width * picture.height)


def _at(payload: Any, key: str) -> Any:
    """A value by its key or its path into nested maps; None where there is none."""
    if isinstance(payload, dict) and key in payload:
        return payload[key]
    for part in key.split("/"):
        if not isinstance(payload, dict) or part not in payload:
            return None
        payload = payload[part]
    return payload
