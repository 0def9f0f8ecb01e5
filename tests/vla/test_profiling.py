"""Where time goes: what is counted against formulas, what is timed against what was waited, and the verb."""

import json
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from brachium.__main__ import main
from brachium.vla.checkpoint import make_golden, save_checkpoint
from brachium.vla.device_limits import LIMITS, bandwidth, peak_flops
from brachium.vla.fused import linear
from brachium.vla.parts import listening, part
from brachium.vla.profiling import KINDS_OF_TIME, Stopwatch, kind_of, profile_pass
from brachium.vla.roofline import REST, counting

from .conftest import make_model, make_observation, make_recipe

CPU = torch.device("cpu")
EXPERT = {"_target_": "brachium.vla.heads.expert.ExpertHead", "width": 32, "mlp": 32, "steps": 3}


@torch.no_grad()
def test_a_product_reads_its_weights_once_a_call_and_leaves_its_result():
    layer, x = nn.Linear(256, 512), torch.ones(4, 256)
    with counting() as found:
        for _ in range(3):
            with part("layer"):
                y = layer(x)
        with part("chain"):  # what is made and used up inside needs no memory
            z = torch.relu(y) * 2.0 + 1.0
    assert found["layer"].calls == 3
    assert found["layer"].flops == 3 * 2 * 4 * 256 * 512
    assert found["layer"].bytes == 3 * 4 * (256 * 512 + 512 + 4 * 256 + 4 * 512)
    assert found["chain"].bytes == 4 * 2 * y.numel()
    assert found["chain"].flops == 0
    assert found[REST].bytes == 0
    assert z.shape == y.shape


@torch.no_grad()
def test_shared_keys_views_and_tables_count_for_what_is_read():
    query, key = torch.randn(1, 8, 10, 16), torch.randn(1, 2, 20, 16)
    table = nn.Embedding(10_000, 8)
    with counting() as found:
        with part("attention"):
            out = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        with part("half"):
            half = key[:, :1] * 2.0
        with part("table"):
            rows = table(torch.arange(5))
    assert found["attention"].flops == 2 * 2 * 8 * 10 * 20 * 16
    assert found["attention"].bytes >= 4 * (query.numel() + key.numel() + out.numel())
    assert found["half"].bytes == 4 * 2 * half.numel()
    assert found["table"].bytes < 4 * 4 * rows.numel() + 100


def test_backward_and_the_optimiser_are_counted():
    layer, x = nn.Linear(64, 128, bias=False), torch.randn(8, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    with counting() as found:
        with part("forward"):
            loss = layer(x).square().mean()
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            optimizer.step()
    assert found["forward"].flops == found["backward"].flops == 2 * 8 * 64 * 128  # nobody asks for x's gradient
    assert found["optimizer"].bytes == 4 * 3 * 64 * 128  # reads the weight and its gradient, writes the weight


@torch.no_grad()
def test_fused_layers_count_as_plain_ones():
    layer, x = nn.Linear(256, 512), torch.randn(128, 256)
    found = []
    for activation in (None, "gelu_tanh"):
        with counting() as does:
            linear(x, layer, activation=activation)
        found.append(does[REST].flops)
    assert found == [2 * 128 * 256 * 512] * 2


def test_time_counts_for_the_innermost_part():
    watch = Stopwatch(CPU)
    with listening(watch):
        watch.start()
        with part("outer"):
            time.sleep(0.02)
            for _ in range(2):
                with part("inner"):
                    time.sleep(0.03)
        time.sleep(0.01)
        spent, calls = watch.stop()
    assert calls == {"outer": 1, "inner": 2}
    assert spent["outer"] >= 20.0
    assert spent["inner"] >= 60.0
    assert spent[REST] >= 10.0
    assert spent["inner"] > spent["outer"] > spent[REST]
    with part("nobody listens"):
        pass
    assert "nobody listens" not in calls


def test_a_pass_is_all_of_its_parts_and_all_of_its_operations():
    layer, x = nn.Linear(512, 512), torch.randn(512, 512)

    @torch.no_grad()
    def run():
        with part("product"):
            y = layer(x)
        with part("softmax"):
            y.softmax(-1)

    run()
    found = profile_pass(run, CPU, repeats=5, flops_per_s=1e9, bytes_per_s=1e12)
    assert list(found.parts) == ["product", "softmax", REST]
    assert found.parts["product"].bound == "arithmetic"
    assert found.parts["product"].floor_ms == pytest.approx(1e3 * 2 * 512**3 / 1e9)
    assert found.parts["softmax"].bound == "memory"
    assert found.floor_ms == pytest.approx(sum(p.floor_ms for p in found.parts.values()))
    assert sum(found.kinds.values()) == pytest.approx(found.median_ms, rel=1e-6)
    assert set(found.kinds) == set(KINDS_OF_TIME)
    assert found.kinds["matrix products"] > found.kinds["attention"] > 0.0
    assert found.p99_ms == max(found.ms)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("nvjet_tst_128x64", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "elementwise"),
        ("aten::_fused_rms_norm", "norms"),
        ("aten::_foreach_addcdiv_", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::cat", "copies"),
        ("aten::addcmul", "elementwise"),
        ("aten::mul_", "elementwise"),
        ("aten::view", "other operations"),
    ],
)
def test_operations_are_of_a_kind(name, kind):
    assert kind_of(name) == kind


