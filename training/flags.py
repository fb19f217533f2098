"""The command line of the training scripts: every flag, with the paper's value and its place there.
"""
import argparse
import os
import sys

from training.errors import Failure, usage
from training.flag_problems import problems, problems_of_family
from training.loading import pipeline_class, pipeline_config
from training.tracking import TRACKERS

# Phased DMD's own values (arXiv 2510.27684): the generator's rate is a LoRA's, the fake score's is
# for all weights. Its 64 samples an iteration are here 16 micro-batches of 4 on one rank.
PHASED = dict(steps=4, ttur=5, lr_generator=5e-5, lora_rank=64, lora_alpha=8.0, lr_fake=4e-7,
              accumulate=16)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's docstring as it stands, and each flag's default."""


def add_what(p, families, embedded):
    g = p.add_argument_group("what")
    g.add_argument("--model", help="local directory or hub id of a pipeline: "
                   + ", ".join(families) + f". {folders_of(embedded)} are trained here and have "
                   f"settings of their own (None: the first of these)")
    g.add_argument("--prompts", help="text file, one prompt a line (embedded teachers: their own)")
    g.add_argument("--method", choices=["dmdx", "dmd", "adp", "reflow", "phased_dmd"],
                   default="dmdx", help="dmdx: ADP, then ADM. dmd: ADP, then the DMD that ADM "
                   "replaces (ablation B3). adp: ADP alone (A5). reflow: squared error on ADP's "
                   "pairs (A1). phased_dmd: experts by noise level, neither ADP nor discriminator")
    g.add_argument("--stage", choices=["all", "pairs", "adp", "adm"], default="all",
                   help="all: pairs, adp, adm for a student of one step; adm alone for one of "
                   "more, since ADP is one-step only. adm starts from a finished adp in --out or, "
                   "without one, from the teacher (ablation B1)")
    g.add_argument("--out", default="out/sdxl", help="where everything is written")
    g.add_argument("--resume", metavar="auto|CHECKPOINT",
                   help="go on from the newest whole checkpoint in --out (auto), or from this one")
    g.add_argument("--seed", type=int, default=0, help="of all random numbers")
    g.add_argument("--no-t5", action="store_true",
                   help="SD3 without its third text encoder, 4.7 billion parameters")
    g.add_argument("--text-tokens", type=int,
                   help="a prompt's, for models with a T5 and Qwen-Image (None: their "
                   "pipeline's, 256 for SD3)")
    g.add_argument("--height", type=int, help="pixels (None: what the model was made for)")
    g.add_argument("--width", type=int, help="pixels")


def add_video(p):
    p.set_defaults(out="out/cogvideox")
    g = p.add_argument_group("video")
    g.add_argument("--frames", type=int, help="of a video (None: what the model was made for)")
    g.add_argument("--context-parallel", type=int, default=1,
                   help="ranks that share each sample's tokens (CogVideoX; paper: yes, B.4)")


def add_pairs(p):
    g = p.add_argument_group("ODE pairs")
    g.add_argument("--pairs", type=int, default=16384, help="how many to collect (choice; "
                   "paper: silent)")
    g.add_argument("--pair-steps", type=int, default=25, help="teacher's steps, second-order "
                   "multistep (choice; the paper's teachers are measured at 25, Tab. 1)")
    g.add_argument("--pair-guidance", type=float, default=7.0,
                   help="teacher's CFG weight (choice: as one samples it)")


def add_optimisation(p):
    g = p.add_argument_group("optimisation")
    g.add_argument("--iterations-adp", type=int, default=8000, help="paper: 8000 (Tab. 7, SDXL)")
    g.add_argument("--iterations-adm", type=int, default=8000,
                   help="paper: 8000 (Tab. 7, SDXL)")
    g.add_argument("--iterations-phase", type=int, default=1000,
                   help="of each phase of Phased DMD (choice)")
    g.add_argument("--iterations", type=int, help="all of these at once")
    g.add_argument("--batch-size", type=int, default=4,
                   help="samples a rank and micro-batch (paper: 4 on each of 32 GPUs, Tab. 7, "
                   "SDXL)")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches an iteration; a larger "
                   "--batch-size is faster where it fits, since the host launches as many kernels "
                   "for one sample as for four (Phased DMD: 16, for the paper's 64 samples on one "
                   "rank)")
    g.add_argument("--lr-generator-adp", type=float, default=1e-6, help="paper: 1e-6 (B.5)")
    g.add_argument("--lr-generator", type=float, default=1e-7, help="in ADM; paper: SDXL 1e-7, "
                   "SD3-Medium 1e-6, SD3.5-Large 1e-8, CogVideoX 1e-7 (B.5); Phased DMD 5e-5, by "
                   "LoRA")
    g.add_argument("--lr-fake", type=float, default=1e-6,
                   help="of all weights; a LoRA wants more. Paper: 1e-6 (B.5); Phased DMD 4e-7")
    g.add_argument("--lr-discriminator", type=float, default=5e-6, help="paper: 5e-6 (B.5)")
    g.add_argument("--clip", type=float, default=1.0,
                   help="largest gradient norm, 0 for none (choice)")
    g.add_argument("--decay", action=argparse.BooleanOptionalAction, default=False,
                   help="let the generator's rate fall to zero over a stage, in a straight line "
                   "(choice)")
    g.add_argument("--ema", type=float, default=0.0, help="decay of the generator's average that "
                   "is sampled and exported, 0 for none (choice)")


def add_method(p):
    g = p.add_argument_group("method")
    g.add_argument("--guidance", type=float, nargs=2, default=[6.0, 8.0], metavar=("LO", "HI"),
                   help="CFG range of the real score (1 1: none); paper: 6 8, SD3.5-Large 3 4, "
                   "CogVideoX 5 7 (B.5)")
    g.add_argument("--steps", type=int, default=1,
                   help="of the student; paper: SDXL 1, SD3 4, CogVideoX 8, Phased DMD 4")
    g.add_argument("--cfg-student", type=float, help="train and sample the student under guidance "
                   "of this weight, two evaluations a step (for the row 'ADM w/ CFG' of the video "
                   "tables, Tab. 8, whose training the paper does not describe)")
    g.add_argument("--ttur", type=int, default=1,
                   help="fake-score updates a generator update; paper: 1 (Tab. 5); Phased DMD 5")
    g.add_argument("--dt", type=int, nargs="+", metavar="TIMES", help="how far below t ADM's "
                   "discriminator looks, in training timesteps; of several, one is drawn an "
                   "iteration (paper: T/64, 16 of 1000)")
    g.add_argument("--warm-heads", action=argparse.BooleanOptionalAction, default=False,
                   help="ADM's discriminator heads start as those of ADP's latent discriminator, "
                   "which has the same backbone and taps (choice; paper: silent)")
    g.add_argument("--warm-up", type=int, default=0, metavar="N", help="first iterations of ADM or "
                   "DMD in which the generator rests, and only fake score and heads learn (choice; "
                   "paper: none)")
    g.add_argument("--lambdas", type=float, nargs=2, default=[0.85, 0.15],
                   metavar=("LATENT", "PIXEL"), help="weights of ADP's discriminators; paper: "
                   "0.85 0.15")
    g.add_argument("--head-channels", type=int, default=256,
                   help="width of a discriminator head (choice)")
    g.add_argument("--pixel-backbone", default="facebook/sam-vit-base",
                   help="id or directory of a SAM (paper) or DINOv2 (ablation A2) model")
    g = p.add_argument_group("Phased DMD")
    g.add_argument("--phases", type=int, default=2,
                   help="experts, each with an equal part of --steps; paper: 2")
    g.add_argument("--weighting", choices=["dmd", "paper"], default="dmd",
                   help="of the generator's gradient (dmd: a choice; phased_dmd.kl_gradient)")
    g.add_argument("--clamp", type=float, nargs=2, default=[0.0, 10.0], metavar=("LO", "HI"),
                   help="range of the fake score's weight; paper: 0 10 (Eq. 13)")
    g.add_argument("--narrow", action="store_true",
                   help="scores only inside the phase's interval, not on all of (s, T] (paper: "
                   "worse)")


def add_memory(p):
    g = p.add_argument_group("memory")
    g.add_argument("--lora-rank", type=int, default=0, help="train the generator as a LoRA of this "
                   "rank on the teacher itself (0: fully; paper: SD3-Medium by LoRA, rank not "
                   "given; Phased DMD 64)")
    g.add_argument("--lora-rank-fake", type=int, default=0, help="the same for the fake score")
    g.add_argument("--lora-alpha", type=float,
                   help="strength of both, alpha/rank (None: the rank; Phased DMD 8)")
    g.add_argument("--bf16", action="store_true",
                   help="bf16 arithmetic, frozen weights stored in bf16 (paper: yes, B.4)")
    g.add_argument("--grad-checkpointing", action="store_true",
                   help="recompute activations in the backward pass (paper: yes, B.4)")
    g.add_argument("--fsdp", action="store_true", help="with torchrun: every rank keeps a part of "
                   "each network's weights, gradients and moments (paper: yes, B.4)")
    g.add_argument("--cpu-offload", action="store_true", help="keep those parts, or on one GPU all "
                   "of them, in host memory, and step there; where they fit on the GPUs it only "
                   "costs time (paper: yes, B.4)")
    g.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND",
                   help="torch.compile each block")
    g.add_argument("--dry-run", nargs="?", type=int, const=1, metavar="RANKS", help="print what "
                   "each stage would take with these flags on that many GPUs (memory of device "
                   "and host, arithmetic, seconds an iteration, disk), and load no weights")
    g.add_argument("--dry-run-card", choices=("h100", "a100"), default="h100",
                   help="whose seconds it prints")


def add_watching(p):
    g = p.add_argument_group("watching")
    g.add_argument("--save-every", type=int, default=500, help="iterations between checkpoints")
    g.add_argument("--sample-every", type=int, default=500, help="iterations between pictures")
    g.add_argument("--look-at", metavar="FILE", help="text file of prompts to draw in these "
                   "pictures, one a line; they are not trained on (None: some of --prompts)")
    g.add_argument("--samples", type=int, help="how many are drawn, each from a fixed seed (None: "
                   "one for each prompt of --look-at, else 8 images or 2 videos)")
    g.add_argument("--report-to", choices=TRACKERS, help="show losses and pictures there as well, "
                   "by accelerate's tracker; wants pip install tensorboard or wandb (None: "
                   "metrics.jsonl and the pictures in --out alone)")


def parser_of(doc, families, embedded):
    p = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    p.error = lambda message: usage([message])
    add_what(p, families, embedded)
    if any(family.medium == "video" for family in families.values()):
        add_video(p)
    add_pairs(p)
    add_optimisation(p)
    add_method(p)
    add_memory(p)
    add_watching(p)
    p.set_defaults(frames=None, context_parallel=1)
    for teacher in embedded:
        tell_settings(p, teacher.name, teacher.settings)
        tell_settings(p, f"{teacher.name}, Phased DMD", teacher.settings_phased)
    return p


def folders_of(embedded):
    return ", ".join(f"teachers/{teacher.folder.name}" for teacher in embedded)


def embedded_at(model, embedded):
    """The embedded teacher that --model names, the first without --model, or None."""
    if model is None:
        return embedded[0]
    for teacher in embedded:
        if os.path.abspath(model) == os.path.abspath(teacher.folder):
            return teacher
    return None


def tell_settings(p, whose, settings):
    """Add to each flag's help what these {flag: value} set in place of its default."""
    for action in p._actions:
        if action.dest in settings:
            action.help += f"; {whose}: {settings[action.dest]}"


