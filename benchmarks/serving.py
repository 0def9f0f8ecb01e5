"""The policy server: its cost beside a bare websocket echo of the same bytes, and what 100 000 hostile messages do.

    python benchmarks/serving.py throughput      # 1, 4 and 16 clients, two cameras of 224 px, rounds interleaved
    python benchmarks/serving.py fuzz            # mutated and random messages, with and without the token

Server and clients run in processes of their own. The policy answers at once with zeros, so that what is measured is
everything but the model; a second one takes 5 ms first, as a real one on a GPU might, and what it took is subtracted.
Writes its part of ``benchmarks/results/serving.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from brachium.policies.access import Access
from brachium.policies.request import OURS, RequestFormat, Wish
from brachium.policies.server import PolicyServer, run
from brachium.policies.wire import decode, encode
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec, Guidance, Observation

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "serving.json"
SIDE, SMALL = 224, 8
"""Of the pictures [px]; small ones for hostile messages, so that most of a message is not a picture."""
HORIZON = 16
MODEL_S = 0.005
"""What the slower policy takes."""
CLIENTS = (1, 4, 16)
OPTIONS: dict[str, Any] = {"compression": None, "max_size": 64 * 2**20}


def spec_of(side: int) -> EmbodimentSpec:
    """A robot with two cameras."""
    return EmbodimentSpec(
        name="bench",
        robot="bench",
        control_hz=20.0,
        cameras=tuple(FeatureSpec(name=n, shape=(side, side, 3), dtype="uint8") for n in ("front", "wrist")),
        state=FeatureSpec(name="state", shape=(8,)),
        action=FeatureSpec(name="action", shape=(7,)),
    )


class ZeroPolicy:
    """Answers after `seconds`, in which other threads may run."""

    action_horizon, noise_dim, takes_guidance = HORIZON, 7, True

    def __init__(self, side: int, seconds: float = 0.0) -> None:
        self.embodiment, self.seconds = spec_of(side), seconds

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """Zeros."""
        if self.seconds:
            time.sleep(self.seconds)
        return ActionChunk(actions=np.zeros((len(observations), HORIZON, 7), np.float32), control_hz=20.0)


def request(number: int, side: int = SIDE) -> bytes:
    """What brachium's client sends: two pictures, a state, a prompt, noise."""
    spec, rng = spec_of(side), np.random.default_rng(number)
    message = RequestFormat().write(Observation.fake(spec, rng), spec)
    wish = Wish(id=number, noise=rng.standard_normal((HORIZON, 7), np.float32))
    return encode({**message, OURS: {**wish.write(), "timestamp": 1.0}})


# -- servers, in processes of their own --------------------------------------------------------------------------------


def run_ours(where: Any, token: str | None, side: int, seconds: float = 0.0) -> None:
    """A policy server."""
    access = Access(port=0, rate_hz=1e9, token=token, clients=64)
    server = PolicyServer(ZeroPolicy(side, seconds), identity={"name": "zero"}, access=access)
    run(server.serve(where.put))


def run_echo(where: Any, reply: bytes | None) -> None:
    """A bare websocket: takes the bytes and gives them back, or with `reply` as few as our server does."""

    async def answer(connection: Any) -> None:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(b"hello")
            async for message in connection:
                await connection.send(message if reply is None else reply)

    async def main() -> None:
        async with serve(answer, "127.0.0.1", 0, **OPTIONS) as server:
            where.put(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}")
            await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def running(target: Any, *words: Any) -> Iterator[tuple[str, Any]]:
    """A server's address and process."""
    context = multiprocessing.get_context("spawn")
    where: Any = context.Queue()
    process = context.Process(target=target, args=(where, *words), daemon=True)
    process.start()
    try:
        yield where.get(timeout=60), process
    finally:
        process.terminate()
        process.join(5)


# -- throughput --------------------------------------------------------------------------------------------------------


async def load(address: str, clients: int, seconds: float, pause: float = 0.0) -> np.ndarray:
    """Latencies [s] without the model of all requests of some clients, each asking again when it is answered.

    `pause` is between a reply and the next request [s]: caches are as cold then as behind a model that takes as long.
    """
    found: list[float] = []

    async def client(number: int) -> None:
        message = request(number + 1)
        async with connect(address, **OPTIONS) as connection:
            await connection.recv()
            until = time.perf_counter() + seconds
            while (begin := time.perf_counter()) < until:
                await connection.send(message)
                reply = await connection.recv()
                spent = time.perf_counter() - begin
                found.append(spent - model_s(reply))
                if pause:
                    await asyncio.sleep(pause)

    await asyncio.gather(*(client(k) for k in range(clients)))
    return np.array(found)


