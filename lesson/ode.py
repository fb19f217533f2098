"""The PF-ODE of a Gaussian mixture, and the measured order of the two solvers of ode.sample.

    python -m lesson.ode                # seconds: a picture, a table, result.json

        schedule               solver          10        20  ...      200    order
        SD3 (flow)             DDIM/Euler   1.6e-01   8.0e-02     8.2e-03     0.99
        SD3 (flow)             multistep    6.5e-02   2.5e-02     3.1e-04     2.03

The score is known in closed form (lesson/worlds.py), so all that is seen here is the solver's own
error. Twice as many steps halve it at first order, and leave a quarter at second.
"""
import json
import math

import torch

from lesson.worlds import Mixture
from ode import Schedule, sample
from training.errors import run_main
from training.pictures import pyplot
from training.schedules import from_diffusers
from training.scripts import folder_for, parser_for, zero_or_more

STEPS = [10, 20, 25, 40, 50, 100, 125, 200]
SOLVERS = {1: "DDIM/Euler", 2: "multistep"}


def released_schedules():
    """{name: Schedule} of the three families, from scheduler configs as released, and ADP's
    line."""
    from diffusers import (CogVideoXDDIMScheduler, EulerDiscreteScheduler,
                           FlowMatchEulerDiscreteScheduler)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sdxl = EulerDiscreteScheduler(**betas)
    cogvideox = CogVideoXDDIMScheduler(**betas, snr_shift_scale=3.0, rescale_betas_zero_snr=True,
                                       prediction_type="v_prediction")
    sd3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {
        "SDXL (eps)": from_diffusers(sdxl),
        "CogVideoX-2b (v)": from_diffusers(cogvideox),
        "SD3 (flow)": from_diffusers(sd3),
        "straight line (flow)": Schedule.straight(),
    }


def solve(net, schedule, x_T, steps, order):
    return sample(net, schedule, x_T, schedule.stops(steps), {}, order=order)


def order_of(errors):
    """The measured order: minus the slope of log(error) over log(steps), of the last four."""
    log_steps = torch.tensor([[math.log(n), 1] for n in STEPS[-4:]])            # [4,2]
    log_errors = torch.tensor(errors[-4:]).log()[:, None]                       # [4,1]
    return -torch.linalg.lstsq(log_steps, log_errors).solution[0].item()


def measure(data, x_T):
    """{(schedule's name, order of the solver): (error by number of steps, measured order)}. The
    error is the median distance of x_0 to that of 1000 second-order steps."""
    measured = {}
    for name, schedule in released_schedules().items():
        net = data.network(schedule)
        exact = solve(net, schedule, x_T, schedule.T, order=2)
        for order in SOLVERS:
            errors = []
            for steps in STEPS:
                x_0 = solve(net, schedule, x_T, steps, order)
                errors.append((x_0 - exact).norm(dim=1).median().item())
            measured[name, order] = errors, order_of(errors)
    return measured


def print_table(measured):
    print("median error of x_0 against 1000 second-order steps, "
          "and the measured order (slope over the last four)\n")
    print(f"{'schedule':22s} solver  " + "".join(f"{n:>10d}" for n in STEPS) + "    order")
    for (name, order), (errors, slope) in measured.items():
        numbers = "".join(f"{error:10.1e}" for error in errors)
        print(f"{name:22s} {SOLVERS[order]:10s}{numbers}{slope:9.2f}")
    print("\nEvenly spaced stops of a VP table leave its last jump long in sigma (sigma grows like "
          "the square root of the time):\nthat one first-order jump, not the solver, sets SDXL's "
          "and CogVideoX's order. The straight lines show the solvers' own.")


def draw_paths(ax, data, x_T):
    """Paths from noise to data, on the straight line."""
    schedule = Schedule.straight()
    net = data.network(schedule)
    stops = schedule.stops(100)
    paths = [x_T]
    for step in zip(stops, stops[1:]):
        paths.append(sample(net, schedule, paths[-1], step, {}))
    paths = torch.stack(paths)                                                  # [101,B,2]
    x_0 = solve(net, schedule, x_T, schedule.T, order=2)
    ax.plot(paths[..., 0], paths[..., 1], "0.6", lw=0.7)
    ax.plot(*x_T.T, "k.", ms=4, label="x_T")
    ax.plot(*x_0.T, "r.", ms=6, label="x_0")
    ax.set(title="the PF-ODE carries noise to data", aspect="equal")
    ax.legend()


def draw_errors(ax, measured):
    names = list(dict.fromkeys(name for name, _ in measured))
    for (name, order), (errors, slope) in measured.items():
        colour = "rgbk"[names.index(name)]
        line = {1: "o--", 2: "o-"}[order]
        label = f"{name}, order {order}: measured {slope:.2f}"
        ax.loglog(STEPS, errors, colour + line, label=label)
    ax.set(title="solver error", xlabel="network evaluations", ylabel="median error of x_0")
    ax.legend(fontsize=7)


def main():
    p = parser_for(__doc__)
    p.add_argument("--out", default="out/ode", help="folder for the picture and result.json")
    p.add_argument("--seed", type=zero_or_more, default=0)
    args = p.parse_args()
    out = folder_for(args.out)

    data = Mixture.ring(std=0.5)
    data.means = data.means.double()
    generator = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(512, 2, dtype=torch.float64, generator=generator)
    measured = measure(data, x_T)
    print_table(measured)

    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 5))
    draw_paths(left, data, x_T[:40])
    draw_errors(right, measured)
    figure.tight_layout()
    figure.savefig(out / "ode.png", dpi=110)
    result = {}
    for (name, order), (errors, slope) in measured.items():
        result[f"{name}, order {order}"] = dict(zip(map(str, STEPS), errors), order=slope)
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\nwrote {out}/ode.png and {out}/result.json")


if __name__ == "__main__":
    run_main(main)
