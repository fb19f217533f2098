"""Distil an image pipeline of diffusers to a few steps: DMDX (ODE pairs, ADP, ADM), ADM alone, DMD,
or Phased DMD. For SDXL, SD3, SD3.5 and Qwen-Image; a family is a file in families/.

    # teachers that ship, two cores, minutes
    python train_sdxl.py                                                # an SDXL, to one step
    python train_sdxl.py --model teachers/sd3                           # an SD3, to four
    python train_sdxl.py --method phased_dmd --out out/phased           # two experts of two steps

    # one GPU, by LoRA
    python train_sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt \\
        --out out/sdxl --bf16 --grad-checkpointing --lora-rank 64 --lora-rank-fake 64 \\
        --lr-generator-adp 1e-4 --lr-generator 1e-5 --lr-fake 1e-4 --lr-discriminator 5e-5
    torchrun --nproc-per-node 8 train_sdxl.py ...       # eight, with the same flags
    python train_sdxl.py --model stabilityai/stable-diffusion-3-medium-diffusers ...  # four steps
    python train_sdxl.py --model Qwen/Qwen-Image --method phased_dmd ...              # two experts

Writes to --out: prompts/, pairs/, checkpoints/, metrics.jsonl, losses.png, samples.png, result.json
and export/, a pipeline that stock diffusers samples.
"""
import training.interrupt  # noqa: F401, I001  first: the libraries take seconds
import json
import textwrap
import time
from functools import partial

import torch

from adm import Scores, adm, adp, reflow
from discriminators import Discriminator
from families.family import of_medium
from families.vision import load_vision_encoder, vision_class, vision_taps
from phased_dmd import Expert, cut_into_phases, phased_dmd
from teachers import embedded
from teachers.report import report_of_student
from tools import dry_run
from training import threads
from training.batches import pair_batches, prompt_batches
from training.checkpoints import (
    checkpoint_to_resume, is_after_adp, load_checkpoint, newest_checkpoint)
from training.errors import Failure, NotFinite, first_not_finite, read_prompts, run_main
from training.export import export, refuse_without_callback
from training.flag_problems import has_adp
from training.flags import parse
from training.folders import write_folder
from training.heads import latent_heads, load_warm_heads, pixel_heads, refuse_without_heads
from training.loading import load_pipeline, pipeline_class
from training.lora import Lora, facts_of_loras
from training.networks import autocast, one_by_one, prepare, trainable
from training.optimizer import EMA, Optimizer
from training.output import Output
from training.pairs import collect_pairs, load_pairs
from training.pictures import curves
from training.ranks import StopSignal, barrier, broadcast, gather_lists, is_rank_0, start, tell_once
from training.sharding import on_rank_0
from training.show import pictures
from training.stage import Run, Stage, begin, cure_of_divergence, follow, goodbye
from training.teacher import Teacher
from training.terminal import tell
from training.tracking import report_of


def run_adp(run, generator, ema, facts):
    """Stage `adp` -> False if it was stopped early."""
    args, teacher = run.args, run.teacher
    batches = pair_batches(args, teacher, "adp", load_pairs(args, run.out, teacher))
    torch.manual_seed(args.seed)
    vision = load_vision_encoder(args.pixel_backbone, teacher.device)
    autocast(vision, teacher.device, args.bf16)
    D_1 = Discriminator(teacher.family.taps(teacher.backbone), latent_heads(args, teacher))
    D_2 = Discriminator(vision_taps(vision), pixel_heads(args, teacher, vision_taps, vision))
    decode = teacher.decode
    if args.grad_checkpointing:
        decode = one_by_one(decode)
        D_2 = Discriminator(one_by_one(D_2.taps), D_2.heads)
    optimizers = (
        Optimizer("generator", generator.parameters(), args.lr_generator_adp, args.clip),
        Optimizer("latent heads", D_1.heads.parameters(), args.lr_discriminator, args.clip),
        Optimizer("pixel heads", D_2.heads.parameters(), args.lr_discriminator, args.clip))
    stage = Stage("adp", args.iterations_adp, ema, optimizers, facts,
                  networks=dict(heads=D_1.heads, pixel_heads=D_2.heads),
                  experts=[Expert(ema.net, teacher.line.stops(1))], schedule=teacher.line)
    iteration, _ = begin(run, stage)
    losses = adp(generator, D_1, D_2, decode, optimizers, teacher.schedule,
                 teacher.line, batches, args.iterations_adp, iteration, args.lambdas)
    return follow(run, stage, losses)


