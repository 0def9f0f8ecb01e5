"""Questions over HTTP: answered in time, put again where that may help, within a budget, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from ....errors import ConfigError, ServerError

MAX_REPLY = 64 * 2**20
"""Bytes of a reply."""
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LOCAL = ("localhost", "127.0.0.1", "::1")
_START = "Start one, for example: vllm serve MODEL, llama-server -m FILE.gguf, or ollama serve"


class Refused(ServerError):
    """A server that understood and said no (a status of 400 to 499): asking in another way may help."""


class Unanswered(ServerError):
    """No server, none in time, one too busy, or no budget: nothing is known of what it can do."""


class Endpoint:
    """A server that is asked for JSON.

    Args:
        address: ``HOST:PORT`` or ``http(s)://HOST[:PORT]``, with or without ``/v1``.
        key_env: Environment variable with the key; without it, or where it is empty, none is sent.
        timeout_s: For a whole reply [s], not for each of its pieces.
        retries: How often a question is put again after a time-out, a lost connection, or a busy server.
        backoff_s: How long to wait before the first of them [s], doubled each time; a server's Retry-After counts too.
        max_calls: Requests in all, retries too.
        cache: JSON lines of answers that need not be asked for again; None for none.

    Raises:
        ConfigError: No address, or a key that cannot be sent.
    """

    def __init__(
        self,
        address: str,
        *,
        key_env: str,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        max_calls: int,
        cache: str | Path | None,
    ) -> None:
        whole = address if "://" in address else f"http://{address}"
        try:
            url = httpx.URL(whole.rstrip("/").removesuffix("/v1"))
        except httpx.InvalidURL as error:
            raise ConfigError(f"expected an address such as 127.0.0.1:8000, got {address!r}") from error
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise ConfigError(f"expected an address such as 127.0.0.1:8000, without user or key, got {url.host!r}")
        self.address, self._base = str(url).rstrip("/"), url
        self._key = os.environ.get(key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"expected a key of plain letters in the environment variable {key_env}, got others")
        self.timeout_s, self.retries, self.backoff_s, self.max_calls = timeout_s, retries, backoff_s, max_calls
        self.calls = 0
        self._lock = threading.Lock()
        self._cache = None if cache is None else Path(cache).expanduser()
        self._known = {} if self._cache is None else _read_cache(self._cache)
        # What a shell exports for browsers must not stand between this machine and itself.
        self._client = httpx.Client(
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            trust_env=url.host not in _LOCAL,
        )

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any], *, remember: bool = True) -> Any:
        """The JSON that answers another; from the cache where that has it and `remember` says so.

        Raises:
            Refused: The server does not take the question.
            Unanswered: No server, none in time, or the budget is spent.
            ServerError: It fails, or answers something else than a JSON object.
        """
        if self._cache is None or not remember:
            return self._ask("POST", path, body)
        key = hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        reply = self._ask("POST", path, body)
        with self._lock:
            self._known[key] = reply
            append_line(self._cache, {"key": key, "reply": reply})
        return reply

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Ask until there is an answer, or no hope of one."""
        for attempt in range(self.retries + 1):
            with self._lock:
                if self.calls >= self.max_calls:
                    raise Unanswered(f"{self.address}: the budget of {self.max_calls} calls is spent: raise max_calls")
                self.calls += 1
            status, wait = 0, 0.0
            try:
                status, wait, said = self._once(method, path, body)
                complaint = f"status {status}: {_brief(said)}"
            except httpx.TimeoutException:
                complaint = f"no answer within {self.timeout_s:g} s"
            except httpx.ConnectError as error:
                complaint = f"nobody there ({error}). {_START}"
            except httpx.HTTPError as error:
                complaint = f"{type(error).__name__}: {error}"
            if status == 200:
                return self._parsed(path, said)
            if status and status not in _AGAIN:
                says_no = 400 <= status < 500
                raise (Refused if says_no else ServerError)(self._clean(f"{self.address}{path}: {complaint}"))
            if attempt < self.retries:
                time.sleep(max(self.backoff_s * 2**attempt, min(wait, self.timeout_s)))
        tries = f" ({self.retries + 1} tries)" if self.retries else ""
        kind = ServerError if status == 500 else Unanswered  # what some servers say where they cannot do a thing
        raise kind(self._clean(f"{self.address}{path}: {complaint}{tries}"))

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, float, bytes]:
        """Status, seconds to wait before asking again, and what was said."""
        until, said = time.monotonic() + self.timeout_s, bytearray()
        with self._client.stream(method, f"{self.address}{path}", json=body) as response:
            for piece in response.iter_bytes():
                said += piece
                if time.monotonic() > until:  # a server that sends a byte now and then is late all the same
                    raise httpx.ReadTimeout("late")
                if len(said) > MAX_REPLY:
                    raise ServerError(f"{self.address}{path}: expected a reply of at most {MAX_REPLY} bytes, got more")
            after = response.headers.get("retry-after", "")
            return response.status_code, float(after) if after.isdigit() else 0.0, bytes(said)

    def _parsed(self, path: str, said: bytes) -> Any:
        try:
            reply = json.loads(said)
        except ValueError as error:
            raise ServerError(self._clean(f"{self.address}{path}: expected JSON, got {_brief(said)!r}")) from error
        if not isinstance(reply, dict):
            raise ServerError(self._clean(f"{self.address}{path}: expected a JSON object, got {_brief(said)!r}"))
        if reply.get("error"):
            raise ServerError(self._clean(f"{self.address}{path}: {_brief(said)}"))
        return reply

    def _clean(self, text: str) -> str:
        """A message without the key, which servers like to repeat."""
        return text.replace(self._key, "***") if self._key else text


def dig(where: str, reply: Any, kind: type | tuple[type, ...], *path: str | int) -> Any:
    """What stands at a path inside a reply.

    Raises:
        ServerError: Something else does, or nothing.
    """
    value = reply
    for step in path:
        inside = isinstance(value, dict if isinstance(step, str) else list)
        try:
            value = value[step] if inside else None
        except (KeyError, IndexError):
            value = None
    if not isinstance(value, kind) or isinstance(value, bool):
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ServerError(
            f"{where}: expected {name} ({wanted}) in the answer, got {_brief(json.dumps(reply).encode())}"
        )
    return value


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON; where a run was killed while it wrote one, that stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file, without those that were cut off."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _read_cache(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"expected a file of answers as cache, got the folder {path}")
    lines = read_lines(path) if path.exists() else []
    return {line["key"]: line["reply"] for line in lines if "key" in line and "reply" in line}


def _brief(said: bytes) -> str:
    """The beginning of an answer, on one line."""
    text = " ".join(said[:2000].decode("utf-8", "replace").split())
    return f"{text[:200]}..." if len(text) > 200 else text
