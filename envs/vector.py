"""Many environments at once in threads: MuJoCo's physics and rendering release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

from ..errors import ConfigError
from ..hardware import cores


class ThreadVectorEnv(VectorEnv):
    """Steps environments in a few threads of this process; observations are written straight into one batch.

    Nothing is pickled, copied through pipes or started anew, and one OpenGL context a thread serves all its
    environments. An environment always runs in the same thread. Autoreset is disabled: reset single environments with
    ``reset(seed=[...], options={"reset_mask": mask})``. Environments whose episode has ended are not stepped.

    Args:
        env_fns: Factories of environments with equal spaces.
        threads: Number of threads; by default one a core, at most one an environment.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]], *, threads: int | None = None) -> None:
        if not env_fns:
            raise ConfigError("expected at least one environment factory, got none")
        self.num_envs = len(env_fns)
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED, "rests_finished": True}
        count = max(1, min(threads or cores(), self.num_envs))
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"env-{k}") for k in range(count)]
        made = [self._pool(k).submit(make) for k, make in enumerate(env_fns)]
        self.envs = [future.result() for future in made]
        first = self.envs[0]
        for k, env in enumerate(self.envs):
            if (env.observation_space, env.action_space) != (first.observation_space, first.action_space):
                raise ConfigError(
                    f"expected environments with equal spaces; environment {k} has {env.observation_space} and "
                    f"{env.action_space}, environment 0 has {first.observation_space} and {first.action_space}"
                )
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.observation_space = batch_space(first.observation_space, self.num_envs)
        self.action_space = batch_space(first.action_space, self.num_envs)
        parts = dict(first.observation_space.items())  # type: ignore[attr-defined]
        self._texts = {name for name, space in parts.items() if isinstance(space, gymnasium.spaces.Text)}
        self._done = np.ones(self.num_envs, bool)
        self._started = False
        self._observation: Any = create_empty_array(first.observation_space, self.num_envs)
        self._text: list[str] = [""] * self.num_envs

    def _pool(self, index: int) -> ThreadPoolExecutor:
        return self._pools[index % len(self._pools)]

    def _write(self, index: int, observation: dict[str, Any]) -> None:
        for key, value in observation.items():
            if isinstance(value, str):
                self._text[index] = value
            else:
                self._observation[key][index] = value

    def _batch(self) -> dict[str, Any]:
        return {
            key: tuple(self._text) if key in self._texts else value.copy() for key, value in self._observation.items()
        }

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]``."""
        seeds, mask, options = reset_arguments(self.num_envs, seed, options)
        self._started = True
        self._run(lambda k: self._reset_one(k, seeds[k], options), np.flatnonzero(mask).tolist())
        return self._batch(), {}

    def _reset_one(self, index: int, seed: int | None, options: dict[str, Any]) -> None:
        observation, _ = self.envs[index].reset(seed=seed, options=options)
        self._write(index, observation)
        self._done[index] = False

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the environments whose episode is running."""
        if not self._started:
            raise ConfigError("step() before reset(); call env.reset(seed=...) first")
        if len(actions) != self.num_envs:
            raise ConfigError(f"expected one action for each of {self.num_envs} environments, got {len(actions)}")
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        success = np.zeros(self.num_envs, bool)
        failure = np.full(self.num_envs, "", object)

        def one(index: int) -> None:
            observation, rewards[index], terminated[index], truncated[index], info = self.envs[index].step(
                actions[index]
            )
            success[index] = bool(info.get("success", False))
            failure[index] = str(info.get("failure", ""))
            self._write(index, observation)
            self._done[index] = terminated[index] or truncated[index]

        self._run(one, np.flatnonzero(~self._done).tolist())
        return self._batch(), rewards, terminated, truncated, {"success": success, "failure": failure}

    def _run(self, job: Callable[[int], None], indices: Sequence[int]) -> None:
        """Run the job of each environment in its thread, one task a thread, and wait for all."""

        def run_all(mine: Sequence[int]) -> None:
            for index in mine:
                job(index)

        futures: list[Future[None]] = []
        for which, pool in enumerate(self._pools):
            mine = [index for index in indices if index % len(self._pools) == which]
            if mine:
                futures.append(pool.submit(run_all, mine))
        for future in futures:
            future.result()

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment in its thread."""
        for index, env in enumerate(self.envs):
            self._pool(index).submit(env.close).result()
        for pool in self._pools:
            pool.shutdown()


def reset_arguments(
    count: int, seed: int | Sequence[int | None] | None, options: dict[str, Any] | None
) -> tuple[list[int | None], np.ndarray, dict[str, Any]]:
    """What a reset of `count` environments is asked for: a seed each, which of them (count,), and the other options."""
    options = dict(options or {})
    mask = np.asarray(options.pop("reset_mask", np.ones(count, bool)))
    if seed is None or isinstance(seed, (int, np.integer)):
        seeds: list[int | None] = [None if seed is None else int(seed) + k for k in range(count)]
    else:
        seeds = [None if one is None else int(one) for one in seed]
    if len(seeds) != count or mask.shape != (count,):
        raise ConfigError(
            f"expected {count} seeds and a reset_mask of shape ({count},), got {len(seeds)} and {mask.shape}"
        )
    return seeds, mask, options
