"""Fast off-screen rendering: one OpenGL context a thread, no shadows, no multisampling.

Software rasterisers spend nearly all their time on shadow maps and multisampling; without them a 96 px frame of a
table-top scene takes under a millisecond.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import threading
import weakref
from collections.abc import Mapping

import mujoco
import numpy as np

from ..errors import RenderError, SpecMismatchError
from .backend import choose_backend, unusable

MAX_GEOMS = 512
HIDDEN = 3
"""Groups of geoms from this on are collision shapes, which no picture shows."""
_OPEN: weakref.WeakSet[CameraRenderer] = weakref.WeakSet()


def _free_contexts() -> None:
    """Free what is still open before MuJoCo ends the display, after which freeing it prints a traceback."""
    for renderer in list(_OPEN):
        with contextlib.suppress(Exception):  # dm_control may have ended the display already: then nothing is left
            renderer._gl.free()


class CameraRenderer:
    """Renders cameras of any number of models at sizes up to (height, width), from the thread that made it."""

    def __init__(self, *, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._thread = threading.get_ident()
        self._gl = self._open_context()
        _OPEN.add(self)
        atexit.unregister(_free_contexts)
        atexit.register(_free_contexts)  # after the one by which MuJoCo ends the display: the last goes first
        self._contexts: dict[tuple[int, ...], mujoco.MjrContext] = {}
        self._keys: weakref.WeakKeyDictionary[mujoco.MjModel, tuple[int, ...]] = weakref.WeakKeyDictionary()
        self._bound: tuple[int, ...] = ()
        self._options = mujoco.MjvOption()
        self._options.geomgroup[HIDDEN:] = 0
        self._options.sitegroup[:] = 0
        self._options.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = 0  # rays of sensors are nothing to see
        self._scene: mujoco.MjvScene | None = None
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def _open_context(self) -> mujoco.GLContext:
        try:
            context = _context_class()(self.width, self.height)
            context.make_current()
        except Exception as error:  # each backend fails in its own way: ImportError, AttributeError, FatalError ...
            raise unusable(os.environ.get("MUJOCO_GL", ""), error) from error
        return context

    def _context_for(self, model: mujoco.MjModel) -> mujoco.MjrContext:
        """Return a context that holds the model's meshes and textures; models that show none share one.

        What a model shows is looked at once: meshes and textures that change after it are drawn as they were.
        """
        key = self._keys.get(model)
        if key is None:  # to hash megabytes of textures would cost more than to draw them
            key = (_shown_meshes(model), model.ntex, model.ntexdata, model.nhfield, model.nskin)
            if any(key):
                quality = model.vis.quality
                drawn = (quality.offsamples, quality.numslices, quality.numstacks, quality.numquads)
                key += (hash(model.tex_data.tobytes()), hash(drawn))
            self._keys[model] = key
        if key not in self._contexts:
            self._bound = ()
            try:
                self._contexts[key] = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
            except mujoco.FatalError as error:  # GLFW without a display opens a "context" that cannot draw
                raise unusable(os.environ.get("MUJOCO_GL", ""), error) from error
            mujoco.mjr_resizeOffscreen(self.width, self.height, self._contexts[key])
        if self._bound != key:  # each context draws into a buffer of its own
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._contexts[key])
            self._bound = key
        return self._contexts[key]

    def segment(
        self, model: mujoco.MjModel, data: mujoco.MjData, outputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Fill each array of `outputs`, keyed by camera name: int32 (height, width), the geom seen, -1 for none."""
        colors = {name: np.empty((*ids.shape, 3), np.uint8) for name, ids in outputs.items()}
        self.render(model, data, colors, segmented=True)
        assert self._scene is not None
        geoms = np.full(self._scene.ngeom + 2, -1, np.int32)  # segment id + 1 -> geom id; 0 is the background
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.segid >= 0:
                geoms[geom.segid + 1] = geom.objid
        for name, ids in outputs.items():
            coded = colors[name].astype(np.int64) @ np.array([1, 256, 65536])
            ids[:] = geoms[np.clip(coded, 0, len(geoms) - 1)]
        return outputs

    def render(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        outputs: dict[str, np.ndarray],
        *,
        segmented: bool = False,
        sites: bool = False,
        free: Mapping[str, mujoco.MjvCamera] | None = None,
        hidden: tuple[int, ...] = (),
    ) -> dict[str, np.ndarray]:
        """Fill each array of `outputs`, keyed by camera name: uint8 (height, width, 3). Returns `outputs`.

        With `segmented`, pixels hold the number of the thing seen instead of its colour; see `segment`. With `sites`,
        the model's sites of groups 0 to 2 are drawn too: suites of others show goals by them. Names in `free` are
        cameras that the model itself has not; groups of geoms in `hidden` are left out.
        """
        if threading.get_ident() != self._thread:
            raise RenderError("a CameraRenderer renders only in the thread that made it; make one in each thread")
        self._gl.make_current()
        context = self._context_for(model)
        if self._scene is None:
            self._scene = mujoco.MjvScene(model, MAX_GEOMS)
        scene, first = self._scene, True
        self._options.sitegroup[:HIDDEN] = sites
        self._options.geomgroup[:HIDDEN] = [group not in hidden for group in range(HIDDEN)]
        for name, image in outputs.items():
            height, width = image.shape[:2]
            if height > self.height or width > self.width:
                raise SpecMismatchError(
                    f"camera {name!r}: expected at most {self.height}x{self.width}, got {height}x{width}"
                )
            camera = (free or {}).get(name)
            if camera is None:
                camera, self._camera.fixedcamid = self._camera, camera_id(model, name)
            if first:  # geometry is the same for every camera: build the scene once
                mujoco.mjv_updateScene(
                    model, data, self._options, self._perturb, camera, mujoco.mjtCatBit.mjCAT_ALL, scene
                )
                for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
                    scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
                for flag in ("SEGMENT", "IDCOLOR"):
                    scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = segmented
                first = False
            else:
                mujoco.mjv_updateCamera(model, data, camera, scene)
            viewport = mujoco.MjrRect(0, 0, width, height)
            mujoco.mjr_render(viewport, scene, context)
            pixels = np.empty((height, width, 3), np.uint8)
            mujoco.mjr_readPixels(pixels, None, viewport, context)
            image[:] = pixels[::-1]  # OpenGL rows run bottom to top
        return outputs

    def close(self) -> None:
        """Free the OpenGL context."""
        for context in self._contexts.values():
            context.free()
        self._contexts.clear()
        self._gl.free()


