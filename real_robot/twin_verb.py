"""The verb ``brachium twin``: a simulated robot that runs by itself."""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Callable
from typing import Any

from ..console import log
from ..errors import ConfigError, RobotError
from .twin import KEY_VARIABLE, Twin


def twin(
    *,
    env: Callable[..., Any],
    host: str = "127.0.0.1",
    port: int = 9000,
    watchdog_s: float = 0.15,
    camera_hz: float = 31.25,
    seed: int = 0,
) -> int:
    """Run a simulated robot in real time until interrupted; deploy to it with ``robot.address=HOST:PORT``.

    Args:
        env: Makes the table-top environment whose robot this is.
        host, port: Where it listens, 0 for any free port; only this machine can reach it.
        watchdog_s: It holds when no command came for so long [s].
        camera_hz: Rate of camera frames [Hz].
        seed: Of the scene and the faults.
    """
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not inside:
        raise ConfigError(f"host={host}: a twin listens on this machine alone. Type: host=127.0.0.1")
    key = os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe(16)
    try:
        made = Twin(env, (host, port), key=key.encode(), watchdog_s=watchdog_s, camera_hz=camera_hz, seed=seed)
    except OSError as error:
        raise RobotError(f"cannot listen on {host}:{port}: {error.strerror or error}. Type: port=9001") from error
    if KEY_VARIABLE not in os.environ:
        log(f"a twin's key, for who controls it: export {KEY_VARIABLE}={key}")
    print(f"ready {host}:{made.address[1]}", flush=True)
    made.run()
    return 0
