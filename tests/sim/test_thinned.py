"""Models as they are drawn: fewer faces, the same picture, and physics that sees nothing of it."""

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.sim.camera import CameraRenderer
from brachium.sim.thinned import thinned


def ball(n=40):
    """A ball of many faces as a mesh of radius 0.2 m."""
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, n, endpoint=False), np.linspace(0.02, np.pi - 0.02, n))
    points = 0.2 * np.stack([np.sin(v) * np.cos(u), np.sin(v) * np.sin(u), np.cos(v)], -1).reshape(-1, 3)
    index = np.arange(n * n).reshape(n, n)
    here, right = index[:-1], np.roll(index, -1, axis=1)[:-1]
    below, across = index[1:], np.roll(index, -1, axis=1)[1:]
    faces = np.concatenate([np.stack([here, below, across], -1), np.stack([here, across, right], -1)]).reshape(-1, 3)
    return points, faces


def model():
    points, faces = ball()
    vertices, triangles = (" ".join(map(str, a.reshape(-1))) for a in (points.round(5), faces))
    return mujoco.MjModel.from_xml_string(f"""<mujoco>
  <visual><quality offsamples="4" shadowsize="512"/></visual>
  <asset><mesh name="ball" vertex="{vertices}" face="{triangles}"/></asset>
  <worldbody><light pos="0 0 2"/><geom type="plane" size="1 1 0.1" pos="0 0 -0.3"/>
  <body name="ball"><freejoint/><geom type="mesh" mesh="ball" rgba="0.8 0.3 0.2 1"/><site name="top" pos="0 0 0.3"
   size="0.05" rgba="0 1 0 1"/></body>
  <camera name="side" pos="1 0 0.1" xyaxes="0 1 0 -0.1 0 1"/></worldbody></mujoco>""")


@pytest.fixture(scope="module")
def made():
    return model()


def test_a_thinned_mesh_has_fewer_faces_and_nearly_the_same_picture(made):
    data = mujoco.MjData(made)
    mujoco.mj_forward(made, data)
    fine, coarse = thinned(made, 0.0), thinned(made, 0.04)
    assert fine.mesh_facenum[0] == made.mesh_facenum[0]
    assert coarse.mesh_facenum[0] < made.mesh_facenum[0] / 3
    renderer, pictures = CameraRenderer(height=64, width=64), []
    for view in (fine, coarse):
        pictures.append(renderer.render(view, data, {"side": np.zeros((64, 64, 3), np.uint8)})["side"].astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 3.0  # of 255
    assert pictures[0].std() > 10
    renderer.close()


def test_physics_goes_on_with_the_model_itself(made):
    before = {name: np.array(getattr(made, name)) for name in ("mesh_face", "mesh_facenum", "mesh_facenormal")}
    samples = made.vis.quality.offsamples
    view = thinned(made, 0.03)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(made, name), value)
    assert (made.vis.quality.offsamples, view.vis.quality.offsamples) == (samples, 0)
    ends = []
    for one in (made, view):  # collisions do not look at faces: even the copy would simulate the same
        data = mujoco.MjData(one)
        for _ in range(200):
            mujoco.mj_step(one, data)
        ends.append(data.qpos.copy())
    np.testing.assert_array_equal(*ends)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.001, 0.5))
def test_what_is_left_are_faces_of_the_mesh(cell):
    made = model()
    view = thinned(made, cell)
    count = int(view.mesh_facenum[0])
    assert 0 < count <= made.mesh_facenum[0]
    faces = view.mesh_face[:count]
    assert faces.min() >= 0
    assert faces.max() < made.mesh_vertnum[0]
    if count < made.mesh_facenum[0]:
        assert all(len(set(face)) == 3 for face in faces.tolist())
        assert len({tuple(sorted(face)) for face in faces.tolist()}) == count
        corners = made.mesh_vert[faces]
        moved = cell * np.sqrt(3)  # no vertex went further than across its cell
        assert np.linalg.norm(corners, axis=2).max() <= 0.2 + moved
        assert [tuple(face) for face in faces.tolist()] == clustered(made.mesh_vert, made.mesh_face, cell)


def clustered(vertices, faces, cell):
    """Vertex clustering by a dictionary: the first vertex of each cell, the first face of each three cells."""
    first, found = {}, {}
    stands_for = [first.setdefault(tuple(np.round(v / cell)), i) for i, v in enumerate(vertices)]
    for face in faces.tolist():
        corners = tuple(stands_for[i] for i in face)
        if len(set(corners)) == 3:
            found.setdefault(tuple(sorted(corners)), corners)
    return list(found.values())


def test_sites_are_drawn_where_they_are_wanted(made):
    data = mujoco.MjData(made)
    mujoco.mj_forward(made, data)
    renderer = CameraRenderer(height=48, width=48)
    without, with_sites = (
        renderer.render(made, data, {"side": np.zeros((48, 48, 3), np.uint8)}, sites=sites)["side"].astype(int)
        for sites in (False, True)
    )
    green = with_sites[..., 1] - with_sites[..., 0] > 60
    assert green.sum() > 4
    assert not (without[..., 1] - without[..., 0] > 60).any()
    renderer.close()


def test_a_camera_that_the_model_has_not(made):
    from brachium.envs.external.cameras import looking_at

    data = mujoco.MjData(made)
    mujoco.mj_forward(made, data)
    renderer = CameraRenderer(height=48, width=48)
    empty = {"side": np.zeros((48, 48, 3), np.uint8), "mine": np.zeros((48, 48, 3), np.uint8)}
    near = looking_at((0.0, 0.0, 0.0), distance=0.8, azimuth=180.0, elevation=0.0)
    seen = renderer.render(made, data, empty, free={"mine": near})
    red = {name: (image[..., 0].astype(int) - image[..., 2] > 40).sum() for name, image in seen.items()}
    assert red["mine"] > red["side"] > 0  # nearer, so larger
    hidden = renderer.render(made, data, {"side": np.zeros((48, 48, 3), np.uint8)}, hidden=(0,))
    assert (hidden["side"][..., 0].astype(int) - hidden["side"][..., 2] <= 40).all()
    again = renderer.render(made, data, {"side": np.zeros((48, 48, 3), np.uint8)})
    np.testing.assert_array_equal(again["side"], seen["side"])  # what was hidden once is not hidden for ever
    renderer.close()
