"""The policy server and its clients, ours and one written from openpi's published behaviour, over real sockets."""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
from serving import HORIZON, SPEC, FormulaPolicy, OpenpiClient, connect, openpi_pack, served
from websockets.exceptions import ConnectionClosed, InvalidStatus

from brachium.errors import ConfigError, ServerError, SpecMismatchError, WireError
from brachium.policies.access import Access
from brachium.policies.connection import PolicyConnection
from brachium.policies.executor import TemporalEnsemble
from brachium.policies.remote import RemotePolicy
from brachium.policies.request import OURS, RequestFormat, Wish
from brachium.policies.server import PolicyServer
from brachium.policies.wire import decode, encode
from brachium.spec import EmbodimentSpec, Guidance, Observation

TOKEN = "a token of more than sixteen characters"


def see(seed=0, text="go"):
    rng = np.random.default_rng(seed)
    made = Observation.fake(SPEC, rng, text)
    return Observation(images=made.images, state=made.state, instruction=text, timestamp=float(seed))


def draws(n, seed=0):
    return np.random.default_rng([seed, 5]).standard_normal((n, HORIZON, 2), np.float32)


def plain(observation):
    return {
        "images": dict(observation.images),
        "state": observation.state,
        "prompt": observation.instruction,
    }


def fetch(address, path, token=None):
    request = urllib.request.Request(address.replace("ws", "http", 1) + path)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=5) as reply:
        return reply.status, reply.read().decode()


# -- our client --------------------------------------------------------------------------------------------------------


def test_a_remote_policy_is_the_policy():
    policy = FormulaPolicy()
    with served(policy, identity={"name": "x", "sha256": "abc"}) as (address, _):
        remote = RemotePolicy(address, embodiment=SPEC)
        assert remote.embodiment == SPEC
        assert (remote.action_horizon, remote.noise_dim, remote.takes_guidance) == (HORIZON, 2, True)
        assert remote.identity == {"name": "x", "sha256": "abc"}
        seen, noise = [see(k) for k in range(5)], draws(5)
        rng = np.random.default_rng(3)
        plan = Guidance(actions=rng.random((HORIZON, 2), np.float32), weights=rng.random(HORIZON, np.float32))
        guides = [None, plan, None, plan, None]
        got = remote.predict(seen, noise, guides)
        expected = np.stack([policy.formula(*each) for each in zip(seen, noise, guides)])
        np.testing.assert_array_equal(got.actions, expected)
        assert got.control_hz == SPEC.control_hz
        assert got.timestamp == 4.0
        remote.close()


def test_a_remote_policy_runs_in_a_rollout_executor():
    from brachium.policies.executor import RealTimeChunking

    with served() as (address, _):
        remote, local = RemotePolicy(address), FormulaPolicy()
        results = []
        for policy in (remote, local):
            executor = RealTimeChunking(policy, inference_delay=1)
            for lane in range(3):
                executor.reset(lane, lane)
            steps = [executor.act([see(t * 3 + lane) for lane in range(3)], range(3)) for t in range(6)]
            results.append(np.stack(steps))
        np.testing.assert_array_equal(*results)
        remote.close()


def test_clients_are_answered_together_and_get_their_own():
    policy = FormulaPolicy(seconds=0.02)
    with served(policy, batch=8) as (address, server):
        with ThreadPoolExecutor(12) as pool:

            def work(k):
                remote = RemotePolicy(address)
                got = [remote.predict([see(100 * k + t)], draws(1, k)).actions[0] for t in range(5)]
                remote.close()
                return got

            every = list(pool.map(work, range(12)))
        for k, got in enumerate(every):
            expected = [policy.formula(see(100 * k + t), draws(1, k)[0]) for t in range(5)]
            np.testing.assert_array_equal(got, expected)
        assert 1 < max(policy.sizes) <= 8, "requests that wait are one batch"
        assert server.metrics.requests._value.get() == 60


