"""A connection to a policy server, brachium's or openpi's: requests out, replies in, in any order.

For the robot's computer: imports neither torch nor transformers, and is quick to import.
"""

from __future__ import annotations

import inspect
import ssl
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from ..errors import ConfigError, NotFoundError, ServerError, WireError
from .request import OURS
from .wire import MAX_MESSAGE, decode, encode

# From 17.1 on websockets wants a `with`, or to be told that there is none; a connection that is kept has none.
_DIRECT: dict[str, Any] = {"legacy": True} if "legacy" in inspect.signature(connect).parameters else {}


class PolicyConnection:
    """One websocket to a policy server.

    Args:
        address: ``ws://HOST:PORT``, ``wss://...``, or ``HOST:PORT``.
        token: What the server asks for.
        authority: PEM file of the certificate authority to trust, for TLS with a certificate of one's own.
        patience_s: How long to wait for a server that is not up yet [s].
        timeout_s: How long the handshake may take [s].

    Raises:
        ServerError: Nobody there, a wrong token, too many clients.
        WireError: Something there that is no policy server.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        authority: str | None = None,
        patience_s: float = 0.0,
        timeout_s: float = 5.0,
    ) -> None:
        self.address = address if "://" in address else f"ws://{address}"
        self._lock = threading.Lock()
        self._numbered: dict[int, Future[dict[str, Any]]] = {}
        self._in_order: list[Future[dict[str, Any]]] = []
        self.strays = 0
        """Replies that nobody waited for: late, doubled, or damaged ones."""
        self._websocket = self._open(token, authority, patience_s, timeout_s)
        try:
            self.metadata = self._handshake(timeout_s)
        except BaseException:
            self._websocket.close()
            raise
        self._receiver = threading.Thread(target=self._receive, name="policy replies", daemon=True)
        self._receiver.start()

    def _open(self, token: str | None, authority: str | None, patience_s: float, timeout_s: float) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        tls = None
        if self.address.startswith("wss://"):
            if authority and not Path(authority).is_file():
                raise NotFoundError(f"no certificate authority at {authority}")
            tls = ssl.create_default_context(cafile=authority)
        until = time.monotonic() + patience_s
        while True:
            try:
                return connect(
                    self.address,
                    **_DIRECT,
                    ssl=tls,
                    compression=None,
                    max_size=MAX_MESSAGE,
                    max_queue=64,
                    additional_headers=headers,
                    open_timeout=timeout_s,
                    ping_interval=None,  # openpi's server answers none while it infers; requests have time limits
                    close_timeout=1.0,
                    proxy=None,  # robots are near; what a shell exports for browsers must not stand between
                )
            except InvalidURI as error:
                raise ConfigError(f"expected an address such as ws://127.0.0.1:8000, got {self.address!r}") from error
            except InvalidStatus as error:
                raise self._refused(error.response.status_code, bytes(error.response.body or b"")) from error
            except ssl.SSLError as error:
                raise ServerError(
                    f"{self.address}: TLS: {error}. Its certificate needs an authority you trust: authority=FILE.pem"
                ) from error
            except (OSError, WebSocketException) as error:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                raise ServerError(
                    f"no policy server at {self.address} ({error or type(error).__name__}). "
                    "Type: brachium serve checkpoint=CHECKPOINT"
                ) from error

    def _refused(self, status: int, body: bytes) -> ServerError:
        said = body[:200].decode("utf-8", "replace").strip()
        if status == 401:
            return ServerError(f"{self.address} refuses this token: expected the one the server was started with")
        return ServerError(f"{self.address} refuses the connection: {status} {said}")

    def _handshake(self, timeout_s: float) -> dict[str, Any]:
        try:
            first = self._websocket.recv(timeout=timeout_s)
        except TimeoutError as error:
            raise WireError(f"{self.address} says nothing: expected the metadata of a policy server") from error
        except ConnectionClosed as error:
            raise ServerError(f"{self.address} closed the connection: {_reason(error)}") from error
        metadata = decode(first) if isinstance(first, bytes) else None
        if not isinstance(metadata, dict):
            raise WireError(f"{self.address} is no policy server: expected metadata, got {str(first)[:80]!r}")
        return metadata

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._receiver.is_alive()

    def submit(self, message: dict[str, Any]) -> Future[dict[str, Any]]:
        """Send a request; the future holds its reply, or a ServerError or WireError."""
        data, future = encode(message), Future[dict[str, Any]]()
        number = message.get(OURS, {}).get("id")
        with self._lock:
            if not self.is_open:
                raise ServerError(f"{self.address}: the connection is closed")
            if number is None:
                self._in_order.append(future)
            else:
                self._numbered[number] = future
            try:
                self._websocket.send(data)
            except (ConnectionClosed, OSError) as error:
                self._numbered.pop(number, None)
                raise ServerError(f"{self.address}: the connection is closed: {error}") from error
        return future

    def ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            ServerError: The server refused, failed, went away or took too long.
            WireError: The reply is none.
        """
        return self.wait(self.submit(message), timeout_s)

    def wait(self, future: Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
        """The reply of a request that was submitted."""
        try:
            return future.result(timeout_s)
        except FutureTimeout as error:
            future.cancel()
            raise ServerError(f"{self.address}: no reply within {timeout_s:g} s") from error

    def _receive(self) -> None:
        """Give each reply to who waits for it."""
        why: Exception = ServerError(f"{self.address}: the connection is closed")
        try:
            for reply in self._websocket:
                self._give(reply)
        except ConnectionClosed as error:
            why = ServerError(f"{self.address}: the connection is closed: {_reason(error)}")
        except WireError as error:  # after a damaged message nothing that follows can be trusted
            self.strays += 1
            why = error
        except Exception as error:  # whatever a broken peer leads to: nobody may wait for ever
            why = ServerError(f"{self.address}: {type(error).__name__}: {error}")
        with self._lock:
            waiting = [*self._numbered.values(), *self._in_order]
            self._numbered.clear()
            self._in_order.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(why)
        self._websocket.close()

    def _give(self, reply: str | bytes) -> None:
        if isinstance(reply, str):  # how openpi says that it failed
            lines = reply.strip().splitlines() or [""]
            self._settle(None, error=ServerError(f"{self.address}: {lines[-1][:300]}"))
            return
        message = decode(reply)
        if not isinstance(message, dict):
            raise WireError(f"{self.address}: expected a map as a reply, got {type(message).__name__}")
        ours = message.get(OURS)
        if not isinstance(ours, dict):
            self._settle(None, message)
        elif "error" in ours:
            self._settle(ours.get("id"), error=ServerError(f"{self.address}: {str(ours['error'])[:300]}"))
        else:
            self._settle(ours.get("id"), message)

    def _settle(self, number: Any, message: dict[str, Any] | None = None, error: Exception | None = None) -> None:
        with self._lock:
            future = None
            if type(number) is int:
                future = self._numbered.pop(number, None)
            elif number is None and self._in_order:
                future = self._in_order.pop(0)
        if future is None or not future.set_running_or_notify_cancel():
            self.strays += 1
        elif error is not None:
            future.set_exception(error)
        elif message is not None:
            future.set_result(message)

    def close(self) -> None:
        """End the connection."""
        self._websocket.close()
        self._receiver.join(2.0)


def _reason(error: ConnectionClosed) -> str:
    if error.rcvd is not None and error.rcvd.reason:
        return str(error.rcvd.reason)
    return "the server went away" if error.rcvd is None else f"code {error.rcvd.code}"
