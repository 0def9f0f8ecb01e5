"""Projection against pixels; the renderer's rules; what a broken backend says."""

import os
import subprocess
import sys
import threading

import mujoco
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from brachium.errors import BrachiumError, RenderError, SpecMismatchError
from brachium.sim.camera import CameraRenderer, camera_id, project, thread_renderer
from brachium.sim.scene import Item, Scene
from brachium.sim.simulation import Simulation

SHADOWY = """<mujoco><visual><quality shadowsize="1024"/></visual><worldbody>
  <light name="lamp" pos="0 0 3" dir="0 0 -1" type="directional" castshadow="true"/>
  <geom type="plane" size="2 2 0.1" rgba="0.6 0.6 0.6 1"/>
  <geom name="ball" type="sphere" size="0.2" pos="0 0 0.6" rgba="0.2 0.9 0.2 1"/>
  <camera name="side" pos="1.5 0 0.6" xyaxes="0 1 0 -0.4 0 1" fovy="60"/>
</worldbody></mujoco>"""
CHECKED = """<mujoco><asset>
  <texture name="t" type="2d" builtin="checker" rgb1="1 0 0" rgb2="0 0 1" width="32" height="32"/>
  <material name="m" texture="t" texrepeat="4 4"/></asset><worldbody>
  <geom type="plane" size="2 2 0.1" material="m"/><camera name="side" pos="1.5 0 0.6" xyaxes="0 1 0 -0.4 0 1"/>
</worldbody></mujoco>"""


@pytest.fixture(scope="module")
def sims(make_arm):
    return {name: Simulation(make_arm(name)) for name in ("arm6_ee", "arm7_ee")}


def red_pixels(image):
    r, g, b = (image[..., k].astype(int) for k in range(3))
    return (r > 60) & (r > 2 * g) & (r > 2 * b)


def with_ball(sim, x, y, tool):
    ball = Item(name="red ball", kind="ball", rgb=(0.9, 0.05, 0.05), x=x, y=y, size=0.021)
    sim.load(Scene(items=(ball,)), tool)


@pytest.mark.parametrize("robot", ["arm6_ee", "arm7_ee"])
@pytest.mark.parametrize(
    ("camera", "tool", "places"),
    [
        ("front", (0.24, 0.0, 0.33), [(0.44, 0.0), (0.40, -0.17), (0.42, 0.15), (0.34, 0.12), (0.36, -0.10)]),
        ("wrist", (0.33, 0.0, 0.25), [(0.33, 0.0), (0.38, 0.04), (0.40, -0.05), (0.36, 0.0)]),
    ],
)
def test_a_projected_ball_is_where_its_pixels_are(sims, robot, camera, tool, places):
    sim, size = sims[robot], 192
    for x, y in places:
        with_ball(sim, x, y, np.array(tool))
        rows, columns = np.nonzero(red_pixels(sim.picture(camera, size)))
        assert len(rows) > 40, (x, y)
        assert min(rows.min(), columns.min()) > 0, "the ball is cut off: the test chose a bad place"
        assert max(rows.max(), columns.max()) < size - 1
        k = sim.embodiment.cameras.index(camera)
        u, v, depth = sim.project(("red ball",))[0, 3 + 3 * k : 6 + 3 * k]
        # pixel centres lie half a pixel from their edges; a ball's picture is centred a little outside its centre
        assert (columns.mean() + 0.5) / size == pytest.approx(u, abs=0.008), (x, y)
        assert (rows.mean() + 0.5) / size == pytest.approx(v, abs=0.008), (x, y)
        radius = 0.5 * np.tan(np.deg2rad(sim.model.cam_fovy[camera_id(sim.model, camera)]) / 2) ** -1 * 0.021 / depth
        assert np.sqrt(len(rows) / np.pi) / size == pytest.approx(radius, rel=0.08)


def test_projection_of_a_wide_picture_and_of_what_is_behind(sims):
    sim = sims["arm6_ee"]
    with_ball(sim, 0.40, -0.12, np.array([0.24, 0.0, 0.33]))
    image = np.empty((120, 200, 3), np.uint8)
    thread_renderer(120, 200).render(sim.model, sim.data, {"front": image})
    rows, columns = np.nonzero(red_pixels(image))
    points = np.stack([sim.position("red ball"), [2.0, 0.0, 2.0]])
    inside, behind = project(sim.model, sim.data, "front", points, aspect=200 / 120)
    assert (columns.mean() + 0.5) / 200 == pytest.approx(inside[0], abs=0.008)
    assert (rows.mean() + 0.5) / 120 == pytest.approx(inside[1], abs=0.008)
    assert inside[2] == pytest.approx(np.linalg.norm(points[0] - [0.68, 0.0, 0.62]), abs=0.03)
    assert behind[2] < 0


