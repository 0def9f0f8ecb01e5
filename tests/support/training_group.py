"""One of several processes that run trainings one after the other; started by torchrun with a JSON file of them."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from brachium.console import silence
from brachium.vla.optim import Optimization
from brachium.vla.parallel import join, leave
from brachium.vla.recipe import Recipe
from brachium.vla.sources import MixedData
from brachium.vla.train import _train

DEFAULTS = {
    "weights": None,
    "grounding": None,
    "encoder": None,
    "init": None,
    "tune": "full",
    "lora_rank": 2,
    "freeze": None,
    "insulate": False,
    "env": None,
    "evaluator": None,
    "evaluate_every": 0,
    "snapshot_every": 0,
    "rollout_every": 0,
    "track": (),
    "resume": False,
}


class Stop(Exception):
    """The run is broken off here."""


def train_all(file):
    """Run the trainings of a file.

    ``stop`` breaks one off at that step; when one comes to the step ``copy``, its save and log are copied to the
    folders ``to``, for others to go on from.
    """
    torch.set_num_threads(1)
    group, place = join("ddp", "cpu", patience=60.0)
    make_share, make = MixedData.make_share, MixedData.make
    try:
        for run in json.loads(Path(file).read_text()):
            stop, copy, to = (run.pop(key, None) for key in ("stop", "copy", "to"))

            def watching(method, stop=stop, copy=copy, to=to, out=Path(run["out"])):
                def called(self, step, *args):
                    if step == stop:
                        raise Stop
                    if step == copy and group.main:
                        for place in to:
                            shutil.copytree(out, place, ignore=shutil.ignore_patterns("tensorboard"))
                    return method(self, step, *args)

                return called

            MixedData.make_share, MixedData.make = watching(make_share), watching(make)
            kind = run["optimization"].get("parallel", "ddp") if group.world > 1 else "alone"
            options = {**DEFAULTS, **run}
            options["optimization"] = Optimization(**options["optimization"])
            options["model"] = Recipe.from_dict(options["model"])
            with silence() if not group.main else nullcontext():
                try:
                    _train(group=replace(group, kind=kind), place=torch.device(place), **options)
                except Stop:
                    group.wait()
    finally:
        MixedData.make_share, MixedData.make = make_share, make
        leave()


if __name__ == "__main__":
    train_all(sys.argv[1])
