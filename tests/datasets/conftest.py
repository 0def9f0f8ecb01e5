"""Small stores of random episodes, made through the public API."""

import http.server
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from brachium.__main__ import main
from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.spec import EmbodimentSpec, FeatureSpec


def make_embodiment(cameras=("front", "wrist"), size=(24, 32)):
    return EmbodimentSpec(
        name="tiny_arm",
        robot="tiny",
        control_hz=10.0,
        cameras=tuple(FeatureSpec(name=c, shape=(*size, 3), dtype="uint8") for c in cameras),
        state=FeatureSpec(
            name="state", shape=(3,), names=("x", "y", "grip"), units=("m", "m", "1"), low=(-1, -1, 0), high=(1, 1, 1)
        ),
        action=FeatureSpec(name="action", shape=(2,), names=("dx", "grip"), units=("m", "1"), gripper="open_is_1"),
    )


def make_schema(extras=(), **options):
    return StoreSchema(embodiment=make_embodiment(**options), extras=extras)


def random_step(schema, rng):
    step = {
        "images": {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in schema.embodiment.cameras},
        "state": rng.standard_normal(3).astype(np.float32),
        "action": rng.standard_normal(2).astype(np.float32),
    }
    if schema.extras:
        step["extras"] = {e.name: rng.standard_normal(e.shape).astype(e.dtype) for e in schema.extras}
    return step


def fill(store, lengths, *, seed=0, successes=None, **options):
    """Record random episodes; return the steps that were given, by episode."""
    rng = np.random.default_rng(seed)
    given = []
    with EpisodeWriter(store, fsync=False, **options) as writer:
        for i, length in enumerate(lengths):
            writer.begin(f"task {i % 2}", tags=("even",) if i % 2 == 0 else ("odd",), meta={"seed": i})
            steps = [random_step(store.schema, rng) for _ in range(length)]
            for step in steps:
                writer.step(**step)
            writer.end(successes[i] if successes else True)
            given.append(steps)
    return given


def run(capsys, *words, code=0):
    """Run a command; return what it printed, errors and all."""
    got = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert got == code, captured.out + captured.err
    return captured.out + captured.err


@pytest.fixture
def schema():
    return make_schema(extras=(FeatureSpec(name="objects", shape=(2, 3)),))


@pytest.fixture
def filled(tmp_path, schema):
    """A store of episodes with 4, 1 and 6 steps in raw frames, and what was recorded."""
    store = EpisodeStore.create(tmp_path / "store", schema)
    given = fill(store, (4, 1, 6), successes=[True, False, None], profile="raw", episodes_per_segment=2)
    return store.refresh(), given


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, as object stores serve them; may fail some requests."""

    protocol_version = "HTTP/1.1"
    failing = 0

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        cls = type(self)
        if cls.failing > 0:
            cls.failing -= 1
            self.send_error(503)
            return
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            self.send_error(404)
            return
        total, wanted = len(data), self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            first = int(start) if start else max(0, total - int(stop))
            last = min(int(stop) if start and stop else total - 1, total - 1)
            data = data[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serve(folder):
    """Serve a folder over HTTP; gives its address, and the handler's class, whose `failing` may be set."""
    handler = type("Here", (Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a, **k: handler(*a, directory=str(folder), **k))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