def test_a_failing_request_is_nobody_elses():
    policy = FormulaPolicy(fail="bad")
    with served(policy) as (address, _):
        bad, good = RemotePolicy(address), RemotePolicy(address)
        policy.gate.clear()  # so that both are one batch
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(good.predict, [see(9)], draws(1))
            time.sleep(0.1)
            broken = pool.submit(bad.predict, [see(1, "bad")], draws(1))
            fine = pool.submit(good.predict, [see(2)], draws(1))
            time.sleep(0.1)
            policy.gate.set()
            first.result(5)
            np.testing.assert_array_equal(fine.result(5).actions[0], policy.formula(see(2), draws(1)[0]))
            with pytest.raises(ServerError, match="policy failed") as caught:
                broken.result(5)
        assert "passwd" not in str(caught.value), "what is inside the server stays there"
        np.testing.assert_array_equal(bad.predict([see(3)], draws(1)).actions[0], policy.formula(see(3), draws(1)[0]))


def test_a_restarted_server_is_found_again_if_it_serves_the_same():
    with served(identity={"sha256": "one"}) as (address, _):
        remote = RemotePolicy(address)
        remote.predict([see()], draws(1))
    port = int(address.rpartition(":")[2])
    with pytest.raises(ServerError):
        remote.predict([see()], draws(1))
    with pytest.raises(ServerError, match="no policy server at"):
        remote.reconnect()
    with served(identity={"sha256": "one"}, port=port):
        remote.reconnect()
        remote.predict([see()], draws(1))
    with served(identity={"sha256": "two"}, port=port), pytest.raises(ServerError, match="another policy"):
        remote.reconnect()


def test_a_reply_that_takes_too_long_is_an_error_and_its_late_reply_is_a_stray():
    policy = FormulaPolicy()
    with served(policy) as (address, _):
        remote = RemotePolicy(address, timeout_s=0.2)
        policy.gate.clear()
        with pytest.raises(ServerError, match="no reply within"):
            remote.predict([see(1)], draws(1))
        policy.gate.set()
        np.testing.assert_array_equal(
            remote.predict([see(2)], draws(1)).actions[0], policy.formula(see(2), draws(1)[0])
        )
        assert remote.connection.strays == 1
        remote.close()


# -- openpi's client ---------------------------------------------------------------------------------------------------


def test_an_openpi_client_is_served():
    policy = FormulaPolicy()
    with served(policy) as (address, _):
        client = OpenpiClient(address)
        assert client.metadata["reset_pose"] is None
        seen = see(4)
        reply = client.infer(plain(seen))
        assert set(reply) == {"actions", "server_timing", "policy_timing"}
        assert set(reply["server_timing"]) == {"infer_ms"}
        assert reply["actions"].shape == (HORIZON, 2)
        offset = reply["actions"] - policy.formula(seen, np.zeros((HORIZON, 2), np.float32))
        assert np.abs(offset).max() < 6.0, "noise of the server's own"
        assert np.abs(offset).max() > 0.0
        again = client.infer(plain(seen))
        assert "prev_total_ms" in again["server_timing"]
        assert (again["actions"] != reply["actions"]).any()


@pytest.mark.parametrize("kind", ["libero", "droid", "aloha"])
def test_requests_of_openpis_examples(kind):
    from brachium.cli.compose import load

    rng = np.random.default_rng(0)
    big = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(4)]
    keys, state = {
        "libero": (("observation/image", "observation/wrist_image"), 8),
        "droid": (("observation/exterior_image_1_left", "observation/wrist_image_left"), 8),
        "aloha": (("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"), 14),
    }[kind]
    cameras = [
        {"name": f"camera{k}", "shape": (224, 224, 3) if k else (96, 128, 3), "dtype": "uint8"}
        for k in range(len(keys))
    ]
    spec = EmbodimentSpec(
        name=kind,
        robot=kind,
        control_hz=10.0,
        cameras=tuple(cameras),
        state={"name": "state", "shape": (state,)},
        action={"name": "action", "shape": (2,)},
    )
    values = rng.standard_normal(state).astype(np.float32)
    request = {"prompt": "do something"}
    if kind == "libero":
        request |= dict(zip(keys, big)) | {"observation/state": values}
    elif kind == "droid":
        request |= dict(zip(keys, big))
        request |= {"observation/joint_position": values[:7], "observation/gripper_position": values[7:]}
    else:
        request |= {"state": values, "images": {k: v.transpose(2, 0, 1) for k, v in zip(keys, big)}}
    found = load(f"request_format/{kind}").read(msgpack_round(request), spec)
    found.check(spec)
    np.testing.assert_array_equal(found.state, values)
    np.testing.assert_array_equal(found.images["camera1"], big[1])
    small = found.images["camera0"]
    assert (small[:, :16] == 0).all()
    assert (small[:, 112:] == 0).all(), "a square picture in a wide one has bars left and right"
    assert abs(small[:, 16:112].mean() - big[0].mean()) < 3.0


