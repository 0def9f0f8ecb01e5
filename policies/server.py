"""The policy server: websocket and msgpack as openpi speaks them, with tokens, limits, batching and metrics.

After the handshake the server sends its metadata, then answers each request with ``actions`` (h, a) and timings. What
brachium adds stands under the key ``brachium`` of messages; clients that know nothing of it are served all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ..console import log
from ..errors import BrachiumError, ConfigError, ServerError, WireError
from ..spec import Observation
from .access import Access
from .base import ChunkPolicy
from .batching import Batcher, Job
from .executor import ChunkExecutor
from .metrics import Metrics
from .request import OURS, PROTOCOL, RequestFormat, Wish
from .wire import decode, encode

INVALID, REFUSED, BROKEN = 1007, 1008, 1011
"""Close codes of RFC 6455: data that is none, against the rules, an error of the server."""
_QUIET = logging.getLogger("brachium.policies.server.websockets")
_QUIET.setLevel(logging.CRITICAL)  # a port scan is no reason for tracebacks; refusals are counted
_OURS = RequestFormat()
"""Of brachium's own clients."""
PIPELINED = 4
"""Requests that one client may have under way at once."""


@dataclass(eq=False)
class _Session:
    """State of one client."""

    lane: int
    began: bool = False
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    allowance: float = 0.0
    refilled: float = field(default_factory=time.monotonic)
    previous: float | None = None
    under_way: int = 0

    def spend(self, rate: float) -> bool:
        """Take one request out of the allowance, if there is one."""
        now = time.monotonic()
        self.allowance = min(2.0 * rate, self.allowance + (now - self.refilled) * rate)
        self.refilled = now
        if self.allowance < 1.0:
            return False
        self.allowance -= 1.0
        return True


