"""phased_dmd.py against exact conditional expectations, the paper's formulae written out, and
adm.py where both must agree."""
import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from adm import Scores, adm, dmd_gradient, score_loss
from cli import Run, succeeded
from lesson.ode import released_schedules
from lesson.phased_dmd import biased_loss
from lesson.worlds import Mixture, Net
from ode import Schedule
from phased_dmd import (Expert, cut_into_phases, generate, kl_gradient, phased_dmd, renoise,
                        renoise_coefficients, scaled_target, subinterval_loss)
from tiny import BATCH, SHAPE, Cond, Float64Draws, apart, equal, sgd

SCHEDULES = {"eps": "SDXL (eps)", "v": "CogVideoX-2b (v)", "flow": "SD3 (flow)"}
GUIDANCE = (2.0, 5.0)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return released_schedules()[SCHEDULES[request.param]]


def networks():
    """(expert 1, expert 2, fake score, teacher), all a little apart."""
    torch.manual_seed(1)
    teacher = Cond().double().requires_grad_(False)
    return (*apart([deepcopy(teacher).requires_grad_(True) for _ in range(3)]), teacher)


def prompts(iteration, samples=range(BATCH)):
    torch.manual_seed(iteration)
    prompt = torch.randn(100, 3).double()[list(samples)]
    draws = Float64Draws((5,), iteration, samples, SHAPE)
    return draws, dict(prompt=prompt), dict(prompt=torch.zeros_like(prompt))


def zeros_and_ones(n):
    return torch.zeros(n, 1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)


DATA = Mixture(torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64), 0.4)


def said_by_the_perfect_network(schedule, x_t, t):
    """What the perfect network of DATA says at x_t, a number, and time t."""
    x = torch.full((1, 1), x_t, dtype=torch.float64)
    return DATA.network(schedule)(x, timestep=schedule.timestep[[t]])[0]


def expectation(schedule, target, x_t, s, t):
    """E[target(x_s, eps) | x_t] of DATA by the trapezoidal rule, given x_t = a x_s + b eps: over
    eps, or over x_s where a is small."""
    a, b = renoise_coefficients(schedule, s, t, torch.zeros(1, dtype=torch.float64))
    a, b = a.item(), b.item()
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    if a > 0.5:
        x_s, eps = (x_t - b * grid) / a, grid
    else:
        x_s, eps = grid, (x_t - a * grid) / b
    alpha, sigma = schedule.alpha[s], schedule.sigma[s]
    variance = (alpha * DATA.std) ** 2 + sigma**2
    of_x_s = (-(x_s - alpha * DATA.means.T) ** 2 / (2 * variance)).exp().sum(1, keepdim=True)
    density = of_x_s * (-eps**2 / 2).exp()
    return (target(x_s, eps) * density).sum() / density.sum()


# --------------------------------------------------------------------- the target inside a phase

@pytest.mark.parametrize("where", ["next to s", 0.1, 0.5, 1.0])
def test_the_minimiser_is_the_teachers_own_output(schedule, where):
    """E[target | x_t], exact, must be what the perfect network of the data says, at every t in
    (s, T] and for every family."""
    s = 400
    t = s + 1 if where == "next to s" else s + round(where * (schedule.T - s))
    _, b = renoise_coefficients(schedule, s, t, torch.zeros(1).double())

    def target(x_s, eps):
        return scaled_target(schedule, x_s, eps, s, torch.full((len(x_s),), t)) / b

    for x_t in (-1.5, 0.1, 0.8):
        expected = said_by_the_perfect_network(schedule, x_t, t).item()
        found = expectation(schedule, target, x_t, s, t).item()
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-8)


def test_the_biased_targets_minimiser_is_another():
    schedule, s, t = Schedule.straight(), 500, 700
    exact = said_by_the_perfect_network(schedule, 0.8, t).item()
    naive = expectation(schedule, lambda x_s, eps: eps - x_s, 0.8, s, t).item()
    assert abs(naive - exact) > 0.1

    def says_zero(x, timestep, return_dict=False):
        return (torch.zeros_like(x),)

    x_s, eps = torch.randn(5, 1), torch.randn(5, 1)
    found = biased_loss(says_zero, schedule, x_s, eps, s, torch.full((5,), t), {})
    assert_close(found, (eps - x_s).square().mean())


