"""An environment that fails, for processes that must find its class."""

import os

import gymnasium
import numpy as np

from brachium.errors import ConfigError


class Explodes(gymnasium.Env):
    """Ends its process, or raises."""

    observation_space = gymnasium.spaces.Dict({"state": gymnasium.spaces.Box(-1, 1, (2,), np.float32)})
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, how):
        self.how = how

    def reset(self, *, seed=None, options=None):
        return {"state": np.zeros(2, np.float32)}, {}

    def step(self, action):
        if self.how == "dies":
            os._exit(3)
        if self.how == "config":
            raise ConfigError("expected another thing")
        raise ZeroDivisionError("by nothing")


def explodes(how):
    return Explodes(how)
