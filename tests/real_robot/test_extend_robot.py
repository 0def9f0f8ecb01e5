"""The driver of docs/extend/robot.md, moved by the real control loop."""

import re
import sys

import numpy as np
import pytest

from brachium.real_robot.body import JointBody
from brachium.real_robot.controller import Controller
from brachium.real_robot.pacing import Timing
from brachium.real_robot.safety.guard import SafetyGuard
from brachium.spec import EmbodimentSpec, FeatureSpec

from .test_motion import assert_within

FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)


class Pusher:
    def takes_over(self):
        return True

    def target(self, commanded, period):
        return commanded + 1.0


def test_the_example_driver_runs(root, tmp_path, monkeypatch):
    for name, content in FILE.findall((root / "docs" / "extend" / "robot.md").read_text()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for folder in ("mydrivers", "mydrivers/conf"):
        (tmp_path / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    robot = instantiate(OmegaConf.load(tmp_path / "mydrivers/conf/robot/gantry.yaml"))
    assert robot.spec.velocity == (0.3, 0.3)
    axes = {"shape": (2,), "names": ("x", "y"), "units": ("m", "m")}
    spec = EmbodimentSpec(
        name="gantry",
        robot="gantry",
        control_hz=10.0,
        cameras=(),
        state=FeatureSpec(name="state", **axes),
        action=FeatureSpec(name="action", **axes),
    )
    seen = [np.array([0.4, 0.3])]
    apply = robot.apply
    robot.apply = lambda position: (seen.append(position), apply(position))
    with robot:
        guard = SafetyGuard(robot.spec, 0.02)
        timing = Timing(control_hz=50.0, realtime=False)
        loop = Controller(robot, JointBody(spec, robot.spec), None, None, guard, timing=timing, human=Pusher())
        outcome = loop.run("", seconds=1.5)
    assert outcome.ending == "time"
    assert_within(seen, guard.limits, 0.02)
    assert np.ptp(np.array(seen)[:, 0]) > 0.2
    sys.modules.pop("mydrivers", None)


def test_the_example_refuses_when_it_is_not_connected(root):
    text = dict(FILE.findall((root / "docs" / "extend" / "robot.md").read_text()))["mydrivers/gantry.py"]
    namespace = {}
    exec(compile(text, "gantry.py", "exec"), namespace)
    with pytest.raises(namespace["RobotError"], match="not connected"):
        namespace["Gantry"]().read()
