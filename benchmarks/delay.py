"""What bears delay: policies of ``brachium demo experiment=realtime``, round by round, over delay in plain simulation.

    python benchmarks/delay.py
    python benchmarks/delay.py --guided CHECKPOINT    # beside one of the same recipe with model.head.max_delay=0

Plain simulation with ``executor.inference_delay``: chunks come so many steps (of 100 ms) after their picture. A cell is
written when it is done, so that the command typed again goes on. Writes ``benchmarks/results/delay.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from brachium.console import log

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "delay.json"
DELAYS = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="outputs/realtime", help="of the demo")
    parser.add_argument("--guided", default="", help="checkpoint of a policy without max_delay")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", default="outputs/delay")
    options = parser.parse_args()
    folder, out = Path(options.folder), Path(options.out)
    rounds = sorted((folder / "rounds").glob("*-*/checkpoint"))
    rows: list[tuple[str, Path, str]] = []
    if options.guided:
        rows += [("no rows given, receding horizon", Path(options.guided), "receding")]
        rows += [("no rows given, guided (real-time chunking)", Path(options.guided), "rtc")]
    rows += [(f"rows given, {k} rounds of corrections", path, "rtc") for k, path in enumerate(rounds)]
    rows += [(f"rows given, {len(rounds)} rounds of corrections", folder / "flow-0" / "checkpoint", "rtc")]
    found: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    for delay in DELAYS:
        for name, checkpoint, executor in rows:
            row = found["rows"].setdefault(name, {})
            if str(delay) in row:
                continue
            place = out / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{delay}"
            words = [f"checkpoint={checkpoint}", "suite=basics_pose", "~suite.reach", f"executor={executor}"]
            words += [f"executor.inference_delay={delay}", f"episodes={options.episodes}", f"out={place}"]
            subprocess.run([sys.executable, "-m", "brachium", "eval", *words, "videos=0", "report=false"], check=True)
            tasks = json.loads((place / "summary.json").read_text())["tasks"]
            row[str(delay)] = {
                task: {key: tasks[task][key] for key in ("success", "episodes", "success_rate", "ci95")}
                for task in tasks
            }
            TARGET.write_text(json.dumps(found, indent=1) + "\n")
            log(f"{name}, {delay} steps: " + ", ".join(f"{t} {r['success']}" for t, r in row[str(delay)].items()))


if __name__ == "__main__":
    main()
