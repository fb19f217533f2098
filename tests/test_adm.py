"""The loops of adm.py against finite differences, closed forms and a literal transcription of Algorithm 1."""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from adm import Draws, adm, adp, dmd_gradient, frozen, reflow, score_loss
from discriminators import Heads, hinge
from ode import Mixture, Schedule, predict, sample
from toys import Fourier, Net, NetTaps, mlp_heads

SHAPE, BATCH = (2,), 6


def networks(dtype=torch.float64, width=8):
    torch.manual_seed(0)
    teacher = Net(width, 2).to(dtype).requires_grad_(False)
    generator, fake = (deepcopy(teacher).requires_grad_(True) for _ in range(2))
    with torch.no_grad():                                       # apart, or x_fake = x_real
        for p in [*generator.parameters(), *fake.parameters()]:
            p += 0.05 * torch.randn_like(p)
    return generator, fake, teacher, NetTaps(teacher), mlp_heads(2, width, 8).to(dtype)


class Cond(nn.Module):
    """A Net that also reads a prompt, so that guidance has something to guide."""

    def __init__(self, width=8):
        super().__init__()
        self.net, self.prompt = Net(width, 2), nn.Linear(3, 2)

    def forward(self, x, timestep, prompt, return_dict=False, features=None):
        return (self.net(x, timestep, features=features)[0] + self.prompt(prompt).to(x.dtype),)


class CondTaps(NetTaps):
    def forward(self, x, timestep, prompt):
        maps = []
        self.net(x, timestep, prompt, features=maps)
        return maps


class Sixtyfour(Draws):
    """The same numbers in float64."""
    normal = lambda self: super(Sixtyfour, self).normal().double()
    uniform = lambda self, *range: super(Sixtyfour, self).uniform(*range).double()


def prompts(iteration, micro=1):
    out = []
    for m in range(micro):
        draws = Sixtyfour((5,), iteration, range(m * BATCH, (m + 1) * BATCH), SHAPE)
        torch.manual_seed(iteration * 10 + m)
        out.append((draws, dict(prompt=torch.randn(BATCH, 3).double()), dict(prompt=torch.zeros(BATCH, 3).double())))
    return out


def conditional(schedule):
    torch.manual_seed(1)
    teacher = Cond().double().requires_grad_(False)
    generator, fake = (deepcopy(teacher).requires_grad_(True) for _ in range(2))
    with torch.no_grad():
        for p in [*generator.parameters(), *fake.parameters()]:
            p += 0.05 * torch.randn_like(p)
    return generator, fake, teacher, CondTaps(teacher), mlp_heads(2, 8, 8).double()


def literal(generator, fake, teacher, heads, optimizers, schedule, rows, guidance, batch, ttur, global_iter):
    """Algorithm 1 as it is printed, one line after the other: guidance in two calls, every gradient everywhere, nothing shared."""
    opt_g, opt_f, opt_d = optimizers
    velocity = lambda net, x, i, c: net(x, timestep=schedule.timestep[i], prompt=c["prompt"])[0]
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    D = lambda x, i, c: heads(CondTaps(teacher)(x, schedule.timestep[i], **c))
    draws, c, u = batch
    full = lambda i: torch.full((BATCH,), i)

    def step(x, v, i, j):                                       # flow: x_0 = x - sigma v, eps = x + alpha v
        return alpha[j] * (x - sigma[i] * v) + sigma[j] * (x + alpha[i] * v)

    z = draws.normal()                                                                                      # 8
    for i, j in zip(rows, rows[1:]):
        z = step(z, velocity(generator, z, full(i), c), full(i), full(j)).detach()                          # 9
    z_f, t_f = draws.normal(), draws.rows(1, schedule.T)                                                    # 10
    loss = ((velocity(fake, alpha[t_f] * z + sigma[t_f] * z_f, t_f, c) - (z_f - z)) ** 2).mean()
    opt_f.zero_grad(), loss.backward(), opt_f.step()                                                        # 11
    if global_iter % ttur != 0:                                                                             # 12
        return
    N, dt = len(rows) - 1, round(schedule.T / 64)
    x, n = draws.normal(), draws.index(1, N)                                                                # 15
    for k in range(N, n, -1):
        i, j = full(rows[N - k]), full(rows[N - k + 1])
        x = step(x, velocity(generator, x, i, c), i, j).detach()                                            # 16
    i = full(rows[N - n])
    x0_hat = x - sigma[i] * velocity(generator, x, i, c)                                                    # 17
    z_g, t = draws.normal(), draws.rows(dt, schedule.T)                                                     # 18
    x_t = alpha[t] * x0_hat + sigma[t] * z_g                                                                # 19
    x_fake = step(x_t, velocity(fake, x_t, t, c), t, t - dt)                                                # 20
    w = draws.uniform(*guidance)[:, None]
    v_real = velocity(teacher, x_t, t, u) + w * (velocity(teacher, x_t, t, c) - velocity(teacher, x_t, t, u))
    x_real = step(x_t, v_real, t, t - dt)                                                                   # 21
    loss = -D(x_fake, t - dt, c).mean()
    opt_g.zero_grad(), loss.backward(), opt_g.step()                                                        # 22
    x_fake, x_real = x_fake.detach(), x_real.detach()
    loss = F.relu(1 + D(x_fake, t - dt, c)).mean() + F.relu(1 - D(x_real, t - dt, c)).mean()
    opt_d.zero_grad(), loss.backward(), opt_d.step()                                                        # 26


