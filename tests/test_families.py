"""Every family of the papers from the command line, on a small random pipeline of the true
structure: train, stop, resume, export, and the stock pipeline draws what the trainer drew."""
import json
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

import pipelines
from cli import ROOT, Run, failed, stock_difference, succeeded, two_at_a_time
from families.family import of_medium
from ode import sample
from training.flags import parse
from training.loading import load_pipeline

QUICK = ("--pairs 4 --pair-steps 2 --iterations 3 --batch-size 2 --save-every 100 "
         "--sample-every 100 --samples 2 --head-channels 8 --accumulate 1 --ttur 1 "
         "--lr-generator-adp 1e-3 --lr-generator 1e-3 --lr-fake 1e-3 "
         "--lr-discriminator 1e-3").split()
PROMPTS = ["a small red circle on green", "two dogs"]
IMAGES, VIDEOS = "train_sdxl.py", "train_cogvideox.py"
FAMILIES = {                    # name: (script, how the pipeline is built, its heads)
    "sd3-medium": (IMAGES, partial(pipelines.sd3, "medium"), 24),
    "sd3-medium without T5": (IMAGES, partial(pipelines.sd3, "medium", with_t5=False), 6),
    "sd3.5-medium": (IMAGES, partial(pipelines.sd3, "3.5-medium"), 6),
    "sd3.5-large": (IMAGES, partial(pipelines.sd3, "3.5-large"), 6),
    "cogvideox-2b": (VIDEOS, partial(pipelines.cogvideox, "2b"), 10),
    "cogvideox-5b": (VIDEOS, partial(pipelines.cogvideox, "5b"), 2),
    "cogvideox-1.5": (VIDEOS, partial(pipelines.cogvideox, "1.5"), 14),
    "wan-2.1": (VIDEOS, partial(pipelines.wan, "2.1"), 2),
    "wan-2.2": (VIDEOS, partial(pipelines.wan, "2.2"), 2),
    "qwen-image": (IMAGES, pipelines.qwen, 2),
}
SIZES = {"wan": "--height 32 --width 32 --frames 9", "qwen": "--height 64 --width 96"}
SHALLOW = 6                     # blocks: time goes with depth
# of all their blocks; of the others tests/test_discriminators.py counts the heads
DEEP = ("sd3-medium", "cogvideox-2b", "cogvideox-1.5")


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
    size = SIZES.get(name.split("-")[0], "").split()
    if name != "sd3-medium without T5":
        size += ["--text-tokens", "16"]         # the pipelines' 226 to 512 take most of the time
    return Run(ROOT / script, "--model", folder, "--prompts", prompts, "--out", out, *QUICK, *size,
               *flags)


def interrupted(family, name, out, *flags):
    """Ctrl-C once the prompts are embedded, which ends the run after its first iteration; then
    resumed to the end."""
    blocks = None if name in DEEP else SHALLOW
    run = start(family, name, out, *flags, blocks=blocks)
    while not (out / "prompts" / "00000").exists() and run.alive():
        time.sleep(0.01)
    run.send(signal.SIGINT)
    succeeded(run.wait())
    assert not (out / "result.json").exists(), "the run was over before the signal came"
    succeeded(start(family, name, out, "--resume", "auto", *flags, blocks=blocks).wait())


PHASED = [name for name in FAMILIES
          if name not in ("sd3-medium without T5", "sd3.5-large", "cogvideox-1.5")]
PHASED_FLAGS = "--method phased_dmd --steps 4 --lora-rank 2 --lora-alpha 1".split()
VARIANTS = {
    "sd3 in one step by ADP":
        ("sd3-medium", "--steps 1 --lora-rank 0 --pixel-backbone VISION"),
    "sd3.5 without T5 by LoRA":
        ("sd3.5-medium", "--no-t5 --lora-rank 2 --lora-rank-fake 2 --grad-checkpointing --steps 3"),
    "sd3, other sizes":
        ("sd3-medium", "--text-tokens 7 --height 64 --method dmd --steps 2"),
    "the student under guidance":
        ("cogvideox-2b", "--cfg-student 3 --steps 2"),
    "both of wan's networks, recomputed":
        ("wan-2.2", "--steps 4 --ema 0.9 --grad-checkpointing"),
    "qwen, all weights, long prompts":
        ("qwen-image", "--lora-rank 0 --grad-checkpointing --steps 3 --text-tokens 40"),
    "cogvideox by LoRA, other sizes":
        ("cogvideox-5b", "--lora-rank 2 --lora-rank-fake 2 --grad-checkpointing --steps 2 "
                         "--frames 5 --width 64"),
}


