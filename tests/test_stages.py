"""What the stages of train_sdxl.py do to rates and averages, in this process, on the small random
pipeline: the very calls that a run makes, without pictures and export."""
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_sdxl
from cli import NEVER
from families.family import of_medium
from sdxl import PROMPTS, weights
from training import checkpoints
from training.flags import parse
from training.networks import one_by_one
from training.optimizer import Optimizer
from training.output import Output
from training.pairs import collect_pairs
from training.stage import Run, Stage, follow
from training.teacher import Teacher

RATES = dict(adp=3e-3, generator=2e-3, fake=5e-3, heads=7e-3)
N = 4                           # iterations of a stage
FLAGS = ("--pairs 4 --pair-steps 2 --batch-size 1 --accumulate 1 --save-every 1 --head-channels 8 "
         f"--iterations {N} --lora-rank 0 --lr-generator-adp {RATES['adp']} --lr-generator "
         f"{RATES['generator']} --lr-fake {RATES['fake']} --lr-discriminator {RATES['heads']}")


class Watched(Optimizer):
    """Keeps the rate at which AdamW steps, each time it does."""
    all = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rates = []
        self.all.append(self)

    def step(self):
        super().step()
        self.rates.append(self.adam.param_groups[0]["lr"])


def no_picture(file, experts, schedule):
    pass


@pytest.fixture
def run_of(small, tmp_path, monkeypatch):
    """flags -> (a Run of them, its teacher's weights); optimizers are Watched, and no checkpoint is
    pruned."""
    monkeypatch.setattr(train_sdxl, "Optimizer", Watched)
    monkeypatch.setattr(checkpoints, "remove", lambda path: None)
    monkeypatch.setattr(Watched, "all", [])

    def made(*flags):
        words = ["--model", str(small / "model"), "--prompts", "x", "--out", str(tmp_path / "out"),
                 "--pixel-backbone", str(small / "vision"), *FLAGS.split(), *flags]
        monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *words])
        families = of_medium("image")
        args, _ = parse("", families, ())
        out = Output(args.out, None)
        teacher = Teacher(args, out, PROMPTS, [], torch.device("cpu"), families)
        start = {name: p.detach().clone() for name, p in teacher.net.named_parameters()}
        stages = train_sdxl.stages_of(args, teacher.family)
        if stages[0] in ("adp", "reflow"):
            assert collect_pairs(args, out, teacher, NEVER)
        return Run(args, out, teacher, NEVER, stages, None, None, no_picture), start
    return made


def net_of(run, stage, iteration, name):
    """The weights of one network in a checkpoint."""
    found = weights(run.out.path, stage, iteration)
    return {k.removeprefix(f"{name}."): v for k, v in found.items() if k.startswith(f"{name}.")}


def furthest(a, b):
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def straight_line(rate):
    return [rate * (1 - i / N) for i in range(N)]


def rates_of(optimizers):
    rates = {optimizer.name: optimizer.rates for optimizer in optimizers}
    assert len(rates) == len(optimizers)
    return rates


def is_average(run, stage, before):
    """Each checkpoint's `average` is the moving average, of decay 0.9, of its `generator`s, begun
    at `before` -> the last one."""
    for i in range(1, N + 1):
        generator = net_of(run, stage, i, "generator")
        assert furthest(generator, before) > 1e-4
        before = {name: 0.9 * v + 0.1 * generator[name] for name, v in before.items()}
        average = net_of(run, stage, i, "average")
        assert average.keys() == before.keys()
        for name, v in before.items():
            assert_close(average[name], v, rtol=0, atol=1e-6)
    return average


