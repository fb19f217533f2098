"""Why this file exists: what `python adm.py` and `python phased_dmd.py` show, in one and two dimensions, where every answer is known; a place for your own data.

    python adm.py                   # a 2-D teacher distilled to one step, four ways
    python phased_dmd.py            # the paper's 1-D toy, then four steps on a ring beside DMD

A data set is an `ode.Mixture`; the networks are small, but called as diffusers calls its own, so the loops are the ones that train SDXL.
"""
import argparse
import json
import math
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from adm import Draws, adm, adp, reflow
from discriminators import Heads
from ode import Mixture, Schedule, sample
from phased_dmd import bridge, generate, phased_dmd, split, subinterval_loss

# ------------------------------------------------------------------------------------------------------------------ adm

class Net(nn.Module):
    """An MLP called as diffusers calls its networks: [B,2] -> [B,2]."""

    def __init__(self, width=256, layers=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2 + 32, width)] + [nn.Linear(width, width) for _ in range(layers - 1)])
        self.output = nn.Linear(width, 2)
        self.register_buffer("waves", torch.pi * 2 ** torch.linspace(-2, 4, 16))

    def forward(self, x, timestep, return_dict=False, features=None):
        angle = timestep[:, None].to(x.dtype) / 1000 * self.waves                 # [B,16]
        h = torch.cat([x, angle.sin(), angle.cos()], 1)                           # [B,34]
        for layer in self.layers:
            h = F.gelu(layer(h))                                                  # [B,width]
            if features is not None:
                features.append(h)
        return (self.output(h),)


class NetTaps(nn.Module):
    """What discriminators.Taps is to real backbones."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, timestep):
        maps = []
        self.net(x, timestep, features=maps)
        return maps


class Fourier(nn.Module):
    """In the place of the vision encoder: fixed random waves of the point itself, [B,2] -> one map [B,width]."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("waves", torch.randn(2, width // 2))

    def forward(self, x):
        return [torch.cat([(x @ self.waves).sin(), (x @ self.waves).cos()], 1)]


def mlp_heads(count, width, hidden=64):
    return Heads([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                nn.Linear(hidden, 1)) for _ in range(count)])


def tv_and_precision(x, data, reference):
    """(total variation between 24x24 histograms over [-3,3]^2, fraction within 3 std of a mode, modes with a tenth of their share)."""
    histogram = lambda x: np.histogram2d(*x.numpy().T, bins=24, range=[[-3, 3]] * 2)[0] / len(x)
    distance, mode = torch.cdist(x, data.means).min(1)
    near = distance < 3 * data.std
    share = torch.bincount(mode[near], minlength=len(data.means)) / len(x)
    return dict(tv=float(0.5 * np.abs(histogram(x) - histogram(reference)).sum()), precision=near.float().mean().item(),
                modes=int((share > 0.1 / len(data.means)).sum()))


