"""What can be wrong with the flags of the training scripts, one sentence each."""
import math

import torch

from training.ranks import number_of_ranks
from training.tracking import problem_of

ABOVE_0 = ("pairs", "pair_steps", "iterations_adp", "iterations_adm", "iterations_phase",
           "batch_size", "accumulate", "lr_generator_adp", "lr_generator", "lr_fake",
           "lr_discriminator", "steps", "ttur", "head_channels", "phases", "save_every",
           "sample_every", "context_parallel")
ABOVE_0_IF_GIVEN = ("text_tokens", "dry_run", "samples", "lora_alpha", "frames")
NOT_NEGATIVE = ("clip", "lora_rank", "lora_rank_fake", "seed", "pair_guidance", "warm_up")
AT_MOST = dict(steps=1000, pair_steps=1000, seed=2**63 - 1, batch_size=2**16, accumulate=2**16,
               pairs=2**30, samples=2**16, text_tokens=2**16, head_channels=2**16, lora_rank=2**16,
               lora_rank_fake=2**16)


def problems(args, unknown, teacher):
    """Every flag that is wrong for any family, one sentence each. teacher: the embedded one that
    --model names, or None."""
    wrong = []
    if unknown:
        wrong.append(f"unknown flag {' '.join(unknown)}")
    wrong += problems_of_text(args)
    wrong += problems_of_numbers(args)
    wrong += problems_of_method(args)
    wrong += problems_of_place(args)
    if teacher is None and args.prompts is None and not args.dry_run:
        wrong.append("--prompts is needed with --model: a text file, one prompt a line")
    if teacher is not None and args.pairs == 1:
        wrong.append("--pairs 1: an embedded teacher's table needs at least 2")
    if teacher is not None:
        wrong += problems_of_size(args)
    untracked = args.report_to and problem_of(args.report_to)
    if untracked:
        wrong.append(untracked)
    return wrong


def problems_of_size(args):
    """An embedded teacher draws one world, whose reader knows one size."""
    return [f"{named(args, name)}: an embedded teacher has one size; leave the flag out"
            for name in ("height", "width", "frames") if getattr(args, name) is not None]


def problems_of_text(args):
    wrong = []
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.strip():
            wrong.append(f"--{name.replace('_', '-')}: empty; give a value, or leave the flag out")
    if args.compile and args.compile not in torch.compiler.list_backends(exclude_tags=()):
        wrong.append(f"--compile {args.compile}: not a backend of torch.compile; leave the value "
                     f"out for inductor")
    return wrong


def problems_of_place(args):
    """What is wrong with where the run is: its directory, its ranks."""
    wrong = []
    try:
        args.out.encode()
    except UnicodeEncodeError:
        wrong.append(f"--out {args.out}: not UTF-8; choose another directory")
    try:
        number_of_ranks()
    except ValueError as e:
        wrong.append(str(e))
    return wrong


def named(args, name):
    """The flag and its value, as a user would write them."""
    value = getattr(args, name)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"--{name.replace('_', '-')} {value}"


def problems_of_numbers(args):
    wrong = []
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, float) and not math.isfinite(v) for v in values):
            wrong.append(f"{named(args, name)}: not finite")
    for name, most in AT_MOST.items():
        if (getattr(args, name) or 0) > most:
            wrong.append(f"{named(args, name)}: must be {most} at most")
    if args.head_channels == 1:                 # nothing to normalise in a map of one pixel
        wrong.append("--head-channels 1: must be above 1")
    for name in ABOVE_0:
        if getattr(args, name) <= 0:
            wrong.append(f"{named(args, name)}: must be above 0")
    for name in ABOVE_0_IF_GIVEN:
        value = getattr(args, name)
        if value is not None and not value > 0:
            wrong.append(f"{named(args, name)}: must be above 0")
    for name in NOT_NEGATIVE:
        if getattr(args, name) < 0:
            wrong.append(f"{named(args, name)}: must be 0 or above")
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and (value < 1 or value % 16 > 0):
            wrong.append(f"{named(args, name)}: must be a multiple of 16 above 0")
    for name in ("guidance", "clamp"):
        low, high = getattr(args, name)
        if not low <= high:
            wrong.append(f"{named(args, name)}: LO is above HI")
    if not 0 <= args.ema < 1:
        wrong.append(f"{named(args, 'ema')}: must be in [0, 1)")
    if args.cfg_student is not None and not args.cfg_student > 1:
        wrong.append(f"{named(args, 'cfg_student')}: must be above 1")
    if args.dt is not None and not all(0 < dt < 1000 for dt in args.dt):
        wrong.append(f"{named(args, 'dt')}: must be in 1 to 999")
    if not (min(args.lambdas) >= 0 and max(args.lambdas) > 0):
        wrong.append("--lambdas: weights must be 0 or above, one of them above")
    return wrong


