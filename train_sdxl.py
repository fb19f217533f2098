"""Distil a Stable Diffusion XL pipeline to one step: DMDX (collect ODE pairs, ADP, ADM), or DMD for comparison.

    python train_sdxl.py                                            # the embedded teacher, on two CPU cores, in minutes
    python train_sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --out out/sdxl \\
        --bf16 --grad-checkpointing --lora-rank 64 --lora-rank-fake 64 --batch-size 1        # one GPU
    torchrun --nproc-per-node 8 train_sdxl.py --model ... (the same flags)                    # eight

Writes to --out: pairs/, checkpoints/, metrics.jsonl, losses.png, samples.png, result.json, and export/, a pipeline that
stock diffusers samples.
"""
import argparse
import hashlib
import json
import math
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
from tqdm import tqdm

import shapes
from adm import Draws, adm, adp
from discriminators import Taps, heads_for
from ode import Schedule, sample
from plumbing import (Adam, Average, Failure, Output, StopSignal, autocast, barrier, curves, goodbye, grid, load_checkpoint,
                      newest_checkpoint, quiet, read_folder, read_prompts, run, save_checkpoint, start, usage, world, write_folder)

EMBEDDED = Path(__file__).parent / "teacher"
SHARD = 256                                                     # pairs in a file

# What the embedded teacher wants instead of the paper's values: three orders of magnitude fewer weights and iterations.
SHAPES = dict(pairs=2048, pair_steps=20, pair_guidance=3.0, iterations_adp=1000, iterations_adm=200, batch_size=32,
              lr_generator_adp=3e-4, lr_generator=2e-5, lr_fake=1e-3, lr_discriminator=1e-3, guidance=[2.0, 4.0], ema=0.99, head_channels=64,
              pixel_backbone=str(EMBEDDED / "vision_encoder"), sample_every=250, save_every=250)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: usage([message])
    g = p.add_argument_group("what")
    g.add_argument("--model", help="local directory or hub id of an SDXL pipeline (default: the embedded teacher of captioned shapes, "
                                   "which brings settings of its own)")
    g.add_argument("--prompts", help="text file, one prompt a line (default for the embedded teacher: its captions)")
    g.add_argument("--method", choices=["dmdx", "dmd"], default="dmdx", help="loss of the last stage: ADM, or the DMD it replaces (ablation B3)")
    g.add_argument("--stage", choices=["all", "pairs", "adp", "adm"], default="all", help="all is DMDX: pairs, adp, adm; adm alone starts "
                   "from a finished adp in --out, or, without one, from the teacher (ablation B1)")
    g.add_argument("--out", default="out/sdxl", help="where everything is written")
    g.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from the newest whole checkpoint in --out (auto), or from this one")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("ODE pairs")
    g.add_argument("--pairs", type=int, default=16384, help="how many to collect (paper: silent)")
    g.add_argument("--pair-steps", type=int, default=25, help="teacher's steps, second-order multistep (paper: teacher of 25 steps, Tab. 1)")
    g.add_argument("--pair-guidance", type=float, default=7.0, help="teacher's CFG (paper: as in its own sampling)")
    g.add_argument("--resolution", type=int, help="pixels (default: the model's own, 1024)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--iterations-adp", type=int, default=8000, help="paper: 8000 (Tab. 7)")
    g.add_argument("--iterations-adm", type=int, default=8000, help="paper: 8000 (Tab. 7)")
    g.add_argument("--iterations", type=int, help="both at once")
    g.add_argument("--batch-size", type=int, default=4, help="samples a rank and micro-batch (paper: 4 on each of 32 GPUs, Tab. 7)")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches an iteration")
    g.add_argument("--lr-generator-adp", type=float, default=1e-6, help="paper: 1e-6 (B.5)")
    g.add_argument("--lr-generator", type=float, default=1e-7, help="in ADM; paper: 1e-7 (B.5)")
    g.add_argument("--lr-fake", type=float, default=1e-6, help="paper: 1e-6 (B.5)")
    g.add_argument("--lr-discriminator", type=float, default=5e-6, help="paper: 5e-6 (B.5)")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm, 0 for none (choice)")
    g.add_argument("--ema", type=float, default=0.0, help="decay of the generator's average that is sampled and exported, 0 for none (choice)")
    g = p.add_argument_group("method")
    g.add_argument("--guidance", type=float, nargs=2, default=[6.0, 8.0], metavar=("LO", "HI"), help="CFG range of the real score; paper: 6 8 (B.5)")
    g.add_argument("--steps", type=int, default=1, help="of the student; paper: 1 for SDXL; more than 1 skips ADP, which is one-step only")
    g.add_argument("--ttur", type=int, default=1, help="fake-score updates a generator update; paper: 1 (Tab. 5)")
    g.add_argument("--lambdas", type=float, nargs=2, default=[0.85, 0.15], metavar=("LATENT", "PIXEL"), help="ADP weights; paper: 0.85 0.15")
    g.add_argument("--head-channels", type=int, default=256, help="width of a discriminator head (choice)")
    g.add_argument("--pixel-backbone", default="facebook/sam-vit-base", help="id or directory of a SAM (paper) or DINOv2 (ablation A2) model")
    g = p.add_argument_group("memory")
    g.add_argument("--lora-rank", type=int, default=0, help="train the generator as a LoRA of this rank (0: fully, as the paper does)")
    g.add_argument("--lora-rank-fake", type=int, default=0, help="the same for the fake score")
    g.add_argument("--bf16", action="store_true", help="bf16 arithmetic, frozen weights stored in bf16 (paper: yes, B.4)")
    g.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass (paper: yes, B.4)")
    g = p.add_argument_group("watching")
    g.add_argument("--save-every", type=int, default=500)
    g.add_argument("--sample-every", type=int, default=500)

    known, _ = p.parse_known_args()
    if known.model is None:
        p.set_defaults(**SHAPES)
    args, unknown = p.parse_known_args()
    wrong = [f"unknown flag {' '.join(unknown)}"] if unknown else []
    if args.iterations is not None:
        args.iterations_adp = args.iterations_adm = args.iterations
    flag = lambda name: f"--{name.replace('_', '-')} {getattr(args, name)}"
    wrong += [f"{flag(n)}: must be above 0" for n in ("pairs", "pair_steps", "iterations_adp", "iterations_adm", "batch_size", "accumulate",
              "lr_generator_adp", "lr_generator", "lr_fake", "lr_discriminator", "steps", "ttur", "head_channels", "save_every", "sample_every")
              if not (getattr(args, n) > 0 and math.isfinite(getattr(args, n)))]
    wrong += [f"{flag(n)}: must be 0 or above" for n in ("clip", "lora_rank", "lora_rank_fake", "seed", "pair_guidance") if getattr(args, n) < 0]
    wrong += [f"{flag('ema')}: must be in [0, 1)"] * (not 0 <= args.ema < 1)
    wrong += [f"--guidance {args.guidance[0]} {args.guidance[1]}: LO is above HI"] * (args.guidance[0] > args.guidance[1])
    wrong += ["--lambdas: weights must be 0 or above, one of them above"] * (min(args.lambdas) < 0 or max(args.lambdas) == 0)
    wrong += [f"{flag('steps')}: ADP is one-step only; use --stage adm"] * (args.steps > 1 and args.stage != "adm")
    wrong += ["--prompts is needed with --model: a text file, one prompt a line"] * (args.model is not None and args.prompts is None)
    wrong += [f"{flag('pairs')}: the embedded teacher's table needs at least 2"] * (args.model is None and args.pairs == 1)
    if wrong:
        usage(wrong)
    return args