def _shown_meshes(model: mujoco.MjModel) -> int:
    """What tells the meshes apart that pictures of a model show; 0 for none."""
    if not model.nmesh:
        return 0
    shown = (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH) & (model.geom_group < HIDDEN)
    last = int(model.geom_dataid[shown].max(initial=-1))
    if last < 0:
        return 0
    end = model.mesh_vertadr[last] + model.mesh_vertnum[last]
    faces = model.mesh_facenum[: last + 1].tobytes()
    return hash((last, faces, model.mesh_vert[:end].tobytes()))


def _context_class() -> type[mujoco.GLContext]:
    """The class for the backend in force, also where MuJoCo was imported before the backend was chosen."""
    backend = choose_backend().lower().strip()
    if backend not in ("egl", "osmesa"):
        return mujoco.GLContext
    made: type[mujoco.GLContext] = importlib.import_module(f"mujoco.{backend}").GLContext
    return made


_LOCAL = threading.local()


def thread_renderer(height: int, width: int) -> CameraRenderer:
    """Return this thread's renderer, made on first use and remade when a larger size is asked for."""
    renderer: CameraRenderer | None = getattr(_LOCAL, "renderer", None)
    if renderer is None or renderer.height < height or renderer.width < width:
        if renderer is not None:
            renderer.close()
        renderer = CameraRenderer(height=height, width=width)
        _LOCAL.renderer = renderer
    return renderer


def camera_id(model: mujoco.MjModel, name: str) -> int:
    """Return the id of a camera by name."""
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    if index < 0:
        names = [model.camera(i).name for i in range(model.ncam)]
        raise SpecMismatchError(f"no camera {name!r} in the model; it has {names}")
    return index


def project(
    model: mujoco.MjModel, data: mujoco.MjData, camera: str, points: np.ndarray, aspect: float = 1.0
) -> np.ndarray:
    """Project world points (k, 3) [m] into a camera.

    Returns:
        (k, 3): u and v in 0..1 from the image's left and top edges (outside that range when out of view), and the
        depth along the optical axis [m] (negative behind the camera).
    """
    index = camera_id(model, camera)
    world_R_camera = data.cam_xmat[index].reshape(3, 3)
    local = (points - data.cam_xpos[index]) @ world_R_camera
    depth = -local[:, 2]
    scale = 0.5 / np.tan(np.deg2rad(model.cam_fovy[index]) / 2)
    safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
    u = 0.5 + scale / aspect * local[:, 0] / safe
    v = 0.5 - scale * local[:, 1] / safe
    return np.stack([u, v, depth], axis=1)
