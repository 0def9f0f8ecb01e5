"""Any Gymnasium id: the wrappers it was registered with belong to it, its own end counts, mistakes are one line."""

from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from brachium.envs.external.any_gymnasium import GymnasiumEnv
from brachium.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # of Gymnasium
ENDS = 5


class Line(gymnasium.Env):
    """A point on a line that stops by itself after some steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's convention)

    def __init__(self, blank=False, render_mode=None):
        self.blank, self.render_mode = blank, render_mode
        self.observation_space = gymnasium.spaces.Box(-10, 10, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-1, 1, 1).astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action):
        self.x, self.steps = np.clip(self.x + action, -10, 10).astype(np.float32), self.steps + 1
        return self.x.copy(), 0.0, False, self.steps >= ENDS, {"is_success": bool(abs(self.x[0]) < 1e-3)}

    def render(self):
        return None if self.blank else np.full((20, 20, 3), 100, np.uint8)


class Slower(gymnasium.ActionWrapper):
    """Halves every action."""

    def action(self, action):
        return 0.5 * action


@pytest.fixture(scope="module", autouse=True)
def registered():
    gymnasium.register("Line-v0", entry_point=Line, max_episode_steps=3)
    gymnasium.register("SlowLine-v0", entry_point=lambda **options: Slower(Line(**options)), max_episode_steps=3)
    yield
    for name in ("Line-v0", "SlowLine-v0"):
        gymnasium.registry.pop(name)


make = partial(
    GymnasiumEnv, instruction="Go to the middle", control_hz=10.0, max_steps=20, cameras={"render": 16}, images=True
)


@pytest.mark.parametrize(("name", "share"), [("Line-v0", 1.0), ("SlowLine-v0", 0.5)])
def test_what_an_environment_was_registered_with_stays_around_it(name, share):
    env = make(id=name)
    before = env.reset(seed=3)[0]["state"]
    after = env.step(np.array([0.8], np.float32))[0]["state"]
    np.testing.assert_allclose(after - before, 0.8 * share, atol=1e-6)


def test_the_environments_own_end_ends_the_episode_and_gymnasiums_limit_does_not():
    env = make(id="Line-v0")
    env.reset(seed=0)
    ends = [env.step(np.ones(1, np.float32))[2:] for _ in range(ENDS)]
    assert [terminated for terminated, _, _ in ends] == [False] * (ENDS - 1) + [True]
    assert ends[-1][2]["failure"]
    check_env(make(id="SlowLine-v0"), skip_render_check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"id": "Hopper-v3"}, "Gymnasium cannot make 'Hopper-v3'"),
        ({"id": "no_such_package:Line-v0"}, "no_such_package"),
        ({"id": "Line-v9"}, "Line"),
        ({"id": "Line-v0", "options": {"blnk": True}}, "blnk"),
    ],
)
def test_what_cannot_be_made_is_one_clear_line(options, words):
    with pytest.raises(ConfigError, match=words):
        make(**options)


def test_a_camera_that_gives_no_picture_is_named():
    env = make(id="Line-v0", options={"blank": True})
    with pytest.raises(ConfigError, match=r"camera 'render' gave .*expected a picture"):
        env.reset(seed=0)
