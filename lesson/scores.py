"""The two scores at one x_t: what DMD takes of them, and what ADM's critic can learn.

    python -m lesson.scores             # half a minute on one core: picture, table, result.json

The world is the ring of eight Gaussians (lesson/worlds.py). The "student" is a ring as well, wider
and with too much of two modes, so both scores are known in closed form and nothing here depends on
how well a network learnt them. At x_t each score guesses an x_0: x0_fake what the student would
have drawn, x0_real what the data has there. DMD takes their difference as it is. ADM goes from x_t
to t - dt with each and hands the two results to a critic, whose slope then moves the student.

The table says how well that slope agrees with the difference of the scores: the cosine between
them over fresh samples of the student, for several dt and for the number of samples that the
critic has seen. 1 is DMD's direction, 0 has nothing to do with it.
"""
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from discriminators import HINGE
from lesson.dt import FRACTIONS, dt_of, last_quarter
from lesson.worlds import Mixture, Net
from ode import Schedule, predict
from training.draws import stream
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import folder_for, parser_for, zero_or_more

SCHEDULE = Schedule.straight()
DATA = Mixture.ring()
STUDENT = Mixture.ring(std=0.3, weights=[4, 1, 1, 1, 4, 1, 1, 1])
TIME = 400                                      # of T = 1000: the modes are still apart
SAMPLES = (4096, 16384, 65536)                  # that the critic has seen
BATCH = 256
POINT = torch.tensor([[0.85, 0.75]])             # the one x_t of the picture


def pairs_at(x_t):
    """((x0_hat, eps_hat) of the student's score, of the data's) at x_t [B,2] and TIME."""
    return [predict(world.network(SCHEDULE), SCHEDULE, x_t, TIME, {}) for world in (STUDENT, DATA)]


def noised(n, generator):
    """n of the student's samples, noised to TIME, [n,2]."""
    x_0 = STUDENT.sample(n, generator)
    return SCHEDULE.add_noise(x_0, torch.randn(x_0.shape, generator=generator), TIME)


def steps_from(x_t, dt):
    """(x_fake, x_real): one PF-ODE step from x_t with each score, lines 20 and 21."""
    fake, real = pairs_at(x_t)
    return SCHEDULE.step(*fake, TIME - dt), SCHEDULE.step(*real, TIME - dt)


class Critic(torch.nn.Module):
    """An MLP: x [B,2] -> D(x) [B]."""

    def __init__(self):
        super().__init__()
        self.net = Net(width=128)

    def forward(self, x):
        output, = self.net(x, torch.zeros(len(x)))                              # [B,2]
        return output[:, 0]


def slope(critic, dt, x_t):
    """dD/dx at x_fake, [B,2]: where G's loss -D moves a sample noised to x_t."""
    x_fake, _ = steps_from(x_t, dt)
    x_fake.requires_grad_()
    return torch.autograd.grad(critic(x_fake).sum(), x_fake)[0]


@torch.no_grad()
def direction(x_t):
    """Where DMD moves a sample noised to x_t, without its normaliser: x0_real - x0_fake, [B,2]."""
    (x0_fake, _), (x0_real, _) = pairs_at(x_t)
    return x0_real - x0_fake


def agreement(critic, dt, generator):
    """The cosine of the critic's slope and the scores' difference, over samples and axes."""
    x_t = noised(4096, generator)
    moved = slope(critic, dt, x_t).flatten()
    return F.cosine_similarity(moved, direction(x_t).flatten(), 0).item()


