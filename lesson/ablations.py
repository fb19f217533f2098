"""The papers' ablations on the embedded teacher, by one command.

    python -m lesson.ablations                      # all rows, three seeds: 40 minutes on two cores
    python -m lesson.ablations --rows B3 B4 --seeds 0       # a part of it

Tables 4, 5, 6 and Fig. 3 of ADM, and Phased DMD beside SGTS. The rows and what they share stand in
lesson/runs.py. Writes lesson/results/ablations.json (row -> lists over seeds) and .png, and prints
the table of docs/results.md. Finished rows are kept in --out.
"""
import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from lesson.runs import RESULTS, ROWS, Job, Row, losses, result_of, trained, training_seconds
from teachers.make_sdxl import train_vision_encoder
from teachers.shapes import every_drawing
from training.errors import run_main
from training.pictures import pyplot

COLUMNS = ("accuracy", "coverage_tv", "precision", "diversity", "seconds")
TEACHER = Row("20 steps with guidance", "", 27.37)


def another_backbone(folder, iterations):
    """A2's DINOv2, as large as the embedded SAM and trained for the same task, by the function that
    trained that."""
    if folder.exists():
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = train_vision_encoder(*every_drawing(), iterations, kind="dinov2")
    net.save_pretrained(f"{folder}.new")
    Path(f"{folder}.new").rename(folder)


def train_rows(args, out):
    """Train the rows, and those they go on from, for all seeds -> (names of the rows, {(seed,
    name): folder})."""
    needed = {*args.rows, *(ROWS[name].follows for name in args.rows)}
    names = [name for name in ROWS if name in needed]
    jobs = []
    for name in names:
        for seed in args.seeds:
            jobs.append(Job(seed, name, ROWS[name].flags, ROWS[name].follows))
    first = []
    if "A2" in names:
        first.append(partial(another_backbone, out / "dinov2", args.vision_iterations))
    return names, trained(out, jobs, args.jobs, first)


def figures_of(names, seeds, folders):
    """{row: {figure: [its value for each seed]}}, the teacher's first."""
    measured = {"teacher": [result_of(folders[seed, names[0]])["teacher"] for seed in seeds]}
    for name in names:
        measured[name] = []
        for seed in seeds:
            folder = folders[seed, name]
            student = result_of(folder)["student"]
            measured[name].append(dict(student, seconds=training_seconds(folder)))
    figures = {}
    for name, of_seeds in measured.items():
        figures[name] = {}
        for key in of_seeds[0]:
            figures[name][key] = [round(of_seed[key], 4) for of_seed in of_seeds]
    return figures


def cell(values, digits):
    """Mean ± standard deviation of several values, or the one value, or nothing."""
    if len(values) > 1:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    return "".join(f"{value:.{digits}f}" for value in values)


def table(figures):
    """The table in Markdown: mean over seeds ± standard deviation."""
    lines = ["| row | | " + " | ".join(COLUMNS) + " | paper, HPSv2 |", "|---" * 8 + "|"]
    for name, of_row in figures.items():
        row = ROWS.get(name, TEACHER)
        cells = []
        for key in COLUMNS:
            cells.append(cell(of_row.get(key, []), 0 if key == "seconds" else 3))
        paper = f"{row.paper:.2f}" if row.paper else ""
        lines.append(f"| {name} | {row.what} | " + " | ".join(cells) + f" | {paper} |")
    return "\n".join(lines)


def save_picture(path, names, seeds, folders, figures):
    """Accuracy and coverage of all rows, and the DMD loss during ADM, recorded but not minimised
    (Fig. 3)."""
    figure, (*panels, recorded) = pyplot().subplots(
        1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1, 1, 0.8))
    for ax, key in zip(panels, ("accuracy", "coverage_tv")):
        for y, of_row in enumerate(figures.values()):
            ax.plot(of_row[key], [y] * len(of_row[key]), "o", color="C0", alpha=0.6)
        ax.set(yticks=range(len(figures)), yticklabels=figures, title=key)
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    shown = [name for name in ("B1", "B4", "TTUR 8") if name in names]
    for k, name in enumerate(shown):
        for seed in seeds:
            iterations, dmd = zip(*losses(folders[seed, name], "adm")["adm: dmd"])
            label = name if seed == seeds[0] else None
            recorded.plot(iterations, dmd, color=f"C{k}", alpha=0.6, label=label)
    recorded.set(title="DMD loss during ADM (Fig. 3)", xlabel="iteration", yscale="log")
    if shown:
        recorded.legend()
    figure.savefig(path, dpi=90)


def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                   help="of the tables: " + ", ".join(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--vision-iterations", type=int, default=1500, help="of A2's backbone")
    p.add_argument("--jobs", type=int, default=2, help="rows at a time, one thread each")
    p.add_argument("--out", default="out/ablations", help="where the runs are kept")
    p.add_argument("--results", help="where figures and pictures go (default: lesson/results, and "
                                     "for a part of the rows or other seeds OUT/results)")
    args = p.parse_args()
    if args.jobs < 1 or args.vision_iterations < 1 or min(args.seeds) < 0:
        p.error("--jobs and --vision-iterations must be above 0, --seeds 0 or above")
    complete = args.rows == p.get_default("rows") and args.seeds == p.get_default("seeds")
    if args.results is None:
        args.results = RESULTS if complete else Path(args.out) / "results"
    return args


def main():
    args = parse()
    began = time.time()
    out = Path(args.out).resolve()
    results = Path(args.results)
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    names, folders = train_rows(args, out)
    figures = figures_of(names, args.seeds, folders)
    (results / "ablations.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))
    save_picture(results / "ablations.png", names, args.seeds, folders, figures)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
