"""Turns what was measured on the way to a robot (``benchmarks/results/``) into ``docs/results-robot.md``.

python benchmarks/robot_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_page import TASKS, cell, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXECUTORS = {"receding": "receding horizon", "ensemble": "temporal ensemble", "rtc": "real-time chunking"}


def read(name: str) -> dict[str, Any]:
    """A file of results; empty where it was not measured."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


Cells = Mapping[tuple[str, ...], Mapping[str, Any]]


def success_table(cells: Cells) -> str:
    """Success in plain simulation and in real time."""
    rows = []
    measured = {key[0]: value for key, value in cells.items() if key[1] == "plain"}
    for task, before in ((task, measured[task]) for task in TASKS if task in measured):
        count = str(before["episodes"])
        real = [cells.get((task, "rtc", delay, "1", count)) for delay in ("0", "150")]
        shown = [
            "" if one is None else f"{cell(one)}, {100 * one['success_rate'] / before['success_rate']:.0f} % of plain"
            for one in real
        ]
        rows.append([task, cell(before), *shown])
    return table(["task", "plain simulation", "real time, 50 Hz", "real time, 150 ms added"], rows)


def realtime(found: Mapping[str, Any], picture: Path) -> str:
    """Success in real time beside plain simulation, and over delay."""
    cells = cells_of(found)
    text = (
        "`benchmarks/realtime.py success`: server, controller and simulated robot in three processes on loopback, the "
        "controller at 50 Hz, the policy of `brachium demo experiment=realtime` (10 steps a second) with "
        f"`executor=rtc`; the scenes of both are the same. {found.get('note', '')}\n\n{success_table(cells)}"
    )
    swept = {key: value for key, value in cells.items() if key[1] != "plain" and value["episodes"] < 100}
    return f"{text}\n\n{sweep(swept, picture)}" if swept else text


def cells_of(found: Mapping[str, Any]) -> Cells:
    """(task, executor or plain, delay, temperature, episodes) -> what was measured."""
    return {tuple(key.split("/")): value for key, value in found.get("cells", {}).items()}


