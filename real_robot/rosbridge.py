"""A client of rosbridge (protocol 2, JSON): messages of ROS topics in, commands out, services asked.

rosbridge answers nothing when it drops a message: of an unknown topic, another type, a field that is not there. So
whoever uses this asks `call` for what topics there are, and watches whether messages come. The socket is emptied by a
thread of its own all the time, because the server keeps what a slow client has not taken, and all of it grows old.

Source: ROSBRIDGE_PROTOCOL.md and the code of RobotWebTools/rosbridge_suite, branch ros2.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import inspect
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from ..errors import RobotError

MAX_MESSAGE = 64 * 2**20
"""Largest message that is taken [bytes]; a raw picture of 4000 by 3000 is one of 48 MB."""
PING_S = 5.0
"""A server whose computer answers no ping for so long is gone [s]."""
LAUNCH = "ros2 launch rosbridge_server rosbridge_websocket_launch.xml"

Heard = Callable[[dict[str, Any], float], None]
"""Is handed a message and when it came, by this computer's `time.monotonic` [s]; called by the receiving thread."""

# From 17.1 on websockets wants a `with`, or to be told that there is none; a connection that is kept has none.
_DIRECT: dict[str, Any] = {"legacy": True} if "legacy" in inspect.signature(connect).parameters else {}


