"""Phased DMD: the paper's toy in one dimension, then four steps on a ring beside DMD.

    python -m lesson.phased_dmd                 # about two minutes on one core
    python -m lesson.phased_dmd --lr 1e-3       # another rate for the ring's generators

The toy shows that the unbiased target is unbiased: networks that only ever see x_s learn the
velocity of x_0's diffusion, and the tempting target "eps - x_s" teaches another one. The ring shows
two phases of two steps beside DMD with stochastic gradient truncation (SGTS), one network for all
four steps. Writes phased_dmd.png and result.json.
"""
import json
import time
from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F

from adm import Scores
from lesson.students import average_in, optimizer_of, trainable_copy
from lesson.worlds import Mixture, closed_form_teacher, share_error, tv_and_precision
from ode import Schedule, network_output, sample
from phased_dmd import Expert, cut_into_phases, generate, phased_dmd, renoise, subinterval_loss
from training.draws import Draws
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import a_count, a_factor, folder_for, parser_for, zero_or_more

# --------------------------------------------------------------------------- the toy, one dimension

TOY = Mixture([[-1.0], [0.0], [1.0], [2.0]], 0.0)       # four points
TOY_SCHEDULE = Schedule.straight(last=1000)
MIDDLE = 500                                            # s, where the interval (0.5, 1] begins


class MLP(nn.Module):
    """The paper's toy network, four layers of width 512, called as diffusers calls its networks:
    [B,1] -> [B,1]."""

    def __init__(self, width=512):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, x, timestep, return_dict=False):
        told = timestep[:, None] / 250 - 2              # the times of (0.5, 1] become (0, 2]
        return (self.layers(torch.cat([x, told], 1)),)


def biased_loss(net, schedule, x_s, eps, s, t, cond):
    """What one would write first: velocity target eps - x_s, as if x_s were x_0. Its minimiser is
    not the velocity."""
    output = network_output(net, schedule, renoise(schedule, x_s, eps, s, t), t, cond)
    return F.mse_loss(output, eps - x_s)


def normal(u):
    """Uniform u [B] in (0, 1) -> normal numbers [B,1]."""
    return (2 * u[:, None] - 1).erfinv() * 2**0.5


def train_velocity(loss_of, s, iterations, seed, batch):
    """An MLP that learns the velocity on (s, T] from x_s; s = 0: from x_0. loss_of:
    `subinterval_loss` or `biased_loss`."""
    net = MLP()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    sobol = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed)
    for _ in range(iterations):
        u = sobol.draw(batch).clamp(1e-6, 1 - 1e-6)                             # [B,4]
        x_0 = TOY.means[TOY.modes_of(u[:, 0])]                                  # [B,1]
        t = s + 1 + ((TOY_SCHEDULE.T - s) * u[:, 1]).long()
        eps = normal(u[:, 2])
        x_s = TOY_SCHEDULE.add_noise(x_0, normal(u[:, 3]), s)
        loss_of(net, TOY_SCHEDULE, x_s, eps, s, t, {}).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return net


@torch.no_grad()
def paths_of(net):
    """100 Euler steps from t = 1 to 0.5 of 64 points, [101,64]."""
    stops = list(range(TOY_SCHEDULE.T, MIDDLE - 1, -5))
    path = [torch.linspace(-2.5, 2.5, 64)[:, None]]
    for step in zip(stops, stops[1:]):
        path.append(sample(net, TOY_SCHEDULE, path[-1], step, {}))
    return torch.cat(path, 1).T


def toy(seed, iterations, batch=128):
    """The paper's toy: x_0 uniform on {-1, 0, 1, 2}; three velocity networks, trained on (0, 1]
    from x_0 ("full"), on (0.5, 1] from x_s by the unbiased target, and by the biased one.

    Returns (mean squared error to the analytic velocity on (0.5, 1] by name, `paths_of` each by
    name, the analytic one's too).

    (x_0, noise, t) come from a scrambled Sobol sequence, so that a few seconds show the targets and
    not the noise in them: at 1,200 iterations errors of 0.0002 and 0.0008, against 0.0024 and
    0.0037 with independent draws (full, unbiased). So the ratio of the two grows as both vanish,
    1.6 to 2.5 here at 500 iterations, 4 at 1,200: what the unbiased network still lacks lies next
    to t = 0.5, where the clamp makes the weight on its velocity small.
    """
    torch.manual_seed(seed)
    nets = {
        "full": train_velocity(subinterval_loss, 0, iterations, seed, batch),
        "unbiased": train_velocity(subinterval_loss, MIDDLE, iterations, seed, batch),
        "biased": train_velocity(biased_loss, MIDDLE, iterations, seed, batch),
    }
    analytic = TOY.network(TOY_SCHEDULE)

    t = torch.randint(MIDDLE + 1, TOY_SCHEDULE.T + 1, (20_000,))
    x_0 = TOY.sample(len(t))
    x_t = TOY_SCHEDULE.add_noise(x_0, torch.randn(len(t), 1), t)
    paths = {"analytic": paths_of(analytic)}
    errors = {}
    with torch.no_grad():
        truth = network_output(analytic, TOY_SCHEDULE, x_t, t, {})
        for name, net in nets.items():
            velocity = network_output(net, TOY_SCHEDULE, x_t, t, {})
            errors[name] = F.mse_loss(velocity, truth).item()
            paths[name] = paths_of(net)
    return errors, paths


# ---------------------------------------------------------------------- four steps, two dimensions

RING_SCHEDULE = Schedule.straight()
STOPS = RING_SCHEDULE.stops(4)


