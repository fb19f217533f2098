"""Every family of the papers from the command line, on a small random pipeline of the true structure: train, stop, resume, export, and
the stock pipeline draws what the trainer drew."""
import importlib
import json
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

import pipelines
from cli import ROOT, Run, failed, stock_difference, succeeded, two_at_a_time

QUICK = ("--pairs 4 --pair-steps 2 --iterations 3 --batch-size 2 --save-every 100 --sample-every 100 --head-channels 8 --accumulate 1 --ttur 1 "
         "--lr-generator-adp 1e-3 --lr-generator 1e-3 --lr-fake 1e-3 --lr-discriminator 1e-3").split()
PROMPTS = ["a small red circle on green", "two dogs"]
# name: (script, how the pipeline is built, its heads)
FAMILIES = {
    "sd3-medium": ("train_sdxl.py", partial(pipelines.sd3, "medium"), 24),
    "sd3-medium without T5": ("train_sdxl.py", partial(pipelines.sd3, "medium", with_t5=False), 24),
    "sd3.5-medium": ("train_sdxl.py", partial(pipelines.sd3, "3.5-medium"), 24),
    "sd3.5-large": ("train_sdxl.py", partial(pipelines.sd3, "3.5-large"), 38),
    "cogvideox-2b": ("train_cogvideox.py", partial(pipelines.cogvideox, "2b"), 10),
    "cogvideox-5b": ("train_cogvideox.py", partial(pipelines.cogvideox, "5b"), 14),
    "cogvideox-1.5": ("train_cogvideox.py", partial(pipelines.cogvideox, "1.5"), 14),
    "wan-2.1": ("train_wan.py", partial(pipelines.wan, "2.1"), 2),
    "wan-2.2": ("train_wan.py", partial(pipelines.wan, "2.2"), 2),
    "qwen-image": ("train_qwen.py", pipelines.qwen, 2),
}
SHALLOW = 6                                                     # blocks, where heads are not counted: time goes with depth


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))

    def saved(name, blocks=None):
        """-> (script, the pipeline's folder, the prompt file)."""
        script, build, _ = FAMILIES[name]
        folder = root / f"{name.replace(' ', '-')}-{blocks}"
        if not folder.exists():
            build(**dict(blocks=blocks) if blocks else {}).save_pretrained(folder)
        return script, folder, root / "prompts.txt"
    return saved


def start(family, name, out, *flags, blocks=SHALLOW):
    script, folder, prompts = family(name, blocks)
    size = {"wan": "--height 32 --width 32 --frames 9", "qwen": "--height 64 --width 96"}.get(name.split("-")[0], "").split()
    size += [] if name == "sd3-medium without T5" else ["--text-tokens", "16"]    # the pipelines' own 226 to 512 take most of the time
    return Run(ROOT / script, "--model", folder, "--prompts", prompts, "--out", out, *QUICK, *size, *flags)


def interrupted(family, name, out, *flags):
    """At full depth. Ctrl-C once the prompts are embedded, which ends the run after its first iteration; then resumed to the end."""
    run = start(family, name, out, *flags, blocks=None)
    while not (out / "prompts" / "00000").exists() and run.alive():
        time.sleep(0.01)
    run.send(signal.SIGINT)
    succeeded(run.wait())
    assert not (out / "result.json").exists(), "the run was over before the signal came"
    succeeded(start(family, name, out, "--resume", "auto", *flags, blocks=None).wait())


PHASED = [n for n in FAMILIES if n not in ("sd3-medium without T5", "sd3.5-large", "cogvideox-1.5")]
VARIANTS = {
    "sd3 in one step by ADP": ("sd3-medium", "--steps", "1", "--lora-rank", "0", "--pixel-backbone", "vision"),
    "sd3.5 without T5 by LoRA": ("sd3.5-medium", "--no-t5", "--lora-rank", "2", "--lora-rank-fake", "2", "--grad-checkpointing", "--steps", "3"),
    "sd3, other sizes": ("sd3-medium", "--text-tokens", "7", "--height", "64", "--method", "dmd", "--steps", "2"),
    "the student under guidance": ("cogvideox-2b", "--cfg-student", "3", "--steps", "2"),
    "both of wan's networks, recomputed": ("wan-2.2", "--steps", "4", "--ema", "0.9", "--grad-checkpointing"),
    "qwen, all weights, long prompts": ("qwen-image", "--lora-rank", "0", "--grad-checkpointing", "--steps", "3", "--text-tokens", "40"),
    "cogvideox by LoRA, other sizes": ("cogvideox-5b", "--lora-rank", "2", "--lora-rank-fake", "2", "--grad-checkpointing", "--steps", "2",
                                       "--frames", "5", "--width", "64")}