def run_reflow(run, generator, ema, facts):
    """Stage `reflow`, ablation A1, in the place of ADP -> False if it was stopped early."""
    args, teacher = run.args, run.teacher
    batches = pair_batches(args, teacher, "reflow", load_pairs(args, run.out, teacher))
    optimizer = Optimizer("generator", generator.parameters(), args.lr_generator_adp, args.clip)
    stage = Stage("reflow", args.iterations_adp, ema, (optimizer,), facts, networks={},
                  experts=[Expert(ema.net, teacher.line.stops(1))], schedule=teacher.line)
    iteration, _ = begin(run, stage)
    losses = reflow(generator, optimizer, teacher.line, batches, args.iterations_adp, iteration)
    return follow(run, stage, losses)


def run_adm(run, generator, ema, schedule, facts):
    """Stage `adm`, or DMD in its place -> False if it was stopped early. schedule: the
    generator's."""
    args, teacher = run.args, run.teacher
    torch.manual_seed(args.seed)
    fake_score = trainable(args, teacher, "fake", args.lora_rank_fake)
    discriminator, heads, heads_opt = None, {}, None
    if args.method == "dmdx":
        discriminator = Discriminator(teacher.family.taps(teacher.backbone),
                                      latent_heads(args, teacher))
        heads = dict(heads=discriminator.heads)
        if args.warm_heads and run.reached != "adm":
            load_warm_heads(run, facts, discriminator.heads)
        heads_opt = Optimizer("latent heads", discriminator.heads.parameters(),
                              args.lr_discriminator, args.clip)
    optimizers = (Optimizer("generator", generator.parameters(), args.lr_generator, args.clip),
                  Optimizer("fake score", fake_score.parameters(), args.lr_fake, args.clip),
                  heads_opt)
    stops = schedule.stops(args.steps)
    facts = dict(facts, method=args.method, dt=args.dt, warm_heads=args.warm_heads,
                 cfg_student=args.cfg_student)
    stage = Stage("adm", args.iterations_adm, ema, tuple(filter(None, optimizers)), facts,
                  networks=dict(fake_score=fake_score, **heads),
                  experts=[Expert(ema.net, stops)], schedule=schedule, warm_up=args.warm_up)
    begun = begin(run, stage)
    scores = Scores(fake_score, teacher.net, teacher.schedule)
    losses = adm(generator, scores, discriminator, optimizers, schedule, stops, args.guidance,
                 prompt_batches(args, teacher, "adm"), args.iterations_adm, begun, args.ttur,
                 args.dt, student_w=args.cfg_student)
    return follow(run, stage, losses)


def run_dmdx(run):
    """ADP or A1, then ADM or DMD, as far as they are in this run -> ([Expert], its schedule), or
    None if it was stopped early or ends before there is a student to export."""
    args, teacher = run.args, run.teacher
    torch.manual_seed(args.seed)
    generator = trainable(args, teacher, "generator", args.lora_rank)
    ema = EMA(generator, args.ema, partial(prepare, args, device=teacher.device))
    facts = dict(teacher.facts, steps=args.steps, seed=args.seed, **facts_of_loras(args))
    if run.reached == "adm":            # perhaps of another --out, where ADP's checkpoint is not
        after_adp = is_after_adp(run.checkpoint)
    elif run.stages[0] == "adm":
        after_adp = load_finished(run, "adp", args.iterations_adp, ema, facts)
    else:
        pretrain = run_adp if run.stages[0] == "adp" else run_reflow
        if not pretrain(run, generator, ema, facts):
            return None
        after_adp = True
    if args.stage == "adp":
        tell_once("adp is done; go on with the same flags and --resume auto, but --stage adm")
        return None
    schedule = teacher.line if after_adp else teacher.schedule
    if run.stages[-1] == "adm":
        if run.reached != "adm":
            ema.restart()               # ADM starts from what ADP's average had become
        if not run_adm(run, generator, ema, schedule, dict(facts, after_adp=after_adp)):
            return None
    return [Expert(ema.net, schedule.stops(args.steps))], schedule