@pytest.fixture(scope="session")
def runs(family, tmp_path_factory):
    """(test, name) -> a future of the run's folder: two at a time in the background, in the order
    the tests ask."""
    root = tmp_path_factory.mktemp("runs")
    pipelines.sam().save_pretrained(root / "vision")
    for name in DEEP:
        family(name)
    for name in FAMILIES:
        family(name, SHALLOW)

    def adm(name, out):
        interrupted(family, name, out, "--steps", "2")
        return out

    def whole(name, out, *flags):
        succeeded(start(family, name, out, *flags).wait())
        return out

    jobs = {}
    for name in FAMILIES:
        jobs["adm", name] = (adm, name, root / f"adm {name}")
    for name in PHASED:
        jobs["phased", name] = (whole, name, root / f"phased {name}", *PHASED_FLAGS)
    for label, (name, flags) in VARIANTS.items():
        flags = flags.replace("VISION", str(root / "vision")).split()
        jobs["variant", label] = (whole, name, root / label, *flags)
    with two_at_a_time(jobs) as futures:
        yield futures


@pytest.mark.parametrize("name", FAMILIES)
def test_adm(runs, name):
    """Interrupted and resumed; as many heads as the paper counts, at full depth."""
    out = runs["adm", name].result()
    heads = load_file(out / "checkpoints" / "adm-00000003" / "heads.safetensors")
    assert len({k.split(".")[1] for k in heads}) == FAMILIES[name][2]
    assert stock_difference(out, PROMPTS) < 1e-4


@pytest.mark.parametrize("name", PHASED)
def test_phased_dmd(runs, name):
    out = runs["phased", name].result()
    assert stock_difference(out, PROMPTS) < 1e-4
    if name.startswith("wan"):          # both experts in the pipeline itself, as Wan2.2 has them
        index = json.loads((out / "export" / "model_index.json").read_text())
        assert index["transformer_2"][1] == "WanTransformer3DModel"
        assert 0.833 < index["boundary_ratio"] < 0.9376


@pytest.mark.parametrize("label", VARIANTS)
def test_variants(runs, label):
    assert stock_difference(runs["variant", label].result(), PROMPTS) < 1e-4


def test_lora_files_load_in_the_stock_pipeline(family, tmp_path):
    """lora/ on the teacher is the exported student: the file is whole, named as diffusers reads it,
    and of the right strength."""
    succeeded(start(family, "sd3-medium", tmp_path / "out", "--steps", "2", "--lora-rank", "2",
                    "--lora-alpha", "1").wait())
    teacher = DiffusionPipeline.from_pretrained(family("sd3-medium", SHALLOW)[1])
    student = DiffusionPipeline.from_pretrained(tmp_path / "out" / "export")
    before = {k: v.clone() for k, v in teacher.transformer.state_dict().items()}
    teacher.load_lora_weights(tmp_path / "out" / "export" / "lora")
    teacher.fuse_lora()
    teacher.unload_lora_weights()
    expected = student.transformer.state_dict()
    fused = teacher.transformer.state_dict()
    changed = [k for k, v in fused.items() if (v - before[k]).abs().max() > 0]
    assert len(changed) > SHALLOW * 4
    for k, v in fused.items():
        assert (v - expected[k]).abs().max() < 1e-6, k


