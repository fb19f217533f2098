"""The loop of adm.py against Algorithm 1, finite differences and closed forms. What algorithm_1
itself is made of (predict, sample, pair, step, target) is held in test_ode.py. ADP: test_adp.py."""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from adm import (Scores, adm, algorithm_1, dmd_gradient, frozen, reflow, score_loss, step_length)
from discriminators import (AdversarialLoss, Discriminator, Heads, hinge_discriminator,
                            hinge_generator)
from lesson.students import PAIRED_HINGE
from lesson.worlds import Mixture, Net, NetTaps
from ode import Schedule, predict, sample
from tiny import (BATCH, SHAPE, Float64Draws, Spy, conditional, draws_of, sgd, unconditional,
                  weights_of)
from training.draws import Draws

GUIDANCE = (2.0, 5.0)


def prompts(iteration, micro=1):
    """`micro` micro-batches of an iteration, the samples after each other."""
    batch = []
    for m in range(micro):
        draws = Float64Draws((5,), iteration, range(m * BATCH, (m + 1) * BATCH), SHAPE)
        torch.manual_seed(iteration * 10 + m)
        prompt = torch.randn(BATCH, 3).double()
        batch.append((draws, dict(prompt=prompt), dict(prompt=torch.zeros(BATCH, 3).double())))
    return batch


def no_prompts(iteration):
    return [(draws_of(iteration), {}, {})]


def variance_preserving(pred, T=100):
    """A table as SDXL's, short; the network is told other numbers than on the straight line."""
    angle = torch.linspace(0, 1.4, T + 1, dtype=torch.float64)
    return Schedule(angle.cos(), angle.sin(), 5 * torch.arange(T + 1) + 3, pred)


# ------------------------------------------------------------------------------------- Algorithm 1

SCORES = {
    "the same line": Schedule.straight(100),
    "eps": variance_preserving("eps"),
    "v": variance_preserving("v"),
    "v, a longer table": variance_preserving("v", T=200),
}


def trained_by_adm(schedule, steps, ttur, iterations):
    line = Schedule.straight(100)
    generator, scores, D = conditional(schedule)
    loop = adm(generator, scores, D, optimizers=sgd(generator, scores.fake, D.heads, lr=0.3),
               student_schedule=line, stops=line.stops(steps), guidance=GUIDANCE, batches=prompts,
               iterations=iterations, ttur=ttur)
    counts = [(losses["iteration"], losses["global_iter"]) for losses in loop]
    assert counts == [(i, i * ttur) for i in range(1, iterations + 1)]
    return dict(generator=generator, fake=scores.fake, heads=D.heads)


def trained_by_algorithm_1(schedule, steps, ttur, iterations):
    line = Schedule.straight(100)
    generator, scores, D = conditional(schedule)
    optimizers = sgd(generator, scores.fake, D.heads, lr=0.3)
    for i in range(1, iterations * ttur + 1):
        draws, cond, uncond = prompts(i)[0]
        algorithm_1(generator, scores, D, optimizers=optimizers, student_schedule=line,
                    stops=line.stops(steps), guidance=GUIDANCE, draws=draws, cond=cond,
                    uncond=uncond, global_iter=i, ttur=ttur)
    return dict(generator=generator, fake=scores.fake, heads=D.heads)