@pytest.mark.parametrize("steps, ttur", [(1, 1), (3, 1), (2, 2)])
def test_lean_loop_is_algorithm_1(steps, ttur):
    schedule = Schedule.straight(100)
    rows = schedule.rows(steps)
    sgd = lambda nets: [torch.optim.SGD(net.parameters(), 0.3) for net in nets]
    lean, plain = conditional(schedule), conditional(schedule)
    loop = adm(*lean, sgd((lean[0], lean[1], lean[4])), schedule, schedule, rows, (2.0, 5.0), prompts, 3, ttur=ttur)
    assert [x["global_iter"] for x in loop] == [ttur, 2 * ttur, 3 * ttur]
    optimizers = sgd((plain[0], plain[1], plain[4]))
    for i in range(1, 3 * ttur + 1):
        literal(plain[0], plain[1], plain[2], plain[4], optimizers, schedule, rows, (2.0, 5.0), prompts(i)[0], ttur, i)
    before = conditional(schedule)
    for k, name in ((0, "generator"), (1, "fake score"), (4, "heads")):
        for a, b in zip(lean[k].parameters(), plain[k].parameters()):
            assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")
        moved = sum((a - b).abs().sum() for a, b in zip(lean[k].parameters(), before[k].parameters()))
        assert moved > 1e-3, f"the {name} did not learn"


def test_micro_batches_add_up_to_the_batch():
    """Two micro-batches = one batch of both, through the same loop."""
    schedule, results = Schedule.straight(100), []
    for micro in (2, 1):
        nets = conditional(schedule)

        def batches(i):
            parts = prompts(i, 2)
            if micro == 2:
                return parts
            draws = Sixtyfour((5,), i, range(2 * BATCH), SHAPE)
            return [(draws, *(dict(prompt=torch.cat([parts[0][k]["prompt"], parts[1][k]["prompt"]])) for k in (1, 2)))]
        for _ in adm(*nets, [torch.optim.SGD(n.parameters(), 0.05) for n in (nets[0], nets[1], nets[4])], schedule, schedule,
                     schedule.rows(1), (2.0, 5.0), batches, 2):
            pass
        results.append(nets)
    for k in (0, 1, 4):
        for a, b in zip(results[0][k].parameters(), results[1][k].parameters()):
            assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_generator_gradient_against_finite_differences():
    """d/d theta of -D(x_fake), everything random held fixed, in float64."""
    generator, fake, teacher, taps, heads = networks()
    schedule, grads = Schedule.straight(100), {}

    class Spy(torch.optim.SGD):
        def step(self):
            grads.update({k: p.grad.clone() for k, p in generator.named_parameters()})
    still = lambda net: torch.optim.SGD(net.parameters(), 0.0)
    batches = lambda i: [(Sixtyfour((7,), i, range(BATCH), SHAPE), {}, {})]
    run = lambda: next(adm(generator, fake, teacher, taps, heads, (Spy(generator.parameters(), 0.0), still(fake), still(heads)),
                           schedule, schedule, [100, 50, 0], (1.0, 1.0), batches, 1))["generator"].item()
    run()
    analytic = {k: g.clone() for k, g in grads.items()}
    # through the whole loop, but the last jump's graph only: earlier steps of G carry no gradient, so n must be N = 2 here
    assert Sixtyfour((7,), 1, range(BATCH), SHAPE).index(1, 2) == 2, "pick a seed whose n is N"
    for name, p in list(generator.named_parameters())[::3]:
        flat, k = p.data.view(-1), p.numel() // 2
        values = []
        for h in (1e-5, -1e-5):
            flat[k] += h
            values.append(run())
            flat[k] -= h
        assert_close(analytic[name].view(-1)[k], torch.tensor((values[0] - values[1]) / 2e-5, dtype=torch.float64), rtol=1e-5, atol=1e-9,
                     msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("loss", ["adm", "dmd"])
def test_frozen_weights_collect_no_gradient_and_do_not_move(loss):
    generator, fake, teacher, taps, heads = networks()
    before = deepcopy(teacher.state_dict())
    schedule = Schedule.straight(100)
    opts = [torch.optim.SGD(n.parameters(), 0.1) for n in (generator, fake, heads)]
    for _ in adm(generator, fake, teacher, taps, heads, opts, schedule, schedule, [100, 0], (1.0, 3.0),
                 lambda i: [(Sixtyfour((7,), i, range(BATCH), SHAPE), {}, {})], 2, loss=loss):
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad is None for p in fake.parameters()), "the generator's update left gradients in the fake score"
    assert all(p.requires_grad for p in fake.parameters())
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_equal_scores_without_guidance_give_equal_samples():
    """f = F: x_fake = x_real bit for bit, so the discriminator's features, and its loss of 2 + nothing, agree."""
    schedule = Schedule.straight(100)
    seen = []

    class Recorder(NetTaps):
        def forward(self, x, timestep):
            seen.append(x.detach().clone())
            return super().forward(x, timestep)
    generator, _, teacher, _, heads = networks()
    fake = deepcopy(teacher).requires_grad_(True)
    out = next(adm(generator, fake, teacher, Recorder(teacher), heads, [torch.optim.SGD(n.parameters(), 0.0) for n in (generator, fake, heads)],
                   schedule, schedule, [100, 0], (1.0, 1.0), lambda i: [(Sixtyfour((7,), i, range(BATCH), SHAPE), {}, {})], 1))
    assert len(seen) == 2 and seen[0].abs().sum() > 0
    assert_close(seen[0], seen[1], rtol=1e-12, atol=1e-12)
    assert out["dmd"] < 1e-20


