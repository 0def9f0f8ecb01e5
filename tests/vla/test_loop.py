"""The training loop: schedule, averages, resuming to the bit, interrupts at bad moments."""

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from brachium.errors import BrachiumError, CheckpointError, ConfigError, DeviceMemoryError
from brachium.vla.loop import TrainLoop
from brachium.vla.optim import Optimization

OPTIONS = Optimization(
    steps=20, batch_size=4, lr=1e-2, warmup=5, ema=0.9, precision="float32", log_every=2, save_every=10, seed=3
)

OF_THE_MACHINE = ("time", "steps_per_s", "loader_wait", "samples_per_s", "memory", "mfu")

MEMORY_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
)


def network(dropout=0.0, seed=0, norm=nn.LayerNorm):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(dropout), norm(8), nn.Linear(8, 2))


def make_batch(step):
    rng = np.random.default_rng([7, step])
    return torch.from_numpy(rng.standard_normal((16, 4)).astype(np.float32))


def make_loop(folder, module=None, *, options=OPTIONS, resume=False, loss=None, batch=make_batch, **extra):
    module = module or network()

    def default(x, generator):
        noise = torch.randn(16, 2, generator=generator)
        error = (module(x) - x[:, :2].sin() - 0.1 * noise).square().mean()
        return error, {"norm": x.norm()}

    return TrainLoop(
        name="toy",
        module=module,
        make_batch=batch,
        loss=loss or default,
        options=options,
        folder=folder,
        resume=resume,
        **extra,
    )


def state_of(loop):
    names = {id(p): k for k, p in loop.parameters.items()}
    state = {f"weight/{k}": p.detach().clone() for k, p in loop.parameters.items()}
    state |= {f"average/{k}": v.clone() for k, v in loop.average.items()}
    state |= {f"buffer/{k}": v.clone() for k, v in loop.buffers.items()}
    for p, values in loop.optimizers[0][0].state.items():
        state |= {f"{names[id(p)]}/{k}": v.clone() for k, v in values.items()}
    return state


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log-toy.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


class Stop(Exception):
    pass


def stopping(at, error):
    """A batch maker that raises at a step, once."""
    raised = []

    def make(step):
        if step == at and not raised:
            raised.append(step)
            raise error
        return make_batch(step)

    return make


@pytest.fixture
def whole(tmp_path):
    loop = make_loop(tmp_path / "whole")
    loop.run()
    return loop, log_of(tmp_path / "whole")


@pytest.mark.parametrize(("dropout", "norm"), [(0.0, nn.LayerNorm), (0.3, nn.LayerNorm), (0.0, nn.BatchNorm1d)])
def test_a_killed_run_resumes_to_the_bit(tmp_path, dropout, norm):
    """The save of step 10 is there; steps 11 to 13 are lost and computed again. BatchNorm has running statistics."""
    whole = make_loop(tmp_path / "whole", network(dropout, norm=norm))
    whole.run()
    folder = tmp_path / "parts"
    with pytest.raises(Stop):
        make_loop(folder, network(dropout, norm=norm), batch=stopping(13, Stop())).run()
    torch.manual_seed(999)
    torch.rand(100)
    resumed = make_loop(folder, network(dropout, seed=5, norm=norm), resume=True)
    assert resumed.step == 10
    resumed.run()
    assert_same(state_of(whole), state_of(resumed))
    assert log_of(folder) == log_of(tmp_path / "whole")
    assert [line["step"] for line in log_of(folder)] == list(range(2, 21, 2))


def test_interrupt_in_a_batch_saves_and_resumes(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path / "a", batch=stopping(7, KeyboardInterrupt())).run()
    resumed = make_loop(tmp_path / "a", network(seed=5), resume=True)
    assert resumed.step == 7
    before = resumed.spent
    resumed.run()
    assert 0 < before == resumed.earlier < resumed.spent  # the time of a run is that of all its parts
    assert_same(state_of(whole[0]), state_of(resumed))
    assert log_of(tmp_path / "a") == whole[1]


def test_interrupt_in_the_loss_saves_and_resumes(tmp_path, whole):
    module = network()
    calls = []

    def loss(x, generator):
        calls.append(0)
        noise = torch.randn(16, 2, generator=generator)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return (module(x) - x[:, :2].sin() - 0.1 * noise).square().mean(), {"norm": x.norm()}

    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path / "a", module, loss=loss).run()
    resumed = make_loop(tmp_path / "a", resume=True)
    assert resumed.step == 5
    resumed.run()
    assert_same(state_of(whole[0]), state_of(resumed))