@pytest.fixture(scope="session")
def runs(family, tmp_path_factory):
    """(test, name) -> a future of the run's folder: two at a time in the background, in the order the tests ask."""
    root = tmp_path_factory.mktemp("runs")
    pipelines.sam().save_pretrained(root / "vision")
    for name in FAMILIES:
        family(name), family(name, SHALLOW)

    def adm(name, out):
        interrupted(family, name, out, "--steps", "2")
        return out

    def whole(name, out, *flags):
        succeeded(start(family, name, out, *(str(root / "vision") if f == "vision" else f for f in flags)).wait())
        return out

    jobs = {("adm", name): (adm, name, root / f"adm {name}") for name in FAMILIES}
    jobs |= {("phased", name): (whole, name, root / f"phased {name}", *"--method phased_dmd --steps 4 --lora-rank 2 --lora-alpha 1".split())
             for name in PHASED}
    jobs |= {("variant", label): (whole, name, root / label, *flags) for label, (name, *flags) in VARIANTS.items()}
    with two_at_a_time(jobs) as futures:
        yield futures


@pytest.mark.parametrize("name", FAMILIES)
def test_adm(runs, name):
    """Interrupted and resumed; as many heads as the paper counts."""
    out = runs["adm", name].result()
    heads = load_file(out / "checkpoints" / "adm-00000003" / "heads.safetensors")
    assert len({k.split(".")[1] for k in heads}) == FAMILIES[name][2]
    assert stock_difference(out, PROMPTS) < 1e-4


@pytest.mark.parametrize("name", PHASED)
def test_phased_dmd(runs, name):
    out = runs["phased", name].result()
    assert stock_difference(out, PROMPTS) < 1e-4
    if name.startswith("wan"):                                  # both experts in the pipeline itself, as Wan2.2 has them
        index = json.loads((out / "export" / "model_index.json").read_text())
        assert index["transformer_2"][1] == "WanTransformer3DModel" and 0.833 < index["boundary_ratio"] < 0.9376


@pytest.mark.parametrize("label", VARIANTS)
def test_variants(runs, label):
    assert stock_difference(runs["variant", label].result(), PROMPTS) < 1e-4


def test_lora_files_load_in_the_stock_pipeline(family, tmp_path):
    """lora/ on the teacher is the exported student: the file is whole, named as diffusers reads it, and of the right strength."""
    succeeded(start(family, "sd3-medium", tmp_path / "out", "--steps", "2", "--lora-rank", "2", "--lora-alpha", "1").wait())
    teacher, student = DiffusionPipeline.from_pretrained(family("sd3-medium", SHALLOW)[1]), DiffusionPipeline.from_pretrained(tmp_path / "out" / "export")
    before = {k: v.clone() for k, v in teacher.transformer.state_dict().items()}
    teacher.load_lora_weights(tmp_path / "out" / "export" / "lora")
    teacher.fuse_lora()
    teacher.unload_lora_weights()
    expected = student.transformer.state_dict()
    changed = [k for k, v in teacher.transformer.state_dict().items() if (v - before[k]).abs().max() > 0]
    assert len(changed) > SHALLOW * 4
    for k, v in teacher.transformer.state_dict().items():
        assert (v - expected[k]).abs().max() < 1e-6, k


def test_two_networks_as_one():
    """ByNoise against each of its networks on its own samples, forward and backward, in float64."""
    from train_wan import ByNoise
    torch.manual_seed(0)
    pipe = pipelines.wan("2.2")
    high, low = pipe.transformer.double(), pipe.transformer_2.double()
    both, told = ByNoise(high, low, 875.0), torch.tensor([999.0, 875.0, 874.0, 3.0])
    x = torch.randn(4, 4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    text = torch.randn(4, 7, 16, dtype=torch.float64)
    out, = both(x, timestep=told, encoder_hidden_states=text)
    alone = torch.cat([net(x[part], timestep=told[part], encoder_hidden_states=text[part], return_dict=False)[0]
                       for net, part in ((high, slice(0, 2)), (low, slice(2, 4)))])
    assert_close(out, alone, rtol=0, atol=1e-12)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, alone)), rtol=0, atol=1e-10)
    wrong, = low(x, timestep=told, encoder_hidden_states=text, return_dict=False)
    assert (out - wrong)[:2].abs().max() > 1e-6


