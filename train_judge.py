"""The verb ``brachium train-judge``: have a policy carry out skills, and learn from it what can be done and what is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .console import log
from .datasets.store import EpisodeStore
from .executions import record_executions
from .policies.base import Policy
from .vla.judge import Judge
from .vla.judge_train import examples_of, fit_judge, show
from .vla.optim import Optimization
from .vla.pretrained import Pretrained


def train_judge(
    *,
    policy: str,
    vlm: str,
    suite: Mapping[str, Callable[..., Any]],
    executor: Callable[..., Policy],
    optimization: Optimization,
    episodes: int = 200,
    seed: int = 700_000,
    width: int = 128,
    workers: int = 2,
    out: str = "outputs/judge",
) -> int:
    """Learn affordances and success of a policy's skills on the features of a pretrained vision-language model.

    The policy carries out every skill of the suite, also some that cannot be done; whether they succeed is what the
    judge learns. What is recorded already is reused; an interrupted training goes on. The result, ``OUT/judge``, is for
    ``affordance=learned`` and ``detector=learned``; AUROC and ECE on held-out executions are told and drawn.

    Args:
        policy: Checkpoint that carries out the skills.
        vlm: Pretrained model whose features are judged.
        suite: Task name -> environment factory, one a skill.
        executor: Turns chunks into actions.
        optimization: Of the judge's network.
        episodes: Executions a skill.
        seed: First seed of the executions.
        width: Of the judge's hidden layers.
        workers: Recording processes.
        out: Folder.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for make in suite.values():
        record_executions(
            policy=policy,
            env=make,
            executor=executor,
            out=str(folder / "executed"),
            episodes=episodes,
            seed=seed,
            workers=workers,
        )
    store = EpisodeStore.open(folder / "executed")
    model = Pretrained.load(vlm)
    examples = examples_of(store, model, seed=optimization.seed)
    judge = fit_judge(examples, model, optimization=optimization, width=width, folder=folder)
    show(judge, folder)
    path = judge.save(folder / "judge")
    Judge.load(path)  # what cannot be loaded is no result
    log(f"{path}: saved and loaded again")
    return 0
