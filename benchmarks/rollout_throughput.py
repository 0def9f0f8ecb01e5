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


def measure(env: Any, steps: int, actions: np.ndarray) -> float:
    """Environment steps a second, resetting finished episodes as an evaluation does."""
    count = env.num_envs
    env.reset(seed=list(range(count)))
    seed, begin, done = count, time.perf_counter(), 0
    for k in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[k])
        done += count
        ended = terminated | truncated
        if ended.any():
            seeds = [seed + i if e else None for i, e in enumerate(ended)]
            seed += count
            env.reset(seed=seeds, options={"reset_mask": ended})
    return done / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Any] = {"envs": options.envs, "cores": os.cpu_count()}
    for images in (False, True):
        make = load("env/tabletop/place")
        functions = [lambda make=make, images=images: make(images=images)] * options.envs
        rng = np.random.default_rng(0)
        single = make(images=images)
        low, high = single.action_space.low, single.action_space.high
        actions = rng.uniform(low, high, (options.steps, options.envs, len(low))).astype(np.float32)
        ours, theirs = [], []
        thread = ThreadVectorEnv(functions)
        processes = AsyncVectorEnv(functions, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        for env in (thread, processes):
            measure(env, 5, actions)
        for _ in range(options.rounds):
            ours.append(measure(thread, options.steps, actions))
            theirs.append(measure(processes, options.steps, actions))
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
