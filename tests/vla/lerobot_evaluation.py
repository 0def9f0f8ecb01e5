"""LeRobot's own command and functions on exported folders, in a process of its own: prints one JSON line."""

import json
import os
import sys
from pathlib import Path

FOLDER, FOR_ROBOT, OUT = (Path(word) for word in sys.argv[1:4])
found = {}


def evaluate(path, *, n_envs=1, env=None, **changes):
    """Success is an info; a mistake its last line."""
    config = PreTrainedConfig.from_pretrained(path, cli_overrides=["--device=cpu"])
    config.pretrained_path = path
    for key, value in changes.items():
        setattr(config, key, value)
    env_config = make_env_config("toyreach", **(env or {}))
    envs = make_env(env_config, n_envs=n_envs, use_async_envs=False)
    policy = make_policy(config, env_cfg=env_config)
    overrides = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {}}}
    before, after = make_pre_post_processors(config, pretrained_path=str(path), preprocessor_overrides=overrides)
    env_before, env_after = make_env_pre_post_processors(env_config, config)
    with torch.no_grad():
        return eval_policy_all(
            envs=envs,
            policy=policy,
            env_preprocessor=env_before,
            env_postprocessor=env_after,
            preprocessor=before,
            postprocessor=after,
            n_episodes=n_envs,
            start_seed=0,
        )


def attempt(name, path=FOLDER, **options):
    try:
        evaluate(path, **options)
        found[name] = "no error"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"


def main():
    """The command first, as a person types it."""
    sys.argv = [
        "lerobot-eval",
        f"--policy.path={FOLDER}",
        "--policy.device=cpu",
        "--policy.n_action_steps=2",
        "--env.type=toyreach",
        "--eval.n_episodes=3",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",  # each process of its own would import LeRobot again: 10 seconds
        f"--output_dir={OUT / 'eval'}",
    ]
    os.environ["TOYREACH_JOURNAL"] = str(OUT / "journal")
    lerobot_eval.main()
    del os.environ["TOYREACH_JOURNAL"]
    found["episodes"] = json.loads((OUT / "eval" / "eval_info.json").read_text())["overall"]["n_episodes"]
    attempt("camera size", env={"size": 48})
    attempt("action", env={"actions": 3})
    attempt("moved", checkpoint=str(OUT / "nowhere"))
    attempt("another", identity="0" * 64)
    attempt("camera", path=OUT / "wrist")
    mistakes = {
        "state": {"observation.state": torch.zeros(1, 3)},
        "task": {"task": [""]},
        "range": {"observation.images.front": torch.full((1, 3, 32, 32), 255.0)},
        "not finite": {"observation.state": torch.full((1, 2), float("nan"))},
    }
    config = PreTrainedConfig.from_pretrained(FOLDER, cli_overrides=["--device=cpu"])
    policy = get_policy_class("brachium").from_pretrained(FOLDER, config=config)
    good = {
        "observation.state": torch.tensor([[0.1, 0.2]]),
        "observation.images.front": torch.full((1, 3, 32, 32), 0.2),
        "task": ["reach the blue ball"],
    }
    for name, change in mistakes.items():
        try:
            policy.select_action({**good, **change})
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["chunk"] = list(policy.predict_action_chunk(good).shape)
    robot(good)


def robot(good):
    """What a robot's keys amount to: degrees in another order, and a picture of another size."""
    config = PreTrainedConfig.from_pretrained(FOR_ROBOT, cli_overrides=["--device=cpu"])
    policy = get_policy_class("brachium").from_pretrained(FOR_ROBOT, config=config)
    picture = torch.zeros(1, 3, 48, 64)
    picture[..., 8:56] = 100 / 255
    seen = {**good, "observation.images.cam": picture, "observation.state": torch.tensor([[90.0, -45.0]])}
    seen.pop("observation.images.front")
    (observation,) = policy.translation.observations(seen)
    found["robot state"] = observation.state.tolist()
    found["robot image"] = [list(observation.images["front"].shape), int(observation.images["front"].min())]
    found["robot action"] = policy.translation.actions(np.array([[0.5, -0.25]])).tolist()
    found["robot acts"] = policy.select_action(seen).tolist()


if __name__ == "__main__":
    import numpy as np
    import torch

    torch.set_num_threads(1)
    from lerobot.configs import PreTrainedConfig
    from lerobot.envs import make_env, make_env_config, make_env_pre_post_processors
    from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
    from lerobot.scripts import lerobot_eval
    from lerobot.scripts.lerobot_eval import eval_policy_all

    main()
    print("FOUND " + json.dumps(found))
