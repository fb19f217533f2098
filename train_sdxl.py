"""Distil an image pipeline of diffusers to a few steps: DMDX (ODE pairs, ADP, ADM), ADM alone, DMD, or Phased DMD.

    python train_sdxl.py                                            # the embedded teacher, on two CPU cores, in minutes
    python train_sdxl.py --method phased_dmd --out out/phased       # the same teacher, two experts of two steps each
    python train_sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --out out/sdxl \\
        --bf16 --grad-checkpointing --lora-rank 64 --lora-rank-fake 64 --batch-size 1        # one GPU
    torchrun --nproc-per-node 8 train_sdxl.py --model ... (the same flags)                    # eight
    python train_sdxl.py --model stabilityai/stable-diffusion-3-medium-diffusers ...          # SD3, SD3.5: four steps

The first command ends with a table (seed 0):

                                          caption accuracy   coverage TV
        teacher, 20 steps with guidance              0.980         0.070
        student, 1 step                              0.887         0.129

Writes to --out: prompts/, pairs/, checkpoints/, metrics.jsonl, losses.png, samples.png, result.json, and export/, a
pipeline that stock diffusers samples.
"""
import argparse
import hashlib
import json
import math
import sys
import textwrap
import time
from copy import deepcopy
from functools import partial, reduce
from pathlib import Path

import torch
from tqdm import tqdm

import shapes
from adm import Draws, adm, adp, reflow
from discriminators import Taps, heads_for
from ode import Schedule, both, predict, sample
from phased_dmd import generate, phased_dmd, split
from plumbing import (Adam, Average, Failure, Lora, NotFinite, Output, StopSignal, autocast, barrier, broadcast, checkpointing, compiled, contact_sheet,
                      curves, full_copy, gather, goodbye, grid, load_checkpoint, newest_checkpoint, next_experts, none_missing, on_rank_0, open_tensors, quiet, read_prompts, receive, run,
                      save_checkpoint, shard, sharding, start, tensors_to, usage, verify, world, write_folder)

EMBEDDED = Path(__file__).parent / "teacher"
SHARD = 256                                                     # pairs, or prompts, in a file

# ------------------------------------------------------------------------------------------------------------- families

def encode_sdxl(pipe, prompts, height, width, device, **tokens):
    """-> (cond, uncond), the UNet's keyword arguments for these prompts and for no prompt, each batch first."""
    tokens, no_tokens, pooled, no_pooled = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=True)
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device).expand(len(prompts), -1)
    return tuple(dict(encoder_hidden_states=t, added_cond_kwargs=dict(text_embeds=p, time_ids=size)) for t, p in ((tokens, pooled), (no_tokens, no_pooled)))


def encode_sd3(pipe, prompts, height, width, device, **tokens):
    """The same for SD3. Without its third text encoder the pipeline itself puts zeros in T5's place."""
    text, no_text, pooled, no_pooled = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=True, **tokens)
    return tuple(dict(encoder_hidden_states=t, pooled_projections=p) for t, p in ((text, pooled), (no_text, no_pooled)))


def unipc(scheduler, steps, shift):
    """UniPC at first order, without its corrector, is the plain step of a flow model."""
    from diffusers import UniPCMultistepScheduler
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1,
                                   disable_corrector=list(range(steps)), num_train_timesteps=scheduler.config.num_train_timesteps)


def schedulers_sdxl(scheduler, line, rows):
    """-> (the stock scheduler that does to a student what the trainer did, the arguments its pipeline must be called with)."""
    from diffusers import DPMSolverMultistepScheduler
    if line:                                                    # after ADP: one straight jump
        return unipc(scheduler, 1, 1.0), dict(num_inference_steps=1)
    return DPMSolverMultistepScheduler.from_config(             # at first order, DDIM; diffusers' own DDIM steps to rows it then does not visit,
        scheduler.config, solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero"), dict(num_inference_steps=len(rows) - 1)   # unless steps divide T


def schedulers_sd3(scheduler, line, rows):
    """FlowMatchEuler wants its stops as unshifted sigmas; by their number alone it would choose others."""
    changed = dict(shift=1.0) if line else {}
    return type(scheduler).from_config(scheduler.config, **changed), \
        dict(num_inference_steps=len(rows) - 1, sigmas=[row / rows[0] for row in rows[:-1]])


def latent_image(pipe, network, args):
    """-> (shape of a latent, height, width in pixels, leading frames to drop): the flags', or what the model was made for."""
    height, width = args.height or network.config.sample_size * pipe.vae_scale_factor, args.width or network.config.sample_size * pipe.vae_scale_factor
    return (network.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor), height, width, 0


def decode_image(vae, x0, drop):
    """Latents [B,C,h,w] -> images [B,3,H,W] in [-1,1], with gradient."""
    return vae.decode(x0 / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0), return_dict=False)[0].float()


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# class of the pipeline -> what differs between families. `lora`: layers that get an adapter. `last`: what the network is told at
# the noisy end of ADP's line, None where there is no ADP. `defaults`: the paper's values where they are not SDXL's, from the network's config. `result`: where the pipeline leaves its samples, and how one of them, `sample`, is saved.
IMAGE = dict(latent=latent_image, decode=decode_image, constant=lambda pipe, shape, height, width: {},
             result=("images", 'sample.save("sample.png")'), tag="text-to-image")
