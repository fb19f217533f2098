"""phased_dmd.py against exact conditional expectations, the paper's formulae written out, and adm.py where both must agree."""
import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from adm import Draws, adm, dmd_gradient, score_loss
from cli import ROOT, Run, succeeded
from ode import Mixture, Schedule, families
from phased_dmd import bridge, generate, interpolant, kl_gradient, phased_dmd, scaled_target, split, subinterval_loss
from toys import Net, biased_loss

BATCH = 6
SCHEDULES = {"eps": "SDXL (eps)", "v": "CogVideoX-2b (v)", "flow": "SD3 (flow)"}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return families()[SCHEDULES[request.param]]


class Sixtyfour(Draws):
    """The same numbers in float64."""
    normal = lambda self: super(Sixtyfour, self).normal().double()
    uniform = lambda self, *range: super(Sixtyfour, self).uniform(*range).double()


class Cond(nn.Module):
    """A Net that also reads a prompt, so that guidance has something to guide."""

    def __init__(self):
        super().__init__()
        self.net, self.prompt = Net(8, 2), nn.Linear(3, 2)

    def forward(self, x, timestep, prompt, return_dict=False):
        return (self.net(x, timestep)[0] + self.prompt(prompt),)


def networks():
    """(expert 1, expert 2, fake score, teacher), all a little apart."""
    torch.manual_seed(1)
    teacher = Cond().double().requires_grad_(False)
    others = [deepcopy(teacher).requires_grad_(True) for _ in range(3)]
    with torch.no_grad():
        for p in [p for net in others for p in net.parameters()]:
            p += 0.05 * torch.randn_like(p)
    return (*others, teacher)


def prompts(i, samples=range(BATCH)):
    torch.manual_seed(i)
    prompt = torch.randn(100, 3).double()[list(samples)]
    return Sixtyfour((5,), i, samples, (2,)), dict(prompt=prompt), dict(prompt=torch.zeros_like(prompt))


def sgd(*nets, lr=0.3):
    return [torch.optim.SGD(net.parameters(), lr) for net in nets]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


DATA = Mixture(torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64), 0.4)


def expectation(schedule, target, x_t, s, t):
    """E[target(x_s, eps) | x_t] of DATA by the trapezoidal rule, given x_t = a x_s + b eps: over eps, or over x_s where a is small."""
    a, b = (c.item() for c in interpolant(schedule, s, t, torch.zeros(1, dtype=torch.float64)))
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    x_s, eps = ((x_t - b * grid) / a, grid) if a > 0.5 else (grid, (x_t - a * grid) / b)
    alpha, sigma = schedule.alpha[s], schedule.sigma[s]
    var = (alpha * DATA.std) ** 2 + sigma**2
    weight = (-(x_s - alpha * DATA.means.T) ** 2 / (2 * var)).exp().sum(1, keepdim=True) * (-eps**2 / 2).exp()
    return (target(x_s, eps) * weight).sum() / weight.sum()


@pytest.mark.parametrize("where", [1, 0.1, 0.5, 1.0])
def test_the_minimiser_is_the_teachers_own_output(schedule, where):
    """E[target | x_t], exact, must be what the perfect network of the data says, at every t in (s, T] and for every family."""
    s = 400
    t = s + (1 if where == 1 and isinstance(where, int) else round(where * (schedule.T - s)))
    rows = lambda x: torch.full((len(x),), t)
    b = interpolant(schedule, s, t, torch.zeros(1).double())[1]
    for x_t in (-1.5, 0.1, 0.8):
        x = torch.full((1, 1), x_t, dtype=torch.float64)
        expected = DATA.network(schedule)(x, timestep=schedule.timestep[rows(x)])[0].item()
        found = expectation(schedule, lambda x_s, eps: scaled_target(schedule, x_s, eps, s, rows(x_s)) / b, x_t, s, t).item()
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-8)


