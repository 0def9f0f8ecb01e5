"""A stand-in of a rosbridge server with a robot behind it, in a process of its own.

It imitates what rosbridge_suite and ros2_controllers do, above all what they do not say: a message of an unknown topic,
another type, or with a wrong field is dropped without a word. It keeps a journal of what reached the controllers.
"""

import base64
import contextlib
import itertools
import json
import math
import multiprocessing
import socket
import threading
import time

import cv2
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

POLICY_ORDER = ("shoulder", "elbow", "wrist")
STATE_ORDER = ("finger", "wrist", "camera_tilt", "shoulder", "elbow")
CONTROLLER_ORDER = ("elbow", "wrist", "shoulder")
LAG_S = 0.03
STATE_HZ, CAMERA_HZ = 80.0, 30.0
ARRAY, TRAJECTORY = "std_msgs/msg/Float64MultiArray", "trajectory_msgs/msg/JointTrajectory"
TYPES = {
    "/joint_states": "sensor_msgs/msg/JointState",
    "/forward_position_controller/commands": ARRAY,
    "/joint_trajectory_controller/joint_trajectory": TRAJECTORY,
    "/gripper_controller/commands": ARRAY,
    "/camera/color/compressed": "sensor_msgs/msg/CompressedImage",
    "/camera/raw": "sensor_msgs/msg/Image",
}
CONTROLLERS = {
    "forward_position_controller": CONTROLLER_ORDER,
    "joint_trajectory_controller": CONTROLLER_ORDER,
    "gripper_controller": ("finger",),
}
FAULTS = {
    "mute": False,  # no joint states any more, the connection stays
    "blind": False,  # no pictures any more
    "null": "",  # the position of this joint is NaN, which is null in JSON
    "empty_velocity": False,
    "reverse": False,  # names in another order
    "without": "",  # this joint is not named any more
    "short": False,  # fewer positions than names
    "skew_s": 0.0,  # stamps are off
    "unstamped": False,
    "frozen": False,  # stamps and positions stand still
    "garbage": False,  # a broken message before every good one
    "max_message_size": 10_000_000,
    "status": "",
    "types": {},  # topic -> another type
    "services": "answer",  # or "fail", "silent"
    "inactive": "",  # this controller
    "interface": "position",
    "deaf": (),  # topics nobody listens to
    "others": (),  # nodes that publish commands too
    "bad_jpeg": False,
}


class Robot:
    """Joints that follow their goals like a first-order lag."""

    def __init__(self):
        self.lock = threading.RLock()
        self.reset()

    def reset(self):
        with self.lock:
            self.position = dict.fromkeys(STATE_ORDER, 0.1)
            self.position["finger"] = 0.04
            self.goal = dict(self.position)
            self.ramps = {}
            self.moved = time.monotonic()
            self.faults = dict(FAULTS)
            self.journal, self.ignored, self.path = [], [], []
            self.stamp = 0.0

    def advance(self):
        """To now, in steps of a millisecond."""
        with self.lock:
            now = time.monotonic()
            before = dict(self.position)
            while self.moved < now:
                step = min(0.001, now - self.moved)
                self.moved += step
                for name, (start, at, end, until) in list(self.ramps.items()):
                    share = min(1.0, (self.moved - at) / (until - at))
                    self.goal[name] = start + (end - start) * share
                for name, goal in self.goal.items():
                    self.position[name] = goal + (self.position[name] - goal) * math.exp(-step / LAG_S)
            elapsed = 1.0 / STATE_HZ
            return {name: (self.position[name] - before[name]) / elapsed for name in STATE_ORDER}

    def take(self, topic, kind, message):
        """A message on a controller's topic, as rosbridge converts and the controller takes it."""
        with self.lock:
            self.advance()
            why = self._take(topic, kind, message)
            if why:
                self.ignored.append((time.monotonic(), topic, why))

    def _take(self, topic, kind, message):
        controller = topic.split("/")[1]
        if TYPES.get(topic) != kind or controller not in CONTROLLERS:
            return f"unknown topic or type {kind}"
        if self.faults["inactive"] == controller:
            return "inactive"
        if kind == ARRAY:
            joints, data = CONTROLLERS[controller], message.get("data")
            if set(message) - {"layout", "data"} or len(data) != len(joints):
                return "wrong fields or length"
            seconds = 0.0
        else:
            stamp, points = message["header"]["stamp"], message["points"]
            joints, data = message["joint_names"], points[-1]["positions"]
            lead = points[-1]["time_from_start"]
            if (stamp["sec"], stamp["nanosec"]) != (0, 0):
                return "a start in the past"
            if not (isinstance(lead["sec"], int) and isinstance(lead["nanosec"], int) and lead["nanosec"] < 10**9):
                return "float for int"
            if set(joints) != set(CONTROLLERS[controller]) or len(points) != 1 or points[0]["velocities"]:
                return "joints or points"
            seconds = lead["sec"] + lead["nanosec"] * 1e-9
            if seconds <= 0.0:
                return "time_from_start"
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in data):
            return "not finite"
        now = time.monotonic()
        for name, value in zip(joints, data):
            if seconds:
                self.ramps[name] = (self.goal[name], now, value, now + seconds)
            else:
                self.ramps.pop(name, None)
                self.goal[name] = value
        self.journal.append((now, topic, dict(zip(joints, data))))
        return ""

    def joint_state(self):
        with self.lock:
            velocity = self.advance()
            faults = self.faults
            self.path.append((self.moved, dict(self.position)))
            names = [name for name in STATE_ORDER if name != faults["without"]]
            if faults["reverse"]:
                names.reverse()
            positions = [None if name == faults["null"] else self.position[name] for name in names]
            if not faults["frozen"]:
                self.stamp = time.time() + faults["skew_s"]
            stamp = 0.0 if faults["unstamped"] else self.stamp
            return {
                "header": {"stamp": {"sec": int(stamp), "nanosec": int(stamp % 1 * 1e9)}, "frame_id": ""},
                "name": names,
                "position": positions[:-1] if faults["short"] else positions,
                "velocity": [] if faults["empty_velocity"] else [velocity[name] for name in names],
                "effort": [None] * len(names),
            }

    def picture(self):
        """RGB uint8 (48, 64, 3): red on the left, blue on the right, and a bar that moves with the shoulder."""
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, :32, 0], image[:, 32:, 2] = 200, 200
        image[: int(20 + 20 * self.position["shoulder"]), 28:36, 1] = int(1e4 * self.position["shoulder"]) % 200 + 50
        return image