def model_s(reply: str | bytes) -> float:
    """What the server says the model took [s]; the echo, whose reply is the request, says nothing."""
    timing = decode(reply).get("server_timing", {}) if isinstance(reply, bytes) and len(reply) < 10_000 else {}
    return float(timing.get("infer_ms", 0.0)) * 1e-3


def throughput(seconds: float, rounds: int) -> dict[str, Any]:
    """Ours beside the echo, interleaved; medians over rounds."""

    async def one_reply(address: str) -> bytes:
        async with connect(address, **OPTIONS) as connection:
            await connection.recv()
            await connection.send(request(1))
            answer = await connection.recv()
            assert isinstance(answer, bytes)
            assert decode(answer)["actions"].shape == (HORIZON, 7)
            return answer

    rows: dict[str, Any] = {}
    with running(run_ours, None, SIDE) as (ours, _):
        reply = asyncio.run(one_reply(ours))
        with (
            running(run_echo, None) as (echo, _),
            running(run_echo, reply) as (short, _),
            running(run_ours, None, SIDE, MODEL_S) as (slow, _),
        ):
            addresses = {"echo": echo, "short_reply": short, "ours": ours, "echo_paced": echo, "ours_5ms": slow}
            for count in CLIENTS:
                measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in addresses}
                for _ in range(rounds):
                    for name, address in addresses.items():
                        if name in ("ours_5ms", "echo_paced") and count > 1:  # clients would wait for others' turns
                            continue
                        times = asyncio.run(load(address, count, seconds, MODEL_S if name == "echo_paced" else 0.0))
                        p50, p99 = np.percentile(times * 1e3, [50, 99])
                        measured[name].append((len(times) / seconds, p50, p99))
                found = {name: np.median(each, axis=0) for name, each in measured.items() if each}
                rows[str(count)] = {
                    name: {"requests_per_s": round(v[0], 1), "p50_ms": round(v[1], 3), "p99_ms": round(v[2], 3)}
                    for name, v in found.items()
                }
                for ours_name, other in (("ours", "echo"), ("ours", "short_reply"), ("ours_5ms", "echo_paced")):
                    ratios = [a[1] / b[1] for a, b in zip(measured[ours_name], measured[other])]
                    if ratios:
                        key = f"p50_{ours_name}_to_{other}"
                        rows[str(count)][key] = [round(float(x), 3) for x in (np.median(ratios), *ratios)]
                print(count, "clients:", json.dumps(rows[str(count)]), flush=True)
    return {"bytes": {"request": len(request(1)), "reply": len(reply)}, "seconds": seconds, "clients": rows}


# -- hostile messages --------------------------------------------------------------------------------------------------

VALUES = (
    None, True, -1, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"), "", "x" * 70000, b"", b"\x00" * 999,
    [], {}, [[[[[[[[[[]]]]]]]]]], {"a": {"b": {"c": []}}}, {b"__ndarray__": True}, {b"__npgeneric__": True, b"data": 1},
    {b"__ndarray__": True, b"data": b"\x00" * 8, b"dtype": "<f8", b"shape": [2**31, 2**31]},
    {b"__ndarray__": True, b"data": b"\x00" * 8, b"dtype": "|O", b"shape": [1]},
    {b"__ndarray__": True, b"data": b"\x00" * 8, b"dtype": "<f4", b"shape": [-1]},
    {b"__ndarray__": True, b"data": b"\x00" * 8, b"dtype": "V8", b"shape": [1]},
)  # fmt: skip
"""What stands where something else is expected."""


def hostile(rng: random.Random, good: Sequence[bytes]) -> bytes | str:
    """A message that is wrong in one of several ways."""
    kind = rng.randrange(8)
    base = bytearray(rng.choice(good))
    if kind == 0:  # bits flipped
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            base[rng.randrange(len(base))] ^= 1 << rng.randrange(8)
        return bytes(base)
    if kind == 1:  # cut off
        return bytes(base[: rng.randrange(len(base))])
    if kind == 2:  # a piece twice, or missing
        a, b = sorted(rng.randrange(len(base)) for _ in range(2))
        return bytes(base[:b] + base[a:]) if rng.random() < 0.5 else bytes(base[:a] + base[b:])
    if kind == 3:  # noise
        return rng.randbytes(rng.choice((0, 1, 2, 7, 64, 1000)))
    if kind == 4:  # text
        return "".join(chr(rng.choice((rng.randrange(32, 127), 0x1F600))) for _ in range(rng.randrange(40)))
    if kind == 5:  # deeply nested, or announcing more than there is
        return rng.choice(
            (
                b"\x91" * rng.randrange(1, 5000),
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\x7f\xff\xff\xff",
                b"\xc6\xff\xff\xff\xff",
            )
        )
    message = msgpack.unpackb(bytes(base), strict_map_key=False)
    if kind == 6:  # a value of another kind
        holder: Any = message
        for _ in range(rng.randrange(3)):
            inner = [v for v in holder.values() if isinstance(v, dict)]
            holder = rng.choice(inner) if inner else holder
        key = rng.choice(list(holder)) if holder else "x"
        holder[key] = rng.choice(VALUES)
    else:  # keys missing or added
        for key in rng.sample(list(message), rng.randrange(len(message))):
            del message[key]
        message[rng.choice(("brachium", "state", "images", "é", "__class__", "x"))] = rng.choice(VALUES)
    return bytes(msgpack.packb(message))


