"""Choose MuJoCo's rendering backend before MuJoCo is imported, which is when it reads the choice."""

from __future__ import annotations

import os
import sys

from ..errors import RenderError


def choose_backend() -> str:
    """Set MUJOCO_GL to ``egl`` on a Linux machine without a display unless it is set; return what is in force."""
    headless = not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    # Mesa's software rasteriser then draws in the calling thread: we keep every core busy with worlds of their own, and
    # small pictures gain nothing from a pool of threads for each context.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if sys.platform == "linux" and headless:
        os.environ.setdefault("MUJOCO_GL", "egl")
    return os.environ.get("MUJOCO_GL", "")


def load_mujoco() -> None:
    """Import MuJoCo; raise RenderError when the backend's library is missing or MUJOCO_GL names none."""
    backend = choose_backend()
    try:
        import mujoco  # noqa: F401
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each backend fails in its own way: ImportError, AttributeError, RuntimeError ...
        raise unusable(backend, error) from error


def unusable(backend: str, error: Exception) -> RenderError:
    """The error to raise when a backend does not work."""
    return RenderError(
        f"MuJoCo cannot render here (MUJOCO_GL={backend or 'unset'}: {type(error).__name__}: {error}). "
        "Expected a working EGL or OSMesa library: set MUJOCO_GL to egl or osmesa. Type: brachium doctor"
    )