class Bridge:
    """What rosbridge does for one client after another."""

    def __init__(self):
        self.robot = Robot()
        self.clients = set()
        self.opened = 0

    def handle(self, connection):
        self.clients.add(connection)
        self.opened += 1
        client = Client(self, connection)
        thread = threading.Thread(target=client.publish, daemon=True)
        thread.start()
        with contextlib.suppress(ConnectionClosed):
            for text in connection:
                client.hear(text)
        client.ended.set()
        thread.join()
        self.clients.discard(connection)

    def drop(self):
        for connection in list(self.clients):
            connection.socket.shutdown(socket.SHUT_RDWR)


class Client:
    def __init__(self, bridge, connection):
        self.bridge, self.robot, self.connection = bridge, bridge.robot, connection
        self.subscribed, self.advertised = {}, {}
        self.ended = threading.Event()
        self.lock = threading.Lock()

    def say(self, message):
        text = json.dumps(message)
        size = self.robot.faults["max_message_size"]
        with contextlib.suppress(ConnectionClosed, OSError), self.lock:
            if len(text) <= size:
                self.connection.send(text)
                return
            for number, begin in enumerate(range(0, len(text), size)):
                piece = {"op": "fragment", "id": 0, "data": text[begin : begin + size], "num": number}
                self.connection.send(json.dumps({**piece, "total": (len(text) - 1) / size + 1}))

    def hear(self, text):
        message = json.loads(text)
        operation, topic = message["op"], message.get("topic", "")
        if operation == "subscribe":
            if TYPES.get(topic) == message["type"] and isinstance(message["throttle_rate"], int):
                self.subscribed[topic] = [message["throttle_rate"] / 1e3, 0.0]
        elif operation == "advertise":
            self.advertised[topic] = message["type"]
        elif operation == "publish":
            self.robot.take(topic, self.advertised.get(topic), message["msg"])
        elif operation == "call_service":
            mode = self.robot.faults["services"]
            if mode == "silent":
                return
            values = self.answer(message["service"], message["args"]) if mode == "answer" else None
            reply = {"op": "service_response", "id": message["id"], "service": message["service"]}
            if values is None:
                self.say({**reply, "result": False, "values": f"Service {message['service']} does not exist"})
            else:
                self.say({**reply, "result": True, "values": values})

    def answer(self, service, arguments):
        faults = self.robot.faults
        types = {**TYPES, **faults["types"]}
        topic = arguments.get("topic", "")
        if service == "/rosapi/topic_type":
            return {"type": types.get(topic, "")}
        if service == "/rosapi/topics_for_type":
            return {"topics": [name for name, kind in types.items() if kind == arguments["type"]]}
        if service == "/rosapi/subscribers":
            return {"subscribers": ["/rosbridge_websocket", *([] if topic in faults["deaf"] else ["/listener"])]}
        if service == "/rosapi/publishers":
            return {"publishers": ["/rosbridge_websocket", *faults["others"]]}
        if service == "/controller_manager/list_controllers":
            return {"controller": [self.controller(name, joints) for name, joints in CONTROLLERS.items()]}
        name = service.removeprefix("/").removesuffix("/get_parameters")
        if name in CONTROLLERS:
            return {"values": [{"type": 9, "string_array_value": list(CONTROLLERS[name])}]}
        return None

    def controller(self, name, joints):
        faults = self.robot.faults
        return {
            "name": name,
            "state": "inactive" if faults["inactive"] == name else "active",
            "type": "forward_command_controller/ForwardCommandController",
            "claimed_interfaces": [f"{joint}/{faults['interface']}" for joint in joints],
        }

    def publish(self):
        """Joint states and pictures at their rates, as each was asked for."""
        for tick in itertools.count():
            if self.ended.wait(1.0 / STATE_HZ):
                return
            faults = self.robot.faults
            if faults["status"]:
                self.say({"op": "status", "level": "error", "msg": faults["status"]})
            if "/joint_states" in self.subscribed and not faults["mute"]:
                if faults["garbage"]:
                    with contextlib.suppress(ConnectionClosed):
                        self.connection.send('{"op": "publish", "topic": "/joint_st')
                self.say({"op": "publish", "topic": "/joint_states", "msg": self.robot.joint_state()})
            if tick % round(STATE_HZ / CAMERA_HZ) == 0 and not faults["blind"]:
                self.pictures(time.monotonic())

    def pictures(self, now):
        for topic, make in (("/camera/color/compressed", compressed), ("/camera/raw", raw)):
            every = self.subscribed.get(topic)
            if every is not None and now - every[1] >= every[0]:
                every[1] = now
                message = make(self.robot.picture())
                if self.robot.faults["bad_jpeg"]:
                    message["data"] = base64.b64encode(b"\xff\xd8 no jpeg").decode()
                self.say({"op": "publish", "topic": topic, "msg": message})


