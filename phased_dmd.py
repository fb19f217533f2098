"""Phased DMD: one expert per interval of noise, each trained by distribution matching inside its own interval.

    python phased_dmd.py --out out/phased_dmd     # the paper's 1-D toy, then Phased DMD beside DMD: picture, table, result.json

From arXiv 2510.27684. The rows T = t_0 > t_1 > ... > t_K = 0 (row 0 clean, counted down as in the paper) cut the noise
into K phases. Expert k carries p(x at row t_{k-1}) to p(x at row s = t_k); `phased_dmd` trains one of them, below frozen
earlier ones, and `generate` runs them one after the other. For phase k, x_s plays the part that x_0 plays in DMD:

    DMD                      inside a phase                                        with
    x_0                      x_s
    x_t = alpha x_0 + ...    x_t = a x_s + b eps                                   a = alpha_t/alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2
    (x_0, eps)               (x_s/alpha_s - alpha_t sigma_s^2/(alpha_s^2 b) eps,
                              (sigma_t/b) eps)                                     the pair that makes the fake score unbiased

The last line is the method. The scores are those of x_0's diffusion, and that is what the teacher knows; a fake score
taught (x_s, eps) would learn another one. The pair has the same mean given x_t as the true (x_0, eps), and it satisfies
alpha_t x_0 + sigma_t eps = x_t exactly, so flow, v and eps networks all take their targets from it. At s = 0 it is (x_0, eps).
"""
import argparse
import json
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from adm import Draws, closed_form_teacher, dmd_gradient, score_loss, tv_and_precision
from ode import Mixture, Schedule, predict, sample


def interpolant(schedule, s, t, x):
    """(a, b) of x_t = a x_s + b eps, from row s (int) to rows t > s (int or LongTensor [B]), shaped to multiply x [B,...].
    Taken in float64: where t is next to s, b^2 is a small difference of large numbers."""
    t = torch.as_tensor(t, device=schedule.alpha.device)
    a = schedule.alpha[t] / schedule.alpha[s]
    b = (schedule.sigma[t] ** 2 - (a * schedule.sigma[s]) ** 2).sqrt()
    shape = t.shape + (1,) * (x.dim() - 1) if t.dim() else ()
    return tuple(c.to(x.device, x.dtype).reshape(shape) for c in (a, b))


def bridge(schedule, x_s, eps, s, t):
    """x_s [B,...] at row s, noised further to rows t: distributed as x_0 noised to t at once. At s = 0 it is schedule.noise."""
    a, b = interpolant(schedule, s, t, x_s)
    return a * x_s + b * eps


def scaled_target(schedule, x_s, eps, s, t):
    """b times the unbiased regression target at x_t = bridge(x_s, eps): schedule.target of the pair in the head of this file,
    which is linear in the pair, so b goes in first and nothing is divided by it. For a flow network this is b v* of Eq. 13."""
    a, b = interpolant(schedule, s, t, x_s)
    (alpha_s, sigma_s), (_, sigma_t) = schedule.at(s, x_s), schedule.at(t, x_s)
    return schedule.target(b / alpha_s * x_s - a * sigma_s**2 / alpha_s * eps, sigma_t * eps, t)


def subinterval_loss(net, schedule, x_s, eps, s, t, cond, clamp=(0.0, 10.0)):
    """The score loss when only x_s is known: clamp(1/b^2) || b net(x_t) - b target ||^2 (Eq. 13), a mean.

    x_s, eps [B,...]; s an int, t LongTensor [B] with t > s; cond: the network's keyword arguments; clamp: range of 1/b^2.
    The target's variance grows like 1/b^2 as t -> s. Clamping the weight bounds the loss there and leaves its minimiser
    alone, since a weight of t only cannot bias what is learnt at t. At s = 0 nothing grows, and this is adm.score_loss
    itself, unweighted: the teacher's own loss.
    """
    if s == 0:
        return score_loss(net, schedule, x_s, eps, t, cond)
    _, b = interpolant(schedule, s, t, x_s)
    out = net(bridge(schedule, x_s, eps, s, t), timestep=schedule.timestep.to(x_s.device)[t], **cond, return_dict=False)[0]
    error = b * out.to(x_s.dtype) - scaled_target(schedule, x_s, eps, s, t)
    return ((1 / b**2).clamp(*clamp) * error.square()).mean()


