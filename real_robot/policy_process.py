"""A policy in a process of its own: inference never shares an interpreter with the control loop."""

from __future__ import annotations

import os
import queue
import secrets
import subprocess
import sys
import threading
from types import TracebackType

from ..errors import ServerError

START_S = 300.0
"""How long a checkpoint may take to be loaded, verified and warmed up [s]."""


class PolicyProcess:
    """``brachium serve`` on loopback, with a token nobody else knows; ends with the block, and with this process.

    Args:
        checkpoint: Folder of the checkpoint.
        device: ``cpu``, ``cuda`` or ``auto``.
        embodiment: Which of the checkpoint's robots; the only one when None.
        threads: CPU threads of the model.
    """

    def __init__(
        self, checkpoint: str, *, device: str = "auto", embodiment: str | None = None, threads: int | None = 1
    ) -> None:
        self.token = secrets.token_urlsafe()
        words = [f"checkpoint={checkpoint}", f"device={device}", "access.port=0"]
        words += [f"embodiment={embodiment}"] if embodiment else []
        words += [f"threads={threads}"] if threads else []
        self._command = [sys.executable, "-m", "brachium", "serve", *words]
        self._process: subprocess.Popen[str] | None = None
        self.address = ""

    def __enter__(self) -> PolicyProcess:
        environment = {**os.environ, "BRACHIUM_TOKEN": self.token, "BRACHIUM_PARENT": str(os.getpid())}
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: the robot comes to rest first
        )
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        streams = ((self._process.stdout, lines.put), (self._process.stderr, errors.append))
        for stream, take in streams:
            threading.Thread(target=_drain, args=(stream, take), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=START_S)
            except queue.Empty:
                self.close()
                raise ServerError(f"the policy server was not ready within {START_S:.0f} s") from None
            if line is None:
                self.close()
                said = "".join(x for x in errors[-12:] if x).strip() or "nothing"
                raise ServerError(f"the policy server did not start: {said}")
            if line.startswith("ready "):
                self.address = line.split()[1]
                return self

    @property
    def process_id(self) -> int | None:
        """Of the server."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the server."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(3.0)
        self._process = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _drain(stream: object, take: object) -> None:
    """Read a pipe to its end, so that it never fills."""
    for line in stream:  # type: ignore[attr-defined]
        take(line)  # type: ignore[operator]
    take(None)  # type: ignore[operator]
