"""Train on real teleoperation: the public Bridge V2 sample through the commands that a user types.

Type: .venv/bin/python benchmarks/bridge.py PATH   (a folder with the RLDS/TFRecord data set)
Figures go to ``benchmarks/results/bridge.json``; ``make bench-demo`` puts them into ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of the data set")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    source = Path(options.source).resolve()
    os.chdir(ROOT)
    brachium = str(Path(os.sys.executable).with_name("brachium"))  # type: ignore[attr-defined]
    store, run = "outputs/bridge", "outputs/bridge-policy"
    subprocess.run(
        [brachium, "convert", f"source={source}", "data=bridge", "data.skip_first=1", f"out={store}", "overwrite=true"],
        check=True,
    )
    subprocess.run([brachium, "inspect", f"store={store}", f"out={store}-inspect"], check=True)
    words = ["model.points=false", "tune=full", "heldout=0.25", "optimization.lr=0.0005"]
    size = [f"optimization.steps={options.steps}", f"optimization.batch_size={options.batch}"]
    subprocess.run([brachium, "train", f"store={store}", f"out={run}", *words, *size], check=True)
    meta = json.loads((ROOT / run / "checkpoint" / "meta.json").read_text())
    from brachium.datasets.store import EpisodeStore

    found = {
        "episodes": EpisodeStore.open(store).num_episodes,
        "training": meta["store"]["episodes"],
        "metrics": {k.removeprefix("eval/"): v for k, v in meta["metrics"].items()},
        "parameters": meta["parameters"],
        "seconds": meta["seconds"]["total"],
        "steps": options.steps,
        "batch_size": options.batch,
    }
    target = ROOT / "benchmarks" / "results" / "bridge.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