def kl_gradient(schedule, x_s, fake, real, s, t, weighting="dmd"):
    """Reverse-KL gradient in x_s [B,...], from both scores' pairs (x0_hat, eps_hat) at x_t = bridge(x_s, eps), s int, t [B].

    weighting 'paper': a (score_fake - score_real), the chain rule through d x_t / d x_s = a and no more. Since a score is
    -eps_hat/sigma this equals alpha_t a / (alpha_t sigma_t + sigma_t^2) (T - F) of the paper, T and F the real and the fake
    velocity eps_hat - x0_hat, and asks an eps network for no division by alpha.
    weighting 'dmd': dmd_gradient with x_s as the data, so of both means E[x_s | x_t] = alpha_s x0_hat + (a sigma_s^2/sigma_t)
    eps_hat. Every scalar weight, a included, is replaced by one over the mean distance per sample. At s = 0 it is DMD's own.
    Both stay finite as t -> s > 0. At s = 0 'paper' grows like 1/sigma_t, and in the demo's two dimensions it is the worse one
    (lr 1e-4, one seed, share_error: two phases 0.032 against 0.018, one phase 0.31 against 0.017), hence the default.
    Raises ValueError for another weighting.
    """
    a, _ = interpolant(schedule, s, t, x_s)
    (alpha_s, sigma_s), (_, sigma_t) = schedule.at(s, x_s), schedule.at(t, x_s)
    if weighting == "paper":
        return a / sigma_t * (real[1] - fake[1])
    if weighting == "dmd":
        mean = lambda x0, eps: alpha_s * x0 + a * sigma_s**2 / sigma_t * eps
        return dmd_gradient(x_s, mean(*fake), mean(*real))
    raise ValueError(f"weighting {weighting!r} is neither 'paper' nor 'dmd'")


def split(rows, boundaries):
    """A sampler's rows T > ... > 0, cut at some of its inner rows: [4,3,2,1,0] at [2] -> [[4,3,2], [2,1,0]], one list a phase."""
    if any(b not in rows[1:-1] for b in boundaries):
        raise ValueError(f"boundaries {list(boundaries)} are not all inner rows of {list(rows)}")
    cuts = [0, *sorted(rows.index(b) for b in boundaries), len(rows) - 1]
    return [list(rows[i:j + 1]) for i, j in zip(cuts, cuts[1:])]


def generate(experts, schedule, z, cond):
    """Noise z [B,...] at row T through the experts, each down its own rows.

    experts: [(net, rows), ...], noisiest first, rows[0] of each being rows[-1] of the one before. Returns x at the last row
    of the last: x_0 if that is 0, else x_s. Raises ValueError where the rows leave a gap or do not start at T.
    """
    reached, x = schedule.T, z
    for net, rows in experts:
        if rows[0] != reached or sorted(set(rows), reverse=True) != list(rows):
            raise ValueError(f"rows {list(rows)}: must fall from {reached}, where the expert before (or the noise) stops")
        x, reached = sample(net, schedule, x, rows, cond), rows[-1]
    return x