def test_the_same_state_gives_the_same_bytes_whatever_was_drawn_before(sims, make_arm):
    sim = sims["arm6_ee"]
    with_ball(sim, 0.4, 0.1, np.array([0.3, 0.0, 0.2]))
    first = sim.images()
    with_ball(sims["arm7_ee"], 0.3, 0.0, None)
    sims["arm7_ee"].images()
    sim.picture("wrist", 300)  # a larger size: the renderer is made anew
    again = sim.images()
    other = Simulation(make_arm("arm6_ee"))
    with_ball(other, 0.4, 0.1, np.array([0.3, 0.0, 0.2]))
    for name, image in first.items():
        assert image.shape == (96, 96, 3)
        assert image.std() > 5  # not an empty picture
        np.testing.assert_array_equal(again[name], image)
        np.testing.assert_array_equal(other.images()[name], image)


def render_text(text, renderer=None):
    model = mujoco.MjModel.from_xml_string(text)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    made = renderer or CameraRenderer(height=64, width=64)
    try:
        return made.render(model, data, {"side": np.empty((64, 64, 3), np.uint8)})["side"]
    finally:
        if renderer is None:
            made.close()


def test_shadows_are_off():
    """The floor under a ball is as bright as without the ball; MuJoCo's own renderer darkens it."""
    shaded, bare = render_text(SHADOWY), render_text(SHADOWY.replace('name="ball"', 'name="ball" group="4"'))
    ball = shaded[..., 1].astype(int) > shaded[..., 0].astype(int) + 30
    assert 20 < ball.sum() < 1000
    ball = binary_dilation(ball, iterations=3)  # its dark rim
    np.testing.assert_array_equal(shaded[~ball], bare[~ball])
    model = mujoco.MjModel.from_xml_string(SHADOWY)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 64, 64) as plain:
        plain.update_scene(data, "side")
        assert np.any(plain.render()[~ball].astype(int) < shaded[~ball].astype(int) - 20)


def test_one_renderer_draws_models_with_and_without_textures():
    renderer = CameraRenderer(height=64, width=64)
    other = CHECKED.replace('rgb1="1 0 0"', 'rgb1="0 1 0"')
    mixed = [render_text(text, renderer) for text in (SHADOWY, CHECKED, other, SHADOWY, CHECKED)]
    renderer.close()
    for text, image in zip((SHADOWY, CHECKED, other, SHADOWY, CHECKED), mixed):
        np.testing.assert_array_equal(image, render_text(text))
    assert mixed[1][..., 0].max() > 40  # red squares
    assert mixed[1][..., 1].max() < 20
    assert mixed[2][..., 1].max() > 40  # green ones, not the red of before
    assert mixed[2][..., 0].max() < 20


def in_thread(function):
    """Run in another thread; return what it returned or raised."""
    result = []

    def run():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


MESH = """<mujoco><asset><mesh name="m" vertex="0 0 0  {s} 0 0  0 {s} 0  0 0 {s}"/></asset><worldbody>
  <light pos="0 0 3" dir="0 0 -1" type="directional" castshadow="false"/>
  <geom type="plane" size="2 2 0.1" rgba="0.6 0.6 0.6 1"/>
  <geom type="mesh" mesh="m" pos="0 0 0.3" group="{group}" rgba="0.9 0.1 0.1 1"/>
  <camera name="side" pos="1.5 0 0.6" xyaxes="0 1 0 -0.4 0 1"/></worldbody></mujoco>"""


def test_models_take_turns_and_meshes_that_no_picture_shows_cost_no_context():
    renderer = CameraRenderer(height=48, width=48)

    def drawn(group, size):
        model = mujoco.MjModel.from_xml_string(MESH.format(group=group, s=size))
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        return renderer.render(model, data, {"side": np.empty((48, 48, 3), np.uint8)})["side"]

    hidden, shown, larger = drawn(3, 0.3), drawn(0, 0.3), drawn(0, 0.6)
    assert 5 < red_pixels(shown).sum() < red_pixels(larger).sum()
    assert not red_pixels(hidden).any()
    for group, size, first in ((3, 0.3, hidden), (3, 0.9, hidden), (0, 0.3, shown), (0, 0.6, larger), (3, 0.1, hidden)):
        np.testing.assert_array_equal(drawn(group, size), first)
    assert len(renderer._contexts) == 3
    renderer.close()


