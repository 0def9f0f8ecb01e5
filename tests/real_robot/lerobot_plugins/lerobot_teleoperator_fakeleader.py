"""A leader arm in memory, as a plugin of LeRobot: where it is held stands in a file."""

import json
from dataclasses import dataclass
from pathlib import Path

from lerobot.teleoperators import Teleoperator, TeleoperatorConfig


@TeleoperatorConfig.register_subclass("fakeleader")
@dataclass(kw_only=True)
class FakeLeaderConfig(TeleoperatorConfig):
    folder: str
    calibrated: bool = True


class FakeLeader(Teleoperator):
    config_class, name = FakeLeaderConfig, "fakeleader"

    def __init__(self, config):
        super().__init__(config)
        self.config, self._connected = config, False

    action_features = property(lambda self: {f"{j}.pos": float for j in ("shoulder", "elbow", "gripper")})
    feedback_features = property(lambda self: {})
    is_connected = property(lambda self: self._connected)
    is_calibrated = property(lambda self: self.config.calibrated)

    def connect(self, calibrate=True):
        assert not calibrate
        self._connected = True

    def calibrate(self):
        raise AssertionError("nobody asked for it")

    def configure(self):
        pass

    def get_action(self):
        held = json.loads((Path(self.config.folder) / "held").read_text())
        if held is None:
            raise ConnectionError("no answer from motor 3")
        return dict(zip(self.action_features, held))

    def send_feedback(self, feedback):
        raise NotImplementedError

    def disconnect(self):
        self._connected = False
