"""The one-step students of the pages of glyphs, and the four-step ones: how each is trained.

lesson/tables.py measures them over seeds, all with one Setting; lesson/adm.py shows six of them in
a shorter one; lesson/dt.py and lesson/collapse.py change one thing at a time. The loops are those
that train SDXL: adm.reflow, adm.adp, adm.adm and phased_dmd.phased_dmd.
"""
import time
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from adm import Scores, adm, adp, reflow
from discriminators import HINGE, AdversarialLoss, Discriminator, hinge_generator
from lesson.glyphs import (SCHEDULE, SHAPE, generated, latent_discriminator, measure, no_prompt,
                           pixel_discriminator)
from phased_dmd import Expert, cut_into_phases, phased_dmd
from training.draws import Draws, stream

ONE_STEP = SCHEDULE.stops(1)
FOUR_STEPS = SCHEDULE.stops(4)
A1, ADP, ADM, PHASED = range(4)                 # stages: each has random numbers of its own
WATCHED = 6                                     # how often ADM and DMD are measured on their way


def paired_hinge(d_fake, d_real):
    """max(0, 1 - (D(x_real) - D(x_fake))): which of the two is real? 1 when D cannot tell. Its
    gradient is Eq. 8's while |D| and the difference are below 1. Eq. 8 learns no more from a sample
    once D passes a margin, even for what x_fake and x_real share; this, once they are told apart.
    """
    return F.relu(1 - (d_real - d_fake)).mean()


PAIRED_HINGE = AdversarialLoss(hinge_generator, paired_hinge)


@dataclass(frozen=True)
class Setting:
    """What the students share. Chosen on seed 10, reported on 0, 1 and 2 (docs/notebook.md)."""
    count: int = 2048           # pages that are read of each student
    pairs: int = 2048           # of the teacher's ODE
    pair_steps: int = 10
    batch: int = 16
    batch_without_adp: int = 32         # ADM and DMD from the teacher
    iterations_a1: int = 1200
    iterations_adp: int = 1200
    iterations_adm: int = 400           # after ADP: of ADM and of DMD
    iterations_without_adp: int = 300   # from the teacher: of ADM and of DMD
    iterations_phased: int = 60         # of both phases together, and of SGTS
    lr_a1: float = 1e-3
    lr_adp: float = 1e-3
    lr_adm: float = 2e-4
    lr_without_adp: float = 3e-4
    lr_phased: float = 3e-4
    lr_fake: float = 5e-4
    lr_heads: float = 1e-3      # of ADP's discriminators
    critic_ratio: float = 3.0   # rate of ADM's heads, in the generator's
    lambda_1: float = 0.85      # weight of ADP's D_1; D_2 has the rest
    dt: int = round(SCHEDULE.T / 6)
    warm_heads: bool = True     # ADM after ADP starts from the heads of ADP's D_1
    paired: bool = False        # ADM's critic is asked which of x_fake and x_real is real
    backbone: str = "reader"    # of the pixel discriminator
    ema: float = 0.98

    def scaled(self, factor):
        """With all iterations and counts times `factor`, for quick tests, and a batch of no more
        than its pairs."""
        changed = {}
        for field in fields(self):
            if field.name in ("pairs", "count") or field.name.startswith("iterations"):
                changed[field.name] = max(2, round(getattr(self, field.name) * factor))
        most = changed["pairs"]
        return replace(self, batch=min(self.batch, most),
                       batch_without_adp=min(self.batch_without_adp, most), **changed)


class Given(NamedTuple):
    """What a student is trained with."""
    teacher: torch.nn.Module
    pairs: tuple                # (x_T, x_0), each [pairs,1,12,12]
    setting: Setting
    seed: int


class Student(NamedTuple):
    experts: list               # one Expert, or one for each phase
    heads: torch.nn.Module      # of the latent discriminator, or None
    log: list                   # a dict for each iteration: its losses; watched: what was measured
    seconds: float              # of this thread's processor, for training alone


# ------------------------------------------------------------------------------- what stages share

def teacher_pairs(teacher, setting, seed):
    """The teacher's ODE pairs (x_T, x_0)."""
    x_T = torch.randn(setting.pairs, *SHAPE, generator=stream(seed, 100))
    return x_T, generated(teacher, x_T, SCHEDULE.stops(setting.pair_steps))


def pair_batches(given, stage):
    """`batches` of adm.adp and adm.reflow."""
    x_T, x_0 = given.pairs
    n = given.setting.batch

    def batches(iteration):
        draws = Draws((given.seed, stage), iteration, [0], SHAPE, block=n)
        pick = (draws.uniform() * len(x_T)).long()
        return [(draws, x_0[pick], x_T[pick], no_prompt(n))]
    return batches


def noise_batches(given, stage, n):
    """`batches` of n samples, for adm.adm and phased_dmd.phased_dmd."""
    def batches(iteration):
        draws = Draws((given.seed, stage), iteration, [0], SHAPE, block=n)
        return [(draws, no_prompt(n), no_prompt(n))]
    return batches


def trainable_copy(net):
    return deepcopy(net).requires_grad_(True)


def optimizer_of(net, lr, beta_2=0.99):
    return torch.optim.AdamW(net.parameters(), lr, betas=(0.0, beta_2), weight_decay=0.0,
                             fused=True)


@torch.no_grad()
def average_in(average, net, weight):
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), weight)