# -------------------------------------------------------------------------------------------------------------- teacher

class Teacher:
    """An SDXL pipeline taken apart for distillation: `unet` (frozen), `schedule`, prompt embeddings, `decode`, and the `shape` of a
    latent. The text encoders are freed once the prompts are embedded. Raises Failure if --model is no SDXL pipeline."""

    def __init__(self, args, prompts, device):
        pipe = load_pipeline(args)
        pipe.to(device)
        self.prompts, self.device, self.unet, self.vae = prompts, device, pipe.unet, pipe.vae
        self.schedule = Schedule.from_diffusers(pipe.scheduler).to(device)
        self.line = Schedule.straight(self.schedule.T).to(device)
        pixels = args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
        if pixels % (4 * pipe.vae_scale_factor):
            raise Failure(f"--resolution {pixels}: this model needs a multiple of {4 * pipe.vae_scale_factor}")
        self.shape = (pipe.unet.config.in_channels, pixels // pipe.vae_scale_factor, pixels // pipe.vae_scale_factor)
        self.size = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32, device=device)
        self.embed(pipe)
        # what pairs and checkpoints are marked with: a hash of up to 2,000 values from each of the teacher's tensors
        some = [p.detach().flatten()[::1 + p.numel() // 1000] for p in self.unet.parameters()]
        self.mark = hashlib.sha256(torch.cat(some).cpu().numpy().tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def embed(self, pipe):
        long = sum(len(pipe.tokenizer(p).input_ids) > pipe.tokenizer.model_max_length for p in self.prompts)
        if long and world()[0] == 0:
            print(f"warning: {long} of {len(self.prompts)} prompts are longer than {pipe.tokenizer.model_max_length} tokens and are cut there", file=sys.stderr)
        tokens, pooled = [], []
        for i in range(0, len(self.prompts), 64):
            token, no_token, pool, no_pool = pipe.encode_prompt(self.prompts[i:i + 64], device=self.device, do_classifier_free_guidance=True)
            tokens.append(token.cpu()), pooled.append(pool.cpu())
        self.tokens, self.pooled = torch.cat(tokens), torch.cat(pooled)                   # [n,77,2048], [n,1280] on the host
        self.no_token, self.no_pool = no_token[:1], no_pool[:1]                           # of the empty prompt

    def cond(self, index):
        """LongTensor [B] of prompts -> the UNet's conditioning for that batch."""
        index = index.cpu()
        return dict(encoder_hidden_states=self.tokens[index].to(self.device), added_cond_kwargs=dict(
            text_embeds=self.pooled[index].to(self.device), time_ids=self.size.expand(len(index), -1)))

    def uncond(self, n):
        """The empty prompt, n times."""
        return dict(encoder_hidden_states=self.no_token.expand(n, -1, -1), added_cond_kwargs=dict(
            text_embeds=self.no_pool.expand(n, -1), time_ids=self.size.expand(n, -1)))

    def decode(self, x0):
        """Latents [B,4,h,w] -> images [B,3,H,W] in [-1,1], with gradient."""
        return self.vae.decode(x0 / self.vae.config.scaling_factor, return_dict=False)[0].float()

    @torch.no_grad()
    def solve(self, net, schedule, rows, x_T, index, batch, w=None, order=1):
        """The PF-ODE of `net` for any number of latents on the host, `batch` at a time on the device."""
        return torch.cat([sample(net, schedule, x.to(self.device), rows, self.cond(i), self.uncond(len(x)), w, order).cpu()
                          for x, i in zip(x_T.split(batch), index.split(batch))])

    @torch.no_grad()
    def images(self, x0, batch=16):
        return torch.cat([self.decode(x.to(self.device)).cpu() for x in x0.split(batch)])


def load_pipeline(args):
    quiet()                                                     # before the import, which has things to say
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
    path = str(args.model or EMBEDDED)
    try:
        kind = DiffusionPipeline.load_config(path).get("_class_name")
    except (OSError, ValueError) as e:
        raise Failure(f"--model {path}: no such pipeline, here or on the hub; give a directory with a model_index.json, or a hub id") from e
    if kind != "StableDiffusionXLPipeline":
        raise Failure(f"--model {path}: a {kind}, not a StableDiffusionXLPipeline; give an SDXL model")
    pipe = StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False).to(torch.float32)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    return pipe


def load_vision_encoder(path, device):
    """The pixel discriminator's backbone: the vision half of a SAM model, or a DINOv2. Raises Failure if it is neither."""
    from transformers import AutoConfig, Dinov2Model, SamVisionModel
    try:
        kind = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError, KeyError) as e:
        raise Failure(f"--pixel-backbone {path}: no such model, here or on the hub; give a SAM or DINOv2 directory or hub id") from e
    classes = {"sam": SamVisionModel, "sam_vision_model": SamVisionModel, "dinov2": Dinov2Model}
    if kind not in classes:
        raise Failure(f"--pixel-backbone {path}: a {kind} model; give a SAM or a DINOv2")
    return classes[kind].from_pretrained(path).to(device, torch.float32)


def trainable(unet, rank):
    """A copy of the teacher to train: all of it, or a LoRA on its attention and feed-forward layers."""
    net = deepcopy(unet).float()
    if rank:
        from peft import LoraConfig
        net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=[
            "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]))
    else:
        net.requires_grad_(True)
    return net


# --------------------------------------------------------------------------------------------------------------- stages

def collect_pairs(args, out, teacher, stop):
    """Stage `pairs`: shards of (x_T, x_0, prompt). A shard is a function of seed and index, so a killed stage goes on where it was."""
    (rank, ranks), shards = world(), math.ceil(args.pairs / SHARD)
    rows, facts = teacher.schedule.rows(args.pair_steps), pair_facts(args, teacher)
    for first in tqdm(range(0, shards, ranks), desc="pairs", unit="round", disable=rank > 0):
        k = first + rank
        path = out.path / "pairs" / f"{k:05d}"
        if k < shards and not path.exists():
            draws = Draws((args.seed, 0), 0, range(k * SHARD, min((k + 1) * SHARD, args.pairs)), teacher.shape)
            x_T, prompt = draws.normal(), draws.rows(0, len(teacher.prompts) - 1)
            x_0 = teacher.solve(teacher.unet, teacher.schedule, rows, x_T, prompt, 2 * args.batch_size, args.pair_guidance, order=2)
            write_folder(path, {"pairs.safetensors": dict(x_T=x_T, x_0=x_0, prompt=prompt)}, facts)
        if stop:                                                # asked of all ranks together
            return False
    return True


def pair_facts(args, teacher):
    prompts = hashlib.sha256("\n".join(teacher.prompts).encode()).hexdigest()[:16]
    return dict(teacher=teacher.mark, prompts=prompts, steps=args.pair_steps, guidance=args.pair_guidance, seed=args.seed, shape=list(teacher.shape))


def load_pairs(args, out, teacher):
    """All shards -> (x_T, x_0, prompt) on the host. Raises Failure naming a shard that is damaged, or of another teacher or setting."""
    parts, facts = [], pair_facts(args, teacher)
    for k in range(math.ceil(args.pairs / SHARD)):
        path = out.path / "pairs" / f"{k:05d}"
        if not path.exists():
            raise Failure(f"{path}: missing; collect the pairs with --stage pairs --resume auto")
        found, files = read_folder(path)
        for key in facts:
            if found.get(key) != facts[key]:
                raise Failure(f"{path}: collected with {key} {found.get(key)}, this run has {facts[key]}; remove {out.path}/pairs or change the flags")
        parts.append(files["pairs.safetensors"])
    return tuple(torch.cat([p[k] for p in parts])[:args.pairs] for k in ("x_T", "x_0", "prompt"))


def draws_of(args, teacher, stage, iteration):
    """This rank's micro-batches of an iteration: its samples' places in the global batch, and with them their random numbers."""
    rank, ranks = world()
    for m in range(args.accumulate):
        first = (m * ranks + rank) * args.batch_size
        yield Draws((args.seed, stage), iteration, range(first, first + args.batch_size), teacher.shape, teacher.device)


def run_adp(args, out, teacher, generator, average, facts, checkpoint, look, stop):
    """Stage `adp` -> False if it was stopped early."""
    x_T, x_0, prompt = load_pairs(args, out, teacher)
    torch.manual_seed(args.seed)
    vision = autocast(load_vision_encoder(args.pixel_backbone, teacher.device), teacher.device, args.bf16)
    one = torch.zeros(1, *teacher.shape, device=teacher.device)
    heads = heads_for(teacher.unet, one, args.head_channels, timestep=torch.zeros(1), **teacher.cond(prompt[:1])).to(teacher.device)
    pixel_heads = heads_for(vision, torch.zeros(1, 3, vision.config.image_size, vision.config.image_size), args.head_channels).to(teacher.device)
    optimizers = (Adam("generator", generator.parameters(), args.lr_generator_adp, args.clip),
                  Adam("latent heads", heads.parameters(), args.lr_discriminator, args.clip),
                  Adam("pixel heads", pixel_heads.parameters(), args.lr_discriminator, args.clip))
    nets = dict(average.both(), heads=heads, pixel_heads=pixel_heads)
    autocast(heads, teacher.device, args.bf16), autocast(pixel_heads, teacher.device, args.bf16)
    begin = load_checkpoint(checkpoint, facts, nets, optimizers)["iteration"] if checkpoint else 0

    def batches(iteration):
        for draws in draws_of(args, teacher, 1, iteration):
            pick = draws.rows(0, len(prompt) - 1).cpu()
            yield draws, x_0[pick].to(teacher.device), x_T[pick].to(teacher.device), teacher.cond(prompt[pick])

    steps = adp(generator, Taps(teacher.unet), heads, Taps(vision), pixel_heads, teacher.decode, optimizers, teacher.schedule, teacher.line,
                lambda i: list(batches(i)), args.iterations_adp, begin, args.lambdas)
    return follow(args, out, "adp", steps, args.iterations_adp, (nets, optimizers, average, facts, teacher.line), look, stop)


def run_adm(args, out, teacher, generator, average, student_schedule, facts, checkpoint, look, stop):
    """Stage `adm` (or DMD in its place) -> False if it was stopped early."""
    torch.manual_seed(args.seed)
    fake_score = autocast(trainable(teacher.unet, args.lora_rank_fake), teacher.device, args.bf16)
    one = torch.zeros(1, *teacher.shape, device=teacher.device)
    heads = heads_for(teacher.unet, one, args.head_channels, timestep=torch.zeros(1), **teacher.uncond(1)).to(teacher.device)
    facts = dict(facts, method=args.method)
    optimizers = (Adam("generator", generator.parameters(), args.lr_generator, args.clip),
                  Adam("fake score", fake_score.parameters(), args.lr_fake, args.clip),
                  Adam("latent heads", heads.parameters(), args.lr_discriminator, args.clip))
    nets = dict(average.both(), fake_score=fake_score, heads=heads)
    autocast(heads, teacher.device, args.bf16)
    found = load_checkpoint(checkpoint, facts, nets, optimizers) if checkpoint else dict(iteration=0, global_iter=0)

    def batches(iteration):
        for draws in draws_of(args, teacher, 2, iteration):
            yield draws, teacher.cond(draws.rows(0, len(teacher.prompts) - 1)), teacher.uncond(args.batch_size)

    steps = adm(generator, fake_score, teacher.unet, Taps(teacher.unet), heads, optimizers, teacher.schedule, student_schedule,
                student_schedule.rows(args.steps), args.guidance, lambda i: list(batches(i)), args.iterations_adm,
                (found["iteration"], found["global_iter"]), args.ttur, loss="dmd" if args.method == "dmd" else "adm")
    return follow(args, out, "adm", steps, args.iterations_adm, (nets, optimizers, average, facts, student_schedule), look, stop)


def follow(args, out, stage, steps, iterations, state, look, stop):
    """The body of both stages' loops: average, log, save, look. state: (nets, optimizers, average, facts, student_schedule)."""
    nets, optimizers, average, facts, schedule = state
    began, bar = time.time(), None
    for losses in steps:
        average.update()
        i, last, stopping = losses["iteration"], losses["iteration"] == iterations, bool(stop)
        if world()[0] == 0:
            bar = bar or tqdm(total=iterations, initial=i - 1, desc=stage, unit="it", mininterval=1.0)
            bar.update()
            if i % 10 == 0 or last:
                row = {k: round(float(v), 6) for k, v in losses.items()}              # here, not in the method's loop, the device is waited for
                out.log(stage=stage, seconds=round(time.time() - began, 2), **row)
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if "iter" not in k})
        if i % args.save_every == 0 or last or stopping:
            counters = dict(stage=stage, iteration=i, global_iter=losses.get("global_iter", i))
            save_checkpoint(out.path / "checkpoints", dict(facts, **counters), nets, optimizers)
        if i % args.sample_every == 0 and not last:
            look(f"samples-{stage}-{i:06d}.png", schedule)
        if stopping and not last:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- the end