def closed_form_teacher(data, schedule, steps, draws):
    """A frozen Net that knows `data`. It regresses the regression's own minimiser, in closed form: minutes of averaging noisy
    targets fit into seconds, and what a noisy teacher gets wrong its students cannot inherit. draws(i): Draws of step i."""
    teacher, exact = Net(), data.network(schedule)
    opt = torch.optim.AdamW(teacher.parameters(), 2e-3, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for i in range(steps):
        noise = draws(i)
        t = noise.rows(1, schedule.T)
        x_t, told = schedule.noise(data.sample(len(t)), noise.normal(), t), schedule.timestep[t]
        F.mse_loss(teacher(x_t, told)[0], exact(x_t, told)[0]).backward()
        opt.step(), opt.zero_grad(), decay.step()
    return teacher.requires_grad_(False)


def four_students(data, seed, iterations=1500, batch=256, count=50_000, progress=print):
    """Train a teacher on `data`, then four one-step students. Returns name -> samples [count,2]. iterations: of ADP."""
    torch.manual_seed(seed)
    teacher_schedule, line = Schedule.straight(), Schedule.straight()
    draws = lambda stage, i: Draws((seed, stage), i, [0], (2,), block=batch)
    adam = lambda net, lr: torch.optim.AdamW(net.parameters(), lr, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
    one_step, test = [line.T, 0], torch.randn(count, 2)
    samples, third = {}, math.ceil(iterations / 3)

    def student(net, opt, steps, loop):
        """Run a stage to its end; an adversary's pupil never sits still, so its rate falls to zero and its weights are averaged."""
        average, rate = deepcopy(net).requires_grad_(False), opt.param_groups[0]["lr"]
        for losses in loop:
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 0.01)
            opt.param_groups[0]["lr"] = rate * (1 - losses["iteration"] / steps)
        return average

    @torch.no_grad()
    def keep(name, net, rows):
        samples[name] = sample(net, line, test, rows, {}, order=2)                # one step is first order
        progress(name, samples[name])

    teacher = closed_form_teacher(data, teacher_schedule, 5 * third, lambda i: draws(0, i))
    keep("teacher", teacher, line.rows(20))

    x_T = torch.randn(20_000, 2)
    with torch.no_grad():
        x_0 = sample(teacher, teacher_schedule, x_T, line.rows(20), {}, order=2)

    def pairs(i):
        noise = draws(1, i)
        pick = (noise.uniform() * len(x_T)).long()
        return [(noise, x_0[pick], x_T[pick], {})]

    def network(source, lr):
        net = deepcopy(source).requires_grad_(True)
        return net, adam(net, lr)

    net, opt = network(teacher, 1e-3)
    keep("a1", student(net, opt, third, reflow(net, opt, line, pairs, third)), one_step)

    net, opt = network(teacher, 3e-4)
    heads, pixel, pixel_heads = mlp_heads(3, 256), Fourier(), mlp_heads(1, 128)
    pretrained = student(net, opt, iterations, adp(net, NetTaps(teacher), heads, pixel, pixel_heads, lambda x: x,
                                                   (opt, adam(heads, 1e-3), adam(pixel_heads, 1e-3)), teacher_schedule, line, pairs, iterations))
    keep("adp", pretrained, one_step)

    for name, loss, lr in (("dmdx", "adm", 3e-5), ("dmd", "dmd", 1e-4)):
        (net, opt), (fake, fake_opt), heads = network(pretrained, lr), network(teacher, 1e-3), mlp_heads(3, 256)
        keep(name, student(net, opt, third, adm(net, fake, teacher, NetTaps(teacher), heads, (opt, fake_opt, adam(heads, 3e-3)), teacher_schedule,
                                         line, one_step, (1.0, 1.0), lambda i: [(draws(2, i), {}, {})], third, loss=loss)), one_step)
    return samples


def adm_demo(doc):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["ring", "grid"], default="ring", help="eight Gaussians on a circle, or twenty-five on a grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/adm", help="folder for the picture and result.json")
    parser.add_argument("--iterations", type=int, default=1500, help="generator steps of ADP; A1, ADM and DMD get a third as many, the teacher five thirds")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a step")
    parser.add_argument("--samples", type=int, default=50_000, help="drawn of each for table and picture")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be above 0")
    if min(args.iterations, args.samples) < 1:
        parser.error("--iterations and --samples must be above 0")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)                                    # matrices this small are slower on two
    began, out = time.time(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = getattr(Mixture, args.data)()
    reference = data.sample(args.samples, torch.Generator().manual_seed(args.seed))
    labels = dict(data="data", teacher="teacher, 20 steps", a1="A1: squared error, 1 step", adp="ADP, 1 step", dmdx="DMDX (ADP, ADM), 1 step",
                  dmd="ADP, DMD, 1 step")
    result = {}

    def progress(name, x):
        result[name] = tv_and_precision(x, data, reference)
        print(f"{labels[name]:28s}{result[name]['tv']:8.3f}{result[name]['precision']:11.3f}{result[name]['modes']:7d}{time.time() - began:9.0f}", flush=True)

    print(f"{'':28s}{'tv':>8s}{'precision':>11s}{'modes':>7s}{'seconds':>9s}")
    progress("data", data.sample(args.samples, torch.Generator().manual_seed(args.seed + 1)))
    samples = dict(data=reference, **four_students(data, args.seed, args.iterations, args.batch_size, args.samples, progress))
    figure, axes = plt.subplots(1, 6, figsize=(16, 3.1), layout="constrained")
    for (name, x), ax in zip(samples.items(), axes):
        ax.plot(*x[:6000].T, ",", color="k" if name == "data" else "C0")
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal", title=f"{labels[name]}\ntv {result[name]['tv']:.2f}")
        ax.title.set_fontsize(9)
    figure.savefig(out / "adm.png", dpi=110)
    del result["data"]
    (out / "result.json").write_text(json.dumps(dict(modes=len(data.means), seconds=time.time() - began, **result), indent=1))
    print(f"wrote {out}/adm.png and {out}/result.json")


# ----------------------------------------------------------------------------------------------------------- phased_dmd

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


def ring(data, seed, iterations, lr=5e-4, batch=256, count=50_000):
    """A teacher of `data`, then its four-step students: name -> samples [count,2]. One phase of four steps is DMD with SGTS;
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
    z, rows, samples = torch.randn(count, 2), schedule.rows(4), {}
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


def phased_demo(doc):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/phased_dmd", help="folder for the picture and result.json")
    parser.add_argument("--iterations", type=int, default=300, help="generator steps of a ring student; everything else scales along")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the ring students")
    parser.add_argument("--samples", type=int, default=50_000, help="drawn of each for table and picture")
    args = parser.parse_args()
    if min(args.iterations, args.samples) < 1:
        parser.error("--iterations and --samples must be above 0")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    began, out, data = time.time(), Path(args.out), Mixture.ring()
    out.mkdir(parents=True, exist_ok=True)
    errors, paths = toy(args.seed, max(1, args.iterations * 5 // 3))
    print("mean squared error of the velocity on (0.5, 1]")
    for name, label in (("full", "full interval"), ("unbiased", "subinterval, unbiased"), ("biased", "subinterval, biased")):
        print(f"{label:26s}{errors[name]:9.5f}   {errors[name] / errors['full']:7.1f} x full")

    reference = data.sample(args.samples, torch.Generator().manual_seed(args.seed))
    samples = ring(data, args.seed, args.iterations, args.lr, count=args.samples)
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
