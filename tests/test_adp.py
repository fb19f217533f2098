"""adm.adp, adversarial distillation pre-training, against a transcription of its formulas with an
algebra of its own: x_t, velocities and hinges are written out, gradients are autograd's."""
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from adm import adp, adp_times, reflow
from discriminators import HINGE, AdversarialLoss, Discriminator
from lesson.worlds import Fourier, Net, mlp_heads
from ode import Schedule
from tiny import (BATCH, SHAPE, Cond, CondTaps, Float64Draws, Spy, apart, draws_of, sgd,
                  unconditional, weights_of)
from training.draws import Draws

ITERATIONS = 10
RATE = 0.05

# the teacher's diffusion: VP, 80 times, an eps network. ADP's line has 120, and tells others
ANGLE = torch.linspace(0, 1.3, 81, dtype=torch.float64)
TEACHERS = Schedule(ANGLE.cos(), ANGLE.sin(), 7 * torch.arange(81) + 2, "eps")
LINE = Schedule.straight(120)


class Players(NamedTuple):
    generator: nn.Module
    latent: Discriminator
    pixel: Discriminator

    def trained(self):
        return dict(generator=self.generator, latent=self.latent.heads, pixel=self.pixel.heads)


def decode(x0):
    """[B,2] -> "images" [B,2]; not linear."""
    return torch.tanh(0.7 * x0) + 0.2 * x0.flip(1)


def players():
    torch.manual_seed(3)
    teacher = Cond().double().requires_grad_(False)
    generator, = apart([deepcopy(teacher).requires_grad_(True)])
    latent = Discriminator(CondTaps(teacher), mlp_heads(2, 8, 8).double())
    pixel = Discriminator(Fourier(8).double(), mlp_heads(1, 8, 8).double())
    for D in (latent, pixel):
        for head in D.heads.heads:
            head[-1].weight.data *= 80          # values on both sides of the hinges' corners
    return Players(generator, latent, pixel)


def pairs(iteration):
    """Two micro-batches of pairs and prompts."""
    batch = []
    for m in (0, 1):
        draws = Float64Draws((5,), iteration, range(m * BATCH, (m + 1) * BATCH), SHAPE)
        torch.manual_seed(10 * iteration + m)
        x_T = torch.randn(BATCH, 2).double()
        prompt = torch.randn(BATCH, 3).double()
        batch.append((draws, 0.5 * x_T.sin() + 0.2 * prompt[:, :2], x_T, dict(prompt=prompt)))
    return batch


# ---------------------------------------------------------------------------- the transcription

def hinge_of_generator(d_fake, d_real):
    return -d_fake.sum() / len(d_fake)


def hinge_of_discriminator(d_fake, d_real):
    zero = torch.zeros_like(d_fake)
    return (torch.maximum(zero, 1 + d_fake) + torch.maximum(zero, 1 - d_real)).sum() / len(d_fake)


def relativistic_of_generator(d_fake, d_real):
    return torch.log(1 + torch.exp(d_real - d_fake)).sum() / len(d_fake)


def relativistic_of_discriminator(d_fake, d_real):
    return torch.log(1 + torch.exp(d_fake - d_real)).sum() / len(d_fake)


def losses_of(net, weights, generator_loss, discriminator_loss, draws, x_0, x_T, cond):
    """One micro-batch -> (G's loss, D_1's, D_2's, all of D's values)."""
    T = 120
    u = draws.uniform()
    t = torch.ceil(T * (1 - u * u * u)).long()                  # [1 - u^3] T, mostly noise
    t[t < 1] = 1
    part = (t.double() / T)[:, None]                                            # [B,1]
    x_t = (1 - part) * x_0 + part * x_T
    velocity = net.generator(x_t, timestep=t.clamp(max=T - 1).float(), **cond)[0]
    x0_tilde = x_t - part * velocity

    noise = draws.normal()                                      # one for both of D_1's inputs
    t_prime = draws.integers(1, 80)                             # uniform
    angle = (1.3 / 80 * t_prime.double())[:, None]
    told = (7 * t_prime + 2).float()

    def d_1(x0):
        x = angle.cos() * x0 + angle.sin() * noise
        return net.latent.heads(net.latent.taps(x, timestep=told, **cond))

    def d_2(x0):
        return net.pixel.heads(net.pixel.taps(decode(x0)))

    x_fake = x0_tilde.detach()
    values = [d_1(x_fake), d_1(x_0), d_2(x_fake), d_2(x_0)]
    of_generator = (weights[0] * generator_loss(d_1(x0_tilde), values[1].detach())
                    + weights[1] * generator_loss(d_2(x0_tilde), values[3].detach()))
    of_latent = discriminator_loss(values[0], values[1])
    of_pixel = discriminator_loss(values[2], values[3])
    return of_generator, of_latent, of_pixel, values