def export(args, out, generator, student_schedule):
    """export/: the student as a pipeline for stock diffusers, with the scheduler that does what the trainer did, and a model card."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UniPCMultistepScheduler
    folder = out.path / "export"
    pipe = load_pipeline(args)                                  # anew: the run freed its text encoders
    if args.lora_rank:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict
        StableDiffusionXLPipeline.save_lora_weights(folder / "lora", unet_lora_layers=convert_state_dict_to_diffusers(
            get_peft_model_state_dict(generator)))
        generator.fuse_lora()
        generator.unload_lora()
    pipe.unet.load_state_dict(generator.state_dict())
    if student_schedule.pred == "flow":                         # after ADP: one straight jump, first order, no corrector
        pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=1,
                                                 disable_corrector=[0], num_train_timesteps=student_schedule.T)
    else:                                                       # the teacher's own language: DDIM from the last row down
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    pipe.save_pretrained(folder)
    prompt = (read_prompts(args.prompts) if args.prompts else shapes.CAPTIONS)[0]
    (folder / "README.md").write_text(f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
A {args.steps}-step student of `{args.model or "the embedded teacher of captioned shapes"}` by {args.method.upper()}:
{args.iterations_adp} iterations of ADP, {args.iterations_adm} of {"DMD" if args.method == "dmd" else "ADM"}, seed {args.seed}. Sample without
guidance, which is distilled in (weights {args.guidance[0]:g} to {args.guidance[1]:g}).

```python
from diffusers import StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained({str(folder)!r})
image = pipe({prompt!r}, num_inference_steps={args.steps}, guidance_scale=0).images[0]
image.save("image.png")
```
""")


