"""Several processes that train one model: the numbers of one, saves for any number, and what happens to a lost one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from brachium.__main__ import main
from brachium.errors import ConfigError
from brachium.vla.checkpoint import load_checkpoint
from brachium.vla.draws import Draws, integers, normal, uniform
from brachium.vla.ground import Grounding
from brachium.vla.optim import Optimization
from brachium.vla.parallel import Processes, announced
from brachium.vla.policy_data import Rows
from brachium.vla.train import _train

from ..support.training_group import DEFAULTS
from .conftest import make_embodiment, make_recipe, record_demos

WORKER = Path(__file__).resolve().parents[1] / "support" / "training_group.py"
STEPS, SAVED, ENOUGH = 50, 30, 36
EXPERT = {
    "_target_": "brachium.vla.heads.expert.ExpertHead",
    "width": 32,
    "mlp": 32,
    "draws": 2,
    "max_delay": 2,
    "steps": 2,
}


def scenario(stores, out, **optimization):
    """A training of every weight, on robots of two kinds in one batch."""
    options = {"steps": STEPS, "batch_size": 12, "warmup": 5, "lr": 1e-3, "ema": 0.9, "precision": "float32"}
    options |= {"log_every": 1, "save_every": SAVED, "seed": 1, **optimization}
    recipe = make_recipe(EXPERT, action_horizon=4).to_dict()
    return {"store": stores, "out": str(out), "model": recipe, "optimization": options, "heldout": 0.2}


def together(processes, runs, folder):
    """Run trainings in so many processes."""
    file = folder / f"runs-{processes}.json"
    file.write_text(json.dumps(runs))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(WORKER), str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]


def losses(out, key="loss"):
    """Step -> loss."""
    lines = [json.loads(line) for line in (Path(out) / "log-act.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def curve(out, key="loss"):
    found = losses(out, key)
    return np.array([found[k] for k in sorted(found)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of trainings by one, two and four processes, and of those that went on from what four had saved."""
    folder = tmp_path_factory.mktemp("parallel")
    other = make_embodiment("other", names=("x", "y", "z"), actions=2)
    stores = [
        str(record_demos(folder / "tiny", range(8)).path),
        str(record_demos(folder / "other", range(2), spec=other).path),
    ]
    first = [scenario(stores, folder / "one"), scenario(stores, folder / "parts", accumulate=3, checkpointing=True)]
    together(1, first, folder)
    kinds = ("ddp", "fsdp")
    for count in (4, 2):
        runs = [scenario(stores, folder / f"{kind}-{count}", parallel=kind) for kind in kinds]
        if count == 4:  # whose save of step 30 is there until the end
            to = [[str(folder / f"{kind}-4-to-{n}") for n in (2, 1)] for kind in kinds]
            runs = [{**run, "copy": ENOUGH, "to": places} for run, places in zip(runs, to)]
        else:
            crossed = zip(kinds, reversed(kinds))  # either kind goes on from the other's save
            resumed = [scenario(stores, folder / f"{kind}-4-to-2", parallel=other) for kind, other in crossed]
            runs += [{**run, "resume": True, "stop": ENOUGH} for run in resumed]
        together(count, runs, folder)
    alone = [{**scenario(stores, folder / f"{kind}-4-to-1"), "resume": True} for kind in kinds]
    together(1, [{**alone[0], "stop": ENOUGH}, alone[1]], folder)
    return folder


@pytest.mark.parametrize("name", ["parts", "ddp-4", "ddp-2", "fsdp-4", "fsdp-2"])
def test_the_losses_are_those_of_one_process(runs, name):
    """Of every step, of each embodiment, and held-out; by parts of a step with recomputed activations too."""
    for key in ("loss", "loss/tiny", "loss/other", "eval/loss"):
        assert len(curve(runs / "one", key)) >= (1 if key.startswith("eval") else 30)
        np.testing.assert_allclose(curve(runs / name, key), curve(runs / "one", key), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", [2, 1])
def test_what_four_saved_goes_on_with_fewer(runs, kind, count):
    """The next losses are those that four would have had, to the order of sums."""
    name = f"{kind}-4-to-{count}"
    again, whole = losses(runs / name), losses(runs / f"{kind}-4")
    assert list(again)[:ENOUGH] == list(range(1, ENOUGH + 1))
    for step, loss in again.items():
        assert loss == pytest.approx(whole[step], abs=1e-5)
    assert again[SAVED + 1] == pytest.approx(whole[SAVED + 1], rel=2e-6)  # nothing was learnt in between


@pytest.mark.parametrize("name", ["ddp-4", "fsdp-4", "fsdp-4-to-1"])
def test_the_checkpoint_is_that_of_one_process(runs, name):
    """It proves itself on loading, and its averaged weights are the same."""
    one, other = (load_checkpoint(runs / n / "checkpoint").state_dict() for n in ("one", name))
    assert one.keys() == other.keys()
    far = {k: (one[k] - other[k]).abs().max().item() for k in one if one[k].is_floating_point() and one[k].numel()}
    assert max(far.values()) < 2e-3, max(far, key=far.get)
    assert torch.equal(one["action_scale_tiny"], other["action_scale_tiny"])


def typed(store, out, *more):
    """A training of a small Octo, as a user types it."""
    words = ["train", f"store={store}", f"out={out}", "model=octo", "tune=full", "device=cpu", "heldout=0.2", *more]
    words += [f"model.backbone.{k}={v}" for k, v in {"width": 24, "depth": 2, "heads": 2, "image_size": 32}.items()]
    options = {"batch_size": 8, "warmup": 2, "log_every": 5, "save_every": 5, "precision": "float32"}
    return [*words, "model.action_horizon=4", *(f"optimization.{k}={v}" for k, v in options.items())]


def start(words, **environment):
    told = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "brachium", *words]
    return subprocess.Popen(command, env=told, stderr=subprocess.PIPE, text=True, start_new_session=True)