def train_expert(earlier, teacher, stops, draws, iterations, lr):
    """One phase -> the Expert with the EMA of its weights, as in lesson/ring.py. earlier: the
    experts of the phases before it."""
    net, fake = trainable_copy(teacher), trainable_copy(teacher)
    average = deepcopy(teacher)
    optimizers = (optimizer_of(net, lr, beta_2=0.999), optimizer_of(fake, 1e-3, beta_2=0.999))
    for losses in phased_dmd(
            [*earlier, Expert(net, stops)], Scores(fake, teacher, RING_SCHEDULE),
            optimizers=optimizers, guidance=(1.0, 1.0),
            batches=lambda i: [(draws(i), {}, {})], iterations=iterations):
        average_in(average, net, 0.01)
    return Expert(average, stops)


def ring(data, seed, iterations, lr, count, batch=256):
    """A teacher of `data`, then its four-step students: name -> samples [count,2].

    One phase of four steps is DMD with SGTS; two phases of two get half the iterations each. So
    both have equal network evaluations when sampling, and equal generator and fake steps when
    training. The teacher regresses the closed form: the shares it gets wrong would be its
    students' too.

    share_error at three generator rates, seeds 0, 1, 2: Phased DMD hardly notices, one network for
    all noise does.
        lr      phased                   sgts
        3e-4    0.013                    0.010
        5e-4    0.014  0.014  0.008      0.024  0.012  0.034
        1e-3    0.013  0.011  0.021      0.023  0.029  0.028
    So Phased DMD has about half of SGTS's error at the higher rates, and no less than it at the
    lowest.
    """
    def draws_of(stage):
        return lambda i: Draws((seed, stage), i, [0], (2,), block=batch)

    torch.manual_seed(seed)
    teacher = closed_form_teacher(data, RING_SCHEDULE, 6 * iterations, draws_of(stage=0))
    z = torch.randn(count, 2)
    samples = {}
    with torch.no_grad():
        samples["teacher"] = sample(teacher, RING_SCHEDULE, z, RING_SCHEDULE.stops(20), {}, order=2)
    for name, boundaries in (("sgts", []), ("phased", [500])):
        phases = cut_into_phases(STOPS, boundaries)
        experts = []
        for k, stops in enumerate(phases, 1):
            experts.append(train_expert(experts, teacher, stops, draws_of(stage=k),
                                        max(1, iterations // len(phases)), lr))
        with torch.no_grad():
            samples[name] = generate(experts, RING_SCHEDULE, z, {})
    return samples


# ------------------------------------------------------------------------------ tables and picture

TOY_LABELS = {
    "full": "full interval",
    "unbiased": "subinterval, unbiased",
    "biased": "subinterval, biased",
}
RING_LABELS = {
    "teacher": "teacher, 20 second-order steps",
    "sgts": "DMD with SGTS, 4 steps",
    "phased": "Phased DMD, 2 phases, 4 steps",
}


def parse():
    p = parser_for(__doc__)
    p.add_argument("--seed", type=zero_or_more, default=0)
    p.add_argument("--out", default="out/phased_dmd", help="folder for the picture and result.json")
    p.add_argument("--iterations", type=a_count, default=300,
                   help="generator steps of a ring student; everything else scales along")
    p.add_argument("--lr", type=a_factor, default=5e-4, help="of the ring students")
    p.add_argument("--samples", type=a_count, default=50_000,
                   help="drawn of each for table and picture")
    return p.parse_args()


def print_toy(errors):
    print("mean squared error of the velocity on (0.5, 1]")
    for name, label in TOY_LABELS.items():
        ratio = errors[name] / errors["full"]
        print(f"{label:26s}{errors[name]:9.5f}   {ratio:7.1f} x full")


def print_ring(result):
    print(f"\n{'ring of eight Gaussians':32s}{'tv':>8s}{'share_error':>13s}{'precision':>11s}"
          f"{'modes':>7s}")
    for name, figures in result.items():
        print(f"{RING_LABELS[name]:32s}{figures['tv']:8.3f}{figures['share_error']:13.4f}"
              f"{figures['precision']:11.3f}{figures['modes']:7d}")


def save_picture(path, errors, paths, samples, result):
    """Above the paths of the toy's three networks, below samples of the ring's three."""
    figure, (above, below) = pyplot().subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    time_axis = torch.linspace(1, 0.5, 101)
    for name, ax in zip(errors, above):
        ax.plot(time_axis, paths["analytic"], "0.6", lw=0.8)
        ax.plot(time_axis, paths[name], "C0", lw=0.5)
        ax.set(xlim=(1, 0.5), xlabel="t", ylabel="x",
               title=f"{name} (blue), analytic (grey): {errors[name]:.4f}")
    for (name, x), ax in zip(samples.items(), below):
        ax.plot(*x[:8000].T, ",")
        figures = result[name]
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal",
               title=f"{RING_LABELS[name]}\nshare_error {figures['share_error']:.3f}, "
                     f"tv {figures['tv']:.2f}")
    figure.savefig(path, dpi=110)


def main():
    args = parse()
    began = time.time()
    out = folder_for(args.out)
    errors, paths = toy(args.seed, max(1, args.iterations * 5 // 3))
    print_toy(errors)

    data = Mixture.ring()
    reference = data.sample(args.samples, torch.Generator().manual_seed(args.seed))
    samples = ring(data, args.seed, args.iterations, args.lr, args.samples)
    result = {}
    for name, x in samples.items():
        result[name] = dict(tv_and_precision(x, data, reference), share_error=share_error(x, data))
    print_ring(result)

    save_picture(out / "phased_dmd.png", errors, paths, samples, result)
    facts = dict(toy=errors, mixture=result, seconds=time.time() - began)
    (out / "result.json").write_text(json.dumps(facts, indent=1))
    print(f"\nwrote {out}/phased_dmd.png and {out}/result.json ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    run_main(main)
