"""A teacher in the plane, distilled to one step in four ways: A1, ADP, ADP then ADM, ADP then DMD.

    python -m lesson.ring                       # eight Gaussians on a ring; about 75 s on one core
    python -m lesson.ring --data grid           # twenty-five on a grid
    python -m lesson.ring --dt 4 16 64          # D looks 4, 16 or 64 times below t: one is drawn
                                                # an iteration (the paper: T/64 = 16)

                                      tv  precision  modes  seconds
    data                           0.034      0.989      8        0
    teacher, 20 steps              0.062      0.980      8       13
    A1: squared error, 1 step      0.316      0.844      8       15
    ADP, 1 step                    0.325      0.908      8       42
    DMDX (ADP, ADM), 1 step        0.277      0.916      8       65
    ADP, DMD, 1 step               0.251      0.920      8       73

tv is the total variation between histograms of samples and data, precision the share of samples
within three standard deviations of a mode (lesson/worlds.py). Writes ring.png and result.json,
which has the share of each mode as well.
"""
import json
import math
import time
from copy import deepcopy

import torch

from adm import Scores, adm, adp, reflow
from discriminators import Discriminator
from lesson.students import average_in, optimizer_of, trainable_copy
from lesson.worlds import (WORLDS, Fourier, NetTaps, closed_form_teacher, mlp_heads, share_error,
                           shares, tv_and_precision)
from ode import Schedule, sample
from training.draws import Draws
from training.errors import run_main
from training.flag_problems import named
from training.pictures import pyplot
from training.scripts import a_count, folder_for, parser_for, zero_or_more

LABELS = {
    "data": "data",
    "teacher": "teacher, 20 steps",
    "a1": "A1: squared error, 1 step",
    "adp": "ADP, 1 step",
    "dmdx": "DMDX (ADP, ADM), 1 step",
    "dmd": "ADP, DMD, 1 step",
}
LINE = Schedule.straight()                      # the teacher's schedule is the straight line, too
STOPS = LINE.stops(1)                           # of every student


# ------------------------------------------------------------------------------- the four students


def averaged(net, optimizer, iterations, losses_of_stage):
    """Run a stage to its end -> the EMA of net's weights. A network with an adversary never
    settles: so its rate falls to zero, and its weights are averaged."""
    average = deepcopy(net).requires_grad_(False)
    rate = optimizer.param_groups[0]["lr"]
    for losses in losses_of_stage:
        average_in(average, net, 0.01)
        optimizer.param_groups[0]["lr"] = rate * (1 - losses["iteration"] / iterations)
    return average


def pair_batches(teacher, draws, count=20_000):
    """The teacher's ODE pairs, as the `batches` of adm.adp."""
    x_T = torch.randn(count, 2)
    with torch.no_grad():
        x_0 = sample(teacher, LINE, x_T, LINE.stops(20), {}, order=2)

    def batches(iteration):
        noise = draws(iteration)
        pick = (noise.uniform() * count).long()
        return [(noise, x_0[pick], x_T[pick], {})]
    return batches


def train_a1(teacher, pairs, iterations):
    student = trainable_copy(teacher)
    optimizer = optimizer_of(student, 1e-3)
    return averaged(student, optimizer, iterations,
                    reflow(student, optimizer, LINE, pairs, iterations))


def train_adp(teacher, pairs, iterations):
    student = trainable_copy(teacher)
    latent = Discriminator(NetTaps(teacher), mlp_heads(3, 256))
    pixel = Discriminator(Fourier(), mlp_heads(1, 128))
    optimizers = (optimizer_of(student, 3e-4), optimizer_of(latent.heads, 1e-3),
                  optimizer_of(pixel.heads, 1e-3))
    return averaged(student, optimizers[0], iterations, adp(
        student, D_1=latent, D_2=pixel, decode=lambda x: x, optimizers=optimizers,
        schedule=LINE, line=LINE, batches=pairs, iterations=iterations))


def train_adm(pretrained, teacher, draws, iterations, dt):
    """ADM from a student that ADP has trained, with a new fake score and new heads."""
    student = trainable_copy(pretrained)
    fake = trainable_copy(teacher)
    discriminator = Discriminator(NetTaps(teacher), mlp_heads(3, 256))
    optimizers = (optimizer_of(student, 3e-5), optimizer_of(fake, 1e-3),
                  optimizer_of(discriminator.heads, 3e-3))
    return averaged(student, optimizers[0], iterations, adm(
        student, Scores(fake, teacher, LINE), discriminator, optimizers=optimizers,
        student_schedule=LINE, stops=STOPS, guidance=(1.0, 1.0),
        batches=lambda i: [(draws(i), {}, {})], iterations=iterations, dt=dt))


