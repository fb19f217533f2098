"""The lean loop computes the passes it needs and no others, counted in floating-point operations;
and what --dry-run prints is what a run takes."""
import json
import re
import shutil
import sys
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pipelines
from adm import Scores, adm
from cli import ROOT, Run, succeeded
from discriminators import Discriminator
from families import cogvideox, sd3
from ode import Schedule
from tools import bench, bench_loops
from tools.cards import CAN_SHARD
from tools.passes import blank_prompt, passes, saved_bytes
from training.draws import Draws
from training.heads import heads_for


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Networks(NamedTuple):
    generator: object
    scores: Scores
    discriminator: Discriminator
    optimizers: list
    shape: tuple
    cond: dict


def networks(kind):
    torch.manual_seed(0)
    if kind == "sd3":
        teacher, family, shape = pipelines.sd3(blocks=2).transformer, sd3.FAMILY, (4, 16, 16)
    else:
        teacher = pipelines.cogvideox(blocks=3).transformer
        family, shape = cogvideox.FAMILY, (3, 4, 4, 4)
    teacher.requires_grad_(False)
    one = blank_prompt(family, teacher.config, 1, "cpu", 16)
    heads = heads_for(family.taps, teacher, torch.zeros(1, *shape), 8, timestep=torch.zeros(1),
                      **one)
    generator, fake = (deepcopy(teacher).requires_grad_(True) for _ in range(2))
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3) for net in (generator, fake, heads)]
    return Networks(generator, Scores(fake, teacher, Schedule.straight()),
                    Discriminator(family.taps(teacher), heads), optimizers, shape,
                    blank_prompt(family, teacher.config, 2, "cpu", 16))


@pytest.mark.parametrize("kind", ["sd3", "cogvideox"])
def test_the_loop_runs_the_passes_it_needs(kind):
    generator, scores, discriminator, optimizers, shape, cond = networks(kind)
    schedule, draws = scores.schedule, Draws((0,), 1, range(2), shape)
    loop = adm(generator=generator, scores=scores, discriminator=discriminator,
               optimizers=optimizers, student_schedule=schedule, stops=schedule.stops(1),
               guidance=(2.0, 4.0), batches=lambda i: [(draws, cond, cond)], iterations=9)
    lean = count(lambda: next(loop))
    alone = passes(generator=generator, fake_score=scores.fake, real_score=scores.real,
                   discriminator=discriminator, x=torch.randn(2, *shape),
                   t=torch.full((2,), 500.0), cond=cond, uncond=cond)
    each = {name: count(function) for name, function in alone.items()}
    assert lean == sum(each.values()), (lean, each)
    if kind == "cogvideox":     # whose in-place sums FlopCounterMode's hooks refuse where its
        return                  # weights learn in the middle of a graph

    def literal_iteration():
        bench_loops.literal(generator=generator, scores=scores, discriminator=discriminator,
                            optimizers=optimizers, schedule=schedule, draws=draws, cond=cond,
                            uncond=cond)

    literal = count(literal_iteration)
    # 17 passes of the network's size against 14, and the heads
    assert 1.15 < literal / lean < 1.3, (literal, lean)


@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_kept_for_the_backward_pass_are_those_of_a_real_one(recompute):
    """Counted on the meta device and on real tensors: the same."""
    found = []
    for device in ("meta", "cpu"):
        net = pipelines.sd3(blocks=2).transformer.to(device)
        x = torch.zeros(2, 4, 16, 16, device=device)
        t = torch.zeros(2, device=device)
        cond = blank_prompt(sd3.FAMILY, net.config, 2, device, 16)

        def forward():
            return net(x, timestep=t, **cond).sample
        found.append(saved_bytes(forward, net, recompute))
    assert found[0] == found[1] > 10_000, found


def test_dry_run_needs_no_weights(tmp_path):
    """Every weight file gone, the numbers are those of the real network."""
    pipe = pipelines.sd3(blocks=2)
    pipe.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    flags = ("--dry-run 2 --dry-run-card a100 --fsdp --lora-rank 0 --text-tokens 16 --method dmd "
             "--steps 1 --stage adm").split()
    done = succeeded(Run(ROOT / "train_sdxl.py", "--model", tmp_path / "model", *flags,
                         folder=tmp_path).wait())
    size = sum(p.numel() for p in pipe.transformer.parameters())
    assert re.search(rf"real score and backbone +{size / 1e6:.1f} M", done.stdout), done.stdout
    if CAN_SHARD:
        assert "a100 at 187 TFLOP/s" in done.stdout
    else:
        assert "no collectives of fake tensors" in done.stderr
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "model")


class Here:
    """A pool of this process."""

    def Pool(self, *arguments):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def apply(self, function, arguments):
        return function(*arguments)


def bench_of(monkeypatch, tmp_path, name, config, shape, *flags):
    """tools/bench.py in this process, on networks smaller than its own -> its result."""
    monkeypatch.setitem(bench_loops.SMALL, name, bench_loops.Small(config, shape))
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: Here())
    quick = "--repeat 1 --batch-size 1 --head-channels 8".split()
    monkeypatch.setattr(sys, "argv", ["bench.py", "--models", name, *quick, "--out", str(tmp_path),
                                      *flags])
    bench.main()
    return json.loads((tmp_path / "result.json").read_text())[name]


def test_bench_prints_and_writes_its_table(tmp_path, monkeypatch):
    result = bench_of(monkeypatch, tmp_path, "SD3-Medium", dict(
        num_layers=2, num_attention_heads=1, joint_attention_dim=32, caption_projection_dim=64,
        pooled_projection_dim=32), (16, 16, 16))
    assert result.keys() >= {"lean_over_floor", "literal_over_lean", "peak_bytes", "flop", "lean",
                             "floor", "literal"}
    assert len(result["passes"]) == 8


def test_bench_of_adp(tmp_path, monkeypatch):
    """It holds what ADP holds: there is no fake score."""
    trained, real = [], bench_loops.trainable

    def trainable(args, teacher, name, rank):
        trained.append(name)
        return real(args, teacher, name, rank)

    monkeypatch.setattr(bench_loops, "trainable", trainable)
    result = bench_of(monkeypatch, tmp_path, "SDXL", dict(
        block_out_channels=(32, 32, 64), attention_head_dim=(1, 1, 2),
        transformer_layers_per_block=(1, 1, 1), cross_attention_dim=32,
        projection_class_embeddings_input_dim=6 * 256 + 32), (4, 8, 8), "--stage", "adp")
    assert result["lean"] > 0 and result["flop"] > 1e6 and "floor" not in result
    assert trained == ["generator"]