def test_ctrl_c_in_the_middle_of_an_update_waits_until_the_step_is_whole(tmp_path, whole, request):
    """A real signal after the weights have moved, before the step is counted and averaged."""
    loop = make_loop(tmp_path / "a")
    step, calls = loop.optimizers[0][0].step, []

    def interrupted():
        step()
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    loop.optimizers[0][0].step = interrupted
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, outside))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert signal.getsignal(signal.SIGINT) is before
    resumed = make_loop(tmp_path / "a", resume=True)
    assert resumed.step == 4
    resumed.run()
    assert_same(state_of(whole[0]), state_of(resumed))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_evaluation_that_fails_puts_the_trained_weights_back(tmp_path, whole, error):
    """While an evaluation runs, the averaged weights are in place; they must not be saved as the trained ones."""

    def evaluate():
        raise error

    loop = make_loop(tmp_path / "a", evaluate=evaluate, evaluate_every=6)
    with pytest.raises(error):
        loop.run()
    kept = state_of(loop)
    assert any(not torch.equal(kept[f"weight/{k}"], v) for k, v in loop.average.items())
    if error is KeyboardInterrupt:
        resumed = make_loop(tmp_path / "a", resume=True)
        assert resumed.step == 6
        resumed.run()
        assert_same(state_of(whole[0]), state_of(resumed))


def test_evaluations_see_averaged_weights_in_eval_mode_and_change_nothing(tmp_path, whole):
    module = network()
    seen = []

    def evaluate():
        seen.append(({k: p.detach().clone() for k, p in module.named_parameters()}, module.training))
        return {"value": 1.5}

    loop = make_loop(tmp_path / "a", module, evaluate=evaluate, evaluate_every=5)
    metrics = loop.run()
    assert len(seen) == 4  # after 5, 10, 15 and at the end, once
    assert not any(training for _, training in seen)
    assert all(torch.equal(seen[-1][0][k], v) for k, v in loop.average.items())
    assert metrics["eval/value"] == 1.5
    assert_same(state_of(whole[0]), state_of(loop))
    assert module.training


def test_resuming_without_a_save_starts_at_the_beginning(tmp_path, whole):
    loop = make_loop(tmp_path / "none", resume=True)
    assert loop.step == 0
    loop.run()
    assert_same(state_of(whole[0]), state_of(loop))


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    done = make_loop(tmp_path)
    done.run()
    done.save()
    again = make_loop(tmp_path, network(seed=4), resume=True)
    again.run()
    assert again.spent == done.spent
    assert_same(state_of(done), state_of(again))


def stopped(folder, **extra):
    with pytest.raises(KeyboardInterrupt):
        make_loop(folder, batch=stopping(7, KeyboardInterrupt()), **extra).run()


def test_changed_options_are_refused_and_named(tmp_path):
    stopped(tmp_path)
    with pytest.raises(CheckpointError, match=r"lr=0.01 against 0.5.*\n.*resume=false"):
        make_loop(tmp_path, options=replace(OPTIONS, lr=0.5), resume=True)
    with pytest.raises(CheckpointError, match="steps=20 against 30"):
        make_loop(tmp_path, options=replace(OPTIONS, steps=30), resume=True)


def test_other_data_or_another_model_is_refused(tmp_path):
    stopped(tmp_path, identity={"data": "abc"})
    with pytest.raises(CheckpointError, match="data=abc against xyz"):
        make_loop(tmp_path, resume=True, identity={"data": "xyz"})
    wide = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Dropout(0), nn.LayerNorm(9), nn.Linear(9, 2))
    with pytest.raises(CheckpointError, match="another model"):
        make_loop(tmp_path, wide, resume=True, identity={"data": "abc"})
    assert make_loop(tmp_path, resume=True, identity={"data": "abc"}).step == 7


def test_a_damaged_save_is_named(tmp_path):
    stopped(tmp_path)
    file = tmp_path / "resume-toy.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"resume-toy.safetensors is damaged"):
        make_loop(tmp_path, resume=True)


def test_starting_anew_forgets_an_older_save(tmp_path):
    """Else: run A is killed, run B (not resumed) is killed before its first save, and resuming goes on with A."""
    stopped(tmp_path)
    make_loop(tmp_path, resume=False)
    assert make_loop(tmp_path, resume=True).step == 0


def test_a_crash_while_saving_leaves_the_old_save(tmp_path, monkeypatch):
    loop = make_loop(tmp_path)
    loop.run()
    loop.save()
    before = load_file(tmp_path / "resume-toy.safetensors")

    def torn(tensors, path, metadata):
        path.write_bytes(b"half")
        raise Stop

    monkeypatch.setattr("brachium.vla.resume.save_file", torn)
    with pytest.raises(Stop):
        loop.save()
    assert_same(before, load_file(tmp_path / "resume-toy.safetensors"))


def test_averages_by_their_formula(tmp_path):
    module = network()
    history = [{k: p.detach().clone().double() for k, p in module.named_parameters()}]

    def batch(step):
        return make_batch(step)

    loop = make_loop(tmp_path, module, batch=batch)
    update = loop._update_average

    def spy():
        history.append({k: p.detach().clone().double() for k, p in module.named_parameters()})
        update()

    loop._update_average = spy
    loop.run()
    average = history[0]
    for step, weights in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = {k: decay * v + (1 - decay) * weights[k] for k, v in average.items()}
    for k, v in average.items():
        torch.testing.assert_close(loop.average[k].double(), v, atol=1e-6, rtol=1e-5)
    loop.use_average()
    assert all(torch.equal(p, loop.average[k]) for k, p in module.named_parameters())