def test_constant_heads_sit_at_hinge_two():
    constant = Heads([nn.Linear(8, 1), nn.Linear(8, 1)])
    for p in constant.parameters():
        nn.init.zeros_(p)
    value = lambda: constant([torch.randn(5, 8), torch.randn(5, 8)])
    assert hinge(value(), value()).item() == 2.0


def test_dmd_gradient_is_zero_at_equality_and_points_back_to_a_shifted_gaussian():
    """Generator at N(m, 1), data at N(0, 1), both scores exact: descending the gradient must lower |m|."""
    torch.manual_seed(0)
    x0, schedule = torch.randn(4000, 1, dtype=torch.float64) + 1.5, Schedule.straight()
    t = torch.randint(50, 950, (4000,))
    x_t = schedule.noise(x0, torch.randn_like(x0), t)
    alpha, sigma = schedule.at(t, x_t)
    at = lambda mean: Mixture(torch.full((1, 1), mean, dtype=torch.float64), 1.0).x0_hat(x_t, alpha, sigma)
    assert dmd_gradient(x0, at(1.5), at(1.5)).abs().max() == 0
    assert (dmd_gradient(x0, at(1.5), at(0.0)) > 0).all(), "the step is minus the gradient: towards zero from the right"
    assert (dmd_gradient(x0, at(-1.5), at(0.0)) < 0).all()


def test_dmd_loop_applies_the_loss_of_the_paper():
    """The cut with dL/dx0_hat = g/n equals autograd of 0.5 || x0_hat - sg(x0_hat - g) ||^2 (a mean) through the generator."""
    schedule, grads = Schedule.straight(100), {}
    generator, fake, teacher, taps, heads = networks()

    class Spy(torch.optim.SGD):
        def step(self):
            grads.update({k: p.grad.clone() for k, p in generator.named_parameters()})
    batches = lambda i: [(Sixtyfour((7,), i, range(BATCH), SHAPE), {}, {})]
    next(adm(generator, fake, teacher, taps, heads, (Spy(generator.parameters(), 0.0), torch.optim.SGD(fake.parameters(), 0.0), None),
             schedule, schedule, [100, 0], (1.0, 1.0), batches, 1, loss="dmd"))
    draws = Sixtyfour((7,), 1, range(BATCH), SHAPE)
    draws.normal(), draws.normal(), draws.rows(1, 100)                            # the fake score's
    z, _, z_g, t = draws.normal(), draws.index(1, 1), draws.normal(), draws.rows(2, 100)
    x0_hat = z - generator(z, schedule.timestep[torch.full((BATCH,), 100)])[0]
    x_t = schedule.noise(x0_hat, z_g, t).detach()
    g = dmd_gradient(x0_hat, predict(fake, schedule, x_t, t, {})[0], predict(teacher, schedule, x_t, t, {})[0]).detach()
    (0.5 * (x0_hat - (x0_hat - g).detach()).square().mean()).backward()
    for k, p in generator.named_parameters():
        assert_close(grads[k], p.grad, msg=lambda m: f"{k}: {m}")