class PolicyServer:
    """Serves one policy to several clients, each with draws of its own.

    Args:
        policy: What is served.
        identity: What tells this checkpoint from others; part of the handshake.
        access: Address, token and limits.
        request_format: Where requests of clients other than brachium's hold images, state and prompt.
        batch: Most requests in a batch.
        queue: Most requests that wait.
        executor: Answer with the one action of this step (1, a) instead of a chunk, by an executor that keeps a lane
            for each client: for clients that execute whatever they are told, at the embodiment's rate.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        identity: Mapping[str, Any],
        access: Access,
        request_format: RequestFormat | None = None,
        batch: int = 16,
        queue: int = 64,
        executor: ChunkExecutor | None = None,
    ) -> None:
        if batch < 1 or queue < 1:
            raise ConfigError(f"expected batch and queue of at least 1, got {batch} and {queue}")
        self.policy, self.identity, self.access = policy, dict(identity), access
        self.request_format = request_format or RequestFormat()
        self.request_format.image_keys(policy.embodiment)
        self.metrics = Metrics()
        self._batch, self._queue, self._executor = batch, queue, executor
        self._lanes = itertools.count(1)
        self._ready = False
        self._sessions: set[_Session] = set()
        self._batcher: Batcher | None = None
        self._reply_bytes = encode(self.metadata())

    def metadata(self) -> dict[str, Any]:
        """The first message to every client."""
        spec = self.policy.embodiment
        return {
            "reset_pose": None,
            OURS: {
                "protocol": PROTOCOL,
                "spec": spec.to_dict(),
                "digest": spec.digest,
                "action_horizon": self.policy.action_horizon if self._executor is None else 1,
                "noise_dim": self.policy.noise_dim,
                "takes_guidance": self.policy.takes_guidance and self._executor is None,
                "executor": None if self._executor is None else type(self._executor).__name__,
                "identity": self.identity,
            },
        }

    def warm_up(self, runs: int = 2) -> float:
        """Run the policy on random observations of its kind; the seconds of the last run."""
        rng, spec = np.random.default_rng(0), self.policy.embodiment
        spent = 0.0
        policy: Any = self.policy
        if getattr(policy, "accelerated", False):
            policy.warm_up()
        for _ in range(runs):
            begin = time.monotonic()
            noise = rng.standard_normal((self.policy.action_horizon, self.policy.noise_dim), np.float32)
            self._run([Job(observation=Observation.fake(spec, rng), noise=noise, seed=0)])
            spent = time.monotonic() - begin
        return spent

    async def serve(self, ready: Callable[[str], None] | None = None) -> None:
        """Serve until cancelled; `ready` is told the address once the policy is warm and the port open.

        Raises:
            ServerError: The port is in use, or the address is none of this machine.
        """
        access = self.access
        tls = access.tls()
        self.warm_up()
        self._batcher = Batcher(self._run, most=self._batch, queue=self._queue)
        try:
            server = await serve(
                self._client,
                access.host,
                access.port,
                ssl=tls,
                compression=None,
                max_size=access.message_bytes,
                max_queue=PIPELINED,
                process_request=self._admit,
                open_timeout=5.0,
                ping_interval=5.0,
                ping_timeout=10.0,
                close_timeout=1.0,
                server_header=None,
                logger=_QUIET,
            )
        except OSError as error:
            raise ServerError(
                f"cannot listen on {access.host}:{access.port}: {error.strerror or error}. Is a server running there "
                "already? Type: access.port=0 for any free port"
            ) from error
        work = asyncio.create_task(self._batcher.work())
        try:
            async with server:
                self._ready = True
                if ready is not None:
                    ready(self.address(server))
                await asyncio.gather(server.serve_forever(), work)
        finally:
            self._ready = False
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    def address(self, server: Server) -> str:
        """Where clients find it."""
        host, port = next(iter(server.sockets)).getsockname()[:2]
        scheme = "wss" if self.access.certificate else "ws"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    # -- connections ---------------------------------------------------------------------------------------------------

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP; let in who may."""
        path = request.path.partition("?")[0]
        if path in ("/healthz", "/health"):
            return connection.respond(
                http.HTTPStatus.OK if self._ready else http.HTTPStatus.SERVICE_UNAVAILABLE, "OK\n"
            )
        if not self.access.admits(_single(request, "Authorization")):
            self.metrics.refused.labels("token").inc()
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing token\n")
        if path == "/metrics":
            self.metrics.waiting.set(self._batcher.depth if self._batcher else 0)
            return connection.respond(http.HTTPStatus.OK, self.metrics.text().decode())
        if _single(request, "Origin") is not None:  # a web page that the user looks at, not a robot's client
            self.metrics.refused.labels("origin").inc()
            return connection.respond(http.HTTPStatus.FORBIDDEN, "no browsers\n")
        if len(self._sessions) >= self.access.clients:
            self.metrics.refused.labels("clients").inc()
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _client(self, connection: ServerConnection) -> None:
        if len(self._sessions) >= self.access.clients:  # several were let in at once
            await connection.close(REFUSED, "too many clients")
            return
        session = _Session(lane=next(self._lanes), allowance=2.0 * self.access.rate_hz)
        self._sessions.add(session)
        self.metrics.clients.set(len(self._sessions))
        tasks: set[asyncio.Task[None]] = set()
        try:
            await connection.send(self._reply_bytes)
            async for message in connection:
                received = time.monotonic()
                job = await self._understand(connection, session, message)
                if job is None:
                    continue
                wish, one = job
                if wish.id is None:  # such a client cannot tell replies apart: one after another
                    await self._answer(connection, session, wish, one, received)
                    continue
                session.under_way += 1
                # Eager: the job is handed over before this task waits for the next message.
                answer = self._answer(connection, session, wish, one, received)
                task = asyncio.Task(answer, loop=asyncio.get_running_loop(), eager_start=True)
                if not task.done():
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        except ConnectionClosed:
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._sessions.discard(session)
            if self._executor is not None:
                self._executor.forget(session.lane)
            self.metrics.clients.set(len(self._sessions))

    async def _understand(
        self, connection: ServerConnection, session: _Session, message: str | bytes
    ) -> tuple[Wish, Job] | None:
        """A request that can be run; None where the client was told why not."""
        wish = Wish()
        try:
            if isinstance(message, str):
                raise WireError("expected a binary message, got text")
            request = decode(message, limit=self.access.message_bytes)
            policy = self.policy
            if not isinstance(request, dict):
                raise WireError(f"expected a map, got {type(request).__name__}")
            told = request.get(OURS)
            if isinstance(told, dict) and type(told.get("id")) is int and 0 <= told["id"] < 2**63:
                wish = Wish(id=told["id"])
            if not session.spend(self.access.rate_hz):
                raise ServerError(f"too many requests: {self.access.rate_hz:g} a second are allowed")
            if session.under_way >= PIPELINED:
                raise ServerError(f"busy: {PIPELINED} requests of this client are under way")
            spec = policy.embodiment
            wish = Wish.read(
                request, horizon=policy.action_horizon, action_dim=spec.action.dim, noise_dim=policy.noise_dim
            )
            if wish.guidance is not None and not policy.takes_guidance:
                raise WireError("this policy cannot be guided: real-time chunking needs a flow-matching head")
            if self._executor is not None and (wish.id is not None or wish.noise is not None):
                raise WireError(
                    "this server executes chunks itself: ask it as openpi's clients do, without id and noise"
                )
            observation = (_OURS if wish.id is not None else self.request_format).read(request, spec)
        except (WireError, ServerError) as error:
            kind = "rate" if isinstance(error, ServerError) else "message"
            self.metrics.refused.labels(kind).inc()
            await self._refuse(connection, wish, str(error), kind, INVALID if kind == "message" else REFUSED)
            return None
        if wish.seed is not None:
            session.rng = np.random.default_rng([wish.seed, 0xAC7])
        noise = wish.noise
        if noise is None:
            noise = session.rng.standard_normal((policy.action_horizon, policy.noise_dim), np.float32)
        seed = wish.seed
        if seed is None and not session.began:
            seed = int(session.rng.integers(2**31))
        session.began = True
        return wish, Job(observation=observation, noise=noise, guidance=wish.guidance, lane=session.lane, seed=seed)

    async def _answer(
        self, connection: ServerConnection, session: _Session, wish: Wish, job: Job, received: float
    ) -> None:
        assert self._batcher is not None
        try:
            answer = await self._batcher.ask(job)
        except BrachiumError as error:
            kind = "rate" if isinstance(error, ServerError) else "policy"
            self.metrics.refused.labels(kind).inc()
            await self._refuse(connection, wish, str(error), kind, REFUSED)
            return
        except Exception as error:  # of the model: the client learns that, the log learns why
            log(f"policy server: {type(error).__name__}: {error}")
            self.metrics.refused.labels("error").inc()
            await self._refuse(connection, wish, "the policy failed; see the server's log", "error", BROKEN)
            return
        finally:
            if wish.id is not None:
                session.under_way -= 1
        timing: dict[str, float] = {"infer_ms": answer.seconds * 1e3}
        if session.previous is not None:
            timing["prev_total_ms"] = session.previous * 1e3
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "server_timing": timing,
            "policy_timing": {"infer_ms": answer.seconds * 1e3},
        }
        if wish.id is not None:
            reply[OURS] = {"id": wish.id, "timestamp": job.observation.timestamp, "shared": answer.shared}
        with contextlib.suppress(ConnectionClosed):
            await connection.send(encode(reply))
        session.previous = time.monotonic() - received
        self.metrics.requests.inc()
        self.metrics.model.observe(answer.seconds)
        self.metrics.total.observe(session.previous)
        self.metrics.shared.observe(answer.shared)

    async def _refuse(self, connection: ServerConnection, wish: Wish, why: str, kind: str, code: int) -> None:
        """Say why not: to brachium's client by a reply, to others as openpi does, by a text and the end."""
        with contextlib.suppress(ConnectionClosed):
            if wish.id is not None:
                await connection.send(encode({OURS: {"id": wish.id, "error": why, "kind": kind}}))
                return
            await connection.send(why)
            await connection.close(code, kind)

    # -- the model -----------------------------------------------------------------------------------------------------

    def _run(self, jobs: Sequence[Job]) -> np.ndarray:
        """Chunks (n, h, a), or with an executor single actions (n, 1, a)."""
        if self._executor is not None:
            for job in jobs:
                if job.seed is not None:
                    self._executor.reset(job.lane, job.seed)
            acted = self._executor.act([job.observation for job in jobs], [job.lane for job in jobs])
            return np.asarray(acted, np.float32)[:, None]
        noise = np.stack([job.noise for job in jobs])
        guidance = [job.guidance for job in jobs]
        given = guidance if any(g is not None for g in guidance) else None
        return np.asarray(self.policy.predict([job.observation for job in jobs], noise, given).actions, np.float32)


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop to serve on: uvloop's where there is one (not on Windows).

    It reads pictures from sockets in half the time of asyncio's: as much as all of this module takes.
    """
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop()
    return new_event_loop()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a server until it ends."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main)


def _single(request: Request, name: str) -> str | None:
    """A header's value; one that stands there twice has none that could be trusted."""
    values = request.headers.get_all(name)
    return values[0] if len(values) == 1 else ("" if values else None)
