"""The pictures of the lesson's chapters 1, 3, 4 and 8.

    python -m lesson.chapters           # two minutes; students that lesson.tables has trained are
                                        # taken from there

    score.png           1: points of the ring, noised, and where the score sends them
    guidance.png        3: the embedded teacher's answers to one caption, by the guidance weight
    regression.png      4: the teacher's pages, and what regression answers to the same noise
    steps.png           8: a student of four steps: where it stops, and its jump from there
"""
from pathlib import Path

import torch

from lesson.adm import draw_pages
from lesson.glyphs import SCHEDULE, SHAPE, no_prompt
from lesson.rows import PAIRS, Job, add_run_flags, kept_pairs, load_student, name_of, run_jobs
from lesson.students import FOUR_STEPS, Setting
from lesson.worlds import Mixture
from ode import Schedule, predict, sample
from teachers import shapes
from training.draws import stream
from training.errors import run_main
from training.pictures import grid, pyplot
from training.scripts import folder_for, parser_for

SEED = 0
CAPTIONS = ["a large red circle on blue", "a small yellow triangle on green"]


def save_score(path):
    """Arrows go from x_t towards x0_hat, two fifths of the way: along the score, up to the pull to
    the middle that alpha_t adds."""
    schedule = Schedule.straight()
    data = Mixture.ring()
    figure, axes = pyplot().subplots(1, 4, figsize=(14, 3.7), layout="constrained")
    for ax, t in zip(axes, (0, 150, 400, 800)):
        x_0 = data.sample(250, stream(1))
        x_t = schedule.add_noise(x_0, torch.randn(x_0.shape, generator=stream(2)), t)
        ax.plot(*x_t.T, ".", ms=3, color="0.5")
        ax.plot(*data.means.T, "r+", ms=8)
        if t > 0:
            x0_hat, _ = predict(data.network(schedule), schedule, x_t, t, {})
            ax.quiver(*x_t.T, *(x0_hat - x_t).T, angles="xy", scale_units="xy", scale=2.5,
                      width=0.003, color="C0")
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal", title=f"t = {t}")
    figure.savefig(path, dpi=80)


def save_guidance(path):
    pipe = shapes.shipped_teacher()
    captions = [caption for caption in CAPTIONS for _ in range(4)]
    shown = {}
    for w in (1.0, 2.0, 3.0, 7.0):
        drawn = shapes.drawn_by(pipe, captions, SEED, guidance_scale=w)         # [8,3,32,32]
        right = shapes.accuracy(drawn, captions)
        shown[f"w = {w:g}: {right:.0%} right"] = drawn
    grid(path, shown, captions)


def save_regression(path, out):
    """Twelve pages of the teacher's pairs, and the student's answers to the same x_T."""
    x_T, x_0 = kept_pairs(out, SEED)
    student = load_student(out / name_of(SEED, "A1")).experts[0]
    with torch.no_grad():
        answers = sample(student.net, SCHEDULE, x_T[:12], student.stops, no_prompt(12))
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    for ax, pages, title in zip(axes, (x_0[:12], answers), (
            "the teacher's x_0, 10 steps from x_T", "regression's one jump from the same x_T")):
        draw_pages(ax, pages, rows=2, columns=6)
        ax.set_title(title)
    figure.savefig(path, dpi=90)


@torch.no_grad()
def save_steps(path, out):
    """x_t at each stop of a four-step student, and its jump x0_hat from there."""
    student = load_student(out / name_of(SEED, "SGTS")).experts[0]
    n = 4
    x = torch.randn(n, *SHAPE, generator=stream(3))
    figure, axes = pyplot().subplots(2, 4, figsize=(10, 5.4), layout="constrained")
    for (above, below), t, s in zip(axes.T, FOUR_STEPS, FOUR_STEPS[1:]):
        jump, eps_hat = predict(student.net, SCHEDULE, x, t, no_prompt(n))
        for ax, pages, title in ((above, x, f"x_t, t = {t}"), (below, jump, "its jump, x0_hat")):
            draw_pages(ax, pages, rows=2, columns=2)
            ax.set_title(title)
        x = SCHEDULE.step(jump, eps_hat, s)
    figure.savefig(path, dpi=80)


def main():
    p = parser_for(__doc__)
    add_run_flags(p)
    p.add_argument("--pictures", type=Path, default=Path("out/chapters"),
                   help="folder for the pictures")
    args = p.parse_args()
    torch.set_num_threads(1)
    folder_for(args.pictures, "--pictures")
    setting = Setting().scaled(args.scale)
    run_jobs(args.out, [Job(PAIRS, SEED, setting), Job("A1", SEED, setting),
                        Job("SGTS", SEED, setting)], args.processes)
    save_score(args.pictures / "score.png")
    save_guidance(args.pictures / "guidance.png")
    save_regression(args.pictures / "regression.png", args.out)
    save_steps(args.pictures / "steps.png", args.out)
    print(f"wrote score.png, guidance.png, regression.png and steps.png to {args.pictures}")


if __name__ == "__main__":
    run_main(main)