def test_the_flow_target_is_the_formula_of_the_paper():
    """v* = ((alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b)) eps - x_s / alpha_s, weighted
    by clamp(1/b^2, 0, 10) b^2."""
    schedule, s = released_schedules()["SD3 (flow)"], 300
    t = torch.tensor([301, 302, 400, 999, 1000])
    x_s, eps, net = torch.randn(5, 2).double(), torch.randn(5, 2).double(), Net(8, 1).double()
    alpha_s, sigma_s = schedule.coefficients(s, x_s)
    alpha_t, sigma_t = schedule.coefficients(t, x_s)
    b = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).sqrt()
    factor = (alpha_s**2 * sigma_t + alpha_t * sigma_s**2) / (alpha_s**2 * b)
    v = factor * eps - x_s / alpha_s
    assert_close(scaled_target(schedule, x_s, eps, s, t), b * v)
    output = net(alpha_t / alpha_s * x_s + b * eps, schedule.timestep[t])[0]
    for clamp in ((0.0, 10.0), (2.0, 3.0)):
        expected = ((1 / b**2).clamp(*clamp) * b**2 * (output - v) ** 2).mean()
        assert_close(subinterval_loss(net, schedule, x_s, eps, s, t, {}, clamp), expected)


@pytest.mark.parametrize("s", [0, 1, 400, 999])
def test_the_marginal_is_the_direct_one(schedule, s):
    """x_s has mean alpha_s x_0 and variance sigma_s^2: noised further both must be those of time t,
    at every t > s."""
    t = torch.arange(s + 1, schedule.T + 1)
    zero, one = zeros_and_ones(len(t))
    mean = renoise(schedule, schedule.alpha[s] * one, zero, s, t)[:, 0]
    deviation_of_x_s = renoise(schedule, schedule.sigma[s] * one, zero, s, t)[:, 0]
    deviation_of_eps = renoise(schedule, zero, one, s, t)[:, 0]
    variance = deviation_of_x_s**2 + deviation_of_eps**2
    assert_close(mean, schedule.alpha[t], rtol=1e-12, atol=1e-12)
    assert_close(variance, schedule.sigma[t] ** 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [1, 400, 998])
def test_loss_and_gradients_are_finite_next_to_s(schedule, s):
    torch.manual_seed(0)
    x_s, eps, net = torch.randn(64, 2), torch.randn(64, 2), Net(8, 1)
    t = torch.full((64,), s + 1)
    loss = subinterval_loss(net, schedule, x_s, eps, s, t, {})
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    # the weight is at most 10 and b v* of the order of (x_s, eps)/alpha_s, however small b is
    largest = 1 + eps.square().mean() + x_s.square().mean()
    assert loss < 100 * largest / schedule.alpha[s] ** 2
    real, fake = ((torch.randn(64, 2), torch.randn(64, 2)) for _ in range(2))
    for weighting in ("paper", "dmd"):
        assert kl_gradient(schedule, x_s, fake, real, s, t, weighting).isfinite().all()


# ------------------------------------------------------------------------- the expert's gradient

def test_paper_weight_has_a_finite_limit_at_s():
    """alpha_t a / (alpha_t sigma_t + sigma_t^2) -> alpha_s / (alpha_s sigma_s + sigma_s^2)."""
    u = torch.arange(100_001, dtype=torch.float64) / 100_000
    schedule, s = Schedule(1 - u, u, 1000 * u, "flow"), 50_000
    x, T, V = (torch.randn(4, 1, dtype=torch.float64) for _ in range(3))
    t = torch.full((4,), s + 1)
    fake, real = schedule.pair(x, V, t), schedule.pair(x, T, t)
    found = kl_gradient(schedule, x, fake, real, s, t, "paper")
    assert_close(found, 1.0 * (T - V), rtol=1e-3, atol=1e-6)    # 0.5 / (0.25 + 0.25)