def test_rates_and_averages_of_adp_and_adm(run_of):
    """AdamW without momentum moves a weight by just its rate in its first step. So the checkpoints
    say at which rate a network began, and from which weights."""
    run, start = run_of("--decay", "--ema", "0.9")
    assert train_sdxl.run_dmdx(run)
    adp, adm = rates_of(Watched.all[:3]), rates_of(Watched.all[3:])
    assert adp == {"generator": straight_line(RATES["adp"]), "latent heads": [RATES["heads"]] * N,
                   "pixel heads": [RATES["heads"]] * N}
    assert adm == {"generator": straight_line(RATES["generator"]),
                   "fake score": [RATES["fake"]] * N, "latent heads": [RATES["heads"]] * N}
    assert [optimizer.rate for optimizer in Watched.all if optimizer.name == "generator"] == [0, 0]

    average = is_average(run, "adp", start)
    is_average(run, "adm", average)             # ADM goes on from what ADP's average had become
    first = net_of(run, "adp", 1, "generator")
    assert furthest(first, start) == pytest.approx(RATES["adp"], rel=1e-3)
    first = net_of(run, "adm", 1, "generator")
    assert furthest(first, average) == pytest.approx(RATES["generator"], rel=1e-3)
    first = net_of(run, "adm", 1, "fake_score")
    assert furthest(first, start) == pytest.approx(RATES["fake"], rel=1e-3)


def test_rates_without_decay_are_constant(run_of):
    """A1 has ADP's rate, and DMD after it ADM's; without --ema a checkpoint has no average."""
    run, start = run_of("--method", "reflow", "--no-decay")
    assert train_sdxl.run_dmdx(run)
    run.stages = ["adm"]
    run.args.method = "dmd"
    assert train_sdxl.run_dmdx(run)
    assert rates_of(Watched.all[:1]) == {"generator": [RATES["adp"]] * N}
    assert rates_of(Watched.all[1:]) == {"generator": [RATES["generator"]] * N,
                                         "fake score": [RATES["fake"]] * N}
    for stage in ("reflow", "adm"):
        assert not net_of(run, stage, N, "average")
        assert not net_of(run, stage, N, "heads")


def test_rates_and_averages_of_phased_dmd(run_of):
    """Every phase begins at the full rate, from the teacher, with a fake score of its own."""
    run, start = run_of("--method", "phased_dmd", "--decay", "--ema", "0.9", "--ttur", "1")
    assert train_sdxl.run_phases(run)
    for optimizers in (Watched.all[:2], Watched.all[2:]):
        assert rates_of(optimizers) == {"generator": straight_line(RATES["generator"]),
                                        "fake score": [RATES["fake"]] * N}
    for stage in ("phase1", "phase2"):
        is_average(run, stage, start)
        first = net_of(run, stage, 1, "fake_score")
        assert furthest(first, start) == pytest.approx(RATES["fake"], rel=1e-3)


def test_a_resumed_stage_goes_on_at_its_place_on_the_line(run_of, tmp_path):
    """follow() alone: it starts where the checkpoint was, and not at the full rate."""
    net = torch.nn.Linear(2, 2)
    optimizer = Watched("generator", net.parameters(), 0.5, 0.0)

    def steps(start):
        for i in range(start + 1, 11):
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield dict(iteration=i)

    ema = SimpleNamespace(update=lambda: None, networks=lambda: dict(generator=net))
    args = SimpleNamespace(decay=True, save_every=100, sample_every=100)
    run = Run(args, Output(tmp_path / "alone", None), None, NEVER, ["adm"], None, None, no_picture)
    stage = Stage("adm", 10, ema, (optimizer,), {}, {}, [], None)
    run.done[stage.name] = 7
    assert follow(run, stage, steps(7))
    assert optimizer.rates == pytest.approx([0.5 * 0.3, 0.5 * 0.2, 0.5 * 0.1])
    assert optimizer.rate == 0


@pytest.mark.parametrize("gives", ["a tensor", "a list"])
def test_one_by_one_is_the_batch(gives):
    """Values and gradients, of a decoder and of taps."""
    net = torch.nn.Conv2d(3, 4, 3).double()

    def function(x):
        y = net(x).tanh()
        return y if gives == "a tensor" else [y, y[:, :2].exp()]

    found = []
    for f in (function, one_by_one(function)):
        x = torch.linspace(-1, 1, 3 * 3 * 36, dtype=torch.float64).view(3, 3, 6, 6).requires_grad_()
        out = f(x)
        maps = [out] if gives == "a tensor" else out
        loss = sum(y.square().sum() for y in maps)
        found.append([*maps, torch.autograd.grad(loss, x)[0]])
    batch, each = found
    assert len(batch) == len(each)
    for a, b in zip(each, batch):
        assert_close(a, b, rtol=0, atol=1e-12)