def load_finished(run, stage, iterations, ema, facts):
    """The generator and its average as a stage left them that an earlier run has finished -> False
    if there is none in --out. Raises Failure if it has fewer iterations."""
    path = broadcast(newest_checkpoint(run.out.path / "checkpoints", stage))
    if path is None:
        return False
    found = load_checkpoint(path, facts, ema.networks(), ())
    if found["iteration"] < iterations:
        raise Failure(f"{path}: {stage} is not finished there; finish it first, or ask for no more "
                      f"than its {found['iteration']} iterations")
    return True


def run_phases(run):
    """Phased DMD, noisiest phase first -> ([Expert, ...], the teacher's schedule), or None if it
    was stopped early."""
    args, teacher = run.args, run.teacher
    stops, experts = teacher.schedule.stops(args.steps), []
    size = args.steps // args.phases
    facts = dict(teacher.facts, steps=args.steps, phases=args.phases, seed=args.seed,
                 method=args.method, weighting=args.weighting, **facts_of_loras(args))
    for k, phase in enumerate(cut_into_phases(stops, stops[size:-1:size]), 1):
        torch.manual_seed(args.seed)
        generator = trainable(args, teacher, f"phase{k}", args.lora_rank,
                              teacher.units[teacher.unit_of(phase)])
        ema = EMA(generator, args.ema, partial(prepare, args, device=teacher.device))
        if run.reached in run.stages[k:]:
            if not load_finished(run, f"phase{k}", args.iterations_phase, ema, facts):
                raise Failure(f"{run.out.path}/checkpoints: phase{k} is gone, which later phases "
                              f"need; put it back, or begin again in another --out")
        elif not run_phase(run, k, experts, Expert(generator, phase), ema, facts):
            return None
        experts.append(Expert(ema.net, phase))
    return experts, teacher.schedule


def run_phase(run, k, earlier, expert, ema, facts):
    """Stage `phaseK` -> False if it was stopped early."""
    args, teacher = run.args, run.teacher
    fake_score = trainable(args, teacher, f"fake{k}", args.lora_rank_fake)  # from the teacher again
    betas = (0.0, 0.999)
    optimizers = (
        Optimizer("generator", expert.net.parameters(), args.lr_generator, args.clip, betas),
        Optimizer("fake score", fake_score.parameters(), args.lr_fake, args.clip, betas))
    to_the_end = Expert(ema.net, [*expert.stops[:-1], 0])       # in pictures it jumps to 0 at last
    stage = Stage(f"phase{k}", args.iterations_phase, ema, optimizers, facts,
                  networks=dict(fake_score=fake_score), experts=[*earlier, to_the_end],
                  schedule=teacher.schedule)
    begun = begin(run, stage)
    losses = phased_dmd([*earlier, expert], Scores(fake_score, teacher.net, teacher.schedule),
                        optimizers, args.guidance, prompt_batches(args, teacher, stage.name),
                        args.iterations_phase, begun, args.ttur, args.weighting, args.narrow,
                        args.clamp)
    return follow(run, stage, losses)


# ------------------------------------------------------------------------------------------ the run

def stages_of(args, family):
    """What this run trains, in order: the names its checkpoints go by."""
    names = []
    if args.method == "phased_dmd":
        names = [f"phase{k}" for k in range(1, args.phases + 1)]
    elif has_adp(args, family):
        names = ["reflow" if args.method == "reflow" else "adp"]
    if args.method in ("dmdx", "dmd"):
        names.append("adm")
    return [name for name in names if args.stage in ("all", name)]