def test_the_biased_targets_minimiser_is_another():
    schedule, s, t, x_t = Schedule.straight(), 500, 700, torch.full((1, 1), 0.8, dtype=torch.float64)
    exact = DATA.network(schedule)(x_t, timestep=schedule.timestep[[t]])[0].item()
    naive = expectation(schedule, lambda x_s, eps: eps - x_s, 0.8, s, t).item()
    assert abs(naive - exact) > 0.1
    constant = lambda x, timestep, return_dict=False: (torch.zeros_like(x),)
    x_s, eps = torch.randn(5, 1), torch.randn(5, 1)
    assert_close(biased_loss(constant, schedule, x_s, eps, s, torch.full((5,), t)), (eps - x_s).square().mean())


def test_the_flow_target_is_the_formula_of_the_paper():
    """v* = ((alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b)) eps - x_s / alpha_s, weighted by clamp(1/b^2, 0, 10) b^2."""
    schedule, s, t = families()["SD3 (flow)"], 300, torch.tensor([301, 302, 400, 999, 1000])
    x_s, eps, net = torch.randn(5, 2).double(), torch.randn(5, 2).double(), Net(8, 1).double()
    (A, S), (a_t, s_t) = schedule.at(s, x_s), schedule.at(t, x_s)
    b = (s_t**2 - (a_t / A) ** 2 * S**2).sqrt()
    v = (A**2 * s_t + a_t * S**2) / (A**2 * b) * eps - x_s / A
    assert_close(scaled_target(schedule, x_s, eps, s, t), b * v)
    out = net(a_t / A * x_s + b * eps, schedule.timestep[t])[0]
    for clamp in ((0.0, 10.0), (2.0, 3.0)):
        expected = ((1 / b**2).clamp(*clamp) * b**2 * (out - v) ** 2).mean()
        assert_close(subinterval_loss(net, schedule, x_s, eps, s, t, {}, clamp), expected)


@pytest.mark.parametrize("s", [0, 1, 400, 999])
def test_the_marginal_is_the_direct_one(schedule, s):
    """x_s has mean alpha_s x_0 and variance sigma_s^2: through the bridge both must be those of row t, at every t > s."""
    t = torch.arange(s + 1, schedule.T + 1)
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    mean = bridge(schedule, schedule.alpha[s] * one, zero, s, t)[:, 0]
    variance = bridge(schedule, schedule.sigma[s] * one, zero, s, t)[:, 0] ** 2 + bridge(schedule, zero, one, s, t)[:, 0] ** 2
    assert_close(mean, schedule.alpha[t], rtol=1e-12, atol=1e-12)
    assert_close(variance, schedule.sigma[t] ** 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [1, 400, 998])
def test_loss_and_gradients_are_finite_next_to_s(schedule, s):
    torch.manual_seed(0)
    x_s, eps, net, t = torch.randn(64, 2), torch.randn(64, 2), Net(8, 1), torch.full((64,), s + 1)
    loss = subinterval_loss(net, schedule, x_s, eps, s, t, {})
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    # the weight is at most 10 and b v* of the order of (x_s, eps)/alpha_s, however small b is
    assert loss < 100 * (1 + eps.square().mean() + x_s.square().mean()) / schedule.alpha[s] ** 2
    real, fake = ((torch.randn(64, 2), torch.randn(64, 2)) for _ in range(2))
    for weighting in ("paper", "dmd"):
        assert kl_gradient(schedule, x_s, fake, real, s, t, weighting).isfinite().all()


def test_paper_weight_has_a_finite_limit_at_s():
    """alpha_t a / (alpha_t sigma_t + sigma_t^2) -> alpha_s / (alpha_s sigma_s + sigma_s^2)."""
    u = torch.arange(100_001, dtype=torch.float64) / 100_000
    schedule, s = Schedule(1 - u, u, 1000 * u, "flow"), 50_000
    x, T, V = (torch.randn(4, 1, dtype=torch.float64) for _ in range(3))
    t = torch.full((4,), s + 1)
    found = kl_gradient(schedule, x, schedule.split(x, V, t), schedule.split(x, T, t), s, t, "paper")
    assert_close(found, 1.0 * (T - V), rtol=1e-3, atol=1e-6)      # 0.5 / (0.25 + 0.25)