def test_paper_weighting_is_its_velocity_formula(schedule):
    """And that is the chain rule: a (score_fake - score_real), with score = (alpha x0_hat - x_t) /
    sigma^2."""
    torch.manual_seed(0)
    s, t = 300, torch.tensor([301, 450, 700, 950])
    x_s, x_t = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    alpha_s, _ = schedule.coefficients(s, x_s)
    alpha, sigma = schedule.coefficients(t, x_s)
    fake, real = ((x0, (x_t - alpha * x0) / sigma) for x0 in torch.randn(2, 4, 2).double())
    T, V, a = real[1] - real[0], fake[1] - fake[0], alpha / alpha_s
    found = kl_gradient(schedule, x_s, fake, real, s, t, "paper")
    assert_close(found, alpha * a / (alpha * sigma + sigma**2) * (T - V))

    def score(pair):
        return (alpha * pair[0] - x_t) / sigma**2

    assert_close(found, a * (score(fake) - score(real)))
    with pytest.raises(ValueError, match="weighting"):
        kl_gradient(schedule, x_s, fake, real, s, t, "none")


@pytest.mark.parametrize("weighting", ["paper", "dmd"])
def test_the_gradient_points_back_to_a_shifted_gaussian(schedule, weighting):
    """Experts' x_s from N(1.5, .), the data from N(0, .), both scores exact: descending must lower
    the mean, never raise it."""
    torch.manual_seed(0)
    s, t = 300, torch.randint(301, 990, (1000,))
    x_0 = torch.randn(1000, 1).double() + 1.5
    x_s = schedule.add_noise(x_0, torch.randn(1000, 1).double(), s)
    x_t = renoise(schedule, x_s, torch.randn_like(x_s), s, t)
    alpha, sigma = schedule.coefficients(t, x_s)

    def pair(mean):
        data = Mixture(torch.full((1, 1), mean, dtype=torch.float64), 1.0)
        x0 = data.x0_hat(x_t, alpha, sigma)
        return x0, (x_t - alpha * x0) / sigma

    assert (kl_gradient(schedule, x_s, pair(1.5), pair(0.0), s, t, weighting) > 0).all()
    assert (kl_gradient(schedule, x_s, pair(-1.5), pair(0.0), s, t, weighting) < 0).all()


def test_dmd_weighting_is_dmd_on_the_posterior_mean_of_x_s(schedule):
    """alpha_s x0_hat + (a sigma_s^2/sigma_t) eps_hat, against E[x_s | x_t] by quadrature."""
    s, t, x_t = 400, 600, torch.full((1, 1), 0.5, dtype=torch.float64)
    fake = schedule.pair(x_t, said_by_the_perfect_network(schedule, 0.5, t), t)
    zero, one = zeros_and_ones(1)
    found = kl_gradient(schedule, 7 * one, fake, (zero, zero), s, t, "dmd")
    mean = expectation(schedule, lambda x_s, eps: x_s, 0.5, s, t).item()
    assert found.item() == pytest.approx(mean / 7, rel=1e-7)    # dmd_gradient(7, E, 0) = E/7


# ------------------------------------------------------------------------------------ s = 0 is DMD

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_clean_time_everything_is_the_ordinary_thing(schedule, dtype):
    torch.manual_seed(0)
    x0, eps = torch.randn(64, 2).to(dtype), torch.randn(64, 2).to(dtype)
    t, net = torch.randint(1, 1001, (64,)), Net(8, 1).to(dtype)
    assert torch.equal(renoise(schedule, x0, eps, 0, t), schedule.add_noise(x0, eps, t))
    inside = subinterval_loss(net, schedule, x0, eps, 0, t, {})
    plain = score_loss(net, schedule, x0, eps, t, {})
    assert torch.equal(inside, plain)
    gradients = [torch.autograd.grad(loss, net.parameters()) for loss in (inside, plain)]
    for x, y in zip(*gradients):
        assert torch.equal(x, y)
    _, b = renoise_coefficients(schedule, 0, t, x0)
    assert_close(scaled_target(schedule, x0, eps, 0, t), b * schedule.target(x0, eps, t))
    fake, real = torch.randn(2, 64, 2).to(dtype), torch.randn(2, 64, 2).to(dtype)
    found = kl_gradient(schedule, x0, tuple(fake), tuple(real), 0, t, "dmd")
    assert torch.equal(found, dmd_gradient(x0, fake[0], real[0]))


