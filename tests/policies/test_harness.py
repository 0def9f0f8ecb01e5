"""The vla-evaluation harness's protocol: a client written from its published behaviour, and where it is installed its
own."""

import importlib.util
import io
from contextlib import contextmanager
from functools import partial

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import SPEC, FormulaPolicy, connect, served

from brachium.errors import ConfigError, WireError
from brachium.policies.executor import RecedingHorizon
from brachium.policies.harness import HarnessServer, unpack, unpack_arrays
from brachium.policies.request import RequestFormat
from brachium.policies.serve import serve

FORMAT = RequestFormat(images=("images/agentview", "images/wrist"), state=("states",), prompt="task_description")
LIMIT = 2**20


def encode(value, form="png"):
    """As the harness packs arrays and pictures."""
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype == np.uint8 and form != "raw":
        data = io.BytesIO()
        Image.fromarray(value).save(data, form)
        return {"__image__": True, "format": form, "data": data.getvalue(), "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    return value


def message(kind, payload, seq=0, form="png"):
    whole = {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}
    return msgpack.packb(whole, default=partial(encode, form=form), use_bin_type=True)


def decoded(data):
    def array(value):
        if "__ndarray__" in value:
            return np.frombuffer(value["data"], value["dtype"]).reshape(value["shape"])
        return value

    return msgpack.unpackb(data, object_hook=array)


def observation(value=7, words="lift it"):
    picture = np.full((8, 8, 3), value, np.uint8)
    images = {"agentview": picture, "wrist": picture}
    return {"images": images, "states": np.array([1.0, 2.0, 3.0]), "task_description": words}


@contextmanager
def harness(**options):
    make = options.pop("executor", partial(RecedingHorizon, execute_horizon=2))
    with served(kind=HarnessServer, executor=make, request_format=FORMAT, **options) as (address, server):
        yield address, server


def ask(socket, kind, payload, seq=0, form="png"):
    socket.send(message(kind, payload, seq, form))
    return decoded(socket.recv(timeout=10.0))


@pytest.mark.parametrize("form", ["png", "raw"])
def test_an_episode_by_the_harness(form):
    policy = FormulaPolicy()
    with harness(policy=policy) as (address, _), connect(address) as socket:
        hello = ask(socket, "hello", {"harness_version": "0.8.0", "protocol_version": 1}, seq=3)
        assert (hello["type"], hello["seq"]) == ("hello", 3)
        assert hello["payload"]["model_server"] == "brachium"
        assert hello["payload"]["embodiment"]["name"] == SPEC.name
        socket.send(message("episode_start", {"task": {"name": "lift"}}, 4))
        replies = [ask(socket, "observation", observation(k), 5 + k, form) for k in (10, 20, 30)]
        assert [reply["type"] for reply in replies] == ["action"] * 3
        assert [reply["seq"] for reply in replies] == [15, 25, 35]
        actions = np.stack([reply["payload"]["actions"] for reply in replies])
        assert actions.shape == (3, SPEC.action.dim)
        # Chunks are asked for every second step: the second action is row 1 of the first observation's chunk.
        rows = [2 * 10.0 + 7 + 6 + 0, 2 * 10.0 + 7 + 6 + 1, 2 * 30.0 + 7 + 6 + 0]
        np.testing.assert_allclose(actions.mean(axis=1), rows, atol=4.0)  # the executor's noise is drawn by the lane
        socket.send(message("episode_end", {"success": True}, 40))
        again = ask(socket, "observation", observation(50), 41)
        assert again["type"] == "action"


def test_an_episode_begins_anew_and_clients_do_not_meet():
    with harness() as (address, _), connect(address) as one, connect(address) as other:
        first = ask(one, "observation", observation(100))["payload"]["actions"].mean()
        ask(other, "observation", observation(0))
        one.send(message("episode_start", {"task": {}}))
        anew = ask(one, "observation", observation(200))["payload"]["actions"].mean()
        assert abs(first - 213) < 5  # 2 * 100 + 7 letters + 6
        assert abs(anew - 413) < 5  # not the rest of the first chunk


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"images": {}, "states": [1.0] * 3, "task_description": "x"}, "images/agentview"),
        ({**observation(), "states": np.zeros(5)}, "a state of shape"),
        ({**observation(), "states": np.full(3, np.nan)}, "finite state"),
        ({**observation(), "task_description": 3}, "a text"),
        (observation() | {"images": {"agentview": {"__image__": True, "format": "gif", "data": b""}}}, "raw, png or"),
        (observation() | {"images": {"agentview": {"__image__": True, "format": "png", "data": b"no"}}}, "png picture"),
    ],
)
def test_what_is_wrong_is_answered_and_the_connection_stays(payload, words):
    with harness() as (address, _), connect(address) as socket:
        reply = ask(socket, "observation", payload, 9)
        assert (reply["type"], reply["seq"]) == ("error", 9)
        assert words in reply["payload"]["error"]
        assert ask(socket, "observation", observation())["type"] == "action"


