"""Environment steps a second: our thread vector environment beside Gymnasium's AsyncVectorEnv, the same env, one run.

Prints ratios and writes ``benchmarks/results/rollout_throughput.json``. Rounds are interleaved; each figure is the
median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from brachium.cli.compose import load
from brachium.envs.vector import ThreadVectorEnv


def script(make: Any, seeds: range) -> dict[int, np.ndarray]:
    """The expert's actions (steps, a) of each episode: what a rollout asks of an environment, without a policy."""
    env, found = make(images=False), {}
    for seed in seeds:
        env.reset(seed=seed)
        actions, over = [], False
        while not over:
            actions.append(env.expert_action())
            *_, terminated, truncated, _ = env.step(actions[-1])
            over = terminated or truncated
        found[seed] = np.stack(actions)
    return found


def measure(env: Any, scripts: dict[int, np.ndarray]) -> float:
    """Environment steps a second of playing all scripts, resetting finished episodes as an evaluation does."""
    count, waiting = env.num_envs, list(scripts)
    playing: list[int | None] = [waiting.pop(0) for _ in range(count)]
    at, done = np.zeros(count, int), 0
    begin = time.perf_counter()
    env.reset(seed=list(playing))
    actions = np.zeros((count, env.single_action_space.shape[0]), np.float32)
    while waiting:  # until the first lane runs out of episodes: all lanes are busy all the time
        for lane, seed in enumerate(playing):
            actions[lane] = scripts[seed][at[lane]]  # type: ignore[index]
        _, _, terminated, truncated, _ = env.step(actions)
        done, at = done + count, at + 1
        ended = terminated | truncated
        if ended.any() and len(waiting) >= ended.sum():
            for lane in np.flatnonzero(ended):
                playing[lane], at[lane] = waiting.pop(0), 0
            env.reset(seed=list(playing), options={"reset_mask": ended})
        elif ended.any():
            break
    return done / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Any] = {"envs": options.envs, "cores": os.cpu_count()}
    make = load("env/tabletop/place")
    scripts = script(make, range(options.episodes))
    warm = {seed: scripts[seed] for seed in range(options.envs + 1)}
    for images in (False, True):
        functions = [lambda make=make, images=images: make(images=images)] * options.envs
        ours, theirs = [], []
        thread = ThreadVectorEnv(functions)
        processes = AsyncVectorEnv(functions, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        for env in (thread, processes):
            measure(env, warm)
        for _ in range(options.rounds):
            ours.append(measure(thread, scripts))
            theirs.append(measure(processes, scripts))
        thread.close()
        processes.close()
        name = "two 96 px cameras" if images else "no cameras"
        ratio = float(np.median(np.array(ours) / np.array(theirs)))
        results[name] = {"threads": np.median(ours), "async": np.median(theirs), "ratio": ratio}
        print(f"{name}: threads {np.median(ours):.0f} steps/s, AsyncVectorEnv {np.median(theirs):.0f}, x {ratio:.2f}")
    target = Path(__file__).parent / "results" / "rollout_throughput.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