def learn(dt, seed):
    """Train a critic by the hinge on fresh samples -> (critic, the cosine after each of SAMPLES,
    the hinge over the last quarter)."""
    torch.manual_seed(seed)
    critic = Critic()
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-3, betas=(0.0, 0.99), weight_decay=0.0)
    cosines, hinges = [], []
    for i in range(SAMPLES[-1] // BATCH):
        x_fake, x_real = steps_from(noised(BATCH, stream(seed, 0, i)), dt)
        loss = HINGE.discriminator(critic(x_fake), critic(x_real))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hinges.append(loss.item())
        if (i + 1) * BATCH in SAMPLES:
            cosines.append(agreement(critic, dt, stream(seed, 1)))
    return critic, cosines, last_quarter(hinges)


def table(result):
    lines = ["| dt | " + " | ".join(f"{n:,} samples" for n in SAMPLES) + " | hinge |",
             "|---" * (len(SAMPLES) + 2) + "|"]
    for fraction in FRACTIONS:
        found = result[f"T/{fraction}"]
        cells = [f"{statistics.mean(of_seeds):.2f}" for of_seeds in zip(*found["cosine"])]
        cells.append(f"{statistics.mean(found['hinge']):.2f}")
        lines.append(f"| T/{fraction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the picture

def draw_worlds(ax):
    ax.plot(*STUDENT.sample(1500, stream(1)).T, ".", ms=2, color="C3", label="student: x0_hat")
    ax.plot(*DATA.means.T, "k+", ms=9, label="modes of the data")
    ax.set_title("the student is wide, and likes two modes too well")


def draw_point(ax):
    """One x_t, both guesses of x_0, and both steps to t - T/6."""
    (x0_fake, _), (x0_real, _) = pairs_at(POINT)
    x_fake, x_real = steps_from(POINT, dt_of(6))
    ax.plot(*noised(4000, stream(2)).T, ".", ms=2, color="0.8")
    ax.plot(*DATA.means.T, "k+", ms=12)
    ax.plot(*POINT.T, "ko", label="x_t")
    guesses = dict(fake=(x0_fake, x_fake, "C3"), real=(x0_real, x_real, "C2"))
    for name, (x_0, x_s, colour) in guesses.items():
        ax.plot(*torch.cat([POINT, x_0]).T, ":", color=colour)
        ax.plot(*x_0.T, "*", ms=11, color=colour, label=f"x0_{name}")
        ax.plot(*x_s.T, "o", color=colour, label=f"x_{name}, at t - dt")
    ax.set_title("two scores at one x_t, dt = T/6")
    ax.set(xlim=(0.5, 2.4), ylim=(-0.3, 1.6))


def draw_field(ax, arrows, title):
    """arrows: x_t [B,2] -> [B,2]."""
    x_t = noised(300, stream(3))
    field = arrows(x_t)
    field = field / field.square().sum(1).mean().sqrt()
    ax.quiver(*x_t.T, *field.T, angles="xy", color="C0", width=0.004, scale=28)
    ax.plot(*DATA.means.T, "k+", ms=9)
    ax.set_title(title)


def save_picture(path, critics):
    figure, axes = pyplot().subplots(1, 5, figsize=(20, 4.3), layout="constrained")
    draw_worlds(axes[0])
    draw_point(axes[1])
    draw_field(axes[2], direction, "what DMD takes: x0_real - x0_fake")
    for ax, fraction in zip(axes[3:], (6, 64)):
        critic, cosine = critics[fraction]
        arrows = partial(slope, critic, dt_of(fraction))
        draw_field(ax, arrows, f"what ADM does: the critic's slope,\ndt = T/{fraction}, after "
                               f"{SAMPLES[-1]:,} samples (cosine {cosine:.2f})")
    for ax in axes:
        ax.set(aspect="equal", xticks=[], yticks=[])
    for ax in axes[[0, 2, 3, 4]]:
        ax.set(xlim=(-3, 3), ylim=(-3, 3))
    for ax in axes[:2]:
        ax.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main():
    p = parser_for(__doc__)
    p.add_argument("--out", type=Path, default=Path("out/scores"),
                   help="folder for the picture and result.json")
    p.add_argument("--seeds", nargs="+", type=zero_or_more, default=[0, 1, 2],
                   help="of the critics")
    args = p.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    folder_for(args.out)
    result, critics = {}, {}
    for fraction in FRACTIONS:
        found = dict(cosine=[], hinge=[])
        for seed in args.seeds:
            critic, cosines, hinge = learn(dt_of(fraction), seed)
            found["cosine"].append(cosines)
            found["hinge"].append(hinge)
            if seed == args.seeds[0]:                       # which the picture shows
                critics[fraction] = critic, cosines[-1]
        result[f"T/{fraction}"] = found
    print(table(result))
    save_picture(args.out / "scores.png", critics)
    (args.out / "result.json").write_text(json.dumps(dict(samples=SAMPLES, **result), indent=1))
    print(f"wrote {args.out}/scores.png and {args.out}/result.json ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    run_main(main)