def parse(doc, families, embedded):
    """The command line, with the defaults of the model it names -> (args, the embedded teacher it
    distils, or None).

    embedded: the teachers that ship, as teachers/embedded.py has them.

    First argparse's own error, one line; then everything else that is wrong with the flags at once
    (exit code 2); then a model that is nowhere (Failure, exit code 1).
    """
    p = parser_of(doc, families, embedded)
    stray = [word for word in sys.argv[1:] if word == "--" or word.endswith("=--")]
    if stray:                                   # argparse would take --flag=-- for an empty list
        usage([f"{word}: neither a flag nor a value" for word in stray])
    known, _ = p.parse_known_args()
    family, missing = None, None
    teacher = embedded_at(known.model, embedded)
    try:
        model = known.model if teacher is None else teacher.folder
        family = families[pipeline_class(model, families)]
        p.set_defaults(**family.defaults(pipeline_config(model, family.network)))
    except Failure as e:                        # told after the flags, all of which come first
        missing = e
    if known.method == "phased_dmd":
        p.set_defaults(**PHASED)
    if teacher is not None:
        p.set_defaults(**teacher.settings)
        if known.method == "phased_dmd":
            p.set_defaults(**teacher.settings_phased)
    if known.method != "dmdx":                  # what a model's own settings say of ADM
        p.set_defaults(warm_heads=False, dt=None)
    if known.method not in ("dmdx", "dmd"):
        p.set_defaults(warm_up=0)
    if known.steps > 1:                         # no ADP, whose heads could be taken over
        p.set_defaults(warm_heads=False)
    if family is not None and family.always:
        p.set_defaults(**family.always)
    args, unknown = p.parse_known_args()
    if args.model is None:
        args.model = str(teacher.folder)
    if args.iterations is not None:
        args.iterations_adp = args.iterations_adm = args.iterations_phase = args.iterations
    wrong = problems(args, unknown, teacher)
    if family is not None:
        wrong += family.problems(args) + problems_of_family(args, family, teacher)
    if wrong:
        usage(wrong)
    if missing:
        raise missing
    return args, teacher