def phased_dmd(experts, fake_score, real_score, optimizers, schedule, guidance, batches, iterations, start=(0, 0), ttur=5,
               weighting="dmd", narrow=False, clamp=(0.0, 10.0)):
    """One phase, a generator of losses: one yield per generator step. Call it once per phase, noisiest first.

    experts: [(net, rows), ...] as in `generate`; the last is trained, those before it only produce its input and are neither
    changed nor asked for gradients. rows: t_{k-1} > ... > s = t_k. fake_score: a fresh copy of the teacher for every phase.
    optimizers: of the last expert, of fake_score. guidance: range of the real score's CFG weight, drawn per sample.
    batches(global_iter): list of micro-batches (draws, cond, uncond) whose gradients add up. start: (genIter, globalIter) to
    go on from. ttur: fake updates per generator update. weighting: see kl_gradient; clamp: see subinterval_loss.
    narrow: scores only on (s, t_{k-1}] and not on (s, T], which is what the paper found better.
    With one phase, rows T > ... > 0, this is DMD with stochastic gradient truncation (SGTS).
    Yields dict(iteration, global_iter, fake, dmd); `dmd` is 0.5 || gradient ||^2, which stands in for the loss in x_s.
    """
    generator_opt, fake_opt = optimizers
    *earlier, (generator, rows) = experts
    s, N, top = rows[-1], len(rows) - 1, rows[0] if narrow else schedule.T
    gen_iter, global_iter = start
    while gen_iter < iterations:
        global_iter += 1
        batch = batches(global_iter)

        # fake score: what the experts make, noised from s to t and never from x_0, which nobody has
        for draws, cond, _ in batch:
            with torch.no_grad():
                x_s = generate(experts, schedule, draws.normal(), cond)
            eps, t = draws.normal(), draws.rows(s + 1, top)
            fake_loss = subinterval_loss(fake_score, schedule, x_s, eps, s, t, cond, clamp)
            (fake_loss / len(batch)).backward()
        fake_opt.step(), fake_opt.zero_grad()
        if global_iter % ttur:
            continue

        # expert: stop after a random number of its steps and jump to s from there; only the jump has a gradient (SGTS)
        for draws, cond, uncond in batch:
            z, n = draws.normal(), draws.index(1, N)
            with torch.no_grad():
                x_tn = generate([*earlier, (generator, rows[:N - n + 1])], schedule, z, cond)
            x_s_hat = schedule.noise(*predict(generator, schedule, x_tn, rows[N - n], cond), s)
            eps, t = draws.normal(), draws.rows(s + 1, top)
            with torch.no_grad():
                x_s = x_s_hat.detach()                                          # here the backward pass is cut
                x_t = bridge(schedule, x_s, eps, s, t)
                fake = predict(fake_score, schedule, x_t, t, cond)
                real = predict(real_score, schedule, x_t, t, cond, uncond, draws.uniform(*guidance))
                gradient = kl_gradient(schedule, x_s, fake, real, s, t, weighting)
            losses = dict(fake=fake_loss.detach(), dmd=0.5 * gradient.square().mean())
            x_s_hat.backward(gradient / gradient[0].numel() / len(gradient) / len(batch))   # of 0.5 || x_s - sg(x_s - g) ||^2, a mean
        generator_opt.step(), generator_opt.zero_grad()
        gen_iter += 1
        yield dict(iteration=gen_iter, global_iter=global_iter, **losses)


# --------------------------------------------------------------------------------------- demo, one and two dimensions

class MLP(nn.Module):
    """The paper's toy network, four layers of width 512, called as diffusers calls its networks: [B,1] -> [B,1]."""

    def __init__(self, width=512):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                    nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, x, timestep, return_dict=False):
        return (self.layers(torch.cat([x, timestep[:, None] / 250 - 2], 1)),)     # times of (0.5, 1] become (0, 2]


def biased_loss(net, schedule, x_s, eps, s, t):
    """What one would write first: velocity target eps - x_s, as if x_s were x_0. Its minimiser is not the velocity."""
    out, = net(bridge(schedule, x_s, eps, s, t), timestep=schedule.timestep[t])
    return F.mse_loss(out, eps - x_s)