def examine(args, out, teacher, net, student_schedule):
    """The embedded run's table -> dict for result.json: caption accuracy, and total variation of places against a thousand teacher samples."""
    x_T, x_0, prompt = load_pairs(args, out, teacher)
    half = len(prompt) // 2
    captions, reference = [teacher.prompts[i] for i in prompt[:half]], teacher.images(x_0[half:])
    x = Draws((args.seed, 3), 0, range(half), teacher.shape).normal()
    one_step = lambda net, schedule, w: teacher.images(teacher.solve(net, schedule, schedule.rows(args.steps), x, prompt[:half], 128, w))
    drawn = dict(teacher=teacher.images(x_0[:half]), untrained=one_step(teacher.unet, teacher.schedule, args.pair_guidance),
                 student=one_step(net, student_schedule, None))
    table = {name: dict(accuracy=shapes.accuracy(images, captions), coverage_tv=shapes.coverage_tv(images, reference)) for name, images in drawn.items()}
    print(f"\n{'':34s}caption accuracy   coverage TV   ({half} images each)")
    for name, label in (("teacher", f"teacher, {args.pair_steps} steps with guidance"), ("untrained", f"teacher, {args.steps} step"), ("student", f"student, {args.steps} step")):
        print(f"{label:34s}{table[name]['accuracy']:16.3f}{table[name]['coverage_tv']:14.3f}")
    return table


