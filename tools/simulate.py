"""Every stage of a run on the pretended GPU: what --dry-run prints of them, and what the tests look
at. The stages are train_sdxl.py's own; only what they read from the disk is made up.

In a process of its own, which tools.dry_run starts:

    python -m tools.simulate MEDIUM < FLAGS.json        # the flags as JSON; prints JSON
"""
from tools.pretend import (         # first: before torch
    DEVICE, in_fork, pretended, process_group, with_values)

import json
import sys
import tempfile
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import train_sdxl
from families.family import of_medium
from ode import Schedule
from tools.passes import blank_prompt
from training.loading import load_pipeline
from training.networks import (
    decode_in_bf16, place, recompute_activations, tensors_to, units_of)
from training.pairs import draw_pairs
from training.sharding import fsdp_arguments
from training.stage import Run
from training.teacher import Teacher

STEPS = 3                       # of the sampler of pairs: a first, a middle and a last


def without_values(module):
    """Replace a module's weights, which may be on the meta device, by pretended ones on the host;
    also tensors that are plain attributes, such as Qwen-Image's frequencies."""
    for part in module.modules():
        for name, value in vars(part).items():
            if torch.is_tensor(value):
                setattr(part, name, torch.empty_like(value))
    return module._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))


def on_device(schedule):
    """Schedule.to, which would look whether alpha_T is 0: here it is nothing."""
    moved = copy(schedule)
    for name in ("alpha", "sigma", "timestep"):
        setattr(moved, name, getattr(schedule, name).to(DEVICE))
    return moved


class PretendedTeacher(Teacher):
    """A Teacher of a pipeline whose weights may be missing, with blank prompts. schedule: the
    pipeline's, read where tensors had values."""

    def __init__(self, args, pipe, family, schedule, latent):
        self.fsdp = with_values(fsdp_arguments, args.fsdp, args.cpu_offload, args.bf16, DEVICE)
        self.family = family
        self.prompts = [""]
        self.device = DEVICE
        self.tokens = args.text_tokens
        self.net = family.net_of(pipe)
        self.units = units_of(self.net)
        self.backbone = self.units[-1]
        self.latent = latent
        self.shape = latent.shape
        self.schedule = on_device(schedule)
        self.line = Schedule.straight(schedule.T, family.last_timestep).to(DEVICE)
        self.constant = tensors_to(DEVICE, family.constant(pipe, latent))
        self.facts = {}
        self.vae = without_values(pipe.vae).requires_grad_(False).to(DEVICE)
        for net in self.units:
            without_values(net).requires_grad_(False)
            if self.fsdp:
                net.to(DEVICE)          # fully_shard would, but cannot move a fake weight
            place(args, net, self.fsdp, DEVICE)
        if args.bf16:
            decode_in_bf16(self.vae)
        if args.grad_checkpointing and family.last_timestep is not None:
            recompute_activations(self.vae)

    def uncond(self, n):
        cond = blank_prompt(self.family, self.backbone.config, n, DEVICE, self.tokens)
        for name in cond:
            if name.endswith("mask"):
                cond[name] = cond[name].bool()
        return cond | self.constant

    def cond(self, index):
        return self.uncond(len(index))


def vision_encoder(path, device):
    """In the place of the one at --pixel-backbone, with random weights: of the structure that a
    local folder says, else SAM ViT-B."""
    from transformers import AutoConfig, Dinov2Model, SamVisionConfig, SamVisionModel
    config, kind = SamVisionConfig(), SamVisionModel
    if Path(path).exists():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type == "dinov2":
            kind = Dinov2Model
        config = getattr(config, "vision_config", config)
    with torch.device(device):
        return kind(config)


def pairs_of(args, out, teacher):
    x = torch.empty(2, *teacher.shape)
    return x, x, torch.zeros(2, dtype=torch.long)


# ------------------------------------------------------------------------------------- the stages

class Simulation:
    """stages: {name: figures}, filled while train_sdxl's own functions run."""

    def __init__(self, args, watch):
        self.args = args
        self.watch = watch
        self.stages = {}

    def note(self, name, repeated=1.0):
        watch = self.watch
        self.stages[name] = dict(
            peak=watch.peak, held=watch.live, host=watch.host_peak, flop=watch.flop * repeated,
            copied=watch.copied * repeated, seconds=watch.seconds * repeated,
            host_seconds=watch.host_seconds() * repeated, waits=dict(watch.waits),
            mixed=dict(watch.mixed))

    def follow(self, run, stage, losses_of_steps):
        """In the place of training.stage.follow: two iterations, the second of which is looked at,
        since the first makes the moments. Micro-batches beyond two are like the second."""
        next(losses_of_steps)
        stage.ema.update()
        self.watch.reset()
        next(losses_of_steps)
        stage.ema.update()
        micro_batches = self.args.accumulate / run.args.accumulate
        self.note(stage.name, micro_batches)
        losses_of_steps.close()
        return True

    def draw(self, run):
        """Pairs and pictures, which no loop makes."""
        args, teacher = self.args, run.teacher
        sampler = teacher.sampler(teacher.schedule.stops(STEPS), args.pair_guidance, order=2)
        self.watch.reset()
        pairs = draw_pairs(args, teacher, sampler, 0, range(2 * args.batch_size))
        self.note("pairs", args.pair_steps / STEPS)
        self.watch.reset()
        teacher.images(pairs["x_0"][:1])
        self.note("a picture")


def simulate(args, pipe, family, ranks=1, encoder=vision_encoder):
    """-> {stage: dict(peak, held, host, copied: bytes, flop, seconds, host_seconds, waits, mixed)},
    of an iteration of one of so many ranks; what they would send each other takes no time.

    pipe: the pipeline; its weights may be on the meta device. encoder: see vision_encoder.
    """
    if args.fsdp or args.cpu_offload:
        process_group(ranks)
    short = SimpleNamespace(**vars(args))
    short.accumulate = min(args.accumulate, 2)
    short.iterations_adp = short.iterations_adm = short.iterations_phase = 10**6
    latent = family.latent(pipe, getattr(pipe, family.network), short)
    schedule = family.schedule(pipe, latent)
    with (pretended(args.dry_run_card) as watch, ExitStack() as patches,
          tempfile.TemporaryDirectory() as folder):
        found = Simulation(args, watch)
        for name, other in dict(load_pairs=pairs_of, load_vision_encoder=encoder,
                                follow=found.follow).items():
            patches.enter_context(mock.patch.object(train_sdxl, name, other))
        teacher = PretendedTeacher(short, pipe, family, schedule, latent)
        run = Run(args=short, out=SimpleNamespace(path=Path(folder)), teacher=teacher, stop=None,
                  stages=train_sdxl.stages_of(short, family), checkpoint=None, reached=None,
                  show=None)
        found.draw(run)
        if not run.stages:                      # --stage pairs
            return found.stages
        if args.method == "phased_dmd":
            train_sdxl.run_phases(run)
        else:
            train_sdxl.run_dmdx(run)
    return found.stages


def main():
    medium = sys.argv[1]
    args = SimpleNamespace(**json.load(sys.stdin))
    args.warm_heads = False                     # there is no ADP to take them from
    families = of_medium(medium)
    pipe = load_pipeline(args, families, hollow="all")
    stages = in_fork(simulate, args, pipe, families[type(pipe).__name__], args.dry_run)
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