def toy(seed, iterations, batch=128):
    """The paper's toy: x_0 uniform on {-1, 0, 1, 2}; three velocity networks, trained on (0, 1] from x_0, on (0.5, 1] from x_s
    by the unbiased target, and by the biased one. Returns (mean squared error to the analytic velocity on (0.5, 1] by name,
    100-step Euler trajectories from t = 1 to 0.5 by name, [101,64]).

    (x_0, noise, t) come from a scrambled Sobol sequence, so that a few seconds show the targets and not the noise in them: at
    1,200 iterations errors of 0.0002 and 0.0008 against 0.0024 and 0.0037 with independent draws (full, unbiased). So the ratio
    of the two grows as both vanish, 1.6 to 2.5 here at 500 iterations, 4 at 1,200: what the unbiased network still lacks lies next to
    t = 0.5, where the clamp makes the weight on its velocity small.
    """
    torch.manual_seed(seed)
    u = torch.arange(1001, dtype=torch.float64) / 1000
    schedule, data, s = Schedule(1 - u, u, 1000 * u, "flow"), Mixture([[-1.0], [0.0], [1.0], [2.0]], 0.0), 500
    normal = lambda u: (2 * u[:, None] - 1).erfinv() * 2**0.5                     # [B] -> [B,1]
    nets = dict(analytic=data.network(schedule))
    for name, low in (("full", 0), ("unbiased", s), ("biased", s)):
        net = nets[name] = MLP()
        opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0, fused=True)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, iterations)
        sobol = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed)
        for _ in range(iterations):
            u = sobol.draw(batch).clamp(1e-6, 1 - 1e-6)                           # [B,4]
            x_0, t, eps = data.means[(4 * u[:, 0]).long()], low + 1 + ((1000 - low) * u[:, 1]).long(), normal(u[:, 2])
            x_s = schedule.noise(x_0, normal(u[:, 3]), low)                       # x_0 itself for the full interval
            loss = biased_loss(net, schedule, x_s, eps, low, t) if name == "biased" else \
                subinterval_loss(net, schedule, x_s, eps, low, t, {})
            loss.backward()
            opt.step(), opt.zero_grad(), decay.step()
    t = torch.randint(s + 1, 1001, (20_000,))
    x_t = schedule.noise(data.sample(len(t)), torch.randn(len(t), 1), t)
    velocity, errors, paths = lambda name: nets[name](x_t, timestep=schedule.timestep[t])[0], {}, {}
    x_T, rows = torch.linspace(-2.5, 2.5, 64)[:, None], list(range(1000, s - 1, -5))
    with torch.no_grad():
        for name, net in nets.items():
            path = [x_T]
            for step in zip(rows, rows[1:]):
                path.append(sample(net, schedule, path[-1], step, {}))
            errors[name], paths[name] = F.mse_loss(velocity(name), velocity("analytic")).item(), torch.cat(path, 1).T
    del errors["analytic"]
    return errors, paths


def share_error(x, data):
    """Half the L1 distance between the shares of x [N,D] that fall to each mode and the true, equal ones: 0 to 1."""
    share = torch.bincount(torch.cdist(x, data.means).argmin(1), minlength=len(data.means)) / len(x)
    return 0.5 * (share - 1 / len(data.means)).abs().sum().item()


