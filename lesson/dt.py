"""What dt does: how far below t ADM's discriminator looks, with ADP before it and without.

    python -m lesson.dt                         # T/64, T/16, T/6, T/3; two processes
    python -m lesson.dt --scale 0.01 --out out/quick            # does it run?

x_fake and x_real start from the same x_t and differ by dt times the difference of the two scores.
So the critic's input has a signal that grows with dt, beside a page that does not. The number of
samples it takes to find the signal should grow like 1 / dt^2. The paper has a million samples for
T/64, here there are some thousands. hinge is the critic's loss, a mean over the last quarter: 2
says that it cannot tell the two apart, 0 that it always can. Writes lesson/results/dt.json and
.png. Students that lesson.tables has trained are taken from there.
"""
import json
import statistics
import time
from dataclasses import replace

import torch

from lesson.glyphs import SCHEDULE, SHARES
from lesson.rows import PAIRS, Job, add_run_flags, facts_of, name_of, parse_with_results, run_jobs
from lesson.students import Setting
from lesson.tables import cells_of, smoothed, values_of
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import parser_for, zero_or_more

FRACTIONS = (64, 16, 6, 3)                      # dt = T / these
LABELS = {"B4": "ADP, then ADM", "B1": "ADM without ADP"}
COLUMNS = ("hinge", "cell", "page", "tv")


def label_of(row, fraction, setting):
    """The file's name. The setting's own dt is the row of the tables itself."""
    return row if dt_of(fraction) == setting.dt else f"{row}-T{fraction}"


def dt_of(fraction):
    return round(SCHEDULE.T / fraction)


def jobs_of(seeds, setting):
    jobs = [Job(PAIRS, seed, setting) for seed in seeds]
    jobs += [Job("A5", seed, setting) for seed in seeds]
    for row in LABELS:
        for fraction in FRACTIONS:
            for seed in seeds:
                jobs.append(Job(row, seed, replace(setting, dt=dt_of(fraction)),
                                label_of(row, fraction, setting)))
    return jobs


def last_quarter(values):
    return statistics.mean(values[len(values) * 3 // 4:])


def figures_of(out, seeds, setting):
    """{row: {"T/64": {column: [its value for each seed]}}}"""
    figures = {}
    for row in LABELS:
        figures[row] = {}
        for fraction in FRACTIONS:
            of_dt = {column: [] for column in (*COLUMNS, "shares")}
            for seed in seeds:
                facts = facts_of(out / name_of(seed, label_of(row, fraction, setting)))
                of_dt["hinge"].append(last_quarter(values_of(facts["log"], "discriminator")))
                for column in ("cell", "page", "tv", "shares"):
                    of_dt[column].append(facts["measured"][column])
            figures[row][f"T/{fraction}"] = of_dt
    return figures


def table(figures):
    lines = ["| | dt | " + " | ".join(COLUMNS) + " |", "|---" * 6 + "|"]
    for row, of_row in figures.items():
        for dt, of_dt in of_row.items():
            lines.append(f"| {LABELS[row]} | {dt} | {cells_of(of_dt, COLUMNS)} |")
    return "\n".join(lines)


def save_picture(path, out, seeds, setting, figures):
    """A line with ADP and one without: the critic's hinge, and for each dt the shares."""
    figure, axes = pyplot().subplots(
        len(LABELS), 1 + len(FRACTIONS), figsize=(15, 5.6), layout="constrained",
        width_ratios=(1.6, 1, 1, 1, 1))
    edges = [k - 0.5 for k in range(len(SHARES) + 1)]
    for (row, of_row), (hinges, *histograms) in zip(figures.items(), axes):
        for k, (fraction, (dt, of_dt)) in enumerate(zip(FRACTIONS, of_row.items())):
            for seed in seeds:
                log = facts_of(out / name_of(seed, label_of(row, fraction, setting)))["log"]
                hinges.plot(*smoothed(log, "discriminator"), color=f"C{k}",
                            label=dt if seed == seeds[0] else None)
            ax = histograms[k]
            for shares in of_dt["shares"]:
                ax.step(edges, [*shares, shares[-1]], where="post", color=f"C{k}")
            ax.step(edges, [*SHARES, SHARES[-1]], "k", where="post", lw=1)
            page = statistics.mean(of_dt["page"])
            ax.set_title(f"dt = {dt}: pages {page:.2f}, tv {statistics.mean(of_dt['tv']):.2f}",
                         fontsize=9)
        hinges.set(title=f"{LABELS[row]}: the critic's hinge", xlabel="iteration", ylim=(0, 2.3))
        hinges.axhline(2, color="0.7", lw=0.8)
        hinges.legend()
    figure.savefig(path, dpi=90)


def parse():
    p = parser_for(__doc__)
    p.add_argument("--seeds", nargs="+", type=zero_or_more, default=[0, 1, 2])
    add_run_flags(p)
    return parse_with_results(p)


def main():
    args = parse()
    torch.set_num_threads(1)
    began = time.time()
    setting = Setting().scaled(args.scale)
    run_jobs(args.out, jobs_of(args.seeds, setting), args.processes)
    figures = figures_of(args.out, args.seeds, setting)
    (args.results / "dt.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))
    save_picture(args.results / "dt.png", args.out, args.seeds, setting, figures)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