def msgpack_round(message):
    return decode(msgpack.packb(message, default=openpi_pack))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.pop("state"), "expected 'state' in the request"),
        (lambda r: r["images"].pop("wrist"), "expected 'images/wrist' in the request"),
        (lambda r: r.update(state=np.zeros(4, np.float32)), r"expected a state of shape \(3,\)"),
        (lambda r: r.update(state=np.full(3, np.nan)), "finite state"),
        (lambda r: r.update(state="abc"), "array of numbers"),
        (
            lambda r: r["images"].update(front=np.zeros((9, 8, 3), np.uint8)),
            r"expected 'images/front' to be an image \(8, 8",
        ),
        (lambda r: r["images"].update(front=np.full((8, 8, 3), 3.5)), "floats from 0 to 1"),
        (lambda r: r["images"].update(front=None), "NoneType"),
        (lambda r: r.pop("prompt"), "expected a text as 'prompt'"),
        (lambda r: r.update(brachium={"protocol": 99}), "expected protocol 1, got 99"),
        (lambda r: r.update(brachium=7), "to be a map"),
        (lambda r: r.update(brachium={"protocol": 1, "seed": -1}), "seed"),
        (lambda r: r.update(brachium={"protocol": 1, "noise": np.zeros(3)}), "noise to be finite, of shape"),
        (lambda r: r.update(brachium={"protocol": 1, "timestamp": "now"}), "finite timestamp"),
        (lambda r: r.update(brachium={"protocol": 1, "guidance": {"actions": 1}}), "guidance actions"),
        (
            lambda r: r.update(
                brachium={
                    "protocol": 1,
                    "guidance": {"actions": np.zeros((4, 2)), "weights": np.zeros(4), "gradient": "no"},
                }
            ),
            "gradient",
        ),
    ],
)
def test_a_wrong_request_gets_one_line_and_the_server_goes_on(change, complaint):
    with served() as (address, _server):
        request = plain(see())
        change(request)
        client = OpenpiClient(address)
        with pytest.raises(RuntimeError, match=complaint) as caught:
            client.infer(request)
        assert len(str(caught.value).splitlines()) == 2, "openpi's heading, and our line"
        with pytest.raises(ConnectionClosed):
            client.infer(plain(see()))
        # our own client keeps its connection
        connection = PolicyConnection(address)
        request.setdefault(OURS, {})
        if isinstance(request[OURS], dict):
            request[OURS] = {"protocol": 1, "id": 5, **request[OURS]}
            with pytest.raises(ServerError, match=complaint):
                connection.ask(request, 5.0)
            fine = plain(see()) | {OURS: Wish(id=6).write()}
            assert connection.ask(fine, 5.0)["actions"].shape == (HORIZON, 2)
        connection.close()


@pytest.mark.parametrize("message", ["text", b"", b"\xc1", encode([1, 2]), encode(None)])
def test_what_is_no_request_ends_the_connection(message):
    with served() as (address, _):
        websocket = connect(address)
        websocket.recv(timeout=5)
        websocket.send(message)
        assert isinstance(websocket.recv(timeout=5), str)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=5)
        assert closed.value.rcvd.code in (1007, 1008)
        OpenpiClient(address).infer(plain(see()))


def test_seeded_draws_are_each_clients_own():
    with served() as (address, _):

        def ask(connection, seed=None):
            wish = Wish(id=next(numbers), seed=seed).write()
            return connection.ask(plain(see()) | {OURS: wish}, 5.0)["actions"]

        numbers = iter(range(100))
        one, two = PolicyConnection(address), PolicyConnection(address)
        first = [ask(one, 7), ask(one), ask(two, 7), ask(one), ask(two), ask(two)]
        np.testing.assert_array_equal(first[0], first[2])
        np.testing.assert_array_equal(first[1], first[4])
        np.testing.assert_array_equal(first[3], first[5])
        assert (first[0] != first[1]).any()