def test_the_schedule_by_its_closed_form():
    options = Optimization(steps=110, lr=0.2, warmup=10, final_lr=0.1)
    rates = [options.learning_rate(step) for step in range(110)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11) / 10)
    phase = np.arange(100) / 100
    np.testing.assert_allclose(rates[10:], 0.2 * (0.1 + 0.9 * (1 + np.cos(np.pi * phase)) / 2))
    assert options.learning_rate(110) == pytest.approx(0.02)
    assert Optimization(steps=3, warmup=0, lr=1.0).learning_rate(0) == 1.0
    assert all(math.isfinite(Optimization(steps=3, warmup=50).learning_rate(k)) for k in range(3))


def test_the_schedule_reaches_the_optimiser(tmp_path):
    make_loop(tmp_path).run()
    for line in log_of(tmp_path):
        assert line["lr"] == pytest.approx(OPTIONS.learning_rate(line["step"] - 1))


def test_decay_is_for_matrices_only_and_frozen_weights_stay(tmp_path):
    module = network()
    module[0].requires_grad_(False)
    frozen = module[0].weight.detach().clone()
    loop = make_loop(tmp_path, module)
    assert set(loop.parameters) == {"3.weight", "3.bias", "4.weight", "4.bias"}
    decayed, free = loop.optimizers[0][0].param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    loop.run()
    assert torch.equal(module[0].weight, frozen)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path, value):
    module = network()

    def loss(x, generator):
        factor = value if torch.equal(x, make_batch(12)) else 1.0
        return module(x).square().mean() * factor, {}

    with pytest.raises(BrachiumError, match="the loss of step 12 is"):
        make_loop(tmp_path, module, loss=loss).run()
    assert all(p.isfinite().all() for p in module.parameters())
    saved = load_file(tmp_path / "resume-toy.safetensors")
    assert all(v.isfinite().all() for v in saved.values())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path):
    """sqrt at 0: the loss is finite, its gradient is not."""
    module = network()

    def loss(x, generator):
        return (module(x) * 0.0).abs().sum().sqrt() + module(x).square().mean(), {}

    with pytest.raises(BrachiumError, match=r"the loss of step 0 is .*, its gradient nan"):
        make_loop(tmp_path, module, loss=loss).run()
    assert all(p.isfinite().all() for p in module.parameters())


def test_bf16_is_close_to_float32(tmp_path):
    losses = {}
    for precision in ("float32", "bf16"):
        module = network()

        def loss(x, generator, module=module):
            return (module(x).float() - x[:, :2].sin()).square().mean(), {}

        options = replace(OPTIONS, precision=precision)
        losses[precision] = make_loop(tmp_path / precision, module, options=options, loss=loss).run()["loss"]
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "fp16"}, "expected bf16 or float32, got 'fp16'"),
        ({"steps": 0}, "optimization.steps"),
        ({"save_every": 0}, "optimization.save_every"),
        ({"log_every": 0}, "optimization.log_every"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"warmup": -1}, "warmup=-1"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Optimization(**options)


def test_a_torn_log_line_is_dropped_on_resuming(tmp_path, whole):
    stopped(tmp_path / "a")
    with (tmp_path / "a" / "log-toy.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    make_loop(tmp_path / "a", resume=True).run()
    assert log_of(tmp_path / "a") == whole[1]


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_out_of_memory_says_what_to_lower_and_leaves_nothing_half_saved(tmp_path, error):
    def loss(batch, generator):
        raise error

    loop = make_loop(tmp_path, loss=loss)
    with pytest.raises(
        DeviceMemoryError, match=r"out of memory at step 0 on cpu\. Lower optimization.batch_size \(\d+"
    ):
        loop.run()
    assert not list(tmp_path.glob("resume-*"))


def test_snapshots_are_of_the_averaged_weights_and_change_nothing(tmp_path):
    seen = {}

    def look(loop):
        return lambda step: seen.update({step: {k: p.detach().clone() for k, p in loop[0].parameters.items()}})

    box = []
    box.append(make_loop(tmp_path / "with", snapshot=look(box), snapshot_every=3))
    plain = make_loop(tmp_path / "without")
    for loop in (box[0], plain):
        loop.run()
    assert_same(state_of(box[0]), state_of(plain))
    assert list(seen) == list(range(3, OPTIONS.steps, 3))
    again = make_loop(tmp_path / "again", options=replace(OPTIONS, save_every=3))
    again.snapshot, again.snapshot_every = lambda step: assert_same(seen[step], dict(again.parameters)), 3
    again.run()


def test_a_snapshot_that_was_broken_off_is_made_when_the_run_goes_on(tmp_path):
    class Broken(KeyboardInterrupt):
        pass

    made = []

    def broken(step):
        raise Broken

    loop = make_loop(tmp_path, snapshot=broken, snapshot_every=4)
    with pytest.raises(Broken):
        loop.run()
    resumed = make_loop(tmp_path, resume=True, snapshot=made.append, snapshot_every=4)
    assert resumed.step == 4
    resumed.run()
    assert made == list(range(4, OPTIONS.steps, 4))