HEADER = {"stamp": {"sec": 7, "nanosec": 0}, "frame_id": "camera"}


def compressed(image):
    _, file = cv2.imencode(".jpeg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    data = base64.b64encode(file.tobytes()).decode()
    return {"header": HEADER, "format": "rgb8; jpeg compressed bgr8", "data": data}


def raw(image):
    """BGR with padded rows."""
    height, width, _ = image.shape
    rows = np.zeros((height, width * 3 + 8), np.uint8)
    rows[:, : width * 3] = image[:, :, ::-1].reshape(height, -1)
    shape = {"height": height, "width": width, "step": rows.shape[1], "encoding": "bgr8", "is_bigendian": 0}
    return {"header": HEADER, **shape, "data": base64.b64encode(rows.tobytes()).decode()}


def run(pipe):
    """Entry of the process; who started it speaks through `pipe`."""
    bridge = Bridge()
    robot = bridge.robot
    with serve(bridge.handle, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send(server.socket.getsockname()[1])
        while True:
            try:
                what, value = pipe.recv()
            except EOFError:
                return
            with robot.lock:
                if what == "reset":
                    robot.reset()
                elif what == "faults":
                    assert set(value) <= set(FAULTS), value
                    robot.faults.update(value)
                elif what == "drop":
                    bridge.drop()
                elif what == "at":
                    robot.position.update(value)
                    robot.goal.update(value)
                robot.advance()
                answers = {"clients": len(bridge.clients), "opened": bridge.opened, "position": dict(robot.position)}
                pipe.send({"journal": robot.journal, "ignored": robot.ignored, "path": robot.path, **answers})


class FakeRosbridge:
    """Starts the process, and speaks with it."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=run, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.address = f"ws://127.0.0.1:{self.pipe.recv()}"

    def ask(self, what="look", value=None):
        self.pipe.send((what, value))
        return self.pipe.recv()

    def faults(self, **faults):
        return self.ask("faults", faults)

    def close(self):
        self.pipe.close()
        self.process.join(2.0)
        self.process.kill()
