"""Two ranks against one, sharded, offloaded, checkpointed, in bf16, compiled, by LoRA, in every combination; and a run that changes its number of ranks."""
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import pipelines
from cli import ROOT, Run, stock_difference, succeeded, two_at_a_time

FLAGS = ("offload", "checkpointing", "bf16", "lora")
COMBINATIONS = [flags for n in range(len(FLAGS) + 1) for flags in itertools.combinations(FLAGS, n)]
COMBINATIONS += [("nodes", "checkpointing")]                    # each rank a node of its own: shards inside, copies across
COMBINATIONS += [(*FLAGS, "compile")]                           # which takes as long as three of the others


def label(flags):
    return "+".join(flags) or "plain"


def alone(flags):
    """The run on one rank that this one must equal: where weights are kept, and what is computed twice, changes nothing."""
    return label([f for f in flags if f in ("bf16", "lora")])


FIVE = """
import os, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
import pipelines, train_sdxl
from accelerate import init_empty_weights
from adm import Draws, adm
from discriminators import Taps
from ode import Schedule
from plumbing import Adam, Average, sharding, start, trained_state, whole, world
folder, names = sys.argv[1], sys.argv[2:]
device = start(alone=True)
rank, ranks = world()
schedule = Schedule.straight()
uncond = dict(encoder_hidden_states=torch.zeros(1, 5, 32), pooled_projections=torch.zeros(1, 32))
for name in names:
    flags = name.split("+")
    args = SimpleNamespace(grad_checkpointing="checkpointing" in flags, bf16="bf16" in flags, compile="eager" if "compile" in flags else None,
                           lora_alpha=None, head_channels=8)
    os.environ["LOCAL_WORLD_SIZE"] = "1" if "nodes" in flags else str(ranks)
    how = sharding(True, "offload" in flags, args.bf16, device)
    pipe = pipelines.sd3(blocks=2)
    if rank:                                                    # only rank 0 has weights
        with init_empty_weights():
            pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config)
    net = pipe.transformer.requires_grad_(False)
    teacher = SimpleNamespace(net=net, units=[net], backbone=net, device=device, how=how, shape=(4, 8, 8), family=train_sdxl.PIPELINES["StableDiffusion3Pipeline"],
                              uncond=lambda n: uncond)
    train_sdxl.place(args, net, how, device)
    torch.manual_seed(0)
    r = 2 * ("lora" in flags)
    generator, fake = (train_sdxl.trainable(args, teacher, name, r) for name in ("generator", "fake"))
    average = Average(generator, 0.5, lambda net: train_sdxl.prepare(args, net, device))
    heads = train_sdxl.latent_heads(args, teacher)
    nets = dict(generator=generator, fake=fake, heads=heads, average=average.net)
    before = {f"{n}.{k}": whole(p.detach()).clone() for n, net in nets.items() for k, p in trained_state(net).items()}
    optimizers = [Adam(n, nets[n].parameters(), 1e-4, 1.0) for n in ("generator", "fake", "heads")]

    def batches(i):
        for s in range(rank, 4, ranks):                         # four micro-batches of one sample: each is computed alike, whoever does it
            cond = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(9 * i + s)) for k, v in uncond.items()}
            yield Draws((0,), i, [s], teacher.shape), cond, uncond
    for losses in adm(generator, fake, net, Taps(net), heads, optimizers, schedule, schedule, schedule.rows(2), (2.0, 4.0), lambda i: list(batches(i)), 5):
        average.update()
    after = {f"{n}.{k}": whole(p.detach()).clone() for n, net in nets.items() for k, p in trained_state(net).items()}
    gradient = {f"{o.name}.{i}": whole(s["exp_avg"]) for o in optimizers for i, s in o.adam.state_dict()["state"].items()}
    if rank == 0:
        torch.save((before, after, gradient), f"{folder}/{name} {ranks}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def five_iterations(tmp_path_factory):
    """Two ranks through all combinations, one after the other in the same processes; one rank through those that compute something else."""
    folder = tmp_path_factory.mktemp("sharded")
    one, two = (list(dict.fromkeys(map(name, COMBINATIONS))) for name in (alone, label))
    for run in [Run("-c", FIVE, folder, *two, ranks=2), Run("-c", FIVE, folder, *one)]:
        succeeded(run.wait())
    return folder


def equal(one, two):
    """Weights to 1e-5, but for one in a thousand: where a gradient is nothing but rounding (a bias before a normalisation), Adam gives it a full step."""
    apart = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    assert (apart < 1e-5).float().mean() > 0.999, (apart.max(), (apart < 1e-5).float().mean())


@pytest.mark.parametrize("flags", COMBINATIONS, ids=label)
def test_two_ranks_are_one(five_iterations, flags):
    """The weights after five iterations, and the last gradients as the optimizers keep them."""
    (before, one, gradient), (_, two, gradient_two) = (torch.load(five_iterations / f"{name}.pt") for name in (f"{alone(flags)} 1", f"{label(flags)} 2"))
    assert one.keys() == two.keys() and gradient.keys() == gradient_two.keys()
    moved = {n: max((one[k] - before[k]).abs().max().item() for k in one if k.startswith(n)) for n in ("generator", "fake", "heads", "average")}
    assert min(moved.values()) > 1e-4, moved
    for k, g in gradient.items():
        assert_close(gradient_two[k], g, rtol=1e-3, atol=1e-5, msg=lambda m: f"gradient {k}: {m}")
    equal(one, two)


PROMPTS = ["a small red circle on green", "two dogs"]


@pytest.fixture(scope="module")
def change_of_ranks(tmp_path_factory):
    """name -> a future of the folder of four iterations: on one rank whole, or stopped after two and finished on another number of ranks."""
    root = tmp_path_factory.mktemp("ranks")
    pipelines.sd3(blocks=2).save_pretrained(root / "model")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))

    def go(name, *runs):
        for ranks, iterations, *flags in runs:
            succeeded(Run(ROOT / "train_sdxl.py", "--model", root / "model", "--prompts", root / "prompts.txt", "--out", root / name, "--resume", "auto",
                          *"--text-tokens 7 --steps 2 --lora-rank 0 --batch-size 1 --pair-steps 2 --save-every 2 --sample-every 100 --head-channels 8 --ema 0.9 "
                          "--lr-generator 1e-4 --lr-fake 1e-4 --lr-discriminator 1e-4".split(),
                          "--accumulate", 2 // (ranks or 1), "--iterations", iterations, *flags, ranks=ranks).wait())
            (root / name / "result.json").rename(root / name / "result.txt")     # or the next would refuse to touch a finished run
        return root / name

    with two_at_a_time({"whole": (go, "whole", (0, 4)), "2 to 1": (go, "2 to 1", (2, 2, "--fsdp"), (0, 4, "--cpu-offload")),
                        "1 to 2": (go, "1 to 2", (0, 2), (2, 4, "--fsdp", "--cpu-offload", "--grad-checkpointing"))}) as futures:
        yield futures


@pytest.mark.parametrize("name", ["2 to 1", "1 to 2"])
def test_resumed_on_another_number_of_ranks(change_of_ranks, name):
    """Two iterations sharded over two ranks, two more on one, and the other way round: the weights of four on one rank, whole."""
    a, b = (change_of_ranks[n].result() / "checkpoints" / "adm-00000004" for n in ("whole", name))
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    one, two = ({f"{file.stem}.{k}": v for file in folder.glob("[!o]*.safetensors") for k, v in load_file(file).items()} for folder in (a, b))
    assert one.keys() == two.keys() and {k.split(".")[0] for k in one} == {"generator", "average", "fake_score", "heads"}
    equal(one, two)


def test_a_sharded_students_export(change_of_ranks):
    assert stock_difference(change_of_ranks["1 to 2"].result(), PROMPTS) < 1e-4