@pytest.mark.parametrize("height, width", [(1024, 1024), (928, 1664)])
def test_qwens_steps_are_the_stock_schedulers(height, width):
    """Stops, times and whole trajectories, with the shift that the pipeline finds for this many tokens, from the released configuration."""
    import train_qwen
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
    from ode import sample
    pipe = pipelines.qwen()
    shape, *_ = train_qwen.latent_qwen(pipe, pipe.transformer, SimpleNamespace(height=height, width=width))
    assert shape == (height * width // 256, 16)
    schedule = train_qwen.schedule_qwen(pipe, shape)
    net = lambda x, timestep, return_dict: ((x * timestep[:, None]).sin() + timestep[:, None],)
    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for steps in (1, 4, 8, 50):
        rows = schedule.rows(steps)
        stock, call = train_qwen.schedulers_qwen(pipe.scheduler, False, rows)
        stock.set_timesteps(call["num_inference_steps"], sigmas=call["sigmas"], mu=calculate_shift(shape[0], 256, 8192, 0.5, 0.9))
        assert_close(schedule.sigma[rows], stock.sigmas.double(), rtol=0, atol=1e-6)
        assert_close(schedule.timestep[rows[:-1]], stock.timesteps / 1000, rtol=0, atol=1e-6)
        x = noise
        for t in stock.timesteps:
            x = stock.step(net(x, t.expand(2) / 1000, False)[0], t, x, return_dict=False)[0]
        assert_close(sample(net, schedule, noise, rows, {}), x, rtol=0, atol=1e-5)


def test_the_papers_values_are_each_models_defaults(family):
    """What --help cannot show: the family's own steps, rates and guidance, from its config."""
    import sys

    import train_sdxl
    expected = {"sd3-medium": (4, 1e-6, [6.0, 8.0], 64), "sd3.5-large": (4, 1e-8, [3.0, 4.0], 0), "cogvideox-2b": (8, 1e-7, [5.0, 7.0], 0),
                "qwen-image": (4, 1e-6, [4.0, 4.0], 64)}
    before = sys.argv
    for name, (steps, lr, guidance, rank) in expected.items():
        script, folder, prompts = family(name)
        sys.argv = [script, "--model", str(folder), "--prompts", str(prompts)]
        rows = importlib.import_module(Path(script).stem).PIPELINES
        args = train_sdxl.parse("", rows, embedded=False)
        assert (args.steps, args.lr_generator, args.guidance, args.lora_rank) == (steps, lr, guidance, rank), name
        sys.argv += ["--method", "phased_dmd"]
        args = train_sdxl.parse("", rows, embedded=False)
        assert (args.steps, args.lr_generator, args.lr_fake, args.lora_rank, args.lora_alpha, args.ttur) == (4, 5e-5, 4e-7, 64, 8.0, 5), name
    sys.argv = before


def test_bad_usage(family, tmp_path):
    failed(start(family, "wan-2.1", tmp_path / "out", "--method", "phased_dmd", "--phases", "4").wait(), 2, "--phases 4", "two experts")
    failed(start(family, "wan-2.2", tmp_path / "wan", "--lora-rank", "2", "--steps", "2").wait(), 1, "--lora-rank 2", "two networks")
    failed(start(family, "cogvideox-2b", tmp_path / "out", "--steps", "3", "--frames", "8", "--stage", "adp").wait(), 2, "--steps 3", "--frames 8", "--stage adp")
    failed(start(family, "qwen-image", tmp_path / "out", "--cfg-student", "3", "--frames", "9", "--context-parallel", "2", "--text-tokens", "2000").wait(), 2,
           "--cfg-student", "--frames", "--context-parallel", "--text-tokens 2000")
    failed(start(family, "sd3-medium", tmp_path / "out", "--height", "65").wait(), 2, "--height 65", "32")
    failed(Run(ROOT / "train_cogvideox.py", "--out", tmp_path / "out").wait(), 2, "--model")
    failed(Run(ROOT / "train_cogvideox.py", "--out", tmp_path / "out", "--model", family("sd3-medium")[1], "--prompts", family("sd3-medium")[2]).wait(), 1,
           "StableDiffusion3Pipeline", "CogVideoXPipeline")
    assert not (tmp_path / "out").exists()


SHARED = """
import sys, torch
import torch.distributed as dist
import pipelines, train_cogvideox
from discriminators import Taps, heads_for
from plumbing import Lora, checkpointing, start
kind, ranks, blocks, attention_heads, recompute, file = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5] == "recompute", sys.argv[6]
pipe, (frames, side) = pipelines.cogvideox(kind, blocks, attention_heads, text_tokens=15), (4, 4) if kind == "1.5" else (3, 6)
net = pipe.transformer.double().requires_grad_(False)
cond = dict(encoder_hidden_states=torch.randn(2, 15, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
            **train_cogvideox.rotary(pipe, (frames, 4, side, side), 8 * side, 8 * side))
x = torch.randn(2, frames, 4, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
t = torch.tensor([999.0, 300.0])
if ranks > 1:
    start()
    train_cogvideox.context_parallel(net, ranks)
torch.manual_seed(3)
heads = heads_for(net, x.detach()[:1], 8, timestep=t[:1], **dict(cond, encoder_hidden_states=cond["encoder_hidden_states"][:1])).double()
from plumbing import full_copy
taps, student = Taps(net), full_copy(net).requires_grad_(True)
if recompute:
    checkpointing(net), checkpointing(student)
y, = student(x, timestep=t, **cond, return_dict=False)
loss = y.square().mean() + heads(taps(y, timestep=t, **cond)).sum()
loss.backward()
grads = {"loss": loss.detach(), "x": x.grad}
for prefix, module in (("student.", student), ("heads.", heads)):
    for name, p in module.named_parameters():
        if p.grad is not None:
            g = p.grad.clone()
            if ranks > 1:
                dist.all_reduce(g)
            grads[prefix + name] = g / ranks
if ranks == 1 or dist.get_rank() == 0:
    torch.save(grads, file)
if ranks > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind, ranks, blocks, attention_heads, recompute", [
    ("2b", 3, 6, 1, "keep"), ("5b", 2, 6, 3, "recompute"), ("1.5", 3, 6, 4, "keep"), ("5b", 4, 6, 6, "recompute"), ("2b", 8, 4, 14, "keep")])
def test_ranks_that_share_a_sample_are_one(tmp_path, kind, ranks, blocks, attention_heads, recompute):
    """Loss, gradient of the input and of every weight, in float64, where text (15 tokens), video (27, 27, 8) or heads do not divide.
    14 heads leave by 8 what CogVideoX-2b's 30 leave."""
    for run in [Run("-c", SHARED, kind, n, blocks, attention_heads, recompute, tmp_path / f"{n}.pt", ranks=n if n > 1 else 0) for n in (1, ranks)]:
        succeeded(run.wait())
    alone, together = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / f"{ranks}.pt")
    assert alone.keys() == together.keys() and len(alone) > 100
    for k in alone:
        assert_close(together[k], alone[k], rtol=1e-6, atol=1e-8, msg=lambda m: f"{k}: {m}")
    assert alone["x"].abs().max() > 1e-4


def test_context_parallel_from_the_command_line(family, tmp_path):
    """Two ranks that share samples, and weights as well, recomputing, against one rank."""
    script, folder, prompts = family("cogvideox-5b", SHALLOW)
    flags = ["--steps", "2", "--text-tokens", "16", "--lora-rank", "2", "--grad-checkpointing"]
    alone = start(family, "cogvideox-5b", tmp_path / "one", *flags)
    succeeded(Run(ROOT / script, "--model", folder, "--prompts", prompts, "--out", tmp_path / "two", *QUICK, *flags, "--context-parallel", "2", "--fsdp", ranks=2).wait())
    succeeded(alone.wait())
    one, two = (load_file(tmp_path / n / "checkpoints" / "adm-00000003" / "fake_score.safetensors") for n in ("one", "two"))
    for k in one:
        assert_close(two[k], one[k], rtol=1e-3, atol=2e-4, msg=lambda m: f"{k}: {m}")
    assert stock_difference(tmp_path / "two", PROMPTS) < 1e-4