def test_an_executor_on_the_server_keeps_a_lane_for_each_client():
    """Three clients that ask in a jumble get what three executors of their own would do."""

    def make(policy):
        return TemporalEnsemble(policy)

    with served(executor=make) as (address, server):
        clients = [OpenpiClient(address) for _ in range(3)]
        told = clients[0].metadata[OURS]
        assert (told["action_horizon"], told["executor"], told["takes_guidance"]) == (1, "TemporalEnsemble", False)
        alone = make(FormulaPolicy())
        order = [0, 1, 1, 2, 0, 2, 1, 0, 0, 2, 1, 2]
        begun = set()
        for k, who in enumerate(order):
            request = plain(see(k))
            if who not in begun:
                begun.add(who)
                request[OURS] = Wish(seed=100 + who).write()
                alone.reset(who, 100 + who)
            got = clients[who].infer(request)["actions"]
            assert got.shape == (1, 2)
            np.testing.assert_allclose(got[0], alone.act([see(k)], [who])[0], atol=1e-5)
        with pytest.raises(ServerError, match="executes chunks itself"):
            PolicyConnection(address).ask(plain(see()) | {OURS: Wish(id=1).write()}, 5.0)
        with pytest.raises(ServerError, match="Start the server without executor="):
            RemotePolicy(address)
        assert len(server._executor._lanes) == 4  # and that of the warm-up
        for client in clients:
            client.close()
        until = time.monotonic() + 5.0
        while len(server._executor._lanes) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(server._executor._lanes) == 1


# -- who may -----------------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_read():
    with served(token=TOKEN) as (address, server):
        for headers in (
            None,
            {"Authorization": "Api-Key wrong"},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            with pytest.raises(InvalidStatus) as refused:
                connect(address, additional_headers=headers)
            assert refused.value.response.status_code == 401
            assert b"spec" not in (refused.value.response.body or b"")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(address, "/metrics")
        assert fetch(address, "/healthz") == (200, "OK\n")
        assert "brachium_requests_total" in fetch(address, "/metrics", TOKEN)[1]
        with pytest.raises(ServerError, match="refuses this token"):
            RemotePolicy(address, token="wrong")
        assert OpenpiClient(address, TOKEN).infer(plain(see()))["actions"].shape == (HORIZON, 2)
        RemotePolicy(address, token=TOKEN).close()
        assert server.policy.sizes == [1, 1, 1], "two for warm-up, one for who had the token"


def test_a_web_page_is_refused():
    with served() as (address, _):
        with pytest.raises(InvalidStatus) as refused:
            connect(address, origin="https://example.org")
        assert refused.value.response.status_code == 403


def test_tls(tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    own = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    with served(certificate=str(tmp_path / "server.pem"), token=TOKEN) as (address, _):
        assert address.startswith("wss://")
        remote = RemotePolicy(address, token=TOKEN, authority=str(tmp_path / "ca.pem"))
        remote.predict([see()], draws(1))
        remote.close()
        with pytest.raises(ServerError, match="authority you trust"):
            RemotePolicy(address, token=TOKEN)
        with pytest.raises(ServerError):
            RemotePolicy(address.replace("wss", "ws"), token=TOKEN)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"host": "0.0.0.0"}, "open to the network"),
        ({"host": "::"}, "open to the network"),
        ({"token": "short"}, "at least 16"),
        ({"token": "ü" * 20}, "ASCII"),
        ({"port": 70000}, "port from 0"),
        ({"clients": 0}, "clients of at least 1"),
        ({"rate_hz": float("nan")}, "rate_hz above 0"),
        ({"key": "x.pem"}, "TLS needs both"),
    ],
)
def test_mistakes_in_access(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Access(**options)


def test_files_that_are_no_certificates(tmp_path):
    from brachium.errors import NotFoundError

    with pytest.raises(NotFoundError, match="no certificate"):
        Access(certificate=str(tmp_path / "none.pem")).tls()
    (tmp_path / "bad.pem").write_text("no pem")
    with pytest.raises(ConfigError, match="PEM"):
        Access(certificate=str(tmp_path / "bad.pem")).tls()


def test_a_port_in_use_says_so():
    with served() as (address, _):
        port = int(address.rpartition(":")[2])
        with pytest.raises(ServerError, match="cannot listen on") as caught, served(port=port):
            pass
        assert "access.port=0" in str(caught.value)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_flood_is_slowed_and_others_are_served():
    with served(rate_hz=20.0) as (address, server):
        flood, other = PolicyConnection(address), RemotePolicy(address)
        said = []
        for k in range(200):
            try:
                flood.ask(plain(see()) | {OURS: Wish(id=k).write()}, 5.0)
            except ServerError as error:
                said.append(str(error))
        assert len(said) >= 100
        assert all("too many requests" in each for each in said)
        other.predict([see()], draws(1))
        assert server.metrics.refused.labels("rate")._value.get() == len(said)


def test_too_many_clients_are_refused_and_room_is_made():
    with served(clients=2) as (address, _server):
        one, two = RemotePolicy(address), RemotePolicy(address)
        with pytest.raises(ServerError, match="too many clients"):
            RemotePolicy(address)
        one.close()
        RemotePolicy(address, patience_s=2.0)
        two.predict([see()], draws(1))


def test_too_large_a_message_ends_that_connection():
    with served(message_bytes=4096) as (address, _):
        websocket = connect(address)
        websocket.recv(timeout=5)
        websocket.send(b"x" * 10_000)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=5)
        assert closed.value.rcvd.code == 1009
        OpenpiClient(address).infer(plain(see()))