@pytest.mark.parametrize("steps, ttur", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("scores", SCORES)
def test_the_lean_loop_is_algorithm_1(scores, steps, ttur):
    """With the student and the scores on one schedule, and on two: after ADP the student is a
    velocity network of the straight line."""
    lean = trained_by_adm(SCORES[scores], steps, ttur, 3)
    plain = trained_by_algorithm_1(SCORES[scores], steps, ttur, 3)
    generator, start, D = conditional(SCORES[scores])
    before = dict(generator=generator, fake=start.fake, heads=D.heads)
    for name in lean:
        for a, b in zip(lean[name].parameters(), plain[name].parameters()):
            assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")
        pairs = zip(lean[name].parameters(), before[name].parameters())
        moved = sum((a - b).abs().sum() for a, b in pairs)
        assert moved > 1e-3, f"the {name} did not learn"


class Asked(Float64Draws):
    """Draws that keep what they are asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def normal(self):
        self.asked.append(("normal",))
        return super().normal()

    def uniform(self, low=0.0, high=1.0):
        self.asked.append(("uniform", low, high))
        return super().uniform(low, high)

    def integers(self, low, high, device=None):
        self.asked.append(("integers", low, high))
        return super().integers(low, high, device)

    def shared_integer(self, low, high):
        self.asked.append(("shared_integer", low, high))
        return super().shared_integer(low, high)


def test_both_draw_what_the_paper_says():
    """z; noise and t_f of 1..T; z and n of 1..N; noise and t of dt..T; a guidance weight."""
    line, schedule = Schedule.straight(100), variance_preserving("v", T=200)
    expected = [("normal",), ("normal",), ("integers", 1, 200), ("normal",),
                ("shared_integer", 1, 4), ("normal",), ("integers", 3, 200), ("uniform", 2.0, 5.0)]
    for run in ("lean", "plain"):
        generator, scores, D = conditional(schedule)
        optimizers = sgd(generator, scores.fake, D.heads, lr=0.0)
        _, cond, uncond = prompts(1)[0]
        draws = Asked((5,), 1, range(BATCH), SHAPE)
        if run == "lean":
            next(adm(generator, scores, D, optimizers=optimizers, student_schedule=line,
                     stops=line.stops(4), guidance=GUIDANCE,
                     batches=lambda i: [(draws, cond, uncond)], iterations=1))
        else:
            algorithm_1(generator, scores, D, optimizers=optimizers, student_schedule=line,
                        stops=line.stops(4), guidance=GUIDANCE, draws=draws, cond=cond,
                        uncond=uncond, global_iter=1)
        assert draws.asked == expected, run


def joined(iteration):
    """Two micro-batches as one batch of both."""
    (_, cond, uncond), (_, other_cond, other_uncond) = prompts(iteration, 2)
    draws = Float64Draws((5,), iteration, range(2 * BATCH), SHAPE)
    return [(draws, dict(prompt=torch.cat([cond["prompt"], other_cond["prompt"]])),
             dict(prompt=torch.cat([uncond["prompt"], other_uncond["prompt"]])))]


def test_micro_batches_add_up_to_the_batch():
    """Two micro-batches = one batch of both, through the same loop."""
    schedule, results = Schedule.straight(100), []
    for batches in (lambda i: prompts(i, 2), joined):
        generator, scores, D = conditional(schedule)
        nets = generator, scores.fake, D.heads
        for _ in adm(generator, scores, D, optimizers=sgd(*nets, lr=0.05),
                     student_schedule=schedule, stops=schedule.stops(1), guidance=GUIDANCE,
                     batches=batches, iterations=2):
            pass
        results.append(nets)
    for halves, whole in zip(*results):
        for a, b in zip(halves.parameters(), whole.parameters()):
            assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_generator_gradient_against_finite_differences():
    """d/d theta of -D(x_fake), everything random held fixed, in float64."""
    schedule = Schedule.straight(100)
    generator, scores, D = unconditional(schedule)
    spy = Spy(generator)
    optimizers = (spy, *sgd(scores.fake, D.heads, lr=0.0))

    def run():
        losses = next(adm(generator, scores, D, optimizers=optimizers, student_schedule=schedule,
                          stops=[100, 50, 0], guidance=(1.0, 1.0), batches=no_prompts,
                          iterations=1))
        return losses["generator"].item()

    run()
    analytic = spy.gradients[0]
    # through the whole loop, but the last jump's graph only: earlier steps of G carry no gradient,
    # so n must be N = 2 here
    assert draws_of(1).shared_integer(1, 2) == 2, "pick a seed whose n is N"
    names = [name for name, _ in generator.named_parameters()]
    for name, p, gradient in list(zip(names, generator.parameters(), analytic))[::3]:
        flat, k = p.data.view(-1), p.numel() // 2
        values = []
        for h in (1e-5, -1e-5):
            flat[k] += h
            values.append(run())
            flat[k] -= h
        slope = torch.tensor((values[0] - values[1]) / 2e-5, dtype=torch.float64)
        assert_close(gradient.view(-1)[k], slope, rtol=1e-5, atol=1e-9,
                     msg=lambda m: f"{name}: {m}")


class Guided(nn.Module):
    """A network with its guidance inside of it; no prompt is zeros."""

    def __init__(self, net, w):
        super().__init__()
        self.net = net
        self.w = w

    def forward(self, x, timestep, prompt, return_dict=False):
        output = self.net(x, timestep, prompt)[0]
        output_uncond = self.net(x, timestep, torch.zeros_like(prompt))[0]
        return (output_uncond + self.w * (output - output_uncond),)


def test_a_guided_student_is_one_with_guidance_inside_of_it():
    """student_w: wherever G is asked, with gradient or without, and nowhere else."""
    line, trained = Schedule.straight(100), []
    for student_w, student_of in ((3.0, lambda net: net), (None, lambda net: Guided(net, 3.0))):
        generator, scores, D = conditional(line)
        for _ in adm(student_of(generator), scores, D,
                     optimizers=sgd(generator, scores.fake, D.heads, lr=0.3),
                     student_schedule=line, stops=line.stops(3), guidance=GUIDANCE,
                     batches=prompts, iterations=3, student_w=student_w):
            pass
        trained.append((generator, scores.fake, D.heads))
    for guided, plain in zip(*trained):
        for a, b in zip(guided.parameters(), plain.parameters()):
            assert_close(a, b, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------- what is and is not trained

def with_or_without(method, schedule):
    """(generator, scores, discriminator, optimizers) of ADM, or of DMD, which has no D."""
    generator, scores, D = unconditional(schedule)
    optimizers = sgd(generator, scores.fake, D.heads, lr=0.1)
    if method == "dmd":
        return generator, scores, None, (*optimizers[:2], None)
    return generator, scores, D, optimizers


@pytest.mark.parametrize("method", ["adm", "dmd"])
def test_frozen_weights_collect_no_gradient_and_do_not_move(method):
    schedule = Schedule.straight(100)
    generator, scores, D, optimizers = with_or_without(method, schedule)
    before = deepcopy(scores.real.state_dict())
    for _ in adm(generator, scores, D, optimizers=optimizers, student_schedule=schedule,
                 stops=[100, 0], guidance=(1.0, 3.0), batches=no_prompts, iterations=2):
        assert all(p.grad is None for p in scores.real.parameters())
        assert all(p.grad is None for p in scores.fake.parameters()), (
            "the generator's update left gradients in the fake score")
    assert all(p.requires_grad for p in scores.fake.parameters())
    for name, value in scores.real.state_dict().items():
        assert torch.equal(value, before[name]), name


class Recorded(nn.Module):
    """A network, and a note of each of its passes in `passes`: (its name, samples, whether a graph
    was built, whether its weights took part in it). With `recompute` it keeps no activations."""

    def __init__(self, net, name, passes, recompute=False):
        super().__init__()
        self.net = net
        self.name = name
        self.passes = passes
        self.recompute = recompute

    def forward(self, x, timestep, return_dict=False, features=None):
        def noted(x):
            is_trained = any(p.requires_grad for p in self.net.parameters())
            graph = torch.is_grad_enabled()
            self.passes.append((self.name, len(x), graph, graph and is_trained))
            return self.net(x, timestep, features=features)

        if self.recompute and torch.is_grad_enabled():
            return checkpoint(noted, x, use_reentrant=False)
        return noted(x)


def recorded_iteration(method, steps, recompute=False, guidance=(1.0, 3.0)):
    """One iteration of a stage -> the passes of all networks in their order. Nothing may be
    collected in the fake score when the gradient has reached the generator."""
    schedule = Schedule.straight(100)
    generator, scores, D, optimizers = with_or_without(method, schedule)
    passes, looked = [], []

    def nothing_collected(gradient):
        looked.append(all(p.grad is None for p in scores.fake.parameters()))

    next(generator.parameters()).register_hook(nothing_collected)
    if D is not None:
        backbone = Recorded(scores.real, "taps", passes)
        D = Discriminator(NetTaps(backbone), D.heads)
    spied = Scores(Recorded(scores.fake, "f", passes, recompute),
                   Recorded(scores.real, "F", passes), schedule)
    student = Recorded(generator, "G", passes)
    next(adm(student, spied, D, optimizers=optimizers, student_schedule=schedule,
             stops=schedule.stops(steps), guidance=guidance, batches=no_prompts, iterations=1))
    assert looked == [True]
    return passes


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("method", ["adm", "dmd"])
def test_an_iteration_runs_these_passes_and_no_others(method, steps):
    """The fake score's weights are part of one graph, its own update's; in the generator's update
    no gradient could collect in them. The real score's guidance is one batch."""
    n = draws_of(1).shared_integer(1, steps)
    passes = [("G", BATCH, False, False)] * steps
    passes += [("f", BATCH, True, True)]
    passes += [("G", BATCH, False, False)] * (steps - n)
    passes += [("G", BATCH, True, True)]
    if method == "adm":
        passes += [("f", BATCH, True, False), ("F", 2 * BATCH, False, False),
                   ("taps", BATCH, False, False), ("taps", BATCH, True, False)]
    else:
        passes += [("f", BATCH, False, False), ("F", 2 * BATCH, False, False)]
    assert recorded_iteration(method, steps) == passes


def test_without_guidance_the_real_score_is_asked_once():
    unguided = recorded_iteration("adm", 1, guidance=(1.0, 1.0))
    assert ("F", BATCH, False, False) in unguided
    assert len(unguided) == len(recorded_iteration("adm", 1))


def test_the_student_stops_where_the_paper_says():
    """All its steps for the fake score (line 9); then from t_N to t_n without a gradient (16), and
    from there one jump (17)."""
    schedule = Schedule.straight(100)
    generator, scores, D = unconditional(schedule)
    told, every_n = [], set()
    generator.register_forward_pre_hook(
        lambda net, args, kwargs: told.append(int(kwargs["timestep"][0])), with_kwargs=True)
    stops = [99, 75, 50, 25]                            # at T = 100 the line tells 99
    for losses in adm(generator, scores, D,
                      optimizers=sgd(generator, scores.fake, D.heads, lr=0.0),
                      student_schedule=schedule, stops=schedule.stops(4), guidance=(1.0, 3.0),
                      batches=no_prompts, iterations=12):
        n = draws_of(losses["iteration"]).shared_integer(1, 4)
        assert told == stops + stops[:4 - n] + [stops[4 - n]]
        told.clear()
        every_n.add(n)
    assert every_n == {1, 2, 3, 4}


def test_a_fake_score_that_runs_again_in_the_backward_pass_is_frozen_there_too():
    passes = recorded_iteration("adm", 1, recompute=True)
    of_fake = [is_trained for name, _, _, is_trained in passes if name == "f"]
    assert of_fake == [True, True, False, False]        # each twice: forward, and recomputed


def test_frozen_restores_only_what_was_trained():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


# ------------------------------------------------------------------------------- the discriminator

class RecorderTaps(NetTaps):
    """Keeps what it is asked about: (x, timestep)."""

    def __init__(self, net):
        super().__init__(net)
        self.seen = []

    def forward(self, x, timestep):
        self.seen.append((x.detach().clone(), timestep))
        return super().forward(x, timestep)


def test_equal_scores_without_guidance_give_equal_samples():
    """f = F: x_fake = x_real bit for bit, so the discriminator's features, and its loss of 2 +
    nothing, agree."""
    schedule = Schedule.straight(100)
    generator, scores, D = unconditional(schedule)
    fake = deepcopy(scores.real).requires_grad_(True)
    taps = RecorderTaps(scores.real)
    losses = next(adm(generator, Scores(fake, scores.real, schedule), Discriminator(taps, D.heads),
                      optimizers=sgd(generator, fake, D.heads, lr=0.0), student_schedule=schedule,
                      stops=[100, 0], guidance=(1.0, 1.0), batches=no_prompts, iterations=1))
    assert len(taps.seen) == 2
    (x_real, _), (x_fake, _) = taps.seen
    assert x_real.abs().sum() > 0
    assert_close(x_real, x_fake, rtol=1e-12, atol=1e-12)
    assert losses["dmd"] < 1e-20


def test_constant_heads_sit_at_hinge_two():
    constant = Heads([nn.Linear(8, 1), nn.Linear(8, 1)])
    for p in constant.parameters():
        nn.init.zeros_(p)
    d_fake = constant([torch.randn(5, 8), torch.randn(5, 8)])
    d_real = constant([torch.randn(5, 8), torch.randn(5, 8)])
    assert hinge_discriminator(d_fake, d_real).item() == 2.0


STEP_LENGTHS = {
    "T/64": (None, {2}),
    "one": ([5], {5}),
    "one of several": ([1, 4, 9, 60], {1, 4, 9, 60}),
    "a tuple": ((3, 7), {3, 7}),
}


@pytest.mark.parametrize("case", STEP_LENGTHS)
def test_dt_is_how_far_below_t_the_discriminator_looks(case):
    """T/64, or one of those given: drawn for each iteration, the same in all its micro-batches,
    and each of them in turn. t is at least dt."""
    dt, expected = STEP_LENGTHS[case]
    schedule = Schedule.straight(128, last=128)         # the timestep told at t is t
    generator, scores, D = unconditional(schedule)
    taps = RecorderTaps(scores.real)
    times_of_fake = []
    scores.fake.register_forward_pre_hook(
        lambda net, args, kwargs: times_of_fake.append(kwargs["timestep"]), with_kwargs=True)
    asked = []

    def batches(iteration):
        micro = [Asked((7,), iteration, range(m * BATCH, (m + 1) * BATCH), SHAPE) for m in (0, 1)]
        asked.append([draws.asked for draws in micro])
        return [(draws, {}, {}) for draws in micro]

    drawn = []
    for _ in adm(generator, scores, Discriminator(taps, D.heads),
                 optimizers=sgd(generator, scores.fake, D.heads, lr=0.0),
                 student_schedule=schedule, stops=[128, 0], guidance=(1.0, 1.0), batches=batches,
                 iterations=60, dt=dt):
        lengths = set()
        for t, (real, fake) in zip(times_of_fake[-2:], (taps.seen[-4:-2], taps.seen[-2:])):
            assert torch.equal(real[1], fake[1]), "x_fake and x_real are seen at one time"
            assert real[1].min() >= 0
            lengths |= set((t - real[1]).tolist())
        assert len(lengths) == 1, "the micro-batches of an iteration differ"
        drawn += lengths
        for calls in asked[-1]:
            ranges = [call[1:] for call in calls if call[0] == "integers"]
            assert ranges == [(1, 128), (drawn[-1], 128)]
    assert set(drawn) == expected
    if len(expected) > 1:                               # at random, not in turn
        switches = sum(a != b for a, b in zip(drawn, drawn[1:]))
        assert 60 / 4 < switches < 59


def test_the_papers_dt_is_16_of_1000_times():
    assert step_length(None, 1000, None) == 16
    assert step_length(None, 64, None) == 1


def relativistic_generator(d_fake, d_real):
    return F.softplus(d_real - d_fake).mean()


def relativistic_discriminator(d_fake, d_real):
    return F.softplus(d_fake - d_real).mean()


def literal_gradients(generator, scores, D, schedule, draws, generator_loss, discriminator_loss):
    """One iteration of ADM at one step on a straight line, in velocities, gradients by autograd ->
    (of the generator, of the heads). The fake score is not trained; no guidance."""
    sigma = schedule.sigma[:, None]
    draws.normal()
    draws.normal()
    draws.integers(1, 100)                                      # all three of the fake score
    z = draws.normal()
    draws.shared_integer(1, 1)
    z_g, t = draws.normal(), draws.integers(2, 100)
    x0_hat = z - generator(z, schedule.timestep[torch.full((BATCH,), 100)])[0]
    x_t = (1 - sigma[t]) * x0_hat + sigma[t] * z_g
    down = sigma[t - 2] - sigma[t]
    x_fake = x_t + down * scores.fake(x_t, schedule.timestep[t])[0]
    x_real = (x_t + down * scores.real(x_t, schedule.timestep[t])[0]).detach()

    def value(x):
        return D.heads(D.taps(x, schedule.timestep[t - 2]))

    of_generator = torch.autograd.grad(generator_loss(value(x_fake), value(x_real).detach()),
                                       list(generator.parameters()))
    of_heads = torch.autograd.grad(discriminator_loss(value(x_fake.detach()), value(x_real)),
                                   list(D.heads.parameters()))
    return of_generator, of_heads


LOSSES = {
    "hinge": (
        AdversarialLoss(hinge_generator, hinge_discriminator),
        lambda fake, real: -fake.sum() / BATCH,
        lambda fake, real: ((1 + fake).clamp(min=0) + (1 - real).clamp(min=0)).sum() / BATCH),
    "paired hinge": (
        PAIRED_HINGE,
        lambda fake, real: -fake.sum() / BATCH,
        lambda fake, real: (1 + fake - real).clamp(min=0).sum() / BATCH),
    "relativistic": (
        AdversarialLoss(relativistic_generator, relativistic_discriminator),
        lambda fake, real: torch.log(1 + torch.exp(real - fake)).sum() / BATCH,
        lambda fake, real: torch.log(1 + torch.exp(fake - real)).sum() / BATCH),
}


def past_the_corners(D):
    """Values on both sides of the hinges' corners: near 0 paired and single ones agree."""
    for head in D.heads.heads:
        head[-1].weight.data *= 80


@pytest.mark.parametrize("name", LOSSES)
def test_the_adversarial_loss_is_a_pair_of_functions(name):
    """Both players' gradients are autograd's of the pair, written out. D(x_real) is a constant for
    the generator, although x_real starts from its x_t."""
    loss, generator_loss, discriminator_loss = LOSSES[name]
    schedule = Schedule.straight(100)
    generator, scores, D = unconditional(schedule)
    past_the_corners(D)
    spies = Spy(generator), Spy(D.heads)
    optimizers = (spies[0], *sgd(scores.fake, lr=0.0), spies[1])
    losses = next(adm(generator, scores, D, optimizers=optimizers, student_schedule=schedule,
                      stops=[100, 0], guidance=(1.0, 1.0), batches=no_prompts, iterations=1,
                      loss=loss))
    expected = literal_gradients(generator, scores, D, schedule, draws_of(1), generator_loss,
                                 discriminator_loss)
    for spy, gradients in zip(spies, expected):
        assert sum(g.abs().sum() for g in gradients) > 1e-6
        for found, g in zip(spy.gradients[0], gradients, strict=True):
            assert_close(found, g, rtol=1e-9, atol=1e-12)
    assert {"generator", "discriminator", "dmd", "fake", "iteration", "global_iter"} == set(losses)


def test_a_loss_of_ones_own_differs_from_the_hinge():
    """Else the pair would not have been used."""
    weights = []
    for loss, _, _ in LOSSES.values():
        schedule = Schedule.straight(100)
        generator, scores, D = unconditional(schedule)
        past_the_corners(D)
        for _ in adm(generator, scores, D, optimizers=sgd(generator, scores.fake, D.heads, lr=0.1),
                     student_schedule=schedule, stops=[100, 0], guidance=(1.0, 1.0),
                     batches=no_prompts, iterations=2, loss=loss):
            pass
        weights.append((weights_of(generator), weights_of(D.heads)))
    for hinge, *others in zip(*weights):                # of the generator, of the heads
        for other in others:
            assert any((a - b).abs().max() > 1e-6 for a, b in zip(hinge, other))


# --------------------------------------------------------------------------------------------- DMD

def test_dmd_gradient_is_zero_at_equality_and_points_back_to_a_shifted_gaussian():
    """Generator at N(m, 1), data at N(0, 1), both scores exact: descending the gradient must lower
    |m|."""
    torch.manual_seed(0)
    x0, schedule = torch.randn(4000, 1, dtype=torch.float64) + 1.5, Schedule.straight()
    t = torch.randint(50, 950, (4000,))
    x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
    alpha, sigma = schedule.coefficients(t, x_t)

    def x0_hat(mean):
        data = Mixture(torch.full((1, 1), mean, dtype=torch.float64), 1.0)
        return data.x0_hat(x_t, alpha, sigma)

    assert dmd_gradient(x0, x0_hat(1.5), x0_hat(1.5)).abs().max() == 0
    assert (dmd_gradient(x0, x0_hat(1.5), x0_hat(0.0)) > 0).all(), (
        "the step is minus the gradient: towards zero from the right")
    assert (dmd_gradient(x0, x0_hat(-1.5), x0_hat(0.0)) < 0).all()


def test_dmd_loop_applies_the_loss_of_the_paper():
    """The cut with dL/dx0_hat = g/n equals autograd of 0.5 || x0_hat - sg(x0_hat - g) ||^2 (a mean)
    through the generator."""
    schedule = Schedule.straight(100)
    generator, scores, _ = unconditional(schedule)
    spy = Spy(generator)
    next(adm(generator, scores, None, optimizers=(spy, *sgd(scores.fake, lr=0.0), None),
             student_schedule=schedule, stops=[100, 0], guidance=(1.0, 1.0), batches=no_prompts,
             iterations=1))
    draws = draws_of(1)
    draws.normal()
    draws.normal()
    draws.integers(1, 100)                                      # all three of the fake score
    z = draws.normal()
    draws.shared_integer(1, 1)
    z_g, t = draws.normal(), draws.integers(2, 100)
    x0_hat = z - generator(z, schedule.timestep[torch.full((BATCH,), 100)])[0]
    x_t = schedule.add_noise(x0_hat, z_g, t).detach()
    x0_fake, _ = predict(scores.fake, schedule, x_t, t, {})
    x0_real, _ = predict(scores.real, schedule, x_t, t, {})
    g = dmd_gradient(x0_hat, x0_fake, x0_real).detach()
    (0.5 * (x0_hat - (x0_hat - g).detach()).square().mean()).backward()
    for (name, p), found in zip(generator.named_parameters(), spy.gradients[0]):
        assert_close(found, p.grad, msg=lambda m: f"{name}: {m}")


def test_adm_records_the_loss_that_dmd_would_minimise():
    """The paper's Fig. 3: equal in the first iteration, when all networks are."""
    recorded = []
    for method in ("adm", "dmd"):
        schedule = Schedule.straight(100)
        generator, scores, D, optimizers = with_or_without(method, schedule)
        losses = next(adm(generator, scores, D, optimizers=optimizers, student_schedule=schedule,
                          stops=[100, 0], guidance=(1.0, 3.0), batches=no_prompts, iterations=1))
        recorded.append(losses["dmd"].item())
    assert recorded[0] == pytest.approx(recorded[1], rel=1e-9)
    assert recorded[0] > 1e-6


# ----------------------------------------------------------------------------- reflow, and the rest

def test_reflow_finds_a_linear_map():
    """A1 on pairs x_0 = 0.5 x_T: the velocity is x_T / 2 everywhere, and squared error finds it."""
    torch.manual_seed(0)
    generator, line = Net(32, 1), Schedule.straight()
    optimizer = torch.optim.AdamW(generator.parameters(), 3e-3)

    def batches(iteration):
        draws = Draws((1,), iteration, [0], (2,), block=256)
        x_T = draws.normal()
        return [(draws, 0.5 * x_T, x_T, {})]

    losses = [x["generator"].item() for x in reflow(generator, optimizer, line, batches, 300)]
    z = torch.randn(500, 2)
    with torch.no_grad():
        error = (sample(generator, line, z, [line.T, 0], {}) - 0.5 * z).square().mean().item()
    assert losses[-1] < 0.02 * losses[0] and error < 0.01, (losses[0], losses[-1], error)


def test_draws_depend_on_seed_iteration_and_sample_only():
    whole = Draws((3, 1), 8, range(4), (2, 3))
    right = Draws((3, 1), 8, range(2, 4), (2, 3))
    assert torch.equal(whole.normal()[2:], right.normal())
    assert torch.equal(whole.integers(0, 9)[2:], right.integers(0, 9))
    assert torch.equal(whole.uniform()[2:], right.uniform())
    assert whole.shared_integer(1, 1000) == right.shared_integer(1, 1000)
    x = Draws((3, 1), 8, range(4), (2, 3)).normal()
    for other in (Draws((4, 1), 8, range(4), (2, 3)), Draws((3, 2), 8, range(4), (2, 3)),
                  Draws((3, 1), 9, range(4), (2, 3))):
        assert not torch.isclose(x, other.normal()).any()
    many = Draws((0,), 0, range(2000), (1,)).normal()
    assert abs(many.mean()) < 0.08 and abs(many.std() - 1) < 0.05
    integers = Draws((0,), 0, range(500), (1,)).integers(2, 4)
    assert set(integers.tolist()) == {2, 3, 4}


@pytest.mark.parametrize("pred", ["eps", "v", "flow"])
def test_score_loss_is_the_pretraining_loss(pred):
    """Eq. 2 for noise, Eq. 3 for velocity, written out."""
    torch.manual_seed(0)
    angle = torch.linspace(0, 1.5, 11, dtype=torch.float64)
    schedule = Schedule(angle.cos(), angle.sin(), torch.arange(11), pred)
    if pred == "flow":
        schedule = Schedule.straight(10)
    x0, eps = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    t, net = torch.tensor([1, 4, 7, 10]), Net(8, 1).double()
    alpha, sigma = schedule.alpha[t][:, None], schedule.sigma[t][:, None]
    target = {"eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[pred]
    output = net(alpha * x0 + sigma * eps, schedule.timestep[t])[0]
    expected = (output - target).square().mean()
    found = score_loss(net, schedule, x0, eps, t, {}).double()
    assert_close(found, expected, rtol=1e-6, atol=1e-8)