def test_one_phase_is_dmd_with_sgts_bit_for_bit():
    schedule = Schedule.straight(100)
    stops = schedule.stops(3)
    (generator, _, fake, teacher), (other, _, other_fake, other_teacher) = networks(), networks()
    phased = list(phased_dmd(
        [Expert(generator, stops)], Scores(fake, teacher, schedule),
        optimizers=sgd(generator, fake, lr=0.3), guidance=GUIDANCE,
        batches=lambda i: [prompts(i)], iterations=3, ttur=2, weighting="dmd"))
    plain = list(adm(
        other, Scores(other_fake, other_teacher, schedule), None,
        optimizers=(*sgd(other, other_fake, lr=0.3), None), student_schedule=schedule, stops=stops,
        guidance=GUIDANCE, batches=lambda i: [prompts(i)], iterations=3, ttur=2, dt=[1]))
    assert phased == plain
    assert [losses["global_iter"] for losses in phased] == [2, 4, 6]
    assert equal(generator, other) and equal(fake, other_fake)
    assert not equal(generator, networks()[0])


# ---------------------------------------------------------------------------------------- the loop

STOPS = [[100, 80, 60], [60, 40, 30, 20]]                       # a phase that ends above 0


class Literal:
    """Iterations of phase 2 in velocities, everything written out, gradients by autograd of
    0.5 || x_s - sg(x_s - g) ||^2."""

    def __init__(self, schedule, narrow):
        self.first, self.expert, self.fake, self.teacher = networks()
        self.expert_opt, self.fake_opt = sgd(self.expert, self.fake, lr=0.05)
        self.alpha = schedule.alpha[:, None]
        self.sigma = schedule.sigma[:, None]
        self.told = schedule.timestep
        self.noisiest = 60 if narrow else 100

    def velocity(self, net, x, t, cond):
        return net(x, timestep=self.told[t], **cond)[0]

    def euler(self, net, x, t, s, cond):
        times = torch.full((BATCH,), t)
        return x + (self.sigma[s] - self.sigma[t]) * self.velocity(net, x, times, cond)

    def through_phase_1(self, x, cond):
        for t, s in ((100, 80), (80, 60)):
            x = self.euler(self.first, x, t, s, cond)
        return x

    def coefficients(self, t):
        """(a, b, alpha_t, sigma_t) from 20 to times t, each [B,1]."""
        a = self.alpha[t] / self.alpha[20]
        b = (self.sigma[t] ** 2 - a**2 * self.sigma[20] ** 2).sqrt()
        return a, b, self.alpha[t], self.sigma[t]

    def train_fake(self, draws, cond):
        x = draws.normal()
        with torch.no_grad():
            x = self.through_phase_1(x, cond)
            for t, s in ((60, 40), (40, 30), (30, 20)):
                x = self.euler(self.expert, x, t, s, cond)
        eps, t = draws.normal(), draws.integers(21, self.noisiest)
        a, b, alpha_t, sigma_t = self.coefficients(t)
        alpha_s, sigma_s = self.alpha[20], self.sigma[20]
        factor = (alpha_s**2 * sigma_t + alpha_t * sigma_s**2) / (alpha_s**2 * b)
        target = factor * eps - x / alpha_s
        output = self.velocity(self.fake, a * x + b * eps, t, cond)
        loss = ((1 / b**2).clamp(0, 10) * (b * output - b * target) ** 2).mean()
        self.fake_opt.zero_grad()
        loss.backward()
        self.fake_opt.step()

    def train_expert(self, draws, cond, uncond):
        x, n, inner = draws.normal(), draws.shared_integer(1, 3), [60, 40, 30]
        with torch.no_grad():
            x = self.through_phase_1(x, cond)
            for t, s in list(zip(inner, inner[1:]))[:3 - n]:
                x = self.euler(self.expert, x, t, s, cond)
        x_s = self.euler(self.expert, x, inner[3 - n], 20, cond)
        eps, t = draws.normal(), draws.integers(21, self.noisiest)
        a, b, alpha_t, sigma_t = self.coefficients(t)
        w = draws.uniform(2.0, 5.0)[:, None]
        with torch.no_grad():
            x_t = a * x_s + b * eps
            of_prompt = self.velocity(self.teacher, x_t, t, cond)
            of_none = self.velocity(self.teacher, x_t, t, uncond)
            real = of_none + w * (of_prompt - of_none)
            fake = self.velocity(self.fake, x_t, t, cond)
            g = alpha_t * a / (alpha_t * sigma_t + sigma_t**2) * (real - fake)
        loss = 0.5 * F.mse_loss(x_s, (x_s - g).detach())
        self.expert_opt.zero_grad()
        loss.backward()
        self.expert_opt.step()