def resident(process_id: int) -> float:
    """Memory of a process [MB]."""
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def attack(address: str, token: str, count: int, seed: int) -> Counter[str]:
    """Send hostile messages, on a new connection whenever the server ends one; what became of them."""
    rng, found = random.Random(seed), Counter[str]()
    whole = msgpack.unpackb(request(seed, SMALL))
    plain = {key: value for key, value in whole.items() if key != OURS}
    good = [msgpack.packb(message) for message in (whole, plain)]
    sent = 0
    while sent < count:
        try:
            headers = {"Authorization": f"Api-Key {token}"}
            async with connect(address, additional_headers=headers, **OPTIONS) as connection:
                await connection.recv()
                while sent < count:
                    await connection.send(hostile(rng, good))
                    sent += 1
                    reply = await asyncio.wait_for(connection.recv(), 10.0)
                    found["refused by a text" if isinstance(reply, str) else _meaning(reply)] += 1
                    if isinstance(reply, str):  # and the connection is over
                        break
        except ConnectionClosed:
            found["connection ended by the server"] += 1
        except TimeoutError:
            found["no answer"] += 1
        except (WebSocketException, OSError) as error:
            found[type(error).__name__] += 1
    return found


def _meaning(reply: bytes) -> str:
    message = decode(reply)
    return "refused by a reply" if "error" in message.get(OURS, {}) else "answered"


async def strangers(address: str, count: int) -> Counter[str]:
    """Without the token, or with another: how far they come."""
    found, rng = Counter[str](), random.Random(0)
    for _ in range(count):
        header = rng.choice(
            [{}, {"Authorization": "Api-Key " + secrets.token_urlsafe()}, {"Authorization": "Basic eDp4"}]
        )
        try:
            async with connect(address + rng.choice(["", "/metrics", "/?x=1"]), additional_headers=header, **OPTIONS):
                found["LET IN"] += 1
        except InvalidStatus as error:
            found[f"HTTP {error.response.status_code}"] += 1
    return found


async def sound(address: str, token: str) -> bool:
    """Whether a good request is answered with what it should be."""
    headers = {"Authorization": f"Api-Key {token}"}
    async with connect(address, additional_headers=headers, **OPTIONS) as connection:
        await connection.recv()
        await connection.send(request(7, SMALL))
        reply = decode(bytes(await connection.recv()))  # type: ignore[arg-type]
        return bool(reply[OURS]["id"] == 7 and reply["actions"].shape == (HORIZON, 7) and not reply["actions"].any())


def fuzz(count: int) -> dict[str, Any]:
    """Hostile messages to one server; its memory at every tenth of the way."""
    token = secrets.token_urlsafe()
    with running(run_ours, token, SMALL) as (address, process):
        outcomes, memory, begin = Counter[str](), [], time.perf_counter()
        asyncio.run(attack(address, token, 2000, 99))  # what is allocated once is there now
        for part in range(10):
            outcomes += asyncio.run(attack(address, token, count // 10, part))
            memory.append(round(resident(process.pid), 1))
            assert process.is_alive(), "the server died"
            assert asyncio.run(sound(address, token)), "the server answers wrongly"
            print(f"{(part + 1) * count // 10} messages, {memory[-1]} MB, {dict(outcomes)}", flush=True)
        shut = asyncio.run(strangers(address, 500))
        assert asyncio.run(sound(address, token))
        return {
            "messages": count,
            "outcomes": dict(outcomes),
            "memory_mb": memory,
            "strangers": dict(shut),
            "alive_and_right": True,
            "seconds": round(time.perf_counter() - begin, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("throughput", "fuzz"))
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=100_000)
    options = parser.parse_args()
    results = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    if options.part == "throughput":
        results["throughput"] = throughput(options.seconds, options.rounds)
    else:
        results["fuzz"] = fuzz(options.messages)
    results["machine"] = f"{os.cpu_count()} cores"
    TARGET.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
