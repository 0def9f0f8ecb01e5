"""A model as it is drawn: fewer faces, no shadows, no multisampling. Physics goes on with the model itself.

Robots of other suites come with meshes for close-ups: tens of thousands of faces, which a software rasteriser
transforms for every frame, though at 96 px most are smaller than a pixel.
"""

from __future__ import annotations

import copy

import mujoco
import numpy as np

from ..errors import ConfigError


def thinned(model: mujoco.MjModel, cell: float) -> mujoco.MjModel:
    """A copy of a model to draw it by, with the same bodies, geoms, sites and cameras.

    Vertices of a mesh that share a cubic cell become one of them, and faces that lose their area by it go (vertex
    clustering, Rossignac and Borrel 1993). Collisions do not look at faces, and need not see the copy.

    Args:
        model: What is simulated.
        cell: Edge of the cell [m]; 0 keeps every face.
    """
    view = copy.copy(model)
    view.vis.quality.offsamples = 0
    view.vis.quality.shadowsize = 0
    for mesh in range(model.nmesh if cell > 0 else 0):
        _thin(model, view, mesh, cell)
    return view


def _thin(model: mujoco.MjModel, view: mujoco.MjModel, mesh: int, cell: float) -> None:
    first, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
    begin, end = int(model.mesh_faceadr[mesh]), int(model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    cells = np.round(model.mesh_vert[first : first + count] / cell).astype(np.int64)
    _, one, which = np.unique(_packed(cells - cells.min(axis=0)), return_index=True, return_inverse=True)
    faces = one[which][model.mesh_face[begin:end]]
    a, b, c = faces.T
    kept = np.flatnonzero((a != b) & (b != c) & (a != c))
    _, unlike = np.unique(_packed(np.sort(faces[kept], axis=1)), return_index=True)
    kept = kept[np.sort(unlike)]
    if not len(kept):  # smaller than a cell: as it is
        return
    stop = begin + len(kept)
    view.mesh_face[begin:stop] = faces[kept]
    view.mesh_facenormal[begin:stop] = model.mesh_facenormal[begin:end][kept]
    view.mesh_facetexcoord[begin:stop] = model.mesh_facetexcoord[begin:end][kept]
    view.mesh_facenum[mesh] = len(kept)


def _packed(rows: np.ndarray) -> np.ndarray:
    """One number for each row of three, none negative: NumPy finds equal numbers much faster than equal rows."""
    rows = rows.astype(np.int64)
    most = int(rows.max(initial=0)) + 1
    if most > 1 << 21:
        raise ConfigError(f"a mesh of {most} cells or vertices a side is too fine to thin out; a larger cell helps")
    return (rows[:, 0] * most + rows[:, 1]) * most + rows[:, 2]