PIPELINES = {
    "StableDiffusionXLPipeline": dict(
        IMAGE, network="unet", encode=encode_sdxl, schedulers=schedulers_sdxl, last=999,
        lora=[*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"], defaults=lambda config: {},
        problems=lambda args: [f"--text-tokens {args.text_tokens}: SDXL has no T5; leave the flag out"] * (args.text_tokens is not None)),
    "StableDiffusion3Pipeline": dict(
        IMAGE, network="transformer", encode=encode_sd3, schedulers=schedulers_sd3, last=1000,
        lora=[*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"],
        defaults=lambda config: dict(steps=4, lr_generator=1e-8, guidance=[3.0, 4.0]) if config.get("num_layers") == 38 else
        dict(steps=4, lr_generator=1e-6, lora_rank=64)),
}

# Phased DMD's own values (arXiv 2510.27684): 64 samples an iteration, here in micro-batches of 4 on one rank.
PHASED = dict(steps=4, ttur=5, lr_generator=5e-5, lora_rank=64, lora_alpha=8.0, lr_fake=4e-7, accumulate=16)

# What the embedded teacher wants instead of the paper's values: three orders of magnitude fewer weights and iterations.
SHAPES = dict(pairs=2048, pair_steps=20, pair_guidance=3.0, iterations_adp=2000, iterations_adm=100, batch_size=32, decay=True,
              lr_generator_adp=3e-4, lr_generator=1e-5, lr_fake=1e-3, lr_discriminator=1e-3, guidance=[2.0, 4.0], ema=0.98, head_channels=64,
              pixel_backbone=str(EMBEDDED / "vision_encoder"), sample_every=250, save_every=250)
SHAPES_PHASED = dict(SHAPES, iterations_phase=150, lr_generator=1e-4, lora_rank=0, accumulate=1)


def flags(p, pipelines, embedded):
    """Every flag, with the paper's value and its place there."""
    g = p.add_argument_group("what")
    g.add_argument("--model", help="local directory or hub id of a pipeline: " + ", ".join(pipelines) + (
        " (default: the embedded teacher of captioned shapes, which brings settings of its own)" if embedded else ""))
    g.add_argument("--prompts", help="text file, one prompt a line" + (" (default for the embedded teacher: its captions)" if embedded else ""))
    g.add_argument("--method", choices=["dmdx", "dmd", "adp", "reflow", "phased_dmd"], default="dmdx", help="dmdx: ADP, then ADM. dmd: ADP, then the DMD "
                   "that ADM replaces (ablation B3). adp: ADP alone (A5). reflow: squared error on ADP's pairs (A1). phased_dmd: experts by noise "
                   "level, neither ADP nor discriminator")
    g.add_argument("--stage", choices=["all", "pairs", "adp", "adm"], default="all", help="all: pairs, adp, adm for a student of one step, and adm "
                   "alone for one of more, since ADP is one-step only. adm starts from a finished adp in --out or, without one, from the "
                   "teacher (ablation B1)")
    g.add_argument("--out", default="out/sdxl", help="where everything is written")
    g.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from the newest whole checkpoint in --out (auto), or from this one")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--no-t5", action="store_true", help="SD3 without its third text encoder, 4.7 billion parameters")
    g.add_argument("--text-tokens", type=int, help="T5's, for models that have one (default: their pipeline's, 256 for SD3)")
    g.add_argument("--height", type=int, help="pixels (default: what the model was made for)")
    g.add_argument("--width", type=int)
    if not embedded:
        g.add_argument("--frames", type=int, help="of a video (default: what the model was made for)")
        g.add_argument("--context-parallel", type=int, default=1, help="ranks that share each sample's tokens (CogVideoX; paper: yes, B.4)")
    g = p.add_argument_group("ODE pairs")
    g.add_argument("--pairs", type=int, default=16384, help="how many to collect (paper: silent)")
    g.add_argument("--pair-steps", type=int, default=25, help="teacher's steps, second-order multistep (paper: teacher of 25 steps, Tab. 1)")
    g.add_argument("--pair-guidance", type=float, default=7.0, help="teacher's CFG (paper: as in its own sampling)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--iterations-adp", type=int, default=8000, help="paper: 8000 (Tab. 7)")
    g.add_argument("--iterations-adm", type=int, default=8000, help="paper: 8000 (Tab. 7)")
    g.add_argument("--iterations-phase", type=int, default=1000, help="of each phase of Phased DMD (choice)")
    g.add_argument("--iterations", type=int, help="all of these at once")
    g.add_argument("--batch-size", type=int, default=4, help="samples a rank and micro-batch (paper: 4 on each of 32 GPUs, Tab. 7)")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches an iteration (Phased DMD: 16, for the paper's 64 samples on one rank)")
    g.add_argument("--lr-generator-adp", type=float, default=1e-6, help="paper: 1e-6 (B.5)")
    g.add_argument("--lr-generator", type=float, default=1e-7, help="in ADM; paper: SDXL 1e-7, SD3-Medium 1e-6, SD3.5-Large 1e-8, CogVideoX 1e-7 "
                   "(B.5); Phased DMD 5e-5")
    g.add_argument("--lr-fake", type=float, default=1e-6, help="paper: 1e-6 (B.5); Phased DMD 4e-7")
    g.add_argument("--lr-discriminator", type=float, default=5e-6, help="paper: 5e-6 (B.5)")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm, 0 for none (choice)")
    g.add_argument("--decay", action=argparse.BooleanOptionalAction, default=False, help="let the generator's rate fall to zero over a stage, in a straight line "
                   "(choice; paper: constant)")
    g.add_argument("--ema", type=float, default=0.0, help="decay of the generator's average that is sampled and exported, 0 for none (choice)")
    g = p.add_argument_group("method")
    g.add_argument("--guidance", type=float, nargs=2, default=[6.0, 8.0], metavar=("LO", "HI"), help="CFG range of the real score; paper: 6 8, "
                   "SD3.5-Large 3 4, CogVideoX 5 7 (B.5)")
    g.add_argument("--steps", type=int, default=1, help="of the student; paper: SDXL 1, SD3 4, CogVideoX 8, Phased DMD 4")
    g.add_argument("--cfg-student", type=float, help="train and sample the student under guidance of this weight, two evaluations a step (paper: the row "
                   "'ADM w/ CFG' of the video tables; default: without)")
    g.add_argument("--ttur", type=int, default=1, help="fake-score updates a generator update; paper: 1 (Tab. 5); Phased DMD 5")
    g.add_argument("--lambdas", type=float, nargs=2, default=[0.85, 0.15], metavar=("LATENT", "PIXEL"), help="ADP weights; paper: 0.85 0.15")
    g.add_argument("--head-channels", type=int, default=256, help="width of a discriminator head (choice)")
    g.add_argument("--pixel-backbone", default="facebook/sam-vit-base", help="id or directory of a SAM (paper) or DINOv2 (ablation A2) model")
    g = p.add_argument_group("Phased DMD")
    g.add_argument("--phases", type=int, default=2, help="experts, each with an equal part of --steps; paper: 2")
    g.add_argument("--weighting", choices=["dmd", "paper"], default="dmd", help="of the generator's gradient (phased_dmd.kl_gradient)")
    g.add_argument("--clamp", type=float, nargs=2, default=[0.0, 10.0], metavar=("LO", "HI"), help="range of the fake score's weight; paper: 0 10 (Eq. 13)")
    g.add_argument("--narrow", action="store_true", help="scores only inside the phase's interval, not on all of (s, T] (paper: worse)")
    g = p.add_argument_group("memory")
    g.add_argument("--lora-rank", type=int, default=0, help="train the generator as a LoRA of this rank on the teacher itself (0: fully; paper: SD3-Medium by "
                   "LoRA, rank not given; Phased DMD 64)")
    g.add_argument("--lora-rank-fake", type=int, default=0, help="the same for the fake score")
    g.add_argument("--lora-alpha", type=float, help="strength of both, alpha/rank (default: the rank; Phased DMD 8)")
    g.add_argument("--bf16", action="store_true", help="bf16 arithmetic, frozen weights stored in bf16 (paper: yes, B.4)")
    g.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass (paper: yes, B.4)")
    g.add_argument("--fsdp", action="store_true", help="with torchrun: every rank keeps a part of each network's weights, gradients and moments (paper: yes, B.4)")
    g.add_argument("--cpu-offload", action="store_true", help="keep those parts, or on one GPU all of them, in host memory, and step there (paper: yes, B.4)")
    g.add_argument("--dry-run", nargs="?", type=int, const=1, metavar="RANKS", help="print what ADM would take with these flags on that many GPUs, memory and "
                   "arithmetic, and load no weights")
    g.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile each block")
    g = p.add_argument_group("watching")
    g.add_argument("--save-every", type=int, default=500)
    g.add_argument("--sample-every", type=int, default=500)


def parse(doc, pipelines, embedded):
    """The command line, with the defaults of the model it names. What is wrong with it is said all at once (usage), before a model that is nowhere (Failure)."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, exit_on_error=False)
    p.error = lambda message: usage([message])
    flags(p, pipelines, embedded)
    argv, known = [w for w in sys.argv[1:] if w != "--" and not w.endswith("=--")], None   # argparse takes --flag=-- for an empty list
    wrong = [f"{w}: neither a flag nor a value" for w in sys.argv[1:] if w not in argv]
    while known is None:
        try:
            known, unknown = p.parse_known_args(argv)
        except argparse.ArgumentError as e:                     # a value of the wrong type: noted, and on without its flag to the next
            wrong.append(str(e))
            argv = without(argv, (e.argument_name or "").split("/"))
    row, nowhere = {}, None
    if known.model or embedded:
        try:
            row = pipelines[pipeline_class(known.model or EMBEDDED, pipelines)]
            p.set_defaults(**row["defaults"](pipeline_config(known.model or EMBEDDED, row["network"])))
        except Failure as e:                                    # told after the flags, all of which come first
            nowhere = e
    if known.method == "phased_dmd":
        p.set_defaults(**PHASED)
    if known.model is None and embedded:
        p.set_defaults(**SHAPES_PHASED if known.method == "phased_dmd" else SHAPES)
    args, _ = p.parse_known_args(argv)
    if args.iterations is not None:
        args.iterations_adp = args.iterations_adm = args.iterations_phase = args.iterations
    wrong += problems(args, unknown, embedded) + row.get("problems", lambda args: [])(args)
    if row and (args.steps > 1 or row["last"] is None):
        wrong += [f"--method {args.method}: for image models and --steps 1 only; use dmdx"] * (args.method in ("adp", "reflow"))
    if wrong:
        usage(wrong)
    if nowhere:
        raise nowhere
    return args


def without(argv, flags):
    """The command line less these flags and what they were given."""
    kept, inside = [], False
    for word in argv:
        inside = word.split("=")[0] in flags or inside and not word.startswith("--")
        kept += [] if inside else [word]
    return kept if kept != argv else []


def problems(args, unknown, embedded):
    """Every flag that is wrong, one sentence each."""
    wrong = [f"unknown flag {' '.join(unknown)}"] if unknown else []
    flag = lambda name: f"--{name.replace('_', '-')} {getattr(args, name)}"
    numbers = {n: v if isinstance(v, list) else [v] for n, v in vars(args).items()}
    wrong += [f"{flag(n)}: not finite" for n, values in numbers.items() if any(isinstance(v, float) and not math.isfinite(v) for v in values)]
    wrong += [f"{flag(n)}: must be {most} at most" for n, most in (("steps", 1000), ("pair_steps", 1000), ("seed", 2**63 - 1)) if getattr(args, n) > most]
    wrong += [f"{flag(n)}: must be above 0" for n in (
        "pairs", "pair_steps", "iterations_adp", "iterations_adm", "iterations_phase", "batch_size", "accumulate", "lr_generator_adp", "lr_generator", "lr_fake",
        "lr_discriminator", "steps", "ttur", "head_channels", "phases", "save_every", "sample_every")
        if getattr(args, n) <= 0]
    wrong += [f"{flag(n)}: must be 0 or above" for n in ("clip", "lora_rank", "lora_rank_fake", "seed", "pair_guidance") if getattr(args, n) < 0]
    wrong += [f"{flag('lora_alpha')}: must be above 0"] * (args.lora_alpha is not None and not args.lora_alpha > 0)
    wrong += [f"{flag('ema')}: must be in [0, 1)"] * (not 0 <= args.ema < 1)
    wrong += [f"--{name} {low} {high}: LO is above HI" for name, (low, high) in (("guidance", args.guidance), ("clamp", args.clamp)) if not low <= high]
    wrong += ["--lambdas: weights must be 0 or above, one of them above"] * (not (min(args.lambdas) >= 0 and max(args.lambdas) > 0))
    wrong += [f"{flag('steps')}: ADP is one-step only; use --stage adm"] * (args.steps > 1 and args.stage == "adp")
    wrong += [f"--stage {args.stage} --method {args.method}: that method has no such stage; leave --stage out"] * (
        args.stage in ("adp", "adm") and args.method in ("adp", "reflow"))
    wrong += [f"{flag(n)}: must be a multiple of 32 above 0" for n in ("height", "width") if getattr(args, n) is not None and (getattr(args, n) < 1 or getattr(args, n) % 32)]
    wrong += [f"{flag(n)}: must be above 0" for n in ("text_tokens", "dry_run") if getattr(args, n) is not None and getattr(args, n) < 1]
    wrong += [f"{flag('cfg_student')}: must be above 1"] * (args.cfg_student is not None and not args.cfg_student > 1)
    if args.method == "phased_dmd":
        wrong += [f"{flag('cfg_student')}: not with Phased DMD"] * (args.cfg_student is not None)
        wrong += [f"{flag('stage')}: Phased DMD has no such stage; leave the flag out"] * (args.stage in ("adp", "adm"))
        wrong += [f"{flag('phases')}: must divide --steps {args.steps}"] * (args.phases > 0 and args.steps % args.phases > 0)
    wrong += ["--model is needed: a local directory or hub id"] * (args.model is None and not embedded)
    wrong += ["--prompts is needed with --model: a text file, one prompt a line"] * (args.model is not None and args.prompts is None and not args.dry_run)
    wrong += [f"{flag('pairs')}: the embedded teacher's table needs at least 2"] * (args.model is None and args.pairs == 1)
    return wrong


def stages(args, family):
    """What this run trains, in order: the names its checkpoints go by."""
    if args.method == "phased_dmd":
        return [] if args.stage == "pairs" else [f"phase{k}" for k in range(1, args.phases + 1)]
    one_step = args.steps == 1 and family["last"] is not None
    every = ["reflow" if args.method == "reflow" else "adp"] * one_step + ["adm"] * (args.method in ("dmdx", "dmd"))
    return [stage for stage in every if args.stage in ("all", stage)]


# -------------------------------------------------------------------------------------------------------------- teacher

def context(args):
    """How many ranks share a sample."""
    return getattr(args, "context_parallel", 1)


def text_tokens(args):
    return dict(max_sequence_length=args.text_tokens) if args.text_tokens else {}


class Teacher:
    """A pipeline taken apart for distillation: `net` (frozen), `schedule`, prompt embeddings, `decode`, and the `shape` of a latent.
    The text encoders are freed once the prompts are embedded."""

    def __init__(self, args, out, prompts, device, pipelines):
        self.how = sharding(args.fsdp, args.cpu_offload, args.bf16, device)
        pipe = load_pipeline(args, pipelines, hollow="network" if self.how and world()[0] else "")
        self.family = pipelines[type(pipe).__name__]
        self.prompts, self.device, self.vae, self.drawn = prompts, device, pipe.vae.to(device), []
        self.net = (self.family.get("join") or (lambda pipe: getattr(pipe, self.family["network"])))(pipe)
        self.units = getattr(self.net, "units", [self.net])     # two where the teacher is two networks, noisier first: Wan2.2
        self.backbone = self.units[-1]                          # of the latent discriminator
        self.shape, self.height, self.width, self.layout = self.family["latent"](pipe, self.net, args)   # layout: what decode must know besides
        self.schedule = self.family.get("schedule", lambda pipe, shape: Schedule.from_diffusers(pipe.scheduler))(pipe, self.shape).to(device)
        self.line = Schedule.straight(self.schedule.T, self.family["last"]).to(device)
        self.constant = tensors_to(device, self.family["constant"](pipe, self.shape, self.height, self.width))
        # what pairs and checkpoints are marked with: a hash of up to 2,000 values from each of the teacher's tensors
        some = [p.detach().flatten()[::1 + p.numel() // 1000] for p in self.net.parameters()]
        self.mark = broadcast(some[0].is_meta or hashlib.sha256(torch.cat(some).cpu().numpy().tobytes()).hexdigest()[:16])
        self.facts = dict(teacher=self.mark, prompts=hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16], shape=list(self.shape), size=[self.height, self.width],
                          text_tokens=args.text_tokens)
        self.embed(args, pipe, out)
        if context(args) > 1:
            self.family["parallel"](self.net, context(args))
        for net in self.units:
            place(args, net, self.how, device)
        if args.bf16:
            autocast(self.vae.to(torch.bfloat16), device, True, "decode")
        if args.grad_checkpointing and self.family["last"]:     # ADP looks through it
            checkpointing(self.vae)

    def part(self, rows):
        """Which of its units, counted from 0, the teacher would use at the last step of these rows."""
        return int(len(self.units) > 1 and float(self.schedule.timestep[rows[-2]]) < self.net.boundary)

    @torch.no_grad()
    def embed(self, args, pipe, out):
        """prompts/: embeddings in shards, made by all ranks together (by rank 0, the only one with text encoders, of a sharded run), then
        read from the disk as they are needed. The last shard is the empty prompt."""
        limit = min(pipe.tokenizer.model_max_length, not args.no_t5 and args.text_tokens or 512)     # CLIP's 77, or T5's, of which no pipeline here takes more than 512
        long = sum(len(pipe.tokenizer(p).input_ids) > limit for p in self.prompts) if world()[0] == 0 else 0
        if long:
            print(f"warning: {long} of {len(self.prompts)} prompts are longer than {limit} tokens and are cut there", file=sys.stderr)
        (rank, ranks), n = (world()[0], 1) if self.how else world(), len(self.prompts)
        paths = [out.path / "prompts" / f"{k:05d}" for k in range(math.ceil(n / SHARD))] + [out.path / "prompts" / "empty"]
        mine = [k for k in range(rank, len(paths), ranks) if not paths[k].exists() and not (self.how and rank)]
        for name, part in pipe.components.items():
            if mine and name.startswith("text_encoder") and part is not None:
                part.to(self.device)
        encode = lambda prompts: self.family["encode"](pipe, prompts, self.height, self.width, self.device, **text_tokens(args))
        for k in mine:
            conds = [encode(self.prompts[i:i + 64])[0] for i in range(k * SHARD, min((k + 1) * SHARD, n), 64)] or [encode(self.prompts[:1])[1]]
            write_folder(paths[k], {"embeddings.safetensors": flat(reduce(both, conds))}, self.facts)
        barrier()
        *self.shards, empty = [open_tensors(path, self.facts, "embeddings.safetensors") for path in paths]
        self.empty = {name: empty.get_tensor(name).to(self.device) for name in empty.keys()}

    def cond(self, index):
        """LongTensor [B] of prompts -> the network's conditioning for that batch."""
        index = index.tolist()
        self.drawn += index                                     # since draws_of: what to name should the iteration fail
        places = [(self.shards[i // SHARD], i % SHARD) for i in index]
        return nested({name: torch.cat([file.get_slice(name)[i:i + 1] for file, i in places]).to(self.device) for name in self.shards[0].keys()}) | self.constant

    def uncond(self, n):
        """The empty prompt, n times."""
        return nested({name: value.expand(n, *value.shape[1:]) for name, value in self.empty.items()}) | self.constant

    def decode(self, x0):
        return self.family["decode"](self.vae, x0, self.layout)

    @torch.no_grad()
    def draw(self, sampler, x_T, index, batch):
        """Any number of latents on the host through sampler(x_T, cond, uncond), `batch` at a time on the device."""
        return torch.cat([sampler(x.to(self.device), self.cond(i), self.uncond(len(x))).cpu()
                          for x, i in zip(x_T.split(batch), index.split(batch))])

    def sampler(self, rows, w, order=1):
        """The teacher's own, with guidance."""
        return lambda x, cond, uncond: sample(self.net, self.schedule, x, rows, cond, uncond, w, order)

    @torch.no_grad()
    def images(self, x0, batch=8):
        return torch.cat([self.decode(x.to(self.device)).cpu() for x in x0.split(batch)])


def flat(cond, prefix=""):
    """{"a": {"b": x}} -> {"a/b": x}, as a file keeps it; `nested` is the way back."""
    return {k: v for name, value in cond.items() for k, v in (
        flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}).items()}


def nested(values):
    cond = {}
    for name, value in values.items():
        *path, last = name.split("/")
        reduce(lambda at, key: at.setdefault(key, {}), path, cond)[last] = value
    return cond


def pipeline_class(path, pipelines):
    """The class a pipeline's model_index.json names. Raises Failure if there is none, or if it has no row in `pipelines`."""
    kind = pipeline_config(path, "").get("_class_name")
    if kind not in pipelines:
        raise Failure(f"--model {path}: a {kind}; give a {' or a '.join(pipelines)}")
    return kind


def pipeline_config(path, folder):
    """model_index.json of a pipeline, or the config of the network in one of its folders; from the disk, or the hub."""
    name = f"{folder}/config.json" if folder else "model_index.json"
    try:
        if Path(path).exists():
            return dict(json.loads((Path(path) / name).read_text()))
        from huggingface_hub import hf_hub_download, logging
        logging.set_verbosity(logging.CRITICAL)                 # it would tell of each retry
        return dict(json.loads(Path(hf_hub_download(path, name)).read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise Failure(f"--model {path}: no such pipeline, here or on the hub; give a directory with a model_index.json, or a hub id") from e


def load_pipeline(args, pipelines, hollow=""):
    """The whole pipeline, frozen, in float32, on the host. Raises Failure if --model is none, or not a whole one. hollow: no text encoders,
    and no weights in the network (for a rank that gets its part from rank 0), or in anything ("all", for a dry run)."""
    quiet()                                                     # before the imports, which have things to say
    import diffusers
    import transformers
    path = str(args.model or EMBEDDED)
    kind = pipeline_class(path, pipelines)
    given, safe = {name: None for name in left_out(args, path, kind)}, dict(use_safetensors=True, trust_remote_code=False)   # nothing that runs
    parts = {k: v[-1] for k, v in pipeline_config(path, "").items() if isinstance(v, list) and v[0] and k not in given}
    if hollow:
        from accelerate import init_empty_weights
        with init_empty_weights():
            for name, part in parts.items():
                if name.startswith("text_encoder"):
                    given[name] = None
                if name.startswith(pipelines[kind]["network"]) or name == "vae" and hollow == "all":
                    given[name] = getattr(diffusers, part).from_config(pipeline_config(path, name))
    try:
        for name in parts.keys() - given:                       # one by one, to hear what a file lacks: transformers draws it at random
            if name.startswith("text_encoder"):
                given[name], told = getattr(transformers, parts[name]).from_pretrained(path, subfolder=name, output_loading_info=True, **safe)
                none_missing(f"{name}.{k}" for k in told["missing_keys"])
        pipe = getattr(diffusers, kind).from_pretrained(path, **given, **dict(add_watermarker=False) if "XL" in kind else {}, **safe)
        none_missing(f"{name}.{k}" for name in parts.keys() - given if isinstance(getattr(pipe, name), torch.nn.Module)
                     for k, p in getattr(pipe, name).named_parameters() if p.is_meta)                         # diffusers leaves them empty
        pipe.to(torch.float32)
    except Exception as e:                                      # every library here has errors of its own
        raise Failure(f"--model {path}: not a whole pipeline of safetensors ({str(e).split(chr(10))[0]}); download it again") from e
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def place(args, net, how, device):
    """A frozen network to where it runs: whole on this device, or in shards over the ranks, from rank 0's weights."""
    if args.bf16:
        net.to(torch.bfloat16)
    if how:
        weights = net.state_dict() if world()[0] == 0 else {}
        receive(shard(net, how, device), weights)
    else:
        net.to(device)
    return prepare(args, net, device)


def prepare(args, net, device):
    """What every network that runs gets, be it trained or not."""
    if args.grad_checkpointing:
        checkpointing(net)
    if args.compile:
        compiled(net, args.compile)
    return autocast(net, device, args.bf16)


def left_out(args, path, kind):
    """Optional components that this run, or the pipeline's own directory, does without: SD3's T5."""
    config = pipeline_config(path, "")
    return [name for name in ("text_encoder_3", "tokenizer_3") if kind == "StableDiffusion3Pipeline" and (args.no_t5 or not config[name][0])]


def load_vision_encoder(path, device=None):
    """The pixel discriminator's backbone: the vision half of a SAM model, or a DINOv2. Raises Failure if it is neither, which without a device is all it does."""
    from transformers import AutoConfig, Dinov2Model, SamVisionModel
    try:
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    except (OSError, ValueError, KeyError) as e:
        raise Failure(f"--pixel-backbone {path}: no such model, here or on the hub; give a SAM or DINOv2 directory or hub id") from e
    classes = {"sam": SamVisionModel, "sam_vision_model": SamVisionModel, "dinov2": Dinov2Model}
    if kind not in classes:
        raise Failure(f"--pixel-backbone {path}: a {kind} model; give a SAM or a DINOv2")
    try:
        if device:
            net, told = classes[kind].from_pretrained(path, use_safetensors=True, output_loading_info=True)
            none_missing(told["missing_keys"])
            return net.to(device, torch.float32)
    except Exception as e:
        raise Failure(f"--pixel-backbone {path}: not a whole model of safetensors ({str(e).split(chr(10))[0]}); download it again") from e


def trainable(args, teacher, name, rank, source=None):
    """A network that starts as the teacher, or as one of its units: a copy of all of it to train, or a LoRA on those very weights."""
    source = source or teacher.net
    if rank and source not in teacher.units:
        raise Failure(f"--lora-rank{'-fake' if 'fake' in name else ''} {rank}: this teacher is two networks, and what replaces both is trained fully; give 0")
    if rank and teacher.how and teacher.how["mesh"].ndim == 2:
        raise Failure(f"--lora-rank{'-fake' if 'fake' in name else ''} {rank}: peft has no adapters for weights sharded inside of nodes and copied across; leave --fsdp out")
    if rank:
        return Lora(source, name, rank, args.lora_alpha or rank, teacher.family["lora"])
    return prepare(args, full_copy(source).float().requires_grad_(True), teacher.device)


# --------------------------------------------------------------------------------------------------------------- stages

def collect_pairs(args, out, teacher, stop):
    """Stage `pairs`: shards of (x_T, x_0, prompt). A shard is a function of seed and index, so a killed stage goes on where it was."""
    (rank, ranks), shards = (n // context(args) for n in world()), math.ceil(args.pairs / SHARD)
    sampler, facts = teacher.sampler(teacher.schedule.rows(args.pair_steps), args.pair_guidance, order=2), pair_facts(args, teacher)
    for first in tqdm(range(0, shards, ranks), desc="pairs", unit="round", disable=world()[0] > 0):
        paths, n = [out.path / "pairs" / f"{k:05d}" for k in range(first, min(first + ranks, shards))], min(SHARD, args.pairs - first * SHARD)
        missing = broadcast([not path.exists() for path in paths])
        if missing[rank:rank + 1] == [True] or any(missing) and (teacher.how or context(args) > 1):   # there every rank is needed for every pass
            draws = Draws((args.seed, STREAM["pairs"]), 0, range((first + rank) * SHARD, (first + rank) * SHARD + n), teacher.shape)
            x_T, prompt = draws.normal(), draws.rows(0, len(teacher.prompts) - 1)
            x_0 = teacher.draw(sampler, x_T, prompt, 2 * args.batch_size)
            if missing[rank:rank + 1] == [True] and world()[0] % context(args) == 0:
                n = min(n, args.pairs - (first + rank) * SHARD)
                write_folder(paths[rank], {"pairs.safetensors": dict(x_T=x_T[:n], x_0=x_0[:n], prompt=prompt[:n])}, facts)
        if stop:                                                # asked of all ranks together
            return False
    return True


def pair_facts(args, teacher):
    return dict(teacher.facts, steps=args.pair_steps, guidance=args.pair_guidance, seed=args.seed)


def load_pairs(args, out, teacher):
    """All shards -> (x_T, x_0, prompt) on the host. Raises Failure naming a shard that is missing, damaged, or of another teacher or setting."""
    paths = [out.path / "pairs" / f"{k:05d}" for k in range(math.ceil(args.pairs / SHARD))]
    for path in paths:
        if not path.exists():
            raise Failure(f"{path}: missing; collect the pairs with --stage pairs --resume auto")
    files = [open_tensors(path, pair_facts(args, teacher), "pairs.safetensors") for path in paths]
    return tuple(torch.cat([f.get_tensor(k) for f in files])[:args.pairs] for k in ("x_T", "x_0", "prompt"))


STREAM = dict(pairs=0, adp=1, reflow=1, adm=2, examine=3, pictures=4)             # of random numbers; phase k's is 10 + k


def draws_of(args, teacher, stage, iteration):
    """Draws of each of this rank's micro-batches: the places of its samples in the global batch make their random numbers."""
    teacher.at, teacher.drawn = f"{stage}, iteration {iteration}", []
    stream = STREAM[stage] if stage in STREAM else 10 + int(stage.removeprefix("phase"))
    rank, ranks = (n // context(args) for n in world())         # ranks that share their samples draw the same
    for m in range(args.accumulate):
        first = (m * ranks + rank) * args.batch_size
        yield Draws((args.seed, stream), iteration, range(first, first + args.batch_size), teacher.shape, teacher.device)


def micro_batches(args, teacher, stage, iteration):
    """[(draws, cond, uncond), ...] of an iteration of ADM, DMD or Phased DMD."""
    return [(draws, teacher.cond(draws.rows(0, len(teacher.prompts) - 1, "cpu")), teacher.uncond(args.batch_size))
            for draws in draws_of(args, teacher, stage, iteration)]


def latent_heads(args, teacher):
    one = torch.zeros(1, *teacher.shape, device=teacher.device)
    heads = heads_for(teacher.backbone, one, args.head_channels, timestep=torch.zeros(1), **teacher.uncond(1)).to(teacher.device)
    return autocast(split_up(teacher, heads), teacher.device, args.bf16)


def pixel_heads(args, teacher, vision):
    one = torch.zeros(1, 3, vision.config.image_size, vision.config.image_size)
    heads = heads_for(vision, one, args.head_channels).to(teacher.device)
    return autocast(split_up(teacher, heads), teacher.device, args.bf16)


def split_up(teacher, heads):
    return shard(heads, teacher.how, teacher.device) if teacher.how else heads


def pair_batches(args, teacher, stage, pairs):
    """-> batches(iteration), [(draws, x_0, x_T, cond), ...] of ADP or A1."""
    x_T, x_0, prompt = pairs

    def batches(iteration):
        for draws in draws_of(args, teacher, stage, iteration):
            pick = draws.rows(0, len(prompt) - 1, "cpu")
            yield draws, x_0[pick].to(teacher.device), x_T[pick].to(teacher.device), teacher.cond(prompt[pick])
    return lambda iteration: list(batches(iteration))


def run_reflow(args, out, teacher, generator, average, facts, checkpoint, look, stop):
    """Stage `reflow`, ablation A1 -> False if it was stopped early."""
    batches = pair_batches(args, teacher, "reflow", load_pairs(args, out, teacher))
    optimizer, nets = Adam("generator", generator.parameters(), args.lr_generator_adp, args.clip), average.both()
    begin = load_checkpoint(checkpoint, facts, nets, (optimizer,))["iteration"] if checkpoint else 0
    steps = reflow(generator, optimizer, teacher.line, batches, args.iterations_adp, begin)
    show = lambda name: look(name, [(average.net, teacher.line.rows(1))], teacher.line)
    return follow(args, out, "reflow", steps, begin, args.iterations_adp, nets, (optimizer,), average, facts, show, stop)


def run_adp(args, out, teacher, generator, average, facts, checkpoint, look, stop):
    """Stage `adp` -> False if it was stopped early."""
    batches = pair_batches(args, teacher, "adp", load_pairs(args, out, teacher))
    torch.manual_seed(args.seed)
    vision = autocast(load_vision_encoder(args.pixel_backbone, teacher.device), teacher.device, args.bf16)
    heads, d2_heads = latent_heads(args, teacher), pixel_heads(args, teacher, vision)
    optimizers = (Adam("generator", generator.parameters(), args.lr_generator_adp, args.clip),
                  Adam("latent heads", heads.parameters(), args.lr_discriminator, args.clip),
                  Adam("pixel heads", d2_heads.parameters(), args.lr_discriminator, args.clip))
    nets = dict(average.both(), heads=heads, pixel_heads=d2_heads)
    begin = load_checkpoint(checkpoint, facts, nets, optimizers)["iteration"] if checkpoint else 0

    steps = adp(generator, Taps(teacher.backbone), heads, Taps(vision), d2_heads, teacher.decode, optimizers, teacher.schedule, teacher.line,
                batches, args.iterations_adp, begin, args.lambdas)
    show = lambda name: look(name, [(average.net, teacher.line.rows(1))], teacher.line)
    return follow(args, out, "adp", steps, begin, args.iterations_adp, nets, optimizers, average, facts, show, stop)


def run_adm(args, out, teacher, generator, average, student_schedule, facts, checkpoint, look, stop):
    """Stage `adm` (or DMD in its place) -> False if it was stopped early."""
    torch.manual_seed(args.seed)
    fake_score = trainable(args, teacher, "fake", args.lora_rank_fake)
    heads = latent_heads(args, teacher)
    optimizers = (Adam("generator", generator.parameters(), args.lr_generator, args.clip),
                  Adam("fake score", fake_score.parameters(), args.lr_fake, args.clip),
                  Adam("latent heads", heads.parameters(), args.lr_discriminator, args.clip))
    nets = dict(average.both(), fake_score=fake_score, heads=heads)
    found = load_checkpoint(checkpoint, dict(facts, method=args.method), nets, optimizers) if checkpoint else dict(iteration=0, global_iter=0)
    rows = student_schedule.rows(args.steps)
    steps = adm(generator, fake_score, teacher.net, Taps(teacher.backbone), heads, optimizers, teacher.schedule, student_schedule,
                rows, args.guidance, lambda i: micro_batches(args, teacher, "adm", i), args.iterations_adm,
                (found["iteration"], found["global_iter"]), args.ttur, loss="dmd" if args.method == "dmd" else "adm", student_w=args.cfg_student)
    show = lambda name: look(name, [(average.net, rows)], student_schedule)
    return follow(args, out, "adm", steps, found["iteration"], args.iterations_adm, nets, optimizers, average, dict(facts, method=args.method), show, stop)


def run_dmdx(args, out, teacher, todo, checkpoint, reached, look, stop):
    """ADP or A1, then ADM or DMD, as far as they are in `todo` -> ([(student, rows)], its schedule), or None if it was stopped early or
    ends before there is a student to export."""
    torch.manual_seed(args.seed)
    generator = trainable(args, teacher, "generator", args.lora_rank)
    average = Average(generator, args.ema, partial(prepare, args, device=teacher.device))
    facts = dict(teacher.facts, steps=args.steps, lora_rank=args.lora_rank, seed=args.seed)
    if todo[0] != "adm" and reached != "adm":
        first = run_reflow if todo[0] == "reflow" else run_adp
        if not first(args, out, teacher, generator, average, facts, checkpoint, look, stop):
            return goodbye(out)
        after_adp = True
    elif reached == "adm":                                      # perhaps from another --out, where ADP's checkpoint is not
        after_adp = json.loads((checkpoint / "manifest.json").read_text())["after_adp"]
    else:
        after_adp = newest_checkpoint(out.path / "checkpoints", "adp")
        if after_adp and load_checkpoint(after_adp, facts, average.both(), ())["iteration"] < args.iterations_adp:
            raise Failure(f"{after_adp}: ADP is not finished there; finish it with --stage adp --resume auto, or give its length as --iterations-adp")
    if args.stage == "adp":
        return print("adp is done; go on with --stage adm --resume auto")
    student_schedule = teacher.line if after_adp else teacher.schedule
    if todo[-1] == "adm":
        if reached != "adm":
            average.restart()                                   # ADM starts from what ADP's average had become
        facts["after_adp"] = bool(after_adp)
        if not run_adm(args, out, teacher, generator, average, student_schedule, facts, checkpoint if reached == "adm" else None, look, stop):
            return goodbye(out)
    return [(average.net, student_schedule.rows(args.steps))], student_schedule


def run_phases(args, out, teacher, todo, checkpoint, reached, look, stop):
    """Phased DMD, noisiest phase first -> ([(expert, rows), ...], the teacher's schedule), or None if it was stopped early."""
    rows, experts = teacher.schedule.rows(args.steps), []
    size = args.steps // args.phases
    for k, phase in enumerate(split(rows, rows[size:-1:size]), 1):
        torch.manual_seed(args.seed)
        stage, facts = f"phase{k}", dict(teacher.facts, steps=args.steps, phases=args.phases, lora_rank=args.lora_rank, seed=args.seed,
                                         method=args.method, weighting=args.weighting)
        generator = trainable(args, teacher, stage, args.lora_rank, teacher.units[teacher.part(phase)])
        average = Average(generator, args.ema, partial(prepare, args, device=teacher.device))
        if reached in todo[k:]:                                 # finished before this run
            path = newest_checkpoint(out.path / "checkpoints", stage)
            if path is None or load_checkpoint(path, facts, average.both(), ())["iteration"] < args.iterations_phase:
                raise Failure(f"{out.path}/checkpoints: {stage} is not whole and finished there; give its length as --iterations-phase")
        else:
            fake_score = trainable(args, teacher, f"fake{k}", args.lora_rank_fake)    # from the teacher again
            optimizers = tuple(Adam(name, net.parameters(), lr, args.clip, betas=(0.0, 0.999))
                               for name, net, lr in (("generator", generator, args.lr_generator), ("fake score", fake_score, args.lr_fake)))
            nets = dict(average.both(), fake_score=fake_score)
            found = load_checkpoint(checkpoint, facts, nets, optimizers) if reached == stage else dict(iteration=0, global_iter=0)
            steps = phased_dmd([*experts, (generator, phase)], fake_score, teacher.net, optimizers, teacher.schedule, args.guidance,
                               lambda i: micro_batches(args, teacher, stage, i), args.iterations_phase,
                               (found["iteration"], found["global_iter"]), args.ttur, args.weighting, args.narrow, args.clamp)
            show = lambda name: look(name, [*experts, (average.net, [*phase[:-1], 0])], teacher.schedule)   # its last jump goes on to 0
            if not follow(args, out, stage, steps, found["iteration"], args.iterations_phase, nets, optimizers, average, facts, show, stop):
                return goodbye(out)
        experts.append((average.net, phase))
    return experts, teacher.schedule


def follow(args, out, stage, steps, begin, iterations, nets, optimizers, average, facts, show, stop):
    """The body of every stage's loop: average, log, save, look -> False if it was stopped early."""
    began, bar, full = time.time(), None, optimizers[0].rate
    rate = lambda i: full * (1 - i / iterations) if args.decay else full
    optimizers[0].rate = rate(begin)
    for losses in steps:
        average.update()
        i, last, stopping = losses["iteration"], losses["iteration"] == iterations, bool(stop)
        optimizers[0].rate = rate(i)
        if world()[0] == 0:
            bar = bar or tqdm(total=iterations, initial=i - 1, desc=stage, unit="it", mininterval=1.0)
            bar.update()
            if i % 10 == 0 or last:
                row = {k: round(float(v), 6) for k, v in losses.items()}              # here, not in the method's loop, the device is waited for
                out.log(stage=stage, seconds=round(time.time() - began, 2), **row)
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if "iter" not in k})
        if i % args.save_every == 0 or last or stopping:
            counters = dict(stage=stage, iteration=i, global_iter=losses.get("global_iter", i))
            save_checkpoint(out.path / "checkpoints", dict(facts, **counters, flags=vars(args)), nets, optimizers)
        if i % args.sample_every == 0 and not last:
            show(f"samples-{stage}-{i:06d}.png")
        if stopping and not last:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- the end

def export(args, out, teacher, experts, student_schedule, weights, pipelines):
    """export/: the student as a pipeline for stock diffusers, with the scheduler that does what the trainer did, and a model card. weights: of the experts.
    Further experts lie beside the first (unet_2, ...) as Wan2.2's do; experts.json has their boundaries. LoRAs also go to lora/."""
    folder, network = out.path / "export", teacher.family["network"]
    pipe = load_pipeline(args, pipelines)                       # anew: the run freed its text encoders, and may have kept bf16
    students = []
    for k, ((net, rows), values) in enumerate(zip(experts, weights), 1):
        if hasattr(net, "units"):                               # a student as the teacher is, of two networks
            for part, module in (("high", pipe.transformer), ("low", pipe.transformer_2)):
                module.load_state_dict({name.removeprefix(f"{part}."): v for name, v in values.items() if name.startswith(f"{part}.")})
            continue
        module = deepcopy(getattr(pipe, network + "_2" * teacher.part(rows)))
        if isinstance(net, Lora):                               # through the file that a user would load
            lora = folder / "lora" / (str(k) if len(experts) > 1 else "")
            net.save(pipe, lora, network)
            module.load_lora_adapter(lora, prefix=network, weight_name="pytorch_lora_weights.safetensors")
            module.fuse_lora()
            module.unload_lora()
        else:
            module.load_state_dict(values)
        students.append(module)
    stop = [float(student_schedule.timestep[rows[-1]]) for _, rows in experts[:-1]]
    if students:
        setattr(pipe, network, students[0])
    if "join" in teacher.family and len(students) == 2:         # the boundary between the timesteps of the first's last step and the second's first
        pipe.register_modules(transformer_2=students.pop())
        pipe.register_to_config(boundary_ratio=(stop[0] + float(student_schedule.timestep[experts[0][1][-2]])) / 2 / teacher.schedule.T)
    pipe.scheduler, call = teacher.family["schedulers"](pipe.scheduler, student_schedule is teacher.line, student_schedule.rows(args.steps))
    pipe.save_pretrained(folder)
    for k, module in enumerate(students[1:], 2):
        module.save_pretrained(folder / f"{network}_{k}")
    lengths = [len(rows) - 1 for _, rows in experts]
    kind, path = type(pipe).__name__, str(args.model or EMBEDDED)
    load = "".join(f", {name}=None" for name in left_out(args, path, kind))
    facts = dict(network=network, steps=lengths, switch=len(students) > 1, boundaries=stop, call=call)
    call.update({k: v for k, v in dict(height=args.height, width=args.width, num_frames=getattr(args, "frames", None)).items() if v})
    call.update(text_tokens(args), **teacher.family.get("unguided", dict(guidance_scale=args.cfg_student or 0)))
    if len(experts) > 1:
        (folder / "experts.json").write_text(json.dumps(facts, indent=1))
    (folder / "README.md").write_text(model_card(args, teacher, repr(str(folder)), load, kind, type(getattr(pipe, network)).__name__, facts))


def model_card(args, teacher, folder, without, pipeline, network, facts):
    """What the student is, and the lines that sample it."""
    attribute, lengths = facts["network"], facts["steps"]
    call = ", ".join(f"{k}={v!r}" for k, v in facts["call"].items())
    counts = {"reflow": (args.iterations_adp, "rectified flow (A1)"), "adp": (args.iterations_adp, "ADP"),
              "adm": (args.iterations_adm, "DMD" if args.method == "dmd" else "ADM")}
    how = f"{args.iterations_phase} iterations a phase of Phased DMD" if args.method == "phased_dmd" else \
        ", ".join("{} iterations of {}".format(*counts[stage]) for stage in stages(args, teacher.family))
    attribute_of_result, save = teacher.family["result"]
    imports, load, callback = f"from diffusers import {pipeline}", "", ""
    if facts["switch"]:                                         # the pipeline asks after each step which network does the next
        imports += f", {network}"
        load = f"experts = [pipe.{attribute}] + [{network}.from_pretrained({folder}, subfolder=f\"{attribute}_{{k}}\") for k in range(2, {len(lengths) + 1})]\n" \
               f"def switch(pipe, step, t, kwargs):\n    pipe.{attribute} = experts[{next_experts(lengths)}[step]]\n    return kwargs\n"
        callback = ", callback_on_step_end=switch"
    return f"""---
library_name: diffusers
pipeline_tag: {teacher.family["tag"]}
---
A {args.steps}-step student of `{args.model or "the embedded teacher of captioned shapes"}`: {how}, seed {args.seed}. Guidance
is distilled in (weights {args.guidance[0]:g} to {args.guidance[1]:g}){"" if args.cfg_student is None else ", and the student takes its own besides"}.

```python
{imports}
pipe = {pipeline}.from_pretrained({folder}{without})
{load}sample = pipe({teacher.prompts[0]!r}, {call}{callback}).{attribute_of_result}[0]
{save}
```
"""


def examine(args, out, teacher, experts, student_schedule):
    """The embedded run's table -> dict for result.json: shapes.marks of teacher, untrained and student, against a thousand teacher samples."""
    x_T, x_0, prompt = load_pairs(args, out, teacher)
    half = len(prompt) // 2
    captions, reference = [teacher.prompts[i] for i in prompt[:half]], teacher.images(x_0[half:])
    x = Draws((args.seed, STREAM["examine"]), 0, range(half), teacher.shape).normal()
    draw = lambda sampler: teacher.images(teacher.draw(sampler, x, prompt[:half], 128))
    rows = dict(teacher=(f"teacher, {args.pair_steps} steps with guidance", teacher.images(x_0[:half])),
                untrained=(f"teacher, {args.steps} step", draw(teacher.sampler(teacher.schedule.rows(args.steps), args.pair_guidance))),
                student=(f"student, {args.steps} step", draw(student(args, experts, student_schedule))))
    table = {name: shapes.marks(images, captions, reference) for name, (_, images) in rows.items()}
    noise_left = []                                             # by each expert but the last, as a share of what its row asks for: the teacher, asked
    for k, (_, reached) in enumerate(experts[:-1], 1):          # for the noise in x_s, should find a root mean square of 1
        x_s = teacher.draw(lambda x, cond, uncond: generate(experts[:k], student_schedule, x, cond), x, prompt[:half], 128)
        eps_hat = teacher.draw(lambda x, cond, uncond: predict(teacher.net, student_schedule, x, reached[-1], cond)[1], x_s, prompt[:half], 128)
        noise_left.append(eps_hat.square().mean().sqrt().item())
    if world()[0] == 0:
        print(f"\n{half} images each".ljust(34) + "caption accuracy   coverage TV   precision   diversity")
        for name, (label, _) in rows.items():
            print("{:33s}{accuracy:16.3f}{coverage_tv:14.3f}{precision:12.3f}{diversity:12.3f}".format(label, **table[name]))
        for k, left in enumerate(noise_left, 1):
            print(f"expert {k} hands on x_s with {left:.3f} of the noise it should have")
    return dict(table, noise_left=noise_left)


def student(args, experts, schedule):
    """-> sampler(x_T, cond, uncond)."""
    if args.cfg_student is None:
        return lambda x, cond, uncond: generate(experts, schedule, x, cond)
    (net, rows), = experts
    return lambda x, cond, uncond: sample(net, schedule, x, rows, cond, uncond, args.cfg_student)


def pictures(args, out, teacher):
    """-> look(file, experts, schedule): draw student beside teacher for eight fixed prompts and seeds, or two videos."""
    count = 2 if len(teacher.shape) == 4 else 8
    index = torch.arange(count) * 7 % len(teacher.prompts)
    x_T = Draws((args.seed, STREAM["pictures"]), 0, range(count), teacher.shape).normal()
    rows = {}

    def look(file, experts, schedule):
        if world()[0] and context(args) == 1 and not teacher.how:   # ranks that share samples, or weights, are all needed to draw one
            return
        draw = lambda sampler: teacher.images(teacher.draw(sampler, x_T, index, args.batch_size))
        if not rows:
            rows[f"teacher, {args.pair_steps} steps"] = draw(teacher.sampler(teacher.schedule.rows(args.pair_steps), args.pair_guidance, 2))
            rows[f"teacher, {args.steps} step"] = draw(teacher.sampler(teacher.schedule.rows(args.steps), args.pair_guidance))
        rows[f"student, {args.steps} step"] = images = draw(student(args, experts, schedule))
        if world()[0] == 0:
            (grid if images.dim() == 4 else contact_sheet)(out.path / file, rows, [teacher.prompts[i] for i in index])
        return dict(x_T=x_T, prompt=index, images=images)
    return look


def main(doc, pipelines, embedded):
    args = parse(doc, pipelines, embedded)
    if args.dry_run:
        from dry_run import report
        pipe = load_pipeline(args, pipelines, hollow="all")
        return report(args, pipe, pipelines[type(pipe).__name__], args.dry_run)
    began, prompts = time.time(), read_prompts(args.prompts) if args.prompts else shapes.CAPTIONS
    device = start(alone=args.fsdp or args.cpu_offload)
    out, stop = Output(args.out, args.resume), StopSignal()
    todo = stages(args, pipelines[pipeline_class(args.model or EMBEDDED, pipelines)])
    checkpoint = args.resume and next(filter(None, (newest_checkpoint(out.path / "checkpoints", stage) for stage in reversed(todo))), None)
    reached = checkpoint.name.split("-")[0] if checkpoint else None
    if args.resume not in (None, "auto"):
        reached = verify(args.resume).get("stage")
        if reached not in todo:
            raise Failure(f"--resume {args.resume}: its stage is {reached}, and this run has no such stage; give the flags of the run it belongs to")
        if checkpoint and checkpoint.resolve() != Path(args.resume).resolve():
            raise Failure(f"--resume {args.resume}: --out holds {checkpoint}, with which it would be mixed up; choose another --out, or --resume auto")
        checkpoint = Path(args.resume)
    if "adp" in todo and reached != "adm":
        load_vision_encoder(args.pixel_backbone)                # what is wrong with it is told before hours of pairs

    teacher = Teacher(args, out, prompts, device, pipelines)
    look = pictures(args, out, teacher)
    of_pairs = args.stage == "all" and todo[0] in ("adp", "reflow")               # --stage adp finds them collected
    if (args.stage == "pairs" or of_pairs or args.model is None) and not collect_pairs(args, out, teacher, stop):
        return goodbye(out)
    barrier()
    if args.stage == "pairs":
        return print("pairs is done; go on with --stage adp --resume auto")
    try:
        done = (run_phases if args.method == "phased_dmd" else run_dmdx)(args, out, teacher, todo, checkpoint, reached, look, stop)
    except NotFinite as e:
        drawn = [f"{i + 1} ({textwrap.shorten(prompts[i], 40)})" for i in sorted(set(gather(teacher.drawn)))]
        raise Failure(f"{teacher.at}: {e}, or look at its prompts, by line: {', '.join(drawn)}")
    if not done:
        return
    samples = look("samples.png", *done)
    table = examine(args, out, teacher, *done) if args.model is None and (teacher.how or world()[0] == 0) else {}
    weights = [{} if isinstance(net, Lora) else on_rank_0(net.state_dict()) for net, _ in done[0]]
    if world()[0] == 0:
        curves(out)
        write_folder(out.path / "samples", {"samples.safetensors": samples}, teacher.facts)
        export(args, out, teacher, *done, weights, pipelines)
        (out.path / "result.json.tmp").write_text(json.dumps(dict(seconds=time.time() - began, **table), indent=1))
        (out.path / "result.json.tmp").rename(out.path / "result.json")           # which says that all the rest is there
        print(f"wrote {out.path}/export, samples.png, losses.png, result.json in {time.time() - began:.0f} s")


if __name__ == "__main__":
    run(lambda: main(__doc__, PIPELINES, embedded=True))