@pytest.mark.parametrize("narrow", [False, True])
def test_lean_loop_is_the_written_out_one_and_frozen_networks_stay(narrow):
    schedule = Schedule.straight(100)
    first, expert, fake, teacher = networks()
    experts = [Expert(first, STOPS[0]), Expert(expert, STOPS[1])]
    for _ in phased_dmd(experts, Scores(fake, teacher, schedule),
                        optimizers=sgd(expert, fake, lr=0.05), guidance=GUIDANCE,
                        batches=lambda i: [prompts(i)], iterations=4, ttur=2, weighting="paper",
                        narrow=narrow):
        assert all(p.grad is None for net in (first, fake, teacher) for p in net.parameters())
    literal = Literal(schedule, narrow)
    for i in range(1, 9):
        draws, cond, uncond = prompts(i)
        literal.train_fake(draws, cond)
        if i % 2 == 0:
            literal.train_expert(draws, cond, uncond)
    first_before, expert_before, fake_before, teacher_before = networks()
    for lean, plain, before in ((expert, literal.expert, expert_before),
                                (fake, literal.fake, fake_before)):
        for a, b in zip(lean.parameters(), plain.parameters()):
            assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert not equal(lean, before)
    assert equal(first, first_before) and equal(teacher, teacher_before), "a frozen network moved"


def phase_2(batches, cuts):
    """(expert, fake score) after three steps of the expert, stopped and resumed at `cuts`."""
    schedule = Schedule.straight(100)
    first, expert, fake, teacher = networks()
    reached = (0, 0)
    for until in cuts:
        for losses in phased_dmd([Expert(first, STOPS[0]), Expert(expert, STOPS[1])],
                                 Scores(fake, teacher, schedule),
                                 optimizers=sgd(expert, fake, lr=0.05), guidance=GUIDANCE,
                                 batches=batches, iterations=until, start=reached, ttur=2):
            reached = (losses["iteration"], losses["global_iter"])
    assert reached == (3, 6)
    return expert, fake


def test_micro_batches_add_up_and_a_resumed_run_is_the_same():
    def whole(i):
        return [prompts(i, range(2 * BATCH))]

    def halves(i):
        return [prompts(i, range(BATCH)), prompts(i, range(BATCH, 2 * BATCH))]

    trained = [phase_2(whole, [3]), phase_2(halves, [3]), phase_2(whole, [1, 3])]
    for at_once, in_halves, resumed in zip(*trained):
        for a, b, c in zip(at_once.parameters(), in_halves.parameters(), resumed.parameters()):
            assert_close(a, b, rtol=1e-8, atol=1e-10)
            assert torch.equal(a, c)


# -------------------------------------------------------------------------------------- the phases

def test_generate_gives_each_expert_its_own_stops_and_refuses_gaps():
    schedule, seen = Schedule.straight(100), []

    def expert(name, stops):
        def net(x, timestep, return_dict=False):
            seen.append((name, int(timestep[0])))
            return (torch.zeros_like(x),)
        return Expert(net, stops)

    z = torch.randn(3, 2)
    phases = cut_into_phases(schedule.stops(4), [50])
    assert phases == [[100, 75, 50], [50, 25, 0]]
    experts = [expert("a", phases[0]), expert("b", phases[1])]
    assert torch.equal(generate(experts, schedule, z, {}), z)
    assert seen == [("a", 99), ("a", 75), ("b", 50), ("b", 25)]     # at T the line tells T - 1
    for bad in ([[75, 50], [50, 0]], [[100, 50], [25, 0]], [[100, 50, 75]], [[100, 100, 0]]):
        with pytest.raises(ValueError, match="must fall from"):
            generate([expert("a", stops) for stops in bad], schedule, z, {})
    for bad in ([60], [100], [0]):
        with pytest.raises(ValueError, match="inner stops"):
            cut_into_phases(schedule.stops(4), bad)
    assert cut_into_phases(schedule.stops(3), []) == [schedule.stops(3)]


def test_the_lesson_writes_its_result(tmp_path):
    succeeded(Run("-m", "lesson.phased_dmd", "--iterations", "3", "--samples", "2000", "--out",
                  tmp_path).wait())
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"full", "unbiased", "biased"} == set(result["toy"]) and result["seconds"] > 0
    for name in ("phased", "sgts"):
        assert {"tv", "share_error", "precision", "modes"} == set(result["mixture"][name])
    assert (tmp_path / "phased_dmd.png").stat().st_size > 10_000