def test_limits_of_a_cpu_are_measured_and_those_of_gpus_are_in_their_order():
    assert 1e8 < peak_flops(CPU, "float32") < 1e14
    assert 1e8 < bandwidth(CPU) < 1e13
    assert peak_flops(torch.device("meta"), "bf16") is None
    assert bandwidth(torch.device("meta")) is None
    found = {name: next(k for k in LIMITS if k in f"NVIDIA {name} 80GB HBM3") for name in LIMITS}
    assert found == {name: name for name in LIMITS}  # no name hides a longer one behind it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_model(make_recipe(EXPERT, state="vector"))
    golden = make_golden(model, "tiny", make_observation(model.embodiments["tiny"], 2))
    return save_checkpoint(tmp_path_factory.mktemp("profiled") / "checkpoint", model, [golden], {})


def test_the_verb(checkpoint, tmp_path, capsys):
    words = [f"checkpoint={checkpoint}", f"out={tmp_path}", "repeats=3", "optimization.batch_size=4", "trace=true"]
    words += ["device=cpu", "batch_size=2"]
    assert main(["profile", *words]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "profile.json").read_text())
    chunk, step = found["passes"]["chunk"], found["passes"]["step"]
    parts = [
        "images",
        "vision tower",
        "language model",
        "encoder",
        "head: context",
        "head: solver step",
        "head",
        "rest",
    ]
    assert set(chunk["parts"]) == set(parts)
    assert chunk["parts"]["head: solver step"]["calls"] == 3
    assert {"backward", "clipping", "optimizer", "averaged weights", "vision tower"} <= set(step["parts"])
    for name in ("vision tower", "language model", "head: solver step"):
        assert name in said
        assert chunk["parts"][name]["flops"] > 0
        assert chunk["parts"][name]["floor_ms"] > 0
    # A training step does what a chunk's prefix does for each window, and as much again twice for its gradients.
    ours = sum(step["parts"][n]["flops"] for n in ("vision tower", "language model"))
    theirs = sum(chunk["parts"][n]["flops"] for n in ("vision tower", "language model"))
    assert 0.9 < ours / theirs / 2 < 1.5  # 4 windows against 2; heads that take keys leave a part of the last layer out
    forward = sum(p["flops"] for n, p in step["parts"].items() if n != "backward")
    assert 1.4 < step["parts"]["backward"]["flops"] / forward < 2.1
    assert (tmp_path / "profile.png").stat().st_size > 20_000
    assert (tmp_path / "chunk.trace.json").stat().st_size > 1000
    assert "windows/s, MFU" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected either a checkpoint or a model"),
        (["model=octo", "~env"], "expected an env"),
        (["model=octo", "passes=[chunks]"], "passes: expected some of"),
        (["model=octo", "optimization.compile=true"], "compile"),
        (["model=octo", "acceleration=gpu"], "expected device=cuda"),
        (["model=octo", "acceleration.precision=bf8"], "Did you mean"),
        (["model=octo", "repeats=0"], "at least 1"),
    ],
)
def test_what_cannot_be_profiled_is_said(words, says, tmp_path, capsys):
    assert main(["profile", f"out={tmp_path}", "device=cpu", *words]) == 2
    assert says in capsys.readouterr().err