def test_a_full_queue_says_busy():
    policy = FormulaPolicy()
    with served(policy, queue=2, batch=1) as (address, server):
        policy.gate.clear()
        connections = [PolicyConnection(address) for _ in range(6)]
        futures = [c.submit(plain(see()) | {OURS: Wish(id=1).write()}) for c in connections]
        until = time.monotonic() + 5.0
        while server.metrics.refused.labels("rate")._value.get() < 3 and time.monotonic() < until:
            time.sleep(0.01)
        policy.gate.set()
        outcomes, said = [], []
        for connection, future in zip(connections, futures):
            try:
                connection.wait(future, 5.0)
                outcomes.append("answered")
            except ServerError as error:
                said.append(str(error))
        assert len(said) in (3, 4)  # the first is with the model, or waits as well
        assert len(outcomes) == 6 - len(said)
        assert all("busy" in each for each in said)


def test_a_client_that_goes_away_leaves_nothing():
    policy = FormulaPolicy()
    with served(policy) as (address, server):
        for k in range(30):
            websocket = connect(address)
            websocket.recv(timeout=5)
            websocket.send(encode(plain(see()) | {OURS: Wish(id=k).write()}))
            websocket.socket.close()  # no goodbye
        deadline = time.monotonic() + 5.0
        while server._sessions and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server._sessions
        OpenpiClient(address).infer(plain(see()))


# -- servers of others -------------------------------------------------------------------------------------------------


class OpenpiServer:
    """What openpi's server does: metadata first, then a reply a request, a traceback as text where it fails."""

    def __init__(self, metadata=None, reply=None):
        from websockets.sync.server import serve

        self.metadata, self.reply, self.requests = metadata or {}, reply, []
        self.server = serve(self.handle, "127.0.0.1", 0, compression=None, max_size=None)
        self.address = f"ws://127.0.0.1:{self.server.socket.getsockname()[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, websocket):
        websocket.send(msgpack.packb(self.metadata, default=openpi_pack))
        for message in websocket:
            self.requests.append(decode(message))
            reply = self.reply(self.requests[-1]) if callable(self.reply) else self.reply
            websocket.send(reply if isinstance(reply, (str, bytes)) else msgpack.packb(reply, default=openpi_pack))
            if isinstance(reply, str):
                websocket.close(1011)