def sweep(cells: Cells, picture: Path) -> str:
    """Executors over added delay: a table, and a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(key[0] for key in cells))
    delays = sorted({float(key[2]) for key in cells})
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.2), squeeze=False, sharey=True)
    rows = []
    for task, axis in zip(tasks, axes[0]):
        for name, label in EXECUTORS.items():
            line = {float(key[2]): v for key, v in cells.items() if key[0] == task and key[1] == name}
            if not line:
                continue
            rows.append([task, label, *(cell(line[d]) if d in line else "" for d in delays)])
            at = sorted(line)
            rates = [100 * line[d]["success_rate"] for d in at]
            low, high = ([100 * line[d]["ci95"][k] for d in at] for k in (0, 1))
            axis.plot(at, rates, marker="o", label=label)
            axis.fill_between(at, low, high, alpha=0.12)
        axis.set(title=task, xlabel="delay added to each reply [ms]", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("success [%]")
    axes[0][0].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    columns = ["task", "executor", *(f"+{d:g} ms" for d in delays)]
    return (
        "`benchmarks/realtime.py delays`: the same policy and robot, each executor over delay added to every reply "
        f"(inference itself takes 30 to 40 ms):\n\n{table(columns, rows)}\n\n![Success over delay]({picture.name})"
    )


def ablation(found: Mapping[str, Any]) -> str:
    """What each part of a policy that bears delay is worth."""
    delays = sorted({int(delay) for row in found["rows"].values() for delay in row})
    rows = [
        [name, task, *(cell(row[str(d)][task]) if str(d) in row else "" for d in delays)]
        for name, row in found["rows"].items()
        for task in ("push", "place")
    ]
    return (
        "`benchmarks/delay.py`: plain simulation in which chunks come some steps of 100 ms after their picture "
        "(`executor.inference_delay`), one chunk at a time:\n\n"
        + table(["policy", "task", *(f"{100 * d} ms" for d in delays)], rows)
    )


def clock(found: Mapping[str, Any]) -> str:
    """The control loop's clock beside LeRobot's."""
    rows = []
    for name, loop in found.get("loops", {}).items():
        error = loop["period_error_ms"]
        rows.append(
            [
                name,
                f"{loop['rate_hz']:.2f}",
                *(f"{error[key]:.4f}" for key in ("p50", "p99", "max")),
                f"{loop['off_the_grid_ms']['last']:.1f}",
                str(loop["skipped"]),
                f"{loop['seconds']:.0f}",
            ]
        )
    columns = ["loop", "rate [Hz]", "period error p50 [ms]", "p99", "max", "last command off the grid [ms]"]
    return f"`benchmarks/control_loop.py`, {found.get('machine')}:\n\n" + table([*columns, "skipped", "seconds"], rows)


def serving(found: Mapping[str, Any]) -> str:
    """The server beside bare websockets, and under hostile messages."""
    parts = []
    if "bytes" in found.get("throughput", {}):
        rows = []
        for count, row in found["throughput"]["clients"].items():
            for name, label in (
                ("ours", "brachium serve"),
                ("echo", "bare echo"),
                ("short_reply", "bare, short reply"),
                ("ours_5ms", "brachium serve, a model of 5 ms, without it"),
                ("echo_paced", "bare echo, asked every 5 ms"),
            ):
                if name in row:
                    r = row[name]
                    asked = "ours_5ms" if name == "echo_paced" else "ours"
                    ratio = row.get(f"p50_{asked}_to_{name}", [None])[0]
                    rows.append(
                        [count, label, f"{r['requests_per_s']:.0f}", f"{r['p50_ms']:.2f}", f"{r['p99_ms']:.2f}"]
                    )
                    rows[-1].append("" if ratio is None else f"{ratio:.2f}")
        size = found["throughput"]["bytes"]
        columns = ["clients", "server", "requests/s", "p50 [ms]", "p99 [ms]", "ours to it"]
        parts.append(
            f"`benchmarks/serving.py throughput`: two cameras of 224 px, {size['request']} bytes in, "
            f"{size['reply']} out, a policy that answers at once, so that all but the model is measured; for one that "
            "takes 5 ms (its time subtracted) the echo is asked as seldom. The bare echo gives the request's bytes "
            "back; the one with the short reply takes them and gives as few as ours does:\n\n" + table(columns, rows)
        )
    if "fuzz" in found:
        fuzz = found["fuzz"]
        told = ", ".join(f"{count} {what}" for what, count in fuzz["outcomes"].items())
        parts.append(
            f"`benchmarks/serving.py fuzz`: {fuzz['messages']} hostile messages ({told}); the server stayed "
            f"alive and right: {fuzz['alive_and_right']}. Memory {fuzz['memory_mb'][0]} MB at first, "
            f"{fuzz['memory_mb'][-1]} MB at "
            "the end. "
            f"Clients without the token: {', '.join(f'{n} times {k}' for k, n in fuzz['strangers'].items())}."
        )
    return "\n\n".join(parts)


def faults(found: Mapping[str, Any]) -> str:
    """Faults, each injected many times."""
    rows = []
    for name, row in found.get("faults", {}).items():
        endings = ", ".join(f"{count} {ending}" for ending, count in row["endings"].items())
        wrong = ", ".join(f"{count} {kind}" for kind, count in row["violations"].items())
        rows.append([name, str(row["times"]), endings, wrong or "none"])
    return (
        "`benchmarks/faults.py`: injected at a random moment of a motion of the simulated arm. A violation is a "
        "limit that was exceeded (position, velocity, acceleration of the commands that reached the robot, "
        "measured position), a "
        "robot that was not at rest in the end, or an ending that is not the one defined for the fault:\n\n"
        + table(["fault", "times", "how the run ended", "violations"], rows)
    )


def main() -> None:
    sections = {
        "Success in real time": ("realtime", lambda found: realtime(found, ROOT / "docs" / "realtime.png")),
        "What bears delay": ("delay", ablation),
        "The clock of the control loop": ("control_loop", clock),
        "The policy server": ("serving", serving),
        "Faults": ("faults", faults),
    }
    text = (
        "# Results on the way to a robot\n\nWritten by `benchmarks/robot_page.py` from what the benchmarks measured.\n"
    )
    for title, (name, write) in sections.items():
        if found := read(name):
            text += f"\n## {title}\n\n{write(found)}\n"
    (ROOT / "docs" / "results-robot.md").write_text(text)
    readme, block = ROOT / "README.md", success_table(cells_of(read("realtime")))
    pattern = r"(<!-- realtime: begin -->\n).*?(<!-- realtime: end -->)"
    filled = re.sub(pattern, lambda m: f"{m[1]}\n{block}\n\n{m[2]}", readme.read_text(), flags=re.DOTALL)
    readme.write_text(filled)


if __name__ == "__main__":
    main()
