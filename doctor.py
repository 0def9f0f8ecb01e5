"""`brachium doctor`: does this machine have what brachium needs, and if not, what to type."""

from __future__ import annotations

import importlib.metadata
import json as json_lib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import __version__
from .console import free_bytes, human_bytes, table
from .errors import ConfigError, did_you_mean
from .hardware import cores, processor

GB = 1e9
MIN_PYTHON = ">=3.12"
APT = "apt-get install -y libegl1 libgl1 libgles2 libgl1-mesa-dri"

# Runs in a process of its own: MUJOCO_GL is read once, at import, and a broken driver may end the process.
RENDER = """
import sys, time
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light castshadow='false' pos='0 0 2'/><geom size='.1' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data)
    renderer.render()
    start = time.perf_counter()
    for _ in range(20):
        picture = renderer.render()
    spent = (time.perf_counter() - start) / 20
    if not picture.std() > 0:
        sys.exit("the picture is empty")
print(f"RENDERED {1000 * spent:.2f}", flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes:
        area: Group of checks, one of `AREAS`.
        name: What was checked.
        status: ``ok``, ``warn`` (works, but less well) or ``FAIL`` (something needed is missing).
        found: What is there.
        advice: What to type; empty when all is well.
    """

    area: str
    name: str
    status: str
    found: str
    advice: str = ""


def check(*, rendering: bool = True, json: bool = False, only: str | None = None, outputs: str = "outputs") -> int:
    """Check this machine: Python, packages, GPU, MuJoCo rendering, video, disk. Exit code 1 when something fails.

    Args:
        rendering: Also draw a few frames with each MuJoCo backend (some seconds).
        json: Print JSON, to be pasted into a bug report.
        only: Check one area only: python, packages, torch, rendering, codecs or machine.
        outputs: Folder that runs will write to; its disk is checked.
    """
    if only is not None and only not in AREAS:
        raise ConfigError(f"only={only}: expected an area. {did_you_mean(only, AREAS)}")
    chosen = [area for area in AREAS if (only is None and (rendering or area != "rendering")) or area == only]
    found = [result for area in chosen for result in AREAS[area](outputs)]
    failed = [result for result in found if result.status == "FAIL"]
    if json:
        checks = [asdict(result) for result in found]
        print(json_lib.dumps({"brachium": __version__, "ok": not failed, "checks": checks}, indent=2))
        return int(bool(failed))
    rows = [[result.area, result.name, result.status, result.found] for result in found]
    table(f"brachium {__version__}", ["area", "check", "", "found"], rows)
    for result in found:
        if result.advice:
            print(f"\n{result.status} {result.name}: {result.found}\n  {result.advice}")
    print(f"\n{len(failed)} of {len(found)} checks failed" if failed else "\nall checks that matter passed")
    return int(bool(failed))


def check_python(outputs: str = "") -> Iterator[Check]:
    """Python's version and where brachium lies."""
    from packaging.specifiers import SpecifierSet

    version, place = platform.python_version(), sys.executable
    wanted = SpecifierSet(MIN_PYTHON)
    fits = wanted.contains(version, prereleases=True)
    yield Check(
        area="python",
        name="Python",
        status="ok" if fits else "FAIL",
        found=f"{version} ({place})" + ("" if fits else f", expected {wanted}"),
        advice="" if fits else "make clean && make setup finds or fetches Python 3.12",
    )
    root = Path(__file__).resolve().parent
    yield Check(area="python", name="brachium", status="ok", found=f"{__version__}, commit {commit(root)} ({root})")