def pictures(args, out, teacher, average):
    """-> look(stage, iteration, schedule): draw student beside teacher for eight fixed prompts and seeds."""
    index = torch.arange(8) * 7 % len(teacher.prompts)
    x_T = Draws((args.seed, 4), 0, range(8), teacher.shape).normal()
    rows = {}

    def look(path, schedule):
        if world()[0]:
            return
        draw = lambda *how: teacher.images(teacher.solve(*how[:3], x_T, index, args.batch_size, *how[3:]))
        if not rows:
            many = teacher.schedule.rows(args.pair_steps)
            rows[f"teacher, {args.pair_steps} steps"] = draw(teacher.unet, teacher.schedule, many, args.pair_guidance, 2)
            rows[f"teacher, {args.steps} step"] = draw(teacher.unet, teacher.schedule, teacher.schedule.rows(args.steps), args.pair_guidance)
        rows[f"student, {args.steps} step"] = images = draw(average.net, schedule, schedule.rows(args.steps))
        grid(out.path / path, rows, [teacher.prompts[i] for i in index])
        return dict(x_T=x_T, prompt=index, images=images)
    return look


def main():
    args = parse()
    began, prompts = time.time(), read_prompts(args.prompts) if args.prompts else shapes.CAPTIONS
    device = start()
    out, stop = Output(args.out, args.resume), StopSignal()
    checkpoint = None
    if args.resume == "auto":
        checkpoint = newest_checkpoint(out.path / "checkpoints", "adm") or newest_checkpoint(out.path / "checkpoints", "adp")
    elif args.resume:
        checkpoint = Path(args.resume)
        read_folder(checkpoint)
    reached = checkpoint.name.split("-")[0] if checkpoint else None

    teacher = Teacher(args, prompts, device)
    torch.manual_seed(args.seed)
    generator = trainable(teacher.unet, args.lora_rank)
    average = Average(generator, args.ema)
    if args.bf16:
        teacher.unet.to(torch.bfloat16), teacher.vae.to(torch.bfloat16)
    for net in {teacher.unet, generator, average.net}:
        autocast(net, device, args.bf16)
    autocast(teacher.vae, device, args.bf16, "decode")
    if args.grad_checkpointing:
        for net in {teacher.unet, teacher.vae, generator, average.net}:
            net.enable_gradient_checkpointing()
    look = pictures(args, out, teacher, average)
    facts = dict(teacher=teacher.mark, shape=list(teacher.shape), steps=args.steps, lora_rank=args.lora_rank, seed=args.seed)

    if (args.stage in ("all", "pairs") or args.model is None) and not collect_pairs(args, out, teacher, stop):
        return goodbye(out)
    barrier()
    if args.stage in ("all", "adp") and reached != "adm":
        if not run_adp(args, out, teacher, generator, average, facts, checkpoint, look, stop):
            return goodbye(out)
    elif args.stage == "adm" and reached != "adm":
        reached = "adp" if (path := newest_checkpoint(out.path / "checkpoints", "adp")) else None
        if path and load_checkpoint(path, facts, average.both(), ())["iteration"] < args.iterations_adp:
            raise Failure(f"{path}: ADP is not finished there; finish it with --stage adp --resume auto, or give its length as --iterations-adp")
    if args.stage in ("pairs", "adp"):
        print(f"{args.stage} is done; go on with --stage {'adp' if args.stage == 'pairs' else 'adm'} --resume auto")
        return
    after_adp = args.stage == "all" or newest_checkpoint(out.path / "checkpoints", "adp") is not None
    student_schedule = teacher.line if after_adp else teacher.schedule
    if reached != "adm":
        average.restart()                                       # ADM starts from what ADP's average had become
    if not run_adm(args, out, teacher, generator, average, student_schedule, facts, checkpoint if reached == "adm" else None, look, stop):
        return goodbye(out)
    if world()[0] == 0:
        curves(out)
        samples = look("samples.png", student_schedule)
        write_folder(out.path / "samples", {"samples.safetensors": samples}, facts)
        table = examine(args, out, teacher, average.net, student_schedule) if args.model is None else {}
        export(args, out, average.net, student_schedule)
        (out.path / "result.json").write_text(json.dumps(dict(seconds=time.time() - began, **table), indent=1))
        print(f"wrote {out.path}/export, samples.png, losses.png, result.json in {time.time() - began:.0f} s")


if __name__ == "__main__":
    run(main)