def train_dmd(pretrained, teacher, draws, iterations):
    """DMD from the same student: ADM without its discriminator."""
    student = trainable_copy(pretrained)
    fake = trainable_copy(teacher)
    optimizers = (optimizer_of(student, 1e-4), optimizer_of(fake, 1e-3), None)
    return averaged(student, optimizers[0], iterations, adm(
        student, Scores(fake, teacher, LINE), discriminator=None, optimizers=optimizers,
        student_schedule=LINE, stops=STOPS, guidance=(1.0, 1.0),
        batches=lambda i: [(draws(i), {}, {})], iterations=iterations))


def teacher_and_students(data, seed, iterations, batch=256, dt=None):
    """Train a teacher of `data`, then its four one-step students. Yields (name, network, stops) of
    each as soon as it is trained. iterations: of ADP; the teacher gets five thirds as many, the
    others a third. dt: see adm.adm."""
    def draws_of(stage):
        return lambda i: Draws((seed, stage), i, [0], (2,), block=batch)

    third = math.ceil(iterations / 3)
    teacher = closed_form_teacher(data, LINE, 5 * third, draws_of(stage=0))
    yield "teacher", teacher, LINE.stops(20)
    pairs = pair_batches(teacher, draws_of(stage=1))
    yield "a1", train_a1(teacher, pairs, third), STOPS
    pretrained = train_adp(teacher, pairs, iterations)
    yield "adp", pretrained, STOPS
    yield "dmdx", train_adm(pretrained, teacher, draws_of(stage=2), third, dt), STOPS
    yield "dmd", train_dmd(pretrained, teacher, draws_of(stage=2), third), STOPS


# ------------------------------------------------------------------------------- table and picture


def parse():
    p = parser_for(__doc__)
    p.add_argument("--data", choices=WORLDS, default="ring", help="a world of lesson/worlds.py")
    p.add_argument("--seed", type=zero_or_more, default=0)
    p.add_argument("--out", default="out/ring", help="folder for the picture and result.json")
    p.add_argument("--iterations", type=a_count, default=1500,
                   help="generator steps of ADP; A1, ADM and DMD get a third as many, the teacher "
                        "five thirds")
    p.add_argument("--batch-size", type=a_count, default=256, help="samples a step")
    p.add_argument("--dt", type=int, nargs="+", metavar="TIMES",
                   help="how far below t ADM's discriminator looks, of T = 1000 times; of several, "
                        "one is drawn an iteration (default: T/64, the paper's)")
    p.add_argument("--samples", type=a_count, default=50_000,
                   help="drawn of each for table and picture")
    args = p.parse_args()
    if args.dt is not None:
        if min(args.dt) < 1 or max(args.dt) >= LINE.T:
            p.error(f"{named(args, 'dt')}: must be in 1 to {LINE.T - 1}")
    return args


def measured(x, data, reference):
    """What result.json has of samples x [N,2]."""
    return dict(tv_and_precision(x, data, reference),
                shares=shares(x, data).tolist(), share_error=share_error(x, data))


def print_row(name, figures, began):
    print(f"{LABELS[name]:28s}{figures['tv']:8.3f}{figures['precision']:11.3f}"
          f"{figures['modes']:7d}{time.time() - began:9.0f}", flush=True)


def save_picture(path, samples, result):
    """samples: {name: points [N,2]}, a panel each."""
    figure, axes = pyplot().subplots(1, len(samples), figsize=(16, 3.1), layout="constrained")
    for (name, x), ax in zip(samples.items(), axes):
        ax.plot(*x[:6000].T, ",", color="k" if name == "data" else "C0")
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal",
               title=f"{LABELS[name]}\ntv {result[name]['tv']:.2f}")
        ax.title.set_fontsize(9)
    figure.savefig(path, dpi=110)


def main():
    args = parse()
    torch.set_num_threads(1)                    # matrices this small are slower on two
    began = time.time()
    out = folder_for(args.out)

    data = WORLDS[args.data]()
    reference = data.sample(args.samples, torch.Generator().manual_seed(args.seed))
    again = data.sample(args.samples, torch.Generator().manual_seed(args.seed + 1))
    print(f"{'':28s}{'tv':>8s}{'precision':>11s}{'modes':>7s}{'seconds':>9s}")
    result = {"data": measured(again, data, reference)}
    print_row("data", result["data"], began)

    samples = {"data": reference}
    torch.manual_seed(args.seed)
    z = torch.randn(args.samples, 2)            # all start from the same noise
    for name, net, stops in teacher_and_students(data, args.seed, args.iterations,
                                                 args.batch_size, args.dt):
        with torch.no_grad():
            samples[name] = sample(net, LINE, z, stops, {}, order=2)    # one step is first order
        result[name] = measured(samples[name], data, reference)
        print_row(name, result[name], began)

    save_picture(out / "ring.png", samples, result)
    del result["data"]
    facts = dict(modes=len(data.means), weights=data.weights.tolist(),
                 seconds=time.time() - began, **result)
    (out / "result.json").write_text(json.dumps(facts, indent=1))
    print(f"wrote {out}/ring.png and {out}/result.json")


if __name__ == "__main__":
    run_main(main)