def test_paper_weighting_is_its_velocity_formula(schedule):
    """And that is the chain rule: a (score_fake - score_real), with score = (alpha x0_hat - x_t) / sigma^2."""
    torch.manual_seed(0)
    s, t = 300, torch.tensor([301, 450, 700, 950])
    x_s, x_t = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    fake, real = ((x0, (x_t - alpha * x0) / sigma) for x0 in torch.randn(2, 4, 2).double() for alpha, sigma in [schedule.at(t, x_t)])
    (alpha_s, _), (alpha, sigma) = schedule.at(s, x_s), schedule.at(t, x_s)
    T, V, a = real[1] - real[0], fake[1] - fake[0], alpha / alpha_s
    found = kl_gradient(schedule, x_s, fake, real, s, t, "paper")
    assert_close(found, alpha * a / (alpha * sigma + sigma**2) * (T - V))
    score = lambda x0: (alpha * x0 - x_t) / sigma**2
    assert_close(found, a * (score(fake[0]) - score(real[0])))
    with pytest.raises(ValueError, match="weighting"):
        kl_gradient(schedule, x_s, fake, real, s, t, "none")


@pytest.mark.parametrize("weighting", ["paper", "dmd"])
def test_the_gradient_points_back_to_a_shifted_gaussian(schedule, weighting):
    """Experts' x_s from N(1.5, .), the data from N(0, .), both scores exact: descending must lower the mean, never raise it."""
    torch.manual_seed(0)
    s, t = 300, torch.randint(301, 990, (1000,))
    x_s = schedule.noise(torch.randn(1000, 1).double() + 1.5, torch.randn(1000, 1).double(), s)
    x_t = bridge(schedule, x_s, torch.randn_like(x_s), s, t)
    alpha, sigma = schedule.at(t, x_t)

    def pair(mean):
        x0 = Mixture(torch.full((1, 1), mean, dtype=torch.float64), 1.0).x0_hat(x_t, alpha, sigma)
        return x0, (x_t - alpha * x0) / sigma
    assert (kl_gradient(schedule, x_s, pair(1.5), pair(0.0), s, t, weighting) > 0).all()
    assert (kl_gradient(schedule, x_s, pair(-1.5), pair(0.0), s, t, weighting) < 0).all()


