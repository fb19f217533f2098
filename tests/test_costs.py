"""The lean loop computes the passes it needs and no others, counted in floating-point operations; and what --dry-run prints is what a run takes."""
import json
import re
import shutil
import sys
from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import pipelines
from adm import Draws, adm
from cli import ROOT, Run, succeeded
from discriminators import Taps, heads_for
from dry_run import passes, prompt, saved_bytes
from ode import Schedule


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def networks(kind):
    torch.manual_seed(0)
    teacher = (pipelines.sd3(blocks=2) if kind == "sd3" else pipelines.cogvideox(blocks=3)).transformer.requires_grad_(False)
    shape = (4, 16, 16) if kind == "sd3" else (3, 4, 4, 4)
    cond = prompt(teacher, 2, "cpu", 16)
    heads = heads_for(teacher, torch.zeros(1, *shape), 8, timestep=torch.zeros(1), **prompt(teacher, 1, "cpu", 16))
    generator, fake = (deepcopy(teacher).requires_grad_(True) for _ in range(2))
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3) for net in (generator, fake, heads)]
    return teacher, generator, fake, heads, optimizers, shape, cond


@pytest.mark.parametrize("kind", ["sd3", "cogvideox"])
def test_the_loop_runs_the_passes_it_needs(kind):
    teacher, generator, fake, heads, optimizers, shape, cond = networks(kind)
    schedule, draws = Schedule.straight(), Draws((0,), 1, range(2), shape)
    loop = adm(generator, fake, teacher, Taps(teacher), heads, optimizers, schedule, schedule, schedule.rows(1), (2.0, 4.0), lambda i: [(draws, cond, cond)], 9)
    lean = count(lambda: next(loop))
    each = {name: count(function) for name, function in passes(generator, fake, teacher, teacher, heads, torch.randn(2, *shape), torch.full((2,), 500.0), cond, cond).items()}
    assert lean == sum(each.values()), (lean, each)
    if kind == "cogvideox":                                     # whose in-place sums FlopCounterMode's hooks refuse where its weights learn in the middle of a graph
        return
    literal = count(lambda: bench.literal(generator, fake, teacher, heads, optimizers, schedule, schedule.rows(1), (2.0, 4.0), draws, cond, cond))
    assert 1.15 < literal / lean < 1.3, (literal, lean)         # 17 passes of the network's size against 14, and the heads


@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_kept_for_the_backward_pass_are_those_of_a_real_one(recompute):
    """Counted on the meta device and on real tensors: the same."""
    found = []
    for device in ("meta", "cpu"):
        net = pipelines.sd3(blocks=2).transformer.to(device)
        x, t, cond = torch.zeros(2, 4, 16, 16, device=device), torch.zeros(2, device=device), prompt(net, 2, device, 16)
        found.append(saved_bytes(lambda: net(x, timestep=t, **cond).sample, [net], recompute))
    assert found[0] == found[1] > 10_000, found


def test_dry_run_needs_no_weights(tmp_path):
    """Every weight file gone, the numbers are those of the real network."""
    pipe = pipelines.sd3(blocks=2)
    pipe.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    done = succeeded(Run(ROOT / "train_sdxl.py", "--model", tmp_path / "model", "--dry-run", "2", "--fsdp", "--lora-rank", "0", "--text-tokens", "16", folder=tmp_path).wait())
    size = sum(p.numel() for p in pipe.transformer.parameters())
    assert re.search(rf"real score and backbone +{size / 1e6:.1f} M", done.stdout), done.stdout
    assert "TFLOP" in done.stdout and not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "model")


def bench_of(monkeypatch, tmp_path, name, small, *flags):
    """bench.py in this process, on networks smaller than its own -> its result."""
    monkeypatch.setattr(bench, "SMALL", {name: small})
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: Here())
    monkeypatch.setattr(sys, "argv", ["bench.py", "--models", name, "--repeat", "1", "--batch-size", "1", "--head-channels", "8", "--out", str(tmp_path), *flags])
    bench.main()
    return json.loads((tmp_path / "result.json").read_text())[name]


def test_bench_prints_and_writes_its_table(tmp_path, monkeypatch):
    result = bench_of(monkeypatch, tmp_path, "SD3-Medium", ("StableDiffusion3Pipeline", dict(
        num_layers=2, num_attention_heads=1, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32), (16, 16, 16)))
    assert result.keys() >= {"lean_over_floor", "literal_over_lean", "peak_bytes", "flop", "lean", "floor", "literal"} and len(result["passes"]) == 8


def test_bench_of_adp(tmp_path, monkeypatch):
    result = bench_of(monkeypatch, tmp_path, "SDXL", ("StableDiffusionXLPipeline", dict(
        block_out_channels=(32, 32, 64), attention_head_dim=(1, 1, 2), transformer_layers_per_block=(1, 1, 1), cross_attention_dim=32,
        projection_class_embeddings_input_dim=6 * 256 + 32), (4, 8, 8)), "--stage", "adp")
    assert result["lean"] > 0 and result["flop"] > 1e6 and "floor" not in result


class Here:
    """A pool of this process."""
    Pool = lambda self, *args: self
    __enter__ = lambda self: self
    __exit__ = lambda self, *args: None
    apply = lambda self, function, arguments: function(*arguments)
