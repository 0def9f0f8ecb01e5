"""Assemble a MuJoCo model from a robot and a scene with MjSpec, and step it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import mujoco
import numpy as np

from .robot import RobotModel
from .scene import Item, Scene

TABLE_SIZE = (0.42, 0.52)
"""Half lengths of the table top in x and y [m]."""
TABLE_CENTRE_X = 0.28
CONTACT = {"solref": [0.008, 1.0], "solimp": [0.95, 0.99, 0.001, 0.5, 2.0]}
BOWL_WALLS = 8
SIDES, PRISM = 16, 24
"""Of what is round in pictures, and of the prisms with which cylinders touch."""
DRAWER_TRAVEL = 0.10
"""How far the drawer slides out [m]."""


@lru_cache(maxsize=16)
def _robot_spec(robot: RobotModel) -> mujoco.MjSpec:
    return robot.spec()


def robot_model(robot: RobotModel) -> mujoco.MjModel:
    """Compile the robot alone: what kinematics is computed on."""
    return _robot_spec(robot).copy().compile()


def build_model(robot: RobotModel, scene: Scene, timestep: float = 0.004) -> mujoco.MjModel:
    """Compile table, robot and items into one model; takes one to two milliseconds.

    Args:
        robot: Its file says where it stands; the world's origin is the base frame and the table top is z = 0.
        scene: Items become bodies of the same name; an item that moves has the free joint ``NAME``.
        timestep: Physics step [s].
    """
    spec = _robot_spec(robot).copy()
    spec.option.timestep = timestep
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # Pyramidal friction cones: with elliptic ones and few solver iterations a squeezed object is shot off the table.
    spec.option.cone = mujoco.mjtCone.mjCONE_PYRAMIDAL
    spec.visual.quality.shadowsize = 64  # shadows are off; the buffer is allocated all the same
    spec.visual.quality.offsamples = 0
    # A software rasteriser pays for every vertex: these look the same up to 256 px at 0.4 times the cost.
    spec.visual.quality.numslices, spec.visual.quality.numstacks, spec.visual.quality.numquads = SIDES, 10, 1
    spec.visual.map.znear = 0.01
    spec.visual.headlight.ambient = [0.35, 0.35, 0.35]
    spec.visual.headlight.diffuse = [0.2, 0.2, 0.2]
    spec.visual.headlight.specular = [0.0, 0.0, 0.0]
    world = spec.worldbody
    box, plane = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_PLANE
    world.add_geom(
        name="floor",
        type=plane,
        size=[2.0, 2.0, 0.1],
        pos=[0.3, 0.0, -0.7],
        rgba=[*scene.floor_rgb, 1.0],
        contype=1,
        conaffinity=1,
    )
    world.add_geom(
        name="table",
        type=box,
        size=[*TABLE_SIZE, 0.02],
        pos=[TABLE_CENTRE_X, 0.0, -0.02],
        rgba=[*scene.table_rgb, 1.0],
        friction=[0.8, 0.01, 0.0002],
        **CONTACT,
    )
    level = scene.brightness
    world.add_light(
        name="lamp",
        pos=list(scene.light),
        dir=[-scene.light[0] + 0.35, -scene.light[1], -scene.light[2]],
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        diffuse=[level] * 3,
        specular=[0.1] * 3,
        castshadow=False,
    )
    _add_camera(world, scene)
    for item in scene.items:
        if item.kind == "cylinder":
            spec.add_mesh(name=_prism(item), uservert=_prism_corners(item))
        _BUILDERS[item.kind](world, item)
    if any(item.kind == "drawer" for item in scene.items):
        spec.add_exclude(bodyname1="drawer", bodyname2="drawer_tray")
    return spec.compile()


def _add_camera(world: mujoco.MjsBody, scene: Scene) -> None:
    view = scene.view
    z = np.subtract(view.position, view.target)
    z /= np.linalg.norm(z)
    x = np.cross([0.0, 0.0, 1.0], z)
    x /= np.linalg.norm(x)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([x, np.cross(z, x), z], axis=1).ravel())
    world.add_camera(name=view.name, pos=list(view.position), quat=quat, fovy=view.fovy)


def _add_object(world: mujoco.MjsBody, item: Item) -> None:
    """A body with a free joint: cube (half edge), ball (radius) or cylinder (radius, 1.9 radii high)."""
    body = world.add_body(
        name=item.name, pos=[item.x, item.y, item.lift + item.height + 5e-4], quat=_yaw_quat(item.yaw)
    )
    body.add_freejoint(name=item.name)
    types = {
        "cube": (mujoco.mjtGeom.mjGEOM_BOX, [item.size] * 3),
        "ball": (mujoco.mjtGeom.mjGEOM_SPHERE, [item.size, 0, 0]),
        "cylinder": (mujoco.mjtGeom.mjGEOM_CYLINDER, [item.size, item.height, 0]),
    }
    kind, size = types[item.kind]
    touch: dict[str, Any] = {
        "mass": 0.04,
        "condim": 4 if item.kind == "cube" else 6,  # what is round also resists rolling
        "friction": [0.9, 0.01, 0.001],
        **CONTACT,
    }
    if item.kind == "cylinder":  # MuJoCo 3.8.1 now and then finds a leaning one deep in what it leans on
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=_prism(item), group=3, **touch)
        touch = {"mass": 0.0, "contype": 0, "conaffinity": 0}
    body.add_geom(name=item.name, type=kind, size=size, rgba=[*item.rgb, 1.0], **touch)


def _prism(item: Item) -> str:
    return f"{item.name} prism"


def _prism_corners(item: Item) -> list[float]:
    """Corners of the prism with which a cylinder touches: x, y, z of one after another [m]."""
    angles = 2.0 * np.pi * np.arange(PRISM) / PRISM
    ring = item.size * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [float(v) for z in (-item.height, item.height) for x, y in ring for v in (x, y, z)]


def _add_bowl(world: mujoco.MjsBody, item: Item) -> None:
    """A round container of slanted walls around a base; `size` is its outer radius."""
    body = world.add_body(name=item.name, pos=[item.x, item.y, 0.0], quat=_yaw_quat(item.yaw))
    rgba = [*item.rgb, 1.0]
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.78 * item.size, 0.003, 0], pos=[0, 0, 0.003], rgba=rgba, **CONTACT
    )
    radius, half = 0.86 * item.size, math.tan(math.pi / BOWL_WALLS) * item.size
    for k in range(BOWL_WALLS):
        angle = 2 * math.pi * k / BOWL_WALLS
        quat, tilt, spin = np.zeros(4), np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(spin, [0.0, 0.0, 1.0], angle)
        mujoco.mju_axisAngle2Quat(tilt, [0.0, 1.0, 0.0], 0.35)
        mujoco.mju_mulQuat(quat, spin, tilt)
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.003, half, 0.016],
            pos=[radius * math.cos(angle), radius * math.sin(angle), 0.016],
            quat=quat,
            rgba=rgba,
            **CONTACT,
        )


def _add_zone(world: mujoco.MjsBody, item: Item) -> None:
    """A flat painted disc of radius `size`; nothing collides with it."""
    body = world.add_body(name=item.name, pos=[item.x, item.y, 0.0])
    body.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        size=[item.size, 0.001, 0],
        pos=[0, 0, 0.001],
        rgba=[*item.rgb, 1.0],
        contype=0,
        conaffinity=0,
    )


def _add_drawer(world: mujoco.MjsBody, item: Item) -> None:
    """A cabinet whose tray slides out along its own -y; an upright handle stands on the tray's front."""
    cabinet = world.add_body(name="drawer", pos=[item.x, item.y, 0.0], quat=_yaw_quat(item.yaw))
    box, rgba = mujoco.mjtGeom.mjGEOM_BOX, [*item.rgb, 1.0]
    for size, pos in (
        ([0.065, 0.06, 0.004], [0, 0, 0.076]),
        ([0.004, 0.06, 0.036], [-0.061, 0, 0.036]),
        ([0.004, 0.06, 0.036], [0.061, 0, 0.036]),
        ([0.065, 0.004, 0.036], [0, 0.056, 0.036]),
    ):
        cabinet.add_geom(type=box, size=size, pos=pos, rgba=rgba, **CONTACT)
    tray = cabinet.add_body(name="drawer_tray", pos=[0, 0, 0])
    tray.add_joint(
        name="drawer",
        type=mujoco.mjtJoint.mjJNT_SLIDE,
        axis=[0, -1, 0],
        range=[0.0, DRAWER_TRAVEL],
        limited=True,
        damping=4.0,
        frictionloss=0.6,
    )
    front = [min(1.0, c + 0.25) for c in item.rgb] + [1.0]
    for size, pos in (([0.054, 0.052, 0.003], [0, -0.002, 0.008]), ([0.056, 0.004, 0.03], [0, -0.062, 0.034])):
        tray.add_geom(type=box, size=size, pos=pos, rgba=front, mass=0.15, **CONTACT)
    tray.add_geom(
        type=mujoco.mjtGeom.mjGEOM_CAPSULE,
        size=[0.008, 0.025, 0],
        pos=[0, -0.108, 0.06],
        rgba=[0.15, 0.15, 0.15, 1.0],
        mass=0.03,
        friction=[1.2, 0.01, 0.0002],
        **CONTACT,
    )
    tray.add_geom(type=box, size=[0.008, 0.022, 0.008], pos=[0, -0.086, 0.04], rgba=[0.15, 0.15, 0.15, 1.0], mass=0.01)
    tray.add_site(name="drawer_handle", pos=[0, -0.108, 0.06], size=[0.004, 0, 0], group=4, rgba=[0, 0, 0, 0])


def _yaw_quat(yaw: float) -> list[float]:
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


_BUILDERS = {
    "cube": _add_object,
    "ball": _add_object,
    "cylinder": _add_object,
    "bowl": _add_bowl,
    "zone": _add_zone,
    "drawer": _add_drawer,
}