def test_adp_trains_generator_and_both_heads_and_reaches_the_pairs_from_pure_noise():
    schedule, line = Schedule.straight(100), Schedule.straight(100)
    generator, _, teacher, taps, heads = networks()
    pixel, pixel_heads = Fourier(8).double(), mlp_heads(1, 8, 8).double()
    nets = (generator, heads, pixel_heads)
    before = [deepcopy(n.state_dict()) for n in nets]
    x_T = torch.randn(BATCH, 2).double()
    batches = lambda i: [(Sixtyfour((7,), i, range(BATCH), SHAPE), 0.3 * x_T, x_T, {})]
    opts = [torch.optim.SGD(n.parameters(), 0.05) for n in nets]
    rows = list(adp(generator, taps, heads, pixel, pixel_heads, lambda x: x, opts, schedule, line, batches, 3))
    assert [r["iteration"] for r in rows] == [1, 2, 3]
    for net, old in zip(nets, before):
        assert any(not torch.equal(v, old[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_adp_time_is_biased_to_noise_as_the_cubic_schedule_says():
    """t = [1 - u^3] T: P(t <= T/2) = 1 - 0.5^(1/3), about a fifth."""
    times, line = [], Schedule.straight(1000)

    class Spy(Schedule):
        def noise(self, x0, eps, i):
            times.append(i)
            return super().noise(x0, eps, i)
    line.__class__ = Spy
    generator = Net(8, 1)
    opt = torch.optim.SGD(generator.parameters(), 0.0)
    for _ in reflow(generator, opt, line, lambda i: [(Draws((1,), i, [0], (2,), block=4096), torch.zeros(4096, 2), torch.zeros(4096, 2), {})], 3):
        pass
    t = torch.cat(times)
    assert t.min() >= 1 and t.max() <= 1000
    assert_close((t <= 500).double().mean().item(), 1 - 0.5 ** (1 / 3), atol=0.015, rtol=0)


def test_reflow_finds_a_linear_map():
    """A1 on pairs x_0 = 0.5 x_T: the velocity is x_T / 2 everywhere, and squared error finds it."""
    torch.manual_seed(0)
    generator, line = Net(32, 1), Schedule.straight()
    opt = torch.optim.AdamW(generator.parameters(), 3e-3)

    def batches(i):
        draws = Draws((1,), i, [0], (2,), block=256)
        x_T = draws.normal()
        return [(draws, 0.5 * x_T, x_T, {})]
    losses = [x["generator"].item() for x in reflow(generator, opt, line, batches, 300)]
    z = torch.randn(500, 2)
    with torch.no_grad():
        error = (sample(generator, line, z, [line.T, 0], {}) - 0.5 * z).square().mean().item()
    assert losses[-1] < 0.02 * losses[0] and error < 0.01, (losses[0], losses[-1], error)


def test_draws_depend_on_seed_iteration_and_sample_only():
    whole, right = Draws((3, 1), 8, range(4), (2, 3)), Draws((3, 1), 8, range(2, 4), (2, 3))
    assert torch.equal(whole.normal()[2:], right.normal()) and torch.equal(whole.rows(0, 9)[2:], right.rows(0, 9))
    assert torch.equal(whole.uniform()[2:], right.uniform()) and whole.index(1, 1000) == right.index(1, 1000)
    x = Draws((3, 1), 8, range(4), (2, 3)).normal()
    for other in (Draws((4, 1), 8, range(4), (2, 3)), Draws((3, 2), 8, range(4), (2, 3)), Draws((3, 1), 9, range(4), (2, 3))):
        assert not torch.isclose(x, other.normal()).any()
    many = Draws((0,), 0, range(2000), (1,)).normal()
    assert abs(many.mean()) < 0.08 and abs(many.std() - 1) < 0.05
    rows = Draws((0,), 0, range(500), (1,)).rows(2, 4)
    assert set(rows.tolist()) == {2, 3, 4}


def test_frozen_restores_only_what_was_trained():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("pred", ["eps", "v", "flow"])
def test_score_loss_is_the_pretraining_loss(pred):
    """Eq. 2 for noise, Eq. 3 for velocity, written out."""
    torch.manual_seed(0)
    angle = torch.linspace(0, 1.5, 11, dtype=torch.float64)
    schedule = Schedule.straight(10) if pred == "flow" else Schedule(angle.cos(), angle.sin(), torch.arange(11), pred)
    x0, eps, i, net = torch.randn(4, 2).double(), torch.randn(4, 2).double(), torch.tensor([1, 4, 7, 10]), Net(8, 1).double()
    a, s = schedule.alpha[i][:, None], schedule.sigma[i][:, None]
    target = {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[pred]
    expected = (net(a * x0 + s * eps, schedule.timestep[i])[0] - target).square().mean()
    assert_close(score_loss(net, schedule, x0, eps, i, {}).double(), expected, rtol=1e-6, atol=1e-8)