def test_a_renderer_serves_only_its_own_thread(sims):
    sim = sims["arm6_ee"]
    mine = thread_renderer(96, 96)
    outputs = {"front": np.empty((96, 96, 3), np.uint8)}
    error = in_thread(lambda: mine.render(sim.model, sim.data, outputs))
    assert isinstance(error, RenderError)
    assert "thread" in str(error)
    theirs = in_thread(lambda: thread_renderer(96, 96))
    assert theirs is not mine
    assert thread_renderer(96, 96) is mine
    np.testing.assert_array_equal(in_thread(sim.images)["front"], sim.images()["front"])


def test_an_unknown_camera_is_named_with_those_there_are(sims):
    sim = sims["arm6_ee"]
    with pytest.raises(SpecMismatchError, match=r"no camera 'top'.*'wrist'.*'front'|no camera 'top'.*'front'.*'wrist'"):
        sim.picture("top", 64)
    with pytest.raises(SpecMismatchError, match="no camera 'top'"):
        project(sim.model, sim.data, "top", np.zeros((1, 3)))


def test_a_picture_larger_than_the_renderer_is_refused(sims):
    sim = sims["arm6_ee"]
    renderer = CameraRenderer(height=32, width=48)
    for shape in ((33, 48, 3), (32, 49, 3)):
        with pytest.raises(SpecMismatchError, match="at most 32x48"):
            renderer.render(sim.model, sim.data, {"front": np.empty(shape, np.uint8)})
    renderer.close()


def run_python(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**kept, **environment}, capture_output=True, text=True
    )


DRAW = """
import sys
from brachium.errors import RenderError
try:
    from brachium.sim.camera import CameraRenderer
    import mujoco, numpy
    model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><camera name="c"/></worldbody></mujoco>')
    renderer = CameraRenderer(height=8, width=8)
    renderer.render(model, mujoco.MjData(model), {"c": numpy.zeros((8, 8, 3), numpy.uint8)})
    print("drawn")
except RenderError as error:
    print("RenderError:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="backends of Linux")
@pytest.mark.parametrize("backend", ["nonsense", "glfw", "disabled"])
def test_a_broken_backend_is_a_render_error_that_says_what_to_type(backend):
    """Without a display: no such backend; one that needs a display; rendering switched off."""
    done = run_python(DRAW, MUJOCO_GL=backend)
    assert "RenderError: MuJoCo cannot render here" in done.stdout, done.stdout + done.stderr
    assert f"MUJOCO_GL={backend}" in done.stdout
    assert "brachium doctor" in done.stdout
    assert issubclass(RenderError, BrachiumError)


@pytest.mark.skipif(sys.platform != "linux", reason="backends of Linux")
def test_the_command_line_says_so_without_a_traceback(tmp_path):
    code = f"import sys; from brachium.__main__ import main; sys.exit(main(['record', 'out={tmp_path}/store']))"
    done = run_python(code, MUJOCO_GL="nonsense")
    assert done.returncode == 2
    assert "MuJoCo cannot render here (MUJOCO_GL=nonsense" in done.stderr
    assert "brachium doctor" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="backends of Linux")
@pytest.mark.parametrize("first", ["", "import mujoco"])  # MuJoCo takes the window system when it is imported first
def test_without_a_display_and_a_choice_it_draws_all_the_same(first):
    done = run_python(first + DRAW)
    assert done.stdout.strip().endswith("drawn"), done.stdout + done.stderr


def test_a_process_that_drew_ends_without_a_word():
    """Open renderers of the main thread and of a thread that still runs are freed before the display is."""
    draw = """
import threading, numpy
import mujoco
from brachium.sim.camera import thread_renderer
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><camera name="c"/></worldbody></mujoco>')
data, drawn, never = mujoco.MjData(model), threading.Event(), threading.Event()
def work():
    thread_renderer(8, 8).render(model, data, {"c": numpy.zeros((8, 8, 3), numpy.uint8)})
    drawn.set()
work()
drawn.clear()  # Python kills a daemon thread inside MuJoCo's bindings with a signal: let it come out first
threading.Thread(target=lambda: (work(), never.wait()), daemon=True).start()
drawn.wait()
print("drawn")
"""
    done = run_python(draw)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "drawn", "")