def commit(root: Path) -> str:
    """Return the git commit of a checkout, with ``+`` when files were changed; ``none`` for an installed package."""
    if not (root / ".git").exists():
        return "none"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def check_packages(outputs: str = "") -> Iterator[Check]:
    """Each requirement of pyproject.toml against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("brachium") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            area="packages",
            name="brachium",
            status="FAIL",
            found="not installed",
            advice="pip install -c constraints.txt -e . (in the repository)",
        )
        return
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, pins = requirement.name, str(requirement.specifier)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
        found = version or "not installed"
        yield Check(
            area="packages",
            name=name,
            status="ok" if fits else "FAIL",
            found=found if fits else f"{found}, expected {pins or 'any version'}",
            advice="" if fits else f"pip install '{requirement}'   (or in the repository: scripts/setup)",
        )


def check_torch(outputs: str = "") -> Iterator[Check]:
    """Which device torch would train on."""
    try:
        import torch
    except Exception as error:  # a broken CUDA library raises OSError, a broken wheel ImportError
        yield Check(
            area="torch",
            name="torch",
            status="FAIL",
            found=f"{type(error).__name__}: {error}",
            advice="pip install --force-reinstall -c constraints.txt torch torchvision",
        )
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            found = f"{card.name}, {human_bytes(card.total_memory)}, {bf16}, CUDA {torch.version.cuda}"
            yield Check(area="torch", name=f"cuda:{index}", status="ok", found=found)
    elif torch.backends.mps.is_available():
        yield Check(area="torch", name="mps", status="ok", found=f"Apple GPU, {platform.machine()}")
    else:
        threads = torch.get_num_threads()
        bf16 = "bf16 in hardware" if _cpu_has_bf16() else "bf16 emulated (slow): train in float32"
        yield Check(
            area="torch", name="device", status="ok", found=f"CPU only, {threads} threads, {bf16}; enough for the demo"
        )
        card_seen = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
        if card_seen:
            yield Check(
                area="torch",
                name="CUDA",
                status="warn",
                found="an NVIDIA driver is loaded, but torch does not see the GPU",
                advice=f"torch {torch.__version__} wants CUDA {torch.version.cuda}: compare with nvidia-smi",
            )


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() == "arm64"
    return "amx_bf16" in flags or "avx512_bf16" in flags or re.search(r"\bbf16\b", flags) is not None


def check_rendering(outputs: str = "") -> Iterator[Check]:
    """Draw with each MuJoCo backend; the one that brachium will use must work."""
    used = os.environ.get("MUJOCO_GL", "")
    others = [backend for backend in ("egl", "osmesa") if backend != used and sys.platform == "linux"]
    tried = {backend: render_with(backend) for backend in [used, *others]}
    working = [backend for backend, (passed, _, _) in tried.items() if passed]
    for backend, (passed, found, advice) in tried.items():
        needed = backend == used
        if needed and not passed and working:
            switch = f"export MUJOCO_GL={working[0]}   ({working[0]} works here)"
            advice = switch if advice.startswith("export") else f"{switch}. Or: {advice}"
        yield Check(
            area="rendering",
            name=f"MuJoCo {backend or 'default'}" + (" (in use)" if needed else ""),
            status="ok" if passed else "FAIL" if needed else "warn",
            found=found,
            # a spare backend that is missing is worth a line, not an instruction
            advice=advice if needed and not passed else "",
        )


def render_with(backend: str, timeout: float = 120.0) -> tuple[bool, str, str]:
    """Draw a small picture in a fresh process with MUJOCO_GL=`backend`.

    Returns:
        Whether it worked, what was found, and what to type when it did not.
    """
    variables = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    if backend:
        variables["MUJOCO_GL"] = backend
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", RENDER], env=variables, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return False, f"no picture within {timeout:.0f} s", "unset LIBGL_ALWAYS_INDIRECT; update the GPU driver"
    drawn = re.search(r"^RENDERED ([\d.]+)", done.stdout, re.MULTILINE)
    if drawn:  # errors while the process shuts down do not matter
        return True, f"{drawn[1]} ms a frame of 64 x 64 (start-up {time.monotonic() - start:.1f} s)", ""
    reason, advice = explain_render_error(done.stderr)
    return False, reason, advice


def explain_render_error(text: str) -> tuple[str, str]:
    """Return what a MuJoCo rendering traceback means, and what to type."""
    if "eglQueryString" in text or ("libEGL" in text and "cannot open shared object" in text):
        return "libEGL is not installed", f"{APT}   (as root; it brings libEGL.so.1)"
    if "Cannot initialize a EGL device display" in text:
        return (
            "libEGL is there, but it finds no GPU driver and no software rasteriser",
            f"{APT}   (as root; libgl1-mesa-dri draws on the CPU), or install the GPU's driver",
        )
    if "glGetError" in text or "OSMesa" in text:
        return "libOSMesa is not installed", "apt-get install -y libosmesa6   (as root)"
    if "No module named 'mujoco'" in text:
        return "mujoco is not installed", "pip install -c constraints.txt mujoco"
    if re.search(r"GLFW|DISPLAY|X11|gladLoadGL|FatalError", text):
        return "no display, and MUJOCO_GL does not ask for off-screen rendering", "export MUJOCO_GL=egl"
    if "invalid value for environment variable MUJOCO_GL" in text:
        return f"MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} is no backend", "export MUJOCO_GL=egl   (or osmesa)"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "the process ended without a word"), "export MUJOCO_GL=osmesa, or: " + APT


def check_codecs(outputs: str = "") -> Iterator[Check]:
    """Image and video codecs."""
    try:
        import zarr
        from zarr.registry import get_codec_class

        codec = get_codec_class("imagecodecs_jpeg")
        yield Check(area="codecs", name="zarr + JPEG", status="ok", found=f"zarr {zarr.__version__}, {codec.__name__}")
    except Exception as error:  # a codec that cannot load its library fails in its own way
        yield Check(
            area="codecs",
            name="zarr + JPEG",
            status="FAIL",
            found=f"{type(error).__name__}: {error}",
            advice="pip install -c constraints.txt zarr imagecodecs imagecodecs-zarr",
        )
    try:
        import imageio_ffmpeg

        exe = imageio_ffmpeg.get_ffmpeg_exe()
        yield Check(area="codecs", name="ffmpeg", status="ok", found=f"{imageio_ffmpeg.get_ffmpeg_version()} ({exe})")
    except Exception as error:
        yield Check(
            area="codecs",
            name="ffmpeg",
            status="warn",
            found=f"{type(error).__name__}: {error}",
            advice="pip install -c constraints.txt imageio-ffmpeg   (videos of rollouts need it)",
        )


def check_machine(outputs: str) -> Iterator[Check]:
    """Cores, memory and disk."""
    yield Check(
        area="machine",
        name="CPU",
        status="ok",
        found=f"{cores()} cores, {processor()}, {platform.machine()}, {sys.platform}",
    )
    if memory := memory_bytes():
        small = memory < 6 * GB
        yield Check(
            area="machine",
            name="memory",
            status="warn" if small else "ok",
            found=human_bytes(memory),
            advice="the demo wants about 4 GB; close other programs" if small else "",
        )
    free = free_bytes(outputs)
    status = "FAIL" if free < 0.5 * GB else "warn" if free < 5 * GB else "ok"
    yield Check(
        area="machine",
        name="disk",
        status=status,
        found=f"{human_bytes(free)} free at {Path(outputs).resolve()}",
        advice="" if status == "ok" else "free some space: old runs lie in outputs/ (the demo writes about 300 MB)",
    )


def memory_bytes() -> int:
    """Return the machine's memory, or the container's limit where it is lower; 0 when unknown [bytes]."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


AREAS: dict[str, Callable[[str], Iterator[Check]]] = {
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "rendering": check_rendering,
    "codecs": check_codecs,
    "machine": check_machine,
}
