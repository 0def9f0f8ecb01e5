"""An environment and an expert that fail, in a module that other processes find."""

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


def failing(env, options, bad):
    """A source whose expert fails in some seeds."""
    from brachium.envs.record import make_source

    source = make_source(env, options)
    record = source.record
    source.record = lambda seed: [episode._replace(success=seed not in bad) for episode in record(seed)]
    return source