def test_two_networks_as_one():
    """ByNoise against each of its networks on its own samples, forward and backward, in float64."""
    from families.wan import ByNoise
    torch.manual_seed(0)
    pipe = pipelines.wan("2.2")
    high, low = pipe.transformer.double(), pipe.transformer_2.double()
    both = ByNoise(high, low, 875.0)
    told = torch.tensor([999.0, 875.0, 874.0, 3.0])
    x = torch.randn(4, 4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    text = torch.randn(4, 7, 16, dtype=torch.float64)

    def one(net, part):
        return net(x[part], timestep=told[part], encoder_hidden_states=text[part],
                   return_dict=False)[0]

    def gradient(y):
        return torch.autograd.grad(y.square().sum(), x)[0]

    out, = both(x, timestep=told, encoder_hidden_states=text)
    alone = torch.cat([one(high, slice(0, 2)), one(low, slice(2, 4))])
    assert_close(out, alone, rtol=0, atol=1e-12)
    assert_close(gradient(out), gradient(alone), rtol=0, atol=1e-10)
    wrong = one(low, slice(0, 4))
    assert (out - wrong)[:2].abs().max() > 1e-6


@pytest.mark.parametrize("height, width", [(1024, 1024), (928, 1664)])
def test_qwens_steps_are_the_stock_schedulers(height, width):
    """Stops, times and whole trajectories, with the shift that the pipeline finds for this many
    tokens, from the released configuration."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    from families import qwen
    pipe = pipelines.qwen()
    latent = qwen.latent(pipe, pipe.transformer, SimpleNamespace(height=height, width=width))
    assert latent.shape == (height * width // 256, 16)
    schedule = qwen.schedule(pipe, latent)

    def net(x, timestep, return_dict):
        return ((x * timestep[:, None]).sin() + timestep[:, None],)

    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for steps in (1, 4, 8, 50):
        stops = schedule.stops(steps)
        stock, call = qwen.student_scheduler(pipe.scheduler, False, stops)
        stock.set_timesteps(call["num_inference_steps"], sigmas=call["sigmas"],
                            mu=calculate_shift(latent.shape[0], 256, 8192, 0.5, 0.9))
        assert_close(schedule.sigma[stops], stock.sigmas.double(), rtol=0, atol=1e-6)
        assert_close(schedule.timestep[stops[:-1]], stock.timesteps / 1000, rtol=0, atol=1e-6)
        x = noise
        for t in stock.timesteps:
            x = stock.step(net(x, t.expand(2) / 1000, False)[0], t, x, return_dict=False)[0]
        assert_close(sample(net, schedule, noise, stops, {}), x, rtol=0, atol=1e-5)


def test_the_papers_values_are_each_models_defaults(family, monkeypatch):
    """What --help cannot show: the family's own steps, rates and guidance, from its config."""
    expected = {
        "sd3-medium": (4, 1e-6, [6.0, 8.0], 64),
        "sd3.5-large": (4, 1e-8, [3.0, 4.0], 0),
        "cogvideox-2b": (8, 1e-7, [5.0, 7.0], 0),
        "qwen-image": (4, 1e-6, [4.0, 4.0], 64),
    }
    for name, values in expected.items():
        script, folder, prompts = family(name)
        families = of_medium("image" if script == IMAGES else "video")
        words = [script, "--model", str(folder), "--prompts", str(prompts)]
        monkeypatch.setattr(sys, "argv", words)
        args, _ = parse("", families, ())
        assert (args.steps, args.lr_generator, args.guidance, args.lora_rank) == values, name
        monkeypatch.setattr(sys, "argv", [*words, "--method", "phased_dmd"])
        args, _ = parse("", families, ())
        assert (args.steps, args.lr_generator, args.lr_fake) == (4, 5e-5, 4e-7), name
        assert (args.lora_rank, args.lora_alpha, args.ttur) == (64, 8.0, 5), name


def test_bad_usage(family, tmp_path):
    def run(name, *flags):
        return start(family, name, tmp_path / "out", *flags).wait()

    failed(run("wan-2.1", "--method", "phased_dmd", "--phases", "4"), 2, "--phases 4",
           "two experts")
    failed(start(family, "wan-2.2", tmp_path / "wan", "--lora-rank", "2", "--steps", "2").wait(), 1,
           "--lora-rank 2", "two networks")
    failed(run("cogvideox-2b", "--steps", "3", "--frames", "8", "--stage", "adp"), 2, "--steps 3",
           "--frames 8", "--stage adp")
    failed(run("qwen-image", "--cfg-student", "3", "--frames", "9", "--context-parallel", "2",
               "--text-tokens", "2000"), 2, "--cfg-student",
           "unknown flag --frames 9 --context-parallel 2", "--text-tokens 2000")
    failed(run("wan-2.1", "--context-parallel", "2"), 2, "--context-parallel: CogVideoX only")
    failed(run("sd3-medium", "--height", "65"), 2, "--height 65", "16")
    _, folder, prompts = family("sd3-medium")
    failed(Run(ROOT / VIDEOS, "--out", tmp_path / "out", "--model", folder, "--prompts",
               prompts).wait(), 1, "StableDiffusion3Pipeline", "CogVideoXPipeline")
    assert not (tmp_path / "out").exists()


def test_a_cogvideox_without_rotary_embeddings_reads_prompts_of_one_length(tmp_path):
    failed(Run(ROOT / VIDEOS, "--text-tokens", "5", "--out", tmp_path / "out").wait(), 1,
           "--text-tokens 5", "places for 8 tokens", "leave it out")


# -------------------------------------------------------------------------- context parallelism

SHARED = """
import sys, torch
import torch.distributed as dist
import pipelines
from families import cogvideox
from families.family import Latent
from training.context_parallel import context_parallel
from training.heads import heads_for
from training.networks import full_copy, recompute_activations
from training.ranks import start

kind, recompute, file = sys.argv[1], sys.argv[5] == "recompute", sys.argv[6]
ranks, blocks, attention_heads = map(int, sys.argv[2:5])
pipe = pipelines.cogvideox(kind, blocks, attention_heads, text_tokens=15)
frames, side = (4, 4) if kind == "1.5" else (3, 6)
net = pipe.transformer.double().requires_grad_(False)

def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

text = normal(1, 2, 15, 16)
latent = Latent((frames, 4, side, side), 8 * side, 8 * side)
cond = dict(encoder_hidden_states=text, **cogvideox.constant(pipe, latent))
x = normal(2, 2, frames, 4, side, side).requires_grad_()
t = torch.tensor([999.0, 300.0])
if ranks > 1:
    start()
    context_parallel(net, ranks)
torch.manual_seed(3)
heads = heads_for(cogvideox.taps, net, x.detach()[:1], 8, timestep=t[:1],
                  **dict(cond, encoder_hidden_states=text[:1])).double()
taps, student = cogvideox.taps(net), full_copy(net).requires_grad_(True)
if recompute:
    recompute_activations(net)
    recompute_activations(student)
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
    ("2b", 3, 6, 1, "keep"), ("5b", 2, 6, 3, "recompute"), ("1.5", 3, 6, 4, "keep"),
    ("5b", 4, 6, 6, "recompute"), ("2b", 8, 4, 14, "keep")])
def test_ranks_that_share_a_sample_are_one(tmp_path, kind, ranks, blocks, attention_heads,
                                           recompute):
    """Loss, gradient of the input and of every weight, in float64, where text (15 tokens), video
    (27, 27, 8) or heads do not divide. 14 heads leave by 8 what CogVideoX-2b's 30 leave."""
    started = []
    for n in (1, ranks):
        started.append(Run("-c", SHARED, kind, n, blocks, attention_heads, recompute,
                           tmp_path / f"{n}.pt", ranks=n if n > 1 else 0))
    for run in started:
        succeeded(run.wait())
    alone, together = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / f"{ranks}.pt")
    assert alone.keys() == together.keys() and len(alone) > 100
    for k in alone:
        assert_close(together[k], alone[k], rtol=1e-6, atol=1e-8, msg=lambda m: f"{k}: {m}")
    assert alone["x"].abs().max() > 1e-4


