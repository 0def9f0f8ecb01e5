"""The figures of a deployment: one row a run, in a file that is whole at any moment, and as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..console import human_time, table
from ..policies.executor import ChunkExecutor
from ..policies.intervals import rate
from ..policies.remote import RemotePolicy
from .controller import Outcome

COLUMNS = (
    "instruction",
    "task",
    "ending",
    "time",
    "rate",
    "period error p99",
    "inference",
    "starved",
    "interventions",
)
SHOWN = 12


class Summary:
    """What is known of the runs so far.

    Args:
        policy: What was asked for.
        control_hz: Rate of commands [Hz].
        delay_ms: Added delay [ms].
        mode: Of the runs.
    """

    def __init__(self, *, policy: str, control_hz: float, delay_ms: float, mode: str) -> None:
        self._head: dict[str, Any] = {"policy": policy, "control_hz": control_hz, "delay_ms": delay_ms, "mode": mode}
        self.rows: list[dict[str, Any]] = []

    def of(self, remote: RemotePolicy, executor: ChunkExecutor) -> None:
        """Note who acts."""
        self._head |= {
            "identity": dict(remote.identity),
            "embodiment": remote.embodiment.name,
            "executor": type(executor).__name__,
        }

    def add(self, row: dict[str, Any], folder: Path) -> None:
        """One run more; ``folder/summary.json`` has it when this returns."""
        self.rows.append(row)
        summary = {
            **self._head,
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
            "total": total(self.rows),
            "runs": self.rows,
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".summary.json.partial"
        temporary.write_text(json.dumps(summary) + "\n")
        temporary.replace(folder / "summary.json")

    def show(self) -> None:
        """Print the last runs, and how many succeeded."""
        table(f"{len(self.rows)} runs" if len(self.rows) > 1 else "run", COLUMNS, map(_cells, self.rows[-SHOWN:]))
        found = total(self.rows)
        if found is not None:
            low, high = found["ci95"]
            spent = human_time(sum(row["seconds"] for row in self.rows if row["success"] is not None))
            print(
                f"success {found['success']}/{found['episodes']} = {100 * found['success_rate']:.0f} % "
                f"[{100 * low:.0f}, {100 * high:.0f}] in {spent}"
            )


def run_row(outcome: Outcome, told: str, seed: int, success: bool | None, failure: str) -> dict[str, Any]:
    """What is written about a run."""
    telemetry = outcome.telemetry
    return {
        "instruction": told,
        "seed": seed,
        "success": success,
        "failure": failure,
        "ending": outcome.ending,
        "why": outcome.why,
        "seconds": round(outcome.seconds, 3),
        **telemetry.summary(),
        "interventions": [asdict(entry) for entry in outcome.interventions],
        "samples": telemetry.samples(),
    }


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Successes with their interval; None where no run was judged."""
    judged = [row for row in rows if row["success"] is not None]
    return rate(sum(bool(row["success"]) for row in judged), len(judged)) if judged else None


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["instruction"][:44],
        "" if row["success"] is None else ("success" if row["success"] else row["failure"]),
        row["ending"],
        f"{row['seconds']:.1f} s",
        f"{row['rate_hz']:.1f} Hz",
        f"{row['period_error_ms'].get('p99', 0):.2f} ms",
        f"{row['inference_ms'].get('p50', 0):.0f} ms",
        str(row["starved_ticks"]),
        str(len(row["interventions"])),
    )
