"""MuJoCo: worlds, cameras, kinematics, actuation, randomisation, batches of worlds."""

from .backend import load_mujoco

load_mujoco()  # every module here imports MuJoCo, and the backend has to be chosen before