def ring(data, seed, iterations, lr=5e-4, batch=256):
    """A teacher of `data`, then its four-step students: name -> samples [50000,2]. One phase of four steps is DMD with SGTS;
    two phases of two get half the iterations each, so both have equal network evaluations when sampling, and equal generator
    and fake steps when training. The teacher regresses the closed form: the shares it gets wrong would be its students' too.

    share_error at three generator rates, seeds 0, 1, 2: Phased DMD hardly notices, one network for all noise does.
        lr      phased                   sgts
        3e-4    0.013                    0.010
        5e-4    0.014  0.014  0.008      0.024  0.012  0.034
        1e-3    0.013  0.011  0.021      0.023  0.029  0.028
    So Phased DMD has about half of SGTS's error at the higher rates, and no less than it at the lowest.
    """
    torch.manual_seed(seed)
    schedule = Schedule.straight()
    draws = lambda stage, i: Draws((seed, stage), i, [0], (2,), block=batch)
    adam = lambda net, lr: torch.optim.AdamW(net.parameters(), lr, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
    teacher = closed_form_teacher(data, schedule, 6 * iterations, lambda i: draws(0, i))
    z, rows, samples = torch.randn(50_000, 2), schedule.rows(4), {}
    with torch.no_grad():
        samples["teacher"] = sample(teacher, schedule, z, schedule.rows(20), {}, order=2)
    for name, phases in (("sgts", [rows]), ("phased", split(rows, [500]))):
        experts = []
        for k, phase in enumerate(phases, 1):
            net, fake = (deepcopy(teacher).requires_grad_(True) for _ in range(2))
            average = deepcopy(teacher)                                           # of the expert's weights, as in adm.py
            for losses in phased_dmd([*experts, (net, phase)], fake, teacher, (adam(net, lr), adam(fake, 1e-3)), schedule, (1.0, 1.0),
                                     lambda i: [(draws(k, i), {}, {})], max(1, iterations // len(phases))):
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 0.01)
            experts.append((average, phase))
        with torch.no_grad():
            samples[name] = generate(experts, schedule, z, {})
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/phased_dmd", help="folder for the picture and result.json")
    parser.add_argument("--iterations", type=int, default=300, help="generator steps of a ring student; everything else scales along")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the ring students")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error(f"--iterations {args.iterations}: must be above 0")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    began, out, data = time.time(), Path(args.out), Mixture.ring()
    out.mkdir(parents=True, exist_ok=True)
    errors, paths = toy(args.seed, max(1, args.iterations * 5 // 3))
    print("mean squared error of the velocity on (0.5, 1]")
    for name, label in (("full", "full interval"), ("unbiased", "subinterval, unbiased"), ("biased", "subinterval, biased")):
        print(f"{label:26s}{errors[name]:9.5f}   {errors[name] / errors['full']:7.1f} x full")

    reference = data.sample(50_000, torch.Generator().manual_seed(args.seed))
    samples = ring(data, args.seed, args.iterations, args.lr)
    labels = dict(teacher="teacher, 20 second-order steps", sgts="DMD with SGTS, 4 steps", phased="Phased DMD, 2 phases, 4 steps")
    mixture = {name: dict(tv_and_precision(x, data, reference), share_error=share_error(x, data)) for name, x in samples.items()}
    print(f"\n{'ring of eight Gaussians':32s}{'tv':>8s}{'share_error':>13s}{'precision':>11s}{'modes':>7s}")
    for name, r in mixture.items():
        print(f"{labels[name]:32s}{r['tv']:8.3f}{r['share_error']:13.4f}{r['precision']:11.3f}{r['modes']:7d}")

    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    for ax, name in zip(axes[0], errors):
        time_axis = torch.linspace(1, 0.5, 101)
        ax.plot(time_axis, paths["analytic"], "0.6", lw=0.8)
        ax.plot(time_axis, paths[name], "C0", lw=0.5)
        ax.set(xlim=(1, 0.5), xlabel="t", ylabel="x", title=f"{name} (blue), analytic (grey): {errors[name]:.4f}")
    for ax, (name, x) in zip(axes[1], samples.items()):
        ax.plot(*x[:8000].T, ",")
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal",
               title=f"{labels[name]}\nshare_error {mixture[name]['share_error']:.3f}, tv {mixture[name]['tv']:.2f}")
    figure.savefig(out / "phased_dmd.png", dpi=110)
    (out / "result.json").write_text(json.dumps(dict(toy=errors, mixture=mixture, seconds=time.time() - began), indent=1))
    print(f"\nwrote {out}/phased_dmd.png and {out}/result.json ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    main()