class Trained(NamedTuple):
    players: Players
    losses: list            # [{name: value}, ...] of each iteration
    gradients: dict         # player -> [[of each weight], ...] of each iteration


def transcribed(weights, generator_loss, discriminator_loss):
    """ITERATIONS steps of SGD, every gradient by autograd of its own player's loss."""
    net = players()
    losses, gradients = [], dict(generator=[], latent=[], pixel=[])
    values = []
    for iteration in range(1, ITERATIONS + 1):
        sums = {name: None for name in gradients}
        for batch in pairs(iteration):
            of_generator, of_latent, of_pixel, seen = losses_of(
                net, weights, generator_loss, discriminator_loss, *batch)
            values += [value.detach() for value in seen]
            minimised = dict(generator=of_generator, latent=weights[0] * of_latent,
                             pixel=weights[1] * of_pixel)
            for name, module in net.trained().items():
                found = torch.autograd.grad(minimised[name] / 2, list(module.parameters()),
                                            retain_graph=True)
                if sums[name] is not None:
                    found = [a + b for a, b in zip(sums[name], found)]
                sums[name] = found
        for name, module in net.trained().items():
            gradients[name].append(sums[name])
            for p, gradient in zip(module.parameters(), sums[name]):
                p.data -= RATE * gradient
        losses.append(dict(generator=of_generator.item(), discriminator=of_latent.item(),
                           pixel_discriminator=of_pixel.item()))
    if generator_loss is hinge_of_generator:
        for D in (0, 2):
            d_fake, d_real = torch.cat(values[D::4]), torch.cat(values[D + 1::4])
            assert d_fake.min() < -1 < d_fake.max() and d_real.min() < 1 < d_real.max(), (
                "a corner of the hinge was never passed")
    return Trained(net, losses, gradients)


def trained_by_adp(**arguments):
    net = players()
    spies = {name: Spy(module, RATE) for name, module in net.trained().items()}
    losses = []
    for i, found in enumerate(adp(
            net.generator, D_1=net.latent, D_2=net.pixel, decode=decode,
            optimizers=list(spies.values()), schedule=TEACHERS, line=LINE, batches=pairs,
            iterations=ITERATIONS, **arguments), 1):
        assert found.pop("iteration") == i
        assert not any(loss.requires_grad for loss in found.values())
        losses.append({name: loss.item() for name, loss in found.items()})
    return Trained(net, losses, {name: spy.gradients for name, spy in spies.items()})


RELATIVISTIC = AdversarialLoss(
    lambda d_fake, d_real: F.softplus(d_real - d_fake).mean(),
    lambda d_fake, d_real: F.softplus(d_fake - d_real).mean())

# name -> (arguments of adp, lambda_1 and lambda_2, the losses written out)
CASES = {
    "the paper's": ({}, (0.85, 0.15), hinge_of_generator, hinge_of_discriminator),
    "other weights": (dict(lambdas=(0.3, 0.7), loss=HINGE), (0.3, 0.7), hinge_of_generator,
                      hinge_of_discriminator),
    "relativistic": (dict(loss=RELATIVISTIC), (0.85, 0.15), relativistic_of_generator,
                     relativistic_of_discriminator),
}