def problems_of_method(args):
    wrong = []
    if args.stage in ("adp", "adm") and args.method in ("adp", "reflow"):
        wrong.append(f"--stage {args.stage} --method {args.method}: that method has no such stage; "
                     f"leave --stage out")
    if args.warm_heads and args.method != "dmdx":
        wrong.append("--warm-heads: only ADM of dmdx has heads of ADP to start from; leave the "
                     "flag out")
    if args.warm_up > 0 and args.method not in ("dmdx", "dmd"):
        wrong.append(f"{named(args, 'warm_up')}: only ADM and DMD have a warm-up; leave the flag "
                     f"out")
    elif args.warm_up > 0 and args.warm_up >= args.iterations_adm:
        wrong.append(f"{named(args, 'warm_up')}: must be below --iterations-adm "
                     f"{args.iterations_adm}, or the generator would never move; give a smaller "
                     f"one")
    if args.dt is not None and args.method != "dmdx":
        wrong.append(f"{named(args, 'dt')}: only ADM's discriminator has a dt; leave the flag out")
    if args.cfg_student is not None and args.method not in ("dmdx", "dmd"):
        wrong.append(f"{named(args, 'cfg_student')}: only ADM and DMD train a student under "
                     f"guidance; leave the flag out")
    if args.method == "phased_dmd":
        if args.stage in ("adp", "adm"):
            wrong.append(f"{named(args, 'stage')}: Phased DMD has no such stage; leave the flag "
                         f"out")
        if args.phases > 0 and args.steps % args.phases > 0:
            wrong.append(f"{named(args, 'phases')}: must divide --steps {args.steps}")
    return wrong


def has_adp(args, family):
    """ADP is one-step only, and for families that have the straight line (last_timestep)."""
    return args.steps == 1 and family.last_timestep is not None


def problems_of_family(args, family, teacher):
    """What no run of this family can do. teacher: the embedded one that is distilled, or None."""
    wrong = []
    if args.stage == "adp" and not has_adp(args, family):
        wrong.append("--stage adp: this model has no ADP at these --steps; leave the flag out")
    if args.method in ("adp", "reflow") and not has_adp(args, family):
        wrong.append(f"--method {args.method}: this model has none at these --steps; use dmdx")
    if args.warm_heads and not has_adp(args, family):
        wrong.append("--warm-heads: ADP, whose heads they are, is for --steps 1 and models that "
                     "have it; leave the flag out")
    uses_pairs = has_adp(args, family) and args.method != "phased_dmd"
    if args.stage == "pairs" and not uses_pairs and teacher is None:
        wrong.append("--stage pairs: no stage of this run would use them; leave the flag out")
    if args.context_parallel > 1 and family.context_parallel is None:
        wrong.append("--context-parallel: CogVideoX only; leave the flag out")
    try:
        ranks = number_of_ranks()
    except ValueError:                                          # problems_of_place has said it
        return wrong
    if args.context_parallel > 0 and ranks % args.context_parallel > 0:
        wrong.append(f"{named(args, 'context_parallel')}: must divide the number of ranks, {ranks}")
    return wrong
