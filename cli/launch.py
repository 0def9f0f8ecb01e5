"""Sweeps by Hydra's own multirun: its launchers (Slurm by submitit, processes of this machine) and its sweepers.

Chosen by what is typed, for example ``hydra/launcher=submitit_slurm hydra.launcher.partition=gpu``. Every job is a
command of its own, composed and checked as if it had been typed where it runs.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.errors import HydraException

from ..console import table
from ..errors import ConfigError


@dataclass(frozen=True)
class Job:
    """A job of a sweep: the command that was typed, with the job's own values.

    Attributes:
        verb: Which verb.
        search_path: Where configs are looked for beside brachium's own.
    """

    verb: str
    search_path: tuple[str, ...]

    def __call__(self, config: Any) -> int:
        """Run it, where the launcher has put it; returns its exit code."""
        from ..__main__ import main

        words = as_typed(HydraConfig.get().overrides.task)
        GlobalHydra.instance().clear()  # the launcher's: the verb composes its own config
        places = [f"hydra.searchpath=[{','.join(self.search_path)}]"] if self.search_path else []
        return main([self.verb, *words, *places])


def as_typed(words: Sequence[str]) -> list[str]:
    """Overrides without the escapes that Hydra puts before braces."""
    return [re.sub(r"\$\\\{(.*?)\\\}", r"${\1}", word) for word in words]


def is_for_hydra(key: str) -> bool:
    """Whether an option is Hydra's own: which launcher or sweeper runs the jobs, and how."""
    return key.startswith(("hydra/", "hydra.")) and key != "hydra.searchpath"


def launch(verb: str, config_name: str, search_path: Sequence[str], words: Sequence[str]) -> int:
    """Run a sweep by Hydra's launcher and sweeper; returns 0 when every job went well.

    Raises:
        ConfigError: The plugin is not installed, or Hydra cannot make sense of what was typed.
    """
    from hydra import initialize_config_module

    key = "hydra.sweep.dir="
    folder = f"outputs/sweeps/{verb}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = next((word.removeprefix(key) for word in words if word.startswith(key)), folder)
    where = [] if any(word.startswith(key) for word in words) else [f"{key}{folder}"]
    own = "hydra.launcher.submitit_folder="
    if "hydra/launcher=submitit_local" in words and not any(word.startswith(own) for word in words):
        where.append(f"{own}{folder}/.submitit")  # not one a job, which may begin to write before its folder is there
    places = [f"hydra.searchpath=[{','.join(search_path)}]"] if search_path else []
    try:
        with initialize_config_module("brachium.conf", job_name=verb, version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
            found = hydra.multirun(
                config_name=config_name,
                task_function=Job(verb, tuple(search_path)),
                overrides=[*words, *where, *places],
                with_log_configuration=False,
            )
    except (HydraException, RuntimeError) as error:  # of a launcher: no Slurm here, say
        told = str(error).splitlines()[0]
        lacks = "submitit" in told and importlib.util.find_spec("submitit") is None
        raise ConfigError(told + (" Type: uv pip install 'brachium[slurm]'" if lacks else "")) from error
    rows = []
    for number, job in enumerate(job for batch in found or () for job in batch):
        code = job.return_value if job.status is JobStatus.COMPLETED else 1
        rows.append([str(number), " ".join(as_typed(job.overrides)), f"exit {code}" if code else "ok"])
    if rows:  # a sweeper that looks for the best says so itself
        table(f"brachium {verb}: {len(rows)} runs; what they said is in {folder}", ["#", "overrides", "result"], rows)
    return max((1 for row in rows if row[2] != "ok"), default=0)