def test_our_client_at_an_openpi_server():
    def reply(request):
        return {"actions": np.full((10, 2), request["observation/state"].sum(), np.float64), "policy_timing": {}}

    server = OpenpiServer({"reset_pose": [0, 1]}, reply)
    form = RequestFormat(images=("observation/image", "observation/wrist_image"), state=("observation/state",))
    with pytest.raises(SpecMismatchError, match="does not say what robot"):
        RemotePolicy(server.address)
    remote = RemotePolicy(server.address, embodiment=SPEC, action_horizon=10, request_format=form)
    seen = [see(k) for k in range(3)]
    got = remote.predict(seen, np.zeros((3, 10, 2), np.float32))
    np.testing.assert_allclose(got.actions[:, 0, 0], [o.state.sum() for o in seen], rtol=1e-6)
    assert set(server.requests[0]) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert not remote.takes_guidance


@pytest.mark.parametrize(
    ("reply", "error", "complaint"),
    [
        ("Traceback (most recent call last):\n  File x\nKeyError: 'state'", ServerError, "KeyError: 'state'"),
        (b"\xc1", WireError, "msgpack"),
        ({"actions": np.zeros((10, 3))}, WireError, r"shape \(h, 2\)"),
        ({"actions": np.full((10, 2), np.nan)}, WireError, "finite"),
        ({"actions": "no"}, WireError, "array of numbers"),
        ({}, WireError, "NoneType"),
        ([1], WireError, "expected a map"),
        ({"actions": np.zeros((4, 2))}, WireError, "chunks of 10"),
    ],
)
def test_replies_that_are_none(reply, error, complaint):
    server = OpenpiServer(None, reply)
    remote = RemotePolicy(server.address, embodiment=SPEC, action_horizon=10)
    with pytest.raises(error, match=complaint):
        remote.predict([see()], np.zeros((1, 10, 2), np.float32))


@pytest.mark.parametrize(
    ("metadata", "error", "complaint"),
    [
        ({OURS: {"protocol": 2}}, WireError, "expected protocol 1, got 2"),
        ({OURS: 3}, WireError, "protocol"),
        ({OURS: {"protocol": 1}}, WireError, "lacks"),
    ],
)
def test_handshakes_of_other_versions(metadata, error, complaint):
    server = OpenpiServer(metadata)
    with pytest.raises(error, match=complaint):
        RemotePolicy(server.address)


def test_a_policy_for_another_robot_is_refused():
    other = EmbodimentSpec.from_dict({**SPEC.to_dict(), "control_hz": 20.0})
    with served() as (address, _), pytest.raises(SpecMismatchError, match=r"control_hz: 10\.0 against 20\.0"):
        RemotePolicy(address, embodiment=other)


@pytest.mark.parametrize("address", ["ws://127.0.0.1:1", "127.0.0.1:1"])
def test_nobody_there(address):
    with pytest.raises(ServerError, match=r"no policy server at ws://127\.0\.0\.1:1"):
        RemotePolicy(address)


def test_an_address_that_is_none():
    with pytest.raises(ConfigError, match="expected an address"):
        RemotePolicy("http://127.0.0.1:80")


# -- the robot's computer ----------------------------------------------------------------------------------------------


def test_the_client_imports_little_and_quickly(root: Path):
    code = """
import json, resource, sys, time
begin = time.process_time()
import numpy
middle = time.process_time()
import brachium.policies.remote
end = time.process_time()
print(json.dumps([end - begin, end - middle, sorted(name.partition('.')[0] for name in sys.modules)]))
"""
    runs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root.parent)
        runs.append(json.loads(done.stdout))
    modules = set(runs[0][2])
    heavy = {"torch", "transformers", "torchvision", "lerobot", "mujoco", "scipy", "PIL", "hydra", "zarr", "gymnasium"}
    assert not modules & heavy
    # 0.2 s on a quiet machine, half of it numpy's; beside other tests numpy's share grows as well
    assert min(run[0] for run in runs) < 0.3 or min(run[1] for run in runs) < 0.16


def test_server_needs_keys_for_all_cameras():
    with pytest.raises(WireError, match="a key for each camera"):
        PolicyServer(FormulaPolicy(), identity={}, access=Access(), request_format=RequestFormat(images=("one",)))