def workers(parent):
    """The processes that train."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            except OSError:
                continue
            if int(status["PPid"]) == parent and "train" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("kind", ["fsdp"])
def test_a_killed_process_ends_the_run_which_one_goes_on_with(tmp_path, demos, kind):
    """Of two started with processes=2: a clear error, and the save is good."""
    out = tmp_path / "out"
    words = typed(demos.path, out, f"optimization.parallel={kind}")
    process = start([*words, "processes=2", "optimization.steps=100000"])
    save = out / ("resume-act.safetensors" if kind == "ddp" else "resume-act/save.json")
    deadline = time.monotonic() + 120
    while not save.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert save.exists(), process.communicate()[1]
    training = workers(process.pid)
    assert len(training) == 2
    os.kill(max(training), signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "of 2 was killed by SIGKILL; the others were stopped" in told
    assert "Traceback" not in told
    done = start([*words, "resume=true", "optimization.steps=100000", "optimization.log_every=1"])
    lines = []
    for line in done.stderr:
        lines.append(line)
        if "act: resumed at step" in line:
            break
    done.kill()
    done.communicate()
    assert int(lines[-1].split()[-1]) >= 5, lines


def test_an_allocation_of_slurm_is_no_group_but_a_step_is(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not announced()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert announced()


def test_too_few_processes(tmp_path, demos):
    """One of two that were announced: the other never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start([*typed(demos.path, tmp_path / "out"), "patience=2"], **told)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "too few processes: expected 2 (WORLD_SIZE), and process 0 did not meet the others within 2 s" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["optimization.accumulate=9"],
            "batch_size=8 cannot be shared by 1 processes in 9 parts each: expected at least 9",
        ),
        (["optimization.groups={hed:{lr:0.1}}"], "no trained parameter's name has 'hed' in it"),
        (["processes=2"], "processes=2 starts the typed command again, and there is none"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, demos, capsys, more, says):
    assert main(typed(demos.path, tmp_path / "out", *more)) == 2
    assert says in capsys.readouterr().err


def test_grounding_runs_in_one_process(tmp_path, demos, scenes):
    grounding = Grounding(store=str(scenes.path), optimization=Optimization(steps=2))
    options = {**scenario(str(demos.path), tmp_path / "out"), "grounding": grounding, "env": None}
    options |= {"model": make_recipe(), "optimization": Optimization(steps=2)}
    with pytest.raises(ConfigError, match="grounding runs in one process, got 2"):
        _train(group=Processes(rank=0, world=2, kind="ddp"), place=torch.device("cpu"), **{**DEFAULTS, **options})


def test_shares_make_up_the_batch_and_an_empty_one_borrows_a_row():
    for total in (1, 2, 5, 12):
        for count in (1, 2, 4, 7):
            shares = [Rows.of(total, index, count) for index in range(count)]
            rows = [list(range(total))[where] for share, where in shares if share.counts]
            assert [row for part in rows for row in part] == list(range(total))
            for share, where in shares:
                assert where.start == share.first
                assert share.counts or where.stop - where.start == 1


def test_draws_of_a_share_are_its_rows_of_the_whole_draw():
    def whole():
        return torch.Generator().manual_seed(3)

    generator = whole()
    wanted = [draw(generator) for draw in DRAWN]
    found = []
    for first, rows in ((0, 2), (2, 1), (3, 3)):
        draws = Draws(generator=whole(), first=first, rows=rows, total=6)
        found.append([draw(draws, rows / 6) for draw in DRAWN])
    for all_of, parts in zip(wanted, zip(*found)):
        assert torch.equal(all_of, torch.cat(parts))


DRAWN = (
    lambda source, share=1.0: normal(source, (round(12 * share), 3)),
    lambda source, share=1.0: uniform(source, (round(6 * share),)),
    lambda source, share=1.0: integers(source, 9, (round(18 * share), 1)),
)


def test_a_loss_that_is_no_number_names_the_windows(tmp_path, demos, capsys):
    """The windows of that step's batch, by store, episode and frame."""
    words = typed(demos.path, tmp_path / "out", "optimization.lr=1e30", "optimization.steps=50")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert re.search(r"the loss of step \d+ is .*, its gradient .*; stopped, and the save of step \d+ stays", told)
    named = re.findall(rf"{demos.path} episode (\d+) frame (\d+)", told)
    assert len(named) == 6
    assert "and 2 more" in told
    for episode, frame in named:
        assert int(frame) < demos.episodes[int(episode)].length