@pytest.mark.parametrize("case", CASES)
def test_adp_is_its_transcription(case):
    """Losses, the gradient of every weight as the optimizers see it, and the weights after ten
    steps of SGD, to 1e-6 in float64."""
    arguments, weights, generator_loss, discriminator_loss = CASES[case]
    lean = trained_by_adp(**arguments)
    plain = transcribed(weights, generator_loss, discriminator_loss)
    for found, expected in zip(lean.losses, plain.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    start = players().trained()
    for name, module in lean.players.trained().items():
        for found, expected in zip(lean.gradients[name], plain.gradients[name], strict=True):
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")
        for a, b in zip(module.parameters(), plain.players.trained()[name].parameters(),
                        strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")
        moved = zip(module.parameters(), start[name].parameters())
        assert sum((a - b).abs().sum() for a, b in moved) > 1e-3, f"the {name} did not learn"


# ------------------------------------------------------------------------------------- the rest

def test_frozen_backbones_collect_nothing_and_all_three_players_learn():
    schedule, line = Schedule.straight(100), Schedule.straight(100)
    generator, scores, latent = unconditional(schedule)
    pixel = Discriminator(Fourier(8).double(), mlp_heads(1, 8, 8).double())
    trained = generator, latent.heads, pixel.heads
    before = [weights_of(net) for net in trained]
    x_T = torch.randn(BATCH, 2).double()
    found = list(adp(
        generator, D_1=latent, D_2=pixel, decode=lambda x: x,
        optimizers=sgd(*trained, lr=0.05), schedule=schedule, line=line,
        batches=lambda i: [(draws_of(i), 0.3 * x_T, x_T, {})], iterations=3))
    assert [losses["iteration"] for losses in found] == [1, 2, 3]
    for net, old in zip(trained, before):
        assert any(not torch.equal(a, b) for a, b in zip(weights_of(net), old))
    assert all(p.grad is None for p in scores.real.parameters())


class SpySchedule(Schedule):
    """Keeps the times that anything is noised to."""
    times = []

    def add_noise(self, x_0, eps, t):
        self.times.append(t)
        return super().add_noise(x_0, eps, t)


def spied(schedule):
    schedule.__class__ = SpySchedule
    schedule.times = []
    return schedule


def many(iteration):
    """4096 samples."""
    zeros = torch.zeros(4096, 2)
    return [(Draws((1,), iteration, [0], (2,), block=4096), zeros, zeros, {})]


def times_of(stage):
    """(the generator's times on its line of 1000, D_1's in its schedule of 200) of three
    iterations."""
    line, schedule = spied(Schedule.straight(1000)), spied(Schedule.straight(200))
    generator = Net(8, 1)
    if stage == "reflow":
        stages = reflow(generator, *sgd(generator, lr=0.0), line, many, 3)
    else:
        latent = Discriminator(lambda x, timestep: [x], mlp_heads(1, 2, 4))
        pixel = Discriminator(lambda x: [x], mlp_heads(1, 2, 4))
        stages = adp(generator, D_1=latent, D_2=pixel, decode=lambda x: x,
                     optimizers=sgd(generator, latent.heads, pixel.heads, lr=0.0),
                     schedule=schedule, line=line, batches=many, iterations=3)
    for _ in stages:
        pass
    return line.times, schedule.times


@pytest.mark.parametrize("stage", ["adp", "reflow"])
def test_the_generators_times_are_biased_to_noise_as_the_cubic_schedule_says(stage):
    """t = [1 - u^3] T: P(t <= T/2) = 1 - 0.5^(1/3), about a fifth."""
    t = torch.cat(times_of(stage)[0])
    assert len(t) == 3 * 4096
    assert t.min() >= 1 and t.max() == 1000
    for part in (0.25, 0.5, 0.9):
        share = (t <= 1000 * part).double().mean().item()
        assert share == pytest.approx(1 - (1 - part) ** (1 / 3), abs=0.015)


def test_the_discriminators_times_are_uniform_and_the_same_for_fake_and_real():
    times = times_of("adp")[1]
    assert len(times) == 6
    for fake, real in zip(times[::2], times[1::2]):
        assert torch.equal(fake, real)
    t = torch.cat(times)
    assert (t.min(), t.max()) == (1, 200)
    for part in (0.25, 0.5, 0.9):
        assert (t <= 200 * part).double().mean().item() == pytest.approx(part, abs=0.015)


def test_no_time_is_clean():
    """u may round to 1, where t would be 0 and the student would see the answer."""
    class Ones:
        def uniform(self):
            return torch.ones(3)

    assert adp_times(Ones(), 1000).tolist() == [1, 1, 1]