def test_context_parallel_of_the_embedded_teacher(tmp_path):
    """Its table is drawn by all ranks, which share every pass."""
    flags = ("--pairs 8 --pair-steps 2 --iterations 1 --warm-up 0 --batch-size 2 --method dmd "
             "--steps 2 --context-parallel 2").split()
    succeeded(Run(ROOT / VIDEOS, "--out", tmp_path / "out", *flags, ranks=2).wait())
    assert "student" in json.loads((tmp_path / "out" / "result.json").read_text())


def test_context_parallel_from_the_command_line(family, tmp_path):
    """Two ranks that share samples, and weights as well, recomputing, against one rank."""
    script, folder, prompts = family("cogvideox-5b", SHALLOW)
    flags = "--steps 2 --text-tokens 16 --lora-rank 2 --grad-checkpointing".split()
    alone = start(family, "cogvideox-5b", tmp_path / "one", *flags)
    succeeded(Run(ROOT / script, "--model", folder, "--prompts", prompts, "--out", tmp_path / "two",
                  *QUICK, *flags, "--context-parallel", "2", "--fsdp", ranks=2).wait())
    succeeded(alone.wait())
    one, two = (load_file(tmp_path / n / "checkpoints" / "adm-00000003" / "fake_score.safetensors")
                for n in ("one", "two"))
    for k in one:
        assert_close(two[k], one[k], rtol=1e-3, atol=2e-4, msg=lambda m: f"{k}: {m}")
    assert stock_difference(tmp_path / "two", PROMPTS) < 1e-4


def test_a_tokenizer_of_sentencepiece_alone(tmp_path):
    """As the released CogVideoX have it, without a tokenizer.json: transformers then needs
    sentencepiece and protobuf, and does not ask for them itself."""
    model = tmp_path / "model"
    pipelines.cogvideox(blocks=1).save_pretrained(model)
    (model / "tokenizer" / "tokenizer.json").unlink()
    text = tmp_path / "text"
    text.write_text("a small red circle moving right\n" * 100)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model / "tokenizer" / "spiece"), vocab_size=20, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    pipe = load_pipeline(SimpleNamespace(model=str(model), no_t5=False), of_medium("video"))
    alone = sentencepiece.SentencePieceProcessor(str(model / "tokenizer" / "spiece.model"))
    assert pipe.tokenizer("a red circle").input_ids == [*alone.encode("a red circle"), 1]