class Rosbridge:
    """One connection to a rosbridge server.

    Args:
        address: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        timeout_s: How long the server may take to open, and to answer a service call [s].

    Attributes:
        lost: Why the connection is over; empty while it stands.
        complaint: What the server complained of; most servers never do.
        unread: Messages that were no JSON, or lacked a piece.

    Raises:
        RobotError: Nobody there, or something else than a websocket server.
    """

    def __init__(self, address: str, *, timeout_s: float = 5.0) -> None:
        self.address, self._timeout_s = address, timeout_s
        self.lost, self.complaint, self.unread = "", "", 0
        self._heard: dict[str, Heard] = {}
        self._numbers = itertools.count(1)
        self._replies: dict[str, dict[str, Any] | None] = {}
        self._news = threading.Condition()
        self._pieces: list[str] = []
        self._socket = self._open()
        threading.Thread(target=self._receive, name="rosbridge", daemon=True).start()

    def _open(self) -> ClientConnection:
        try:
            return connect(
                self.address,
                **_DIRECT,
                compression=None,
                max_size=MAX_MESSAGE,  # the default of 1 MiB would end the connection at the first large picture
                max_queue=None,
                open_timeout=self._timeout_s,
                ping_interval=PING_S,
                ping_timeout=PING_S,
                close_timeout=1.0,
                proxy=None,  # robots are near; what a shell exports for browsers must not stand between
            )
        except InvalidURI as error:
            raise RobotError(f"expected an address such as ws://192.168.1.10:9090, got {self.address!r}") from error
        except (OSError, WebSocketException) as error:  # a time-out is an OSError
            raise RobotError(
                f"no rosbridge at {self.address} ({error or type(error).__name__}). On the robot type: {LAUNCH}"
            ) from error

    # -- out -----------------------------------------------------------------------------------------------------------

    def subscribe(self, topic: str, kind: str, heard: Heard, *, throttle_ms: int = 0) -> None:
        """Have `heard` called with each message of a topic of type `kind`, at most every `throttle_ms` [ms]."""
        self._heard[topic] = heard
        self._send(
            {
                "op": "subscribe",
                "id": self._number(),
                "topic": topic,
                "type": kind,
                "throttle_rate": throttle_ms,
                "queue_length": 1,
                "compression": "none",
            }
        )

    def advertise(self, topic: str, kind: str) -> None:
        """Say that messages of type `kind` will be published."""
        # Servers that know `qos` drop old commands; others ignore it, and hand a controller that starts those of 1 s.
        quality = {"history": "keep_last", "depth": 1, "reliability": "reliable", "durability": "volatile"}
        self._send({"op": "advertise", "id": self._number(), "topic": topic, "type": kind, "qos": quality})

    def publish(self, topic: str, message: Mapping[str, Any]) -> None:
        """Publish a message of finite numbers on a topic that was advertised.

        Raises:
            RobotError: The connection is lost.
        """
        self._send({"op": "publish", "topic": topic, "msg": message})

    def call(self, service: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a service answers.

        Raises:
            RobotError: No answer in time, or the service failed; connection lost.
        """
        number = self._number()
        with self._news:
            self._replies[number] = None
        request = {"op": "call_service", "id": number, "service": service, "args": dict(arguments or {})}
        self._send({**request, "timeout": self._timeout_s})
        with self._news:
            self._news.wait_for(lambda: self._replies[number] is not None or bool(self.lost), self._timeout_s)
            reply = self._replies.pop(number)
        if reply is None:
            raise RobotError(f"service {service}: {self.lost or f'no answer within {self._timeout_s:g} s'}")
        values = reply.get("values")
        if reply.get("result") is not True or not isinstance(values, dict):
            raise RobotError(f"service {service}: {values or 'failed'}")
        return values

    def close(self) -> None:
        """Close the connection, after everything that was published has been handed over."""
        self._socket.close()

    def _number(self) -> str:
        return f"brachium:{next(self._numbers)}"

    def _send(self, message: dict[str, Any]) -> None:
        if self.lost:
            raise RobotError(f"the connection to {self.address} is lost: {self.lost}")
        try:
            self._socket.send(json.dumps(message, allow_nan=False))
        except (OSError, WebSocketException) as error:
            raise RobotError(f"the connection to {self.address} is lost: {error or type(error).__name__}") from error

    # -- in ------------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        why = ""
        try:
            while True:
                text = self._socket.recv()
                self._take(text, time.monotonic())
        except ConnectionClosed as error:
            why = f"closed ({error})"
        except Exception as error:  # a thread that ends without a word would look like a robot at rest
            why = f"{type(error).__name__}: {error}"
        with self._news:
            self.lost = why
            self._news.notify_all()
        with contextlib.suppress(OSError, WebSocketException):
            self._socket.close()

    def _take(self, text: str | bytes, now: float) -> None:
        """One message of the server, which may be a piece of a long one."""
        try:
            message = json.loads(text)
        except ValueError:
            self.unread += 1
            return
        operation = message.get("op") if isinstance(message, dict) else None
        if operation == "publish":
            heard, content = self._heard.get(message.get("topic")), message.get("msg")
            if heard is not None and isinstance(content, dict):
                heard(content, now)
        elif operation == "fragment":
            self._join(message, now)
        elif operation == "service_response":
            with self._news:
                if message.get("id") in self._replies:
                    self._replies[message["id"]] = message
                    self._news.notify_all()
        elif operation == "status":
            if message.get("level") == "error":
                self.complaint = str(message.get("msg"))
        else:
            self.unread += 1

    def _join(self, piece: dict[str, Any], now: float) -> None:
        """Pieces come in order, all with the same id: those of two long messages can get mixed, and are left out."""
        number, total, data = piece.get("num"), piece.get("total"), piece.get("data")
        if not (isinstance(number, int) and isinstance(total, (int, float)) and isinstance(data, str)):
            self.unread += 1
            return
        if number != len(self._pieces):
            self.unread += 1
            self._pieces = []
            if number != 0:
                return
        self._pieces.append(data)
        if len(self._pieces) >= int(total):  # servers divide, and say for example 3.4
            text, self._pieces = "".join(self._pieces), []
            self._take(text, now)
        elif sum(map(len, self._pieces)) > MAX_MESSAGE:
            self._pieces = []


def binary(data: Any) -> bytes:
    """The bytes of a ``uint8[]``, which JSON has as base64.

    Raises:
        RobotError: It is something else.
    """
    if not isinstance(data, str):
        raise RobotError(f"expected data in base64, got {type(data).__name__}")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RobotError(f"data is no base64: {error}") from error