def distil(run, families, shipped):
    """Pairs, training, export -> what of the run's table goes into result.json, or None if it ends
    before there is a student. shipped: the teacher's record, if it is an embedded one."""
    args, teacher, out = run.args, run.teacher, run.out
    needs_pairs = (args.stage == "all" and run.stages[0] in ("adp", "reflow")
                   and run.reached != "adm")
    if args.stage == "pairs" or needs_pairs or shipped:
        if not collect_pairs(args, out, teacher, run.stop):
            goodbye(run)
            return None
    barrier()
    if args.stage == "pairs":
        tell_once("pairs is done; go on with the same flags and --resume auto, without --stage")
        return None
    done = run_phases(run) if args.method == "phased_dmd" else run_dmdx(run)
    if done is None:
        return None
    experts, schedule = done
    samples = run.show("samples.png", experts, schedule)
    last_stage, iterations = list(run.done.items())[-1]
    run.report.picture(last_stage, iterations, out.path / "samples.png")
    wrong = first_not_finite(samples or {})
    if wrong:
        raise Failure(f"the student's {wrong} are not finite, so nothing was exported; look at its "
                      f"losses in {out.path}/metrics.jsonl")
    weights = [{} if isinstance(expert.net, Lora) else on_rank_0(expert.net.state_dict())
               for expert in experts]
    if is_rank_0():
        write_folder(out.path / "samples", {"samples.safetensors": samples}, teacher.facts)
        export(run, families, experts, schedule, weights)
        curves(out)
    if shipped and (teacher.ranks_draw_together or is_rank_0()):
        return report_of_student(shipped, run, experts, schedule)
    return {}


def main(doc, medium):
    families = of_medium(medium)
    args, shipped = parse(doc, families, embedded.of_medium(medium))
    family = families[pipeline_class(args.model, families)]
    if args.dry_run:
        pipe = load_pipeline(args, families, hollow="all")
        dry_run.report(args, pipe, family)
        return
    began = time.time()
    prompts = read_prompts(args.prompts) if args.prompts else shipped.prompts
    look_at = read_prompts(args.look_at, "--look-at") if args.look_at else []
    refuse_without_callback(args, family)
    device = start(alone=args.fsdp or args.cpu_offload)
    threads.choose(device)
    out, stop = Output(args.out, args.resume), StopSignal()
    stages = stages_of(args, family)
    out.clean()
    checkpoint, reached = broadcast(checkpoint_to_resume(args, out, stages))
    refuse_without_heads(args, out, stages, reached)
    report = report_of(args, out, stages)       # what its tracker refuses is told now
    if "adp" in stages and reached != "adm":
        vision_class(args.pixel_backbone)       # what is wrong with it is told before the pairs
    teacher = Teacher(args, out, prompts, look_at, device, families)
    run = Run(args, out, teacher, stop, stages, checkpoint, reached, pictures(args, out, teacher),
              report=report)
    try:
        table = distil(run, families, shipped)
    except NotFinite as e:
        asked = sorted(set(gather_lists(teacher.asked)))
        lines = [f"{i + 1} ({textwrap.shorten(prompts[i], 40)})" for i in asked]
        raise Failure(f"{teacher.at}: {e}; {cure_of_divergence(run)}, or look at its prompts, by "
                      f"line: {', '.join(lines)}")
    finally:
        report.finish()
    if table is None or not is_rank_0():
        return
    seconds = time.time() - began
    result = out.path / "result.json.tmp"
    result.write_text(json.dumps(dict(seconds=seconds, **table), indent=1), encoding="utf-8")
    result.rename(out.path / "result.json")         # which says that all the rest is there
    tell(f"wrote {out.path}/export, samples.png, losses.png, result.json in {seconds:.0f} s")


if __name__ == "__main__":
    run_main(lambda: main(__doc__, "image"))