def test_dmd_weighting_is_dmd_on_the_posterior_mean_of_x_s(schedule):
    """alpha_s x0_hat + (a sigma_s^2/sigma_t) eps_hat, against E[x_s | x_t] by quadrature."""
    s, t, x_t = 400, 600, torch.full((1, 1), 0.5, dtype=torch.float64)
    x0, eps = schedule.split(x_t, DATA.network(schedule)(x_t, timestep=schedule.timestep[[t]])[0], t)
    x_s, zero = torch.full((1, 1), 7.0, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    found = kl_gradient(schedule, x_s, (x0, eps), (zero, zero), s, t, "dmd")          # dmd_gradient(7, E, 0) = E/7
    assert found.item() == pytest.approx(expectation(schedule, lambda x_s, eps: x_s, 0.5, s, t).item() / 7, rel=1e-7)


# ------------------------------------------------------------------------------------------------------- s = 0 is DMD

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_clean_row_everything_is_the_ordinary_thing(schedule, dtype):
    torch.manual_seed(0)
    x0, eps, t, net = torch.randn(64, 2).to(dtype), torch.randn(64, 2).to(dtype), torch.randint(1, 1001, (64,)), Net(8, 1).to(dtype)
    assert torch.equal(bridge(schedule, x0, eps, 0, t), schedule.noise(x0, eps, t))
    a, b = subinterval_loss(net, schedule, x0, eps, 0, t, {}), score_loss(net, schedule, x0, eps, t, {})
    assert torch.equal(a, b)
    for x, y in zip(torch.autograd.grad(a, net.parameters()), torch.autograd.grad(b, net.parameters())):
        assert torch.equal(x, y)
    b = interpolant(schedule, 0, t, x0)[1]
    assert_close(scaled_target(schedule, x0, eps, 0, t), b * schedule.target(x0, eps, t))
    fake, real = torch.randn(2, 64, 2).to(dtype), torch.randn(2, 64, 2).to(dtype)
    assert torch.equal(kl_gradient(schedule, x0, tuple(fake), tuple(real), 0, t, "dmd"), dmd_gradient(x0, fake[0], real[0]))


def test_one_phase_is_dmd_with_sgts_bit_for_bit():
    schedule = Schedule.straight(100)
    one, two, rows = networks(), networks(), schedule.rows(3)
    batches = lambda i: [prompts(i)]
    a = list(phased_dmd([(one[0], rows)], one[2], one[3], sgd(one[0], one[2]), schedule, (2.0, 5.0), batches, 3, ttur=2, weighting="dmd"))
    b = list(adm(two[0], two[2], two[3], None, None, (*sgd(two[0], two[2]), None), schedule, schedule, rows, (2.0, 5.0), batches, 3,
                 ttur=2, dt=1, loss="dmd"))
    assert a == b and [x["global_iter"] for x in a] == [2, 4, 6]
    assert equal(one[0], two[0]) and equal(one[2], two[2]) and not equal(one[0], networks()[0])


# ------------------------------------------------------------------------------------------------------------ the loop

ROWS = [[100, 80, 60], [60, 40, 30, 20]]                          # a phase that ends above 0


def literal(first, net, fake, teacher, optimizers, schedule, batch, update, narrow):
    """An iteration of phase 2 in velocities, everything written out, gradients by autograd of 0.5 || x_s - sg(x_s - g) ||^2."""
    alpha, sigma, s, top = schedule.alpha[:, None], schedule.sigma[:, None], 20, 60 if narrow else 100
    draws, c, u = batch
    full = lambda i: torch.full((BATCH,), i)
    v = lambda net, x, i, c: net(x, timestep=schedule.timestep[i], **c)[0]
    euler = lambda net, x, i, j: x + (sigma[j] - sigma[i]) * v(net, x, full(i), c)

    x = draws.normal()
    with torch.no_grad():
        for i, j in ((100, 80), (80, 60)):
            x = euler(first, x, i, j)
        for i, j in ((60, 40), (40, 30), (30, 20)):
            x = euler(net, x, i, j)
    eps, t = draws.normal(), draws.rows(s + 1, top)
    a, A, S = alpha[t] / alpha[s], alpha[s], sigma[s]
    b = (sigma[t] ** 2 - a**2 * S**2).sqrt()
    target = (A**2 * sigma[t] + alpha[t] * S**2) / (A**2 * b) * eps - x / A
    loss = ((1 / b**2).clamp(0, 10) * (b * v(fake, a * x + b * eps, t, c) - b * target) ** 2).mean()
    optimizers[1].zero_grad(), loss.backward(), optimizers[1].step()
    if not update:
        return
    x, n, inner = draws.normal(), draws.index(1, 3), [60, 40, 30]
    with torch.no_grad():
        for i, j in ((100, 80), (80, 60)):
            x = euler(first, x, i, j)
        for i, j in list(zip(inner, inner[1:]))[:3 - n]:
            x = euler(net, x, i, j)
    x_s = euler(net, x, inner[3 - n], s)
    eps, t = draws.normal(), draws.rows(s + 1, top)
    a = alpha[t] / alpha[s]
    b = (sigma[t] ** 2 - a**2 * S**2).sqrt()
    with torch.no_grad():
        x_t, w = a * x_s + b * eps, draws.uniform(2.0, 5.0)[:, None]
        T = v(teacher, x_t, t, u) + w * (v(teacher, x_t, t, c) - v(teacher, x_t, t, u))
        g = alpha[t] * a / (alpha[t] * sigma[t] + sigma[t] ** 2) * (T - v(fake, x_t, t, c))
    loss = 0.5 * F.mse_loss(x_s, (x_s - g).detach())
    optimizers[0].zero_grad(), loss.backward(), optimizers[0].step()


@pytest.mark.parametrize("narrow", [False, True])
def test_lean_loop_is_the_written_out_one_and_frozen_networks_stay(narrow):
    schedule, lean, plain, before = Schedule.straight(100), networks(), networks(), networks()
    batches = lambda i: [prompts(i)]
    for _ in phased_dmd(list(zip(lean[:2], ROWS)), lean[2], lean[3], sgd(*lean[1:3], lr=0.05), schedule, (2.0, 5.0), batches, 4, ttur=2,
                        weighting="paper", narrow=narrow):
        assert all(p.grad is None for net in (lean[0], lean[2], lean[3]) for p in net.parameters())
    optimizers = sgd(*plain[1:3], lr=0.05)
    for i in range(1, 9):
        literal(*plain, optimizers, schedule, prompts(i), i % 2 == 0, narrow)
    for k in (1, 2):
        for a, b in zip(lean[k].parameters(), plain[k].parameters()):
            assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert not equal(lean[k], before[k])
    assert equal(lean[0], before[0]) and equal(lean[3], before[3]), "a frozen network moved"


def test_micro_batches_add_up_and_a_resumed_run_is_the_same():
    schedule, results = Schedule.straight(100), []
    whole = lambda i: [prompts(i, range(2 * BATCH))]
    halves = lambda i: [prompts(i, range(BATCH)), prompts(i, range(BATCH, 2 * BATCH))]
    for batches, cuts in ((whole, [3]), (halves, [3]), (whole, [1, 3])):
        nets, at = networks(), (0, 0)
        for until in cuts:
            for losses in phased_dmd(list(zip(nets[:2], ROWS)), nets[2], nets[3], sgd(*nets[1:3], lr=0.05), schedule, (2.0, 5.0), batches, until,
                                     start=at, ttur=2):
                at = (losses["iteration"], losses["global_iter"])
        assert at == (3, 6)
        results.append(nets)
    for k in (1, 2):
        for a, b, c in zip(*(nets[k].parameters() for nets in results)):
            assert_close(a, b, rtol=1e-8, atol=1e-10)
            assert torch.equal(a, c)


def test_generate_gives_each_expert_its_own_rows_and_refuses_gaps():
    schedule, seen = Schedule.straight(100), []

    def expert(name):
        def net(x, timestep, return_dict=False):
            seen.append((name, int(timestep[0])))
            return (torch.zeros_like(x),)
        return net
    z = torch.randn(3, 2)
    phases = split(schedule.rows(4), [50])
    assert phases == [[100, 75, 50], [50, 25, 0]]
    assert torch.equal(generate([(expert("a"), phases[0]), (expert("b"), phases[1])], schedule, z, {}), z)
    assert seen == [("a", 99), ("a", 75), ("b", 50), ("b", 25)]    # the straight table tells T - 1 at its last row
    for bad in ([[75, 50], [50, 0]], [[100, 50], [25, 0]], [[100, 50, 75]], [[100, 100, 0]]):
        with pytest.raises(ValueError, match="must fall from"):
            generate([(expert("a"), rows) for rows in bad], schedule, z, {})
    for bad in ([60], [100], [0]):
        with pytest.raises(ValueError, match="inner rows"):
            split(schedule.rows(4), bad)
    assert split(schedule.rows(3), []) == [schedule.rows(3)]


def test_the_demo_writes_its_result(tmp_path):
    succeeded(Run(ROOT / "phased_dmd.py", "--iterations", "3", "--samples", "2000", "--out", tmp_path).wait())
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"full", "unbiased", "biased"} == set(result["toy"]) and result["seconds"] > 0
    for name in ("phased", "sgts"):
        assert {"tv", "share_error", "precision", "modes"} == set(result["mixture"][name])
    assert (tmp_path / "phased_dmd.png").stat().st_size > 10_000