def test_a_policy_that_fails_does_not_tell_its_secrets():
    with harness(policy=FormulaPolicy(fail="fail")) as (address, _), connect(address) as socket:
        reply = ask(socket, "observation", observation(words="fail"))
        assert reply["payload"]["error"] == "the policy failed; see the server's log"
        assert ask(socket, "observation", observation())["type"] == "action"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_no_message(data):
    with pytest.raises(WireError):
        unpack(data, limit=LIMIT)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "__ndarray__": st.just(True),
            "data": st.one_of(st.binary(max_size=40), st.text(max_size=4), st.none()),
            "dtype": st.one_of(st.sampled_from(["<f4", "|O", "<U3", "V8", "<i8", "nonsense"]), st.integers(0, 99)),
            "shape": st.lists(st.one_of(st.integers(-2, 2**40), st.text(max_size=2)), max_size=12),
        }
    )
)
def test_arrays_that_lie_are_refused(claim):
    _, payload, _ = unpack(message("observation", {"x": claim}), limit=LIMIT)
    try:
        found = unpack_arrays(payload)["x"]
    except WireError:
        return
    # what is let in is what it says it is
    assert found.tobytes() == claim["data"]
    assert list(found.shape) == claim["shape"]


def test_a_huge_picture_is_not_unpacked():
    data = io.BytesIO()
    Image.new("1", (2100, 2100)).save(data, "png")
    assert len(data.getvalue()) < 4000
    claim = {"__image__": True, "format": "png", "data": data.getvalue()}
    with pytest.raises(WireError, match="at most 4194304 pixels"):
        unpack_arrays(claim)


def test_what_nobody_asked_for_is_not_unpacked_and_many_pictures_count_together():
    data = io.BytesIO()
    Image.new("1", (1500, 1500)).save(data, "png")
    claim = {"__image__": True, "format": "png", "data": data.getvalue()}
    with harness() as (address, _), connect(address) as socket:
        more = observation() | {"more": [{"__image__": True, "format": "png", "data": b"none"}] * 50}
        assert ask(socket, "observation", more)["type"] == "action"
        reply = ask(socket, "observation", observation() | {"images": {"agentview": claim, "wrist": claim}})
        assert "4194304 pixels together, got 4500000" in reply["payload"]["error"]


def test_requests_are_limited():
    with harness(rate_hz=2.0) as (address, _), connect(address) as socket:
        kinds = [ask(socket, "observation", observation())["type"] for _ in range(8)]
    assert kinds[:2] == ["action"] * 2
    assert "error" in kinds


def test_serve_asks_for_an_executor(tmp_path):
    from brachium.policies.access import Access

    with pytest.raises(ConfigError, match="Type: executor=receding"):
        serve(checkpoint=str(tmp_path), access=Access(), speaks="harness")
    with pytest.raises(ConfigError, match="Did you mean 'harness'"):
        serve(checkpoint=str(tmp_path), access=Access(), speaks="harnes")


@pytest.mark.skipif(importlib.util.find_spec("vla_eval") is None, reason="vla-eval is not installed")
def test_the_harness_itself_is_served():
    import asyncio

    from vla_eval.connection import Connection

    async def episode(address):
        async with Connection(address) as link:
            assert link.server_info["model_server"] == "brachium"
            await link.start_episode({"task": {"name": "lift"}})
            found = [(await link.act(observation(k)))["actions"] for k in (10, 20)]
            await link.end_episode({"success": True})
            return found

    with harness() as (address, _):
        actions = asyncio.run(episode(address))
    assert all(action.shape == (2,) for action in actions)
    assert abs(actions[0].mean() - 33) < 4
