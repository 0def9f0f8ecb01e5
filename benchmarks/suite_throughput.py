"""Environment steps a second of Meta-World with one 96 px camera: ours beside Gymnasium's AsyncVectorEnv, one run.

Theirs is what users write: the suite's environment with ``render_mode="rgb_array"`` at 96 px, its picture in the
observation, in an AsyncVectorEnv; beside it LeRobot's own wrapper, whose pictures have 480 px whatever is asked for.
Every environment gets the same random actions. Rounds are interleaved; each figure is the median over rounds.
Writes ``benchmarks/results/suite_throughput.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from brachium.envs.external.metaworld import MetaWorldEnv
from brachium.envs.processes import ProcessVectorEnv
from brachium.envs.vector import ThreadVectorEnv
from brachium.hardware import cores

SIDE = 96
STEPS = 40
TASKS = ("drawer-open", "window-close", "pick-place")


class Plain(gymnasium.Wrapper):
    """The suite's environment with its picture in the observation."""

    def __init__(self, task: str) -> None:
        warnings.filterwarnings("ignore")
        import metaworld  # noqa: F401 (registers the ids)

        env: Any = gymnasium.make(
            "Meta-World/MT1",
            env_name=f"{task}-v3",
            render_mode="rgb_array",
            camera_name="corner2",
            width=SIDE,
            height=SIDE,
        )
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
                "picture": gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8),
            }
        )

    def reset(self, **options: Any) -> Any:
        observation, info = self.env.reset(**options)
        return self._seen(observation), info

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return (self._seen(observation), *rest)

    def _seen(self, observation: Any) -> dict[str, np.ndarray]:
        return {"state": observation[:4].astype(np.float32), "picture": np.asarray(self.env.render())}


def lerobots(task: str) -> Any:
    """LeRobot's wrapper, as its evaluation makes it."""
    warnings.filterwarnings("ignore")
    from lerobot.envs.metaworld import MetaworldEnv

    return MetaworldEnv(task=f"metaworld-{task}-v3", obs_type="pixels_agent_pos")


def measure(env: Any, actions: np.ndarray) -> float:
    """Steps a second of all environments, from after the reset."""
    env.reset(seed=[100 + k for k in range(env.num_envs)])
    begin = time.perf_counter()
    for action in actions:
        env.step(action)
    return len(actions) * env.num_envs / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lerobot", action="store_true", help="measure LeRobot's wrapper too (slow to import)")
    options = parser.parse_args()
    found: dict[str, Any] = {"envs": options.envs, "cores": cores(), "side": SIDE, "tasks": {}}
    for task in TASKS:
        ours = partial(MetaWorldEnv, task=task, cameras={"corner2": SIDE})
        makes: dict[str, Any] = {
            "processes": lambda ours=ours: ProcessVectorEnv([ours] * options.envs),
            "threads": lambda ours=ours: ThreadVectorEnv([ours] * options.envs),
            "async": lambda task=task: AsyncVectorEnv(
                [partial(Plain, task)] * options.envs, context="spawn", autoreset_mode=AutoresetMode.DISABLED
            ),
        }
        if options.lerobot:
            makes["lerobot"] = lambda task=task: AsyncVectorEnv(
                [partial(lerobots, task)] * options.envs, context="spawn", autoreset_mode=AutoresetMode.DISABLED
            )
        rng = np.random.default_rng(0)
        actions = rng.uniform(-1.0, 1.0, (STEPS, options.envs, 4)).astype(np.float32)
        envs = {name: make() for name, make in makes.items()}
        rates: dict[str, list[float]] = {name: [] for name in envs}
        for env in envs.values():
            measure(env, actions[:8])
        for _ in range(options.rounds):
            for name, env in envs.items():
                rates[name].append(measure(env, actions))
        for env in envs.values():
            env.close()
        median = {name: float(np.median(each)) for name, each in rates.items()}
        found["tasks"][task] = {name: round(rate, 1) for name, rate in median.items()}
        ratio = median["processes"] / median["async"]
        print(f"{task}: " + ", ".join(f"{k} {v:.0f}/s" for k, v in median.items()) + f"; processes/async {ratio:.2f}")
    for name in next(iter(found["tasks"].values())):
        if name != "async":
            ratios = [rates[name] / rates["async"] for rates in found["tasks"].values()]
            found[f"{name}_over_async"] = round(float(np.exp(np.mean(np.log(ratios)))), 2)
    path = Path(__file__).parent / "results" / "suite_throughput.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "tasks"}, indent=1))


if __name__ == "__main__":
    main()
