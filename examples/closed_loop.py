"""A trained policy in closed loop, by hand: what `brachium eval` does, without its comforts.

Type: .venv/bin/python examples/closed_loop.py outputs/demo/flow-0/checkpoint outputs/episode.mp4
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")

from brachium import Observation, VLAPolicy
from brachium.cli.compose import load
from brachium.policies.executor import RecedingHorizon
from brachium.policies.video import write_video


def main() -> None:
    checkpoint, video = sys.argv[1], Path(sys.argv[2])
    env = load("env/tabletop/place")(render_mode="rgb_array")
    policy = RecedingHorizon(VLAPolicy.from_checkpoint(checkpoint), execute_horizon=1)
    policy.embodiment.require_same(env.spec_embodiment, "checkpoint", "environment")
    seed = 1_000_000
    seen, _ = env.reset(seed=seed)
    policy.reset(0, seed)
    frames, over = [env.render()], False
    while not over:
        images = {name: seen[name] for name in policy.embodiment.camera_names}
        observation = Observation(images=images, state=seen["state"], instruction=seen["instruction"])
        action = policy.act([observation], [0])[0]
        seen, _, terminated, truncated, info = env.step(action)
        frames.append(env.render())
        over = terminated or truncated
    video.parent.mkdir(parents=True, exist_ok=True)
    write_video(video, frames, fps=policy.embodiment.control_hz)
    print(f"{seen['instruction']!r}: {'success' if info['success'] else info['failure']} in {len(frames) - 1} steps")
    print(f"video: {video}")


if __name__ == "__main__":
    main()