def averaged(net, optimizer, iterations, losses_of_stage, setting, watch=0):
    """Run a stage to its end -> (the EMA of net's weights, log, seconds). The rate falls to zero
    and the weights are averaged: a network with an adversary never settles. The average is shorter
    at first, so that it forgets where the student started.

    watch: how often in all the average is measured on the way, on 256 pages.
    """
    average = deepcopy(net).requires_grad_(False)
    rate = optimizer.param_groups[0]["lr"]
    x_T = torch.randn(min(256, setting.count), *SHAPE, generator=stream(5))
    watched = {round(iterations * (k + 1) / watch) for k in range(watch)}
    log = []
    if watch:
        log.append(dict(iteration=0, **measure(generated(average, x_T, ONE_STEP))))
    seconds = 0.0
    began = time.thread_time()
    for losses in losses_of_stage:
        k = losses["iteration"]
        average_in(average, net, 1 - min(setting.ema, (k + 1) / (k + 10)))
        optimizer.param_groups[0]["lr"] = rate * (1 - k / iterations)
        log.append({name: round(float(value), 4) for name, value in losses.items()})
        log[-1]["iteration"] = k
        if k in watched:
            seconds += time.thread_time() - began
            log[-1].update(measure(generated(average, x_T, ONE_STEP)))
            began = time.thread_time()
    return average, log, seconds + time.thread_time() - began


# ------------------------------------------------------------------------------------ the students

def train_a1(given):
    """Squared error on the pairs: rectified flow."""
    setting = given.setting
    net = trainable_copy(given.teacher)
    optimizer = optimizer_of(net, setting.lr_a1)
    losses = reflow(net, optimizer, SCHEDULE, pair_batches(given, A1), setting.iterations_a1)
    average, log, seconds = averaged(net, optimizer, setting.iterations_a1, losses, setting)
    return Student([Expert(average, ONE_STEP)], None, log, seconds)


def train_adp(given, **changed):
    """changed: fields of the setting that differ in this row."""
    setting = replace(given.setting, **changed)
    torch.manual_seed(given.seed)               # of the heads
    net = trainable_copy(given.teacher)
    latent = latent_discriminator(given.teacher)
    pixel = pixel_discriminator(setting.backbone)
    optimizers = (optimizer_of(net, setting.lr_adp), optimizer_of(latent.heads, setting.lr_heads),
                  optimizer_of(pixel.heads, setting.lr_heads))
    losses = adp(net, D_1=latent, D_2=pixel, decode=lambda x: x, optimizers=optimizers,
                 schedule=SCHEDULE, line=SCHEDULE, batches=pair_batches(given, ADP),
                 iterations=setting.iterations_adp,
                 lambdas=(setting.lambda_1, 1 - setting.lambda_1))
    average, log, seconds = averaged(net, optimizers[0], setting.iterations_adp, losses, setting)
    return Student([Expert(average, ONE_STEP)], latent.heads, log, seconds)


def train_matching(given, judge, after=None, ttur=1):
    """ADM or DMD. judge: "adm" or "dmd". after: ADP's Student to start from; None: the teacher."""
    setting = given.setting
    torch.manual_seed(given.seed + 1)
    if after is None:
        net = trainable_copy(given.teacher)
        rate, iterations = setting.lr_without_adp, setting.iterations_without_adp
        batch = setting.batch_without_adp
    else:
        net = trainable_copy(after.experts[0].net)
        rate, iterations, batch = setting.lr_adm, setting.iterations_adm, setting.batch
    fake = trainable_copy(given.teacher)
    optimizers = [optimizer_of(net, rate), optimizer_of(fake, setting.lr_fake), None]
    discriminator = None
    dt = None                   # DMD takes no step: its times begin at the paper's T/64
    if judge == "adm":
        dt = [setting.dt]
        discriminator = latent_discriminator(given.teacher)
        if after is not None and setting.warm_heads:
            discriminator = Discriminator(discriminator.taps, deepcopy(after.heads))
        optimizers[2] = optimizer_of(discriminator.heads, setting.critic_ratio * rate)
    losses = adm(net, Scores(fake, given.teacher, SCHEDULE), discriminator, optimizers=optimizers,
                 student_schedule=SCHEDULE, stops=ONE_STEP, guidance=(1.0, 1.0),
                 batches=noise_batches(given, ADM, batch), iterations=iterations, ttur=ttur, dt=dt,
                 loss=PAIRED_HINGE if setting.paired else HINGE)
    average, log, seconds = averaged(net, optimizers[0], iterations, losses, setting, WATCHED)
    seconds += after.seconds if after is not None else 0
    return Student([Expert(average, ONE_STEP)], None, log, seconds)


def train_phased(given, boundaries):
    """DMD in four steps, one expert for each phase. boundaries: where it is cut; none: SGTS."""
    setting = given.setting
    phases = cut_into_phases(FOUR_STEPS, boundaries)
    iterations = max(1, setting.iterations_phased // len(phases))
    experts, all_logs, all_seconds = [], [], 0.0
    for k, stops in enumerate(phases):
        net, fake = trainable_copy(given.teacher), trainable_copy(given.teacher)
        optimizers = (optimizer_of(net, setting.lr_phased, beta_2=0.999),
                      optimizer_of(fake, setting.lr_fake, beta_2=0.999))
        losses = phased_dmd([*experts, Expert(net, stops)], Scores(fake, given.teacher, SCHEDULE),
                            optimizers=optimizers, guidance=(1.0, 1.0),
                            batches=noise_batches(given, PHASED + k, setting.batch),
                            iterations=iterations)
        average, log, seconds = averaged(net, optimizers[0], iterations, losses, setting)
        experts.append(Expert(average, stops))
        all_logs += log
        all_seconds += seconds
    return Student(experts, None, all_logs, all_seconds)
