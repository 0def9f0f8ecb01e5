"""Many environments at once in a few processes, for suites whose steps are Python and hold its lock."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from ..errors import BrachiumError, ConfigError
from ..hardware import cores
from .vector import reset_arguments

START_S = 300.0
"""How long processes may take to make their environments [s]; importing a suite takes some of them."""


class ProcessVectorEnv(VectorEnv):
    """Steps environments in a few processes that write observations into shared memory.

    One message a process and step: eight environments on two cores wait for two answers, not for eight. Processes are
    spawned, for one that is forked with an open OpenGL context hangs. Autoreset is disabled: reset single environments
    with ``reset(seed=[...], options={"reset_mask": mask})``. Environments whose episode has ended are not stepped.

    Args:
        env_fns: Factories of environments with equal spaces, whose observations are dictionaries.
        processes: Number of processes; by default one a core, at most one an environment.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]], *, processes: int | None = None
    ) -> None:
        if not env_fns:
            raise ConfigError("expected at least one environment factory, got none")
        self.num_envs = len(env_fns)
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED, "rests_finished": True}
        count = max(1, min(processes or cores(), self.num_envs))
        self._closed, self._started = False, False
        self._memory: SharedMemory | None = None
        self._workers: list[_Worker] = []
        context = get_context("spawn")
        try:
            for which in range(count):
                mine = list(range(which, self.num_envs, count))
                here, there = context.Pipe()
                made = [CloudpickleWrapper(env_fns[k]) for k in mine]
                process = context.Process(target=_serve, args=(there, made, mine), daemon=True)
                process.start()
                there.close()
                self._workers.append(_Worker(process, here, mine))
            spaces = [space for worker in self._workers for space in self._answer(worker, START_S)]
            self._share(spaces)
        except BaseException:
            self.close()
            raise

    def _share(self, spaces: list[tuple[gymnasium.Space[Any], gymnasium.Space[Any]]]) -> None:
        first = spaces[0]
        for observation, action in spaces:
            if (observation, action) != first:
                raise ConfigError(
                    f"expected environments with equal spaces, got {observation} and {action} beside {first[0]} and "
                    f"{first[1]}"
                )
        self.single_observation_space, self.single_action_space = first
        self.observation_space = batch_space(first[0], self.num_envs)
        self.action_space = batch_space(first[1], self.num_envs)
        layout = _Layout.of(first[0], first[1], self.num_envs)
        self._memory = SharedMemory(create=True, size=layout.size)
        self._arrays = layout.arrays(self._memory)
        self._texts: dict[str, list[str]] = {name: [""] * self.num_envs for name in layout.texts}
        self._done = np.ones(self.num_envs, bool)
        for worker in self._workers:
            worker.pipe.send(("share", self._memory.name, layout))
        for worker in self._workers:
            self._answer(worker)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]``."""
        seeds, mask, options = reset_arguments(self.num_envs, seed, options)
        self._started = True
        for found in self._ask("reset", np.flatnonzero(mask).tolist(), lambda k: seeds[k], options):
            for k, texts in found.items():
                for name, text in texts.items():
                    self._texts[name][k] = text
        self._done[mask] = False
        return self._batch(), {}

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the environments whose episode is running."""
        if not self._started:
            raise ConfigError("step() before reset(); call env.reset(seed=...) first")
        if len(actions) != self.num_envs:
            raise ConfigError(f"expected one action for each of {self.num_envs} environments, got {len(actions)}")
        arrays = self._arrays
        arrays["action"][:] = actions
        for name in ("reward", "terminated", "truncated", "success"):
            arrays[name][:] = 0
        failure = np.full(self.num_envs, "", object)
        for found in self._ask("step", np.flatnonzero(~self._done).tolist(), lambda k: None, None):
            for k, why in found.items():
                failure[k] = why
        flags = {name: arrays[name].astype(bool) for name in ("terminated", "truncated", "success")}
        self._done |= flags["terminated"] | flags["truncated"]
        info = {"success": flags["success"], "failure": failure}
        return self._batch(), arrays["reward"].copy(), flags["terminated"], flags["truncated"], info

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes and free the memory."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            try:
                worker.pipe.send(("close",))
            except (BrokenPipeError, OSError):
                continue
        for worker in self._workers:
            worker.process.join(5.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        if self._memory is not None:
            self._arrays = {}
            self._memory.close()
            self._memory.unlink()

    def _batch(self) -> dict[str, Any]:
        seen = {name[1:]: array.copy() for name, array in self._arrays.items() if name.startswith(".")}
        return seen | {name: tuple(texts) for name, texts in self._texts.items()}

    def _ask(self, what: str, lanes: Sequence[int], argument: Callable[[int], Any], more: Any) -> list[Any]:
        """Ask each process to do something in its own lanes among `lanes`, and wait for all."""
        asked = []
        for worker in self._workers:
            mine = [(k, argument(k)) for k in worker.lanes if k in lanes]
            if mine:
                try:
                    worker.pipe.send((what, mine, more))
                except (BrokenPipeError, OSError):
                    self._lost(worker)
                asked.append(worker)
        return [self._answer(worker) for worker in asked]

    def _answer(self, worker: _Worker, timeout: float | None = None) -> Any:
        try:
            if timeout is not None and not worker.pipe.poll(timeout):
                raise BrachiumError(f"an environment process made no environments within {timeout:.0f} s")
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            self._lost(worker)
        if kind == "config":
            raise ConfigError(value)
        if kind == "error":
            raise BrachiumError(f"an environment failed:\n{value}")
        return value

    def _lost(self, worker: _Worker) -> None:
        worker.process.join(1.0)
        raise BrachiumError(
            f"an environment process died with exit code {worker.process.exitcode}. Out of memory? Lower num_envs, or "
            "vector.processes"
        )


@dataclass(frozen=True)
class _Worker:
    process: Any
    pipe: Connection
    lanes: list[int]


@dataclass(frozen=True)
class _Layout:
    """Where arrays lie in the shared memory; those of observations have names with a dot before."""

    shapes: dict[str, tuple[tuple[int, ...], str]]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, observation: Any, action: Any, count: int) -> _Layout:
        parts = dict(observation.items())
        texts = tuple(name for name, space in parts.items() if isinstance(space, gymnasium.spaces.Text))
        shapes = {
            f".{name}": ((count, *space.shape), space.dtype.str) for name, space in parts.items() if name not in texts
        }
        shapes["action"] = ((count, *action.shape), action.dtype.str)
        shapes["reward"] = ((count,), "<f8")
        for name in ("terminated", "truncated", "success"):
            shapes[name] = ((count,), "|u1")
        return cls(shapes, texts)

    @property
    def size(self) -> int:
        return sum(self._bytes(*each) for each in self.shapes.values())

    def arrays(self, memory: SharedMemory) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        start = 0
        for name, (shape, dtype) in self.shapes.items():
            found[name] = np.ndarray(shape, dtype, memory.buf, start)
            start += self._bytes(shape, dtype)
        return found

    @staticmethod
    def _bytes(shape: tuple[int, ...], dtype: str) -> int:
        exact = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return -(-exact // 64) * 64  # arrays begin at cache lines


def _serve(pipe: Connection, makes: list[Any], lanes: list[int]) -> None:
    """What a process runs: it makes its environments, then does what it is asked until the pipe ends."""
    import warnings

    warnings.filterwarnings("ignore")  # of the suites, once a process
    envs: dict[int, Any] = {}
    memory: SharedMemory | None = None
    arrays: dict[str, np.ndarray] = {}
    texts: tuple[str, ...] = ()
    try:
        for k, make in zip(lanes, makes):
            envs[k] = make.fn()
        pipe.send(("done", [(env.observation_space, env.action_space) for env in envs.values()]))
        while True:
            what, *rest = pipe.recv()
            if what == "close":
                break
            if what == "share":
                memory = SharedMemory(rest[0])
                arrays, texts = rest[1].arrays(memory), rest[1].texts
                pipe.send(("done", None))
                continue
            found = {k: _do(what, envs[k], k, value, rest[1], arrays, texts) for k, value in rest[0]}
            pipe.send(("done", found))
    except (EOFError, KeyboardInterrupt):
        pass  # the command has ended
    except ConfigError as error:
        pipe.send(("config", str(error)))
    except Exception:
        pipe.send(("error", traceback.format_exc(limit=6)))
    finally:
        for env in envs.values():
            env.close()
        arrays = {}
        if memory is not None:
            memory.close()


def _do(
    what: str, env: Any, k: int, value: Any, options: Any, arrays: dict[str, np.ndarray], texts: tuple[str, ...]
) -> Any:
    """Reset one environment, which gives its texts, or step it, which gives why it failed."""
    if what == "reset":
        observation, _ = env.reset(seed=value, options=dict(options))
        found: Any = {name: observation[name] for name in texts}
    else:
        observation, reward, terminated, truncated, info = env.step(arrays["action"][k].copy())
        arrays["reward"][k], arrays["terminated"][k], arrays["truncated"][k] = reward, terminated, truncated
        arrays["success"][k] = bool(info.get("success", False))
        found = str(info.get("failure", ""))
    for name, part in observation.items():
        if name not in texts:
            arrays[f".{name}"][k] = part
    return found
