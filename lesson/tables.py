"""The papers' tables on pages of glyphs: Tables 4, 5, 6 and Fig. 3 of ADM, Phased DMD beside SGTS.

    python -m lesson.tables                     # all rows, three seeds; two processes of one thread
    python -m lesson.tables --rows B3 B4 --seeds 0              # a part of it
    python -m lesson.tables --scale 0.01 --out out/quick        # does it run?

All rows share one setting. It stands in lesson/students.py, with the seeds on which it was chosen;
no row has one of its own. What was tried stands in docs/notebook.md. What stands in for the paper's
backbones: the pixel discriminator has a small convolutional network that was trained to read noisy
pages (for SAM); A2's is the same network with the weights it was drawn with (for DINOv2). A3
weights the two discriminators 0.7 and 0.3, A4 has the latent one alone. Finished students are kept
in --out. Writes lesson/results/glyphs.json (row -> lists over seeds) and .png.

cell, page, tv and diversity are defined in lesson/glyphs.py. seconds are the processor's, of one
thread, for training alone; those of a row that follows another include that one's. The paper's
column is HPSv2 of one-step SDXL.
"""
import json
import statistics
import time

import torch

from lesson.glyphs import measure
from lesson.rows import (PAIRS, ROWS, Job, Row, add_run_flags, facts_of, kept_pairs, name_of,
                         parse_with_results, run_jobs)
from lesson.students import Setting
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import parser_for, zero_or_more

COLUMNS = ("cell", "page", "tv", "diversity", "seconds")
WIDTH = 20                  # iterations, of which a point of a curve is the mean
TEACHER = Row("10 second-order steps: its pairs", None, 27.37)


def jobs_of(rows, seeds, setting):
    """The rows, and those they start from, for all seeds: in the order of ROWS, in which no row
    comes before the one it follows."""
    needed = {*rows, *(ROWS[name].follows for name in rows)}
    jobs = [Job(PAIRS, seed, setting) for seed in seeds]
    for name in ROWS:
        if name in needed:
            jobs += [Job(name, seed, setting) for seed in seeds]
    return jobs


def figures_of(out, rows, seeds):
    """{row: {column: [its value for each seed]}}, the teacher's first: that of its ODE pairs."""
    found = {"teacher": [dict(measure(kept_pairs(out, seed)[1]), seconds=0.0) for seed in seeds]}
    for name in sorted(rows):
        facts = [facts_of(out / name_of(seed, name)) for seed in seeds]
        found[name] = [dict(of_seed["measured"], seconds=of_seed["seconds"]) for of_seed in facts]
    figures = {}
    for name, of_seeds in found.items():
        figures[name] = {}
        for column in (*COLUMNS, "shares"):
            figures[name][column] = [of_seed[column] for of_seed in of_seeds]
    return figures


def cell(values, digits):
    """Mean ± standard deviation of several values, or the one value."""
    if len(values) > 1:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    return f"{values[0]:.{digits}f}"


def cells_of(figures, columns):
    """The cells of one row in Markdown, empty where it has no figures."""
    cells = []
    for column in columns:
        digits = 0 if column == "seconds" else 3
        cells.append(cell(figures[column], digits) if figures[column] else "")
    return " | ".join(cells)


def table(figures):
    """The table in Markdown: mean over seeds ± standard deviation."""
    lines = ["| row | | " + " | ".join(COLUMNS) + " | paper, HPSv2 |", "|---" * 8 + "|"]
    for name, of_row in figures.items():
        row = ROWS.get(name, TEACHER)
        paper = f"{row.paper:.2f}" if row.paper else ""
        lines.append(f"| {name} | {row.what} | {cells_of(of_row, COLUMNS)} | {paper} |")
    return "\n".join(lines)


def values_of(log, name):
    """A loss of a log, one value for each iteration that has it."""
    return [entry[name] for entry in log if name in entry]


def smoothed(log, name):
    """A loss of a log, in means over WIDTH iterations -> (iterations, means)."""
    values = values_of(log, name)
    starts = range(0, len(values), WIDTH)
    return starts, [statistics.mean(values[k:k + WIDTH]) for k in starts]


def save_picture(path, out, rows, seeds, figures):
    """Pages and shares of all rows, and the DMD loss during ADM, which is recorded and not
    minimised (Fig. 3)."""
    figure, (*panels, recorded) = pyplot().subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for ax, column in zip(panels, ("page", "tv")):
        for y, of_row in enumerate(figures.values()):
            ax.plot(of_row[column], [y] * len(of_row[column]), "o", color="C0", alpha=0.6)
        ax.set(yticks=range(len(figures)), yticklabels=figures)
        ax.set_title({"page": "legible pages", "tv": "tv of shares"}[column])
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    for k, name in enumerate(name for name in ("B1", "B4", "TTUR 8") if name in rows):
        for seed in seeds:
            log = facts_of(out / name_of(seed, name))["log"]
            recorded.plot(*smoothed(log, "dmd"), color=f"C{k}", alpha=0.7,
                          label=name if seed == seeds[0] else None)
        recorded.legend()
    recorded.set(title="DMD loss during ADM (Fig. 3)", xlabel="iteration", yscale="log")
    figure.savefig(path, dpi=90)


def parse():
    p = parser_for(__doc__)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                   help="of the tables: " + ", ".join(ROWS))
    p.add_argument("--seeds", nargs="+", type=zero_or_more, default=[0, 1, 2])
    add_run_flags(p)
    return parse_with_results(p)


def main():
    args = parse()
    torch.set_num_threads(1)
    began = time.time()
    setting = Setting().scaled(args.scale)
    run_jobs(args.out, jobs_of(args.rows, args.seeds, setting), args.processes)
    figures = figures_of(args.out, args.rows, args.seeds)
    (args.results / "glyphs.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))
    save_picture(args.results / "glyphs.png", args.out, args.rows, args.seeds, figures)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
