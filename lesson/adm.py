"""Pages of glyphs, distilled to one step in six ways: what the papers claim, in minutes.

    python -m lesson.adm                        # two processes of one thread
    python -m lesson.adm --dt 16                # D looks 16 times below t: the paper's T/64
    python -m lesson.adm --scale 0.01           # a hundredth of all iterations: does it run?

Seed 0. Seconds are the processor's, of one thread, with ADP's; the whole takes 250 to 290:

                                cell    page      tv  diversity      seconds
    teacher, 10 steps          0.997   0.970   0.030      0.841
    A1: squared error          0.801   0.129   0.048      0.841           43
    ADP                        0.845   0.203   0.056      0.841          140
    ADM from the teacher       0.488   0.001   0.182      0.831           66
    DMD from the teacher       1.000   1.000   0.750      0.000           40
    ADP, then DMD              0.882   0.311   0.133      0.804          183
    DMDX: ADP, then ADM        0.852   0.234   0.065      0.837          216

The world, its reader and what the columns mean stand in lesson/glyphs.py, the students in
lesson/students.py. Writes adm.png, pages to read with the naked eye and the shares of the glyphs on
them, and result.json. ADP has the weights of row A3. With the paper's, about twice the iterations,
all rows and three seeds: `python -m lesson.tables`. A shorter first look, in the plane:
`python -m lesson.ring`.
"""
import json
import shutil
import time
from dataclasses import replace

import torch

from lesson.glyphs import SCHEDULE, SHARES, measure, pages
from lesson.rows import (PAIRS, Job, add_run_flags, facts_of, kept_pairs, load_student, name_of,
                         run_jobs, student_pages)
from lesson.students import Setting
from training.draws import stream
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import folder_for, parser_for, zero_or_more

ROW_OF = {"a1": "A1", "adp": "A5", "adm": "B1", "dmd": "B2", "adp_dmd": "B3", "dmdx": "B4"}
LABELS = {
    "data": "true pages",
    "teacher": "teacher, 10 steps",
    "a1": "A1: squared error",
    "adp": "ADP",
    "adm": "ADM from the teacher",
    "dmd": "DMD from the teacher",
    "adp_dmd": "ADP, then DMD",
    "dmdx": "DMDX: ADP, then ADM",
}
COLUMNS = ("cell", "page", "tv", "diversity", "seconds")
SHOWN = (2, 3)                  # rows and columns of pages in the picture

# About half the iterations of lesson.tables, to take five minutes, and ADP with the weights of row
# A3: with the paper's it needs more of them to be ahead of A1 (docs/notebook.md).
SHORT = replace(Setting(), pairs=1024, iterations_a1=660, iterations_adp=660, iterations_adm=220,
                iterations_without_adp=120, lambda_1=0.7)


def parse():
    p = parser_for(__doc__)
    p.add_argument("--seed", type=zero_or_more, default=0)
    add_run_flags(p, out="out/adm")
    p.add_argument("--dt", type=int, default=Setting().dt, metavar="TIMES",
                   help="how far below t ADM's discriminator looks, of T = 1000 times")
    args = p.parse_args()
    if not 1 <= args.dt < SCHEDULE.T:
        p.error(f"--dt {args.dt}: must be in 1 to {SCHEDULE.T - 1}")
    return args


def train_all(args, setting):
    """-> {name: under which its student is kept}"""
    if (args.out / "result.json").exists():     # finished: it shows what its code does now
        shutil.rmtree(args.out / f"seed{args.seed}", ignore_errors=True)
        (args.out / "result.json").unlink()
    # the first needs no pairs: it is under way while they are collected
    jobs = [Job(PAIRS, args.seed, setting)]
    for row in ("B1", "A5", "B2", "A1", "B4", "B3"):
        jobs.append(Job(row, args.seed, setting))
    run_jobs(args.out, jobs, args.processes)
    return {name: args.out / name_of(args.seed, row) for name, row in ROW_OF.items()}


def print_table(result):
    print(f"\n{'one step':28s}" + "".join(f"{column:>11s}" for column in COLUMNS))
    for name, found in result.items():
        figures = "".join(f"{found[column]:11.3f}" for column in COLUMNS[:-1])
        print(f"{LABELS[name]:28s}{figures}{found['seconds']:11.0f}")


def sheet(x, rows, columns):
    """Pages [n,1,12,12] -> one picture of rows x columns of them in [0,1], with a gap between."""
    x = (x[:rows * columns, 0].clamp(-1, 1) + 1) / 2                            # [n,12,12]
    x = torch.cat([x, x.new_full((rows * columns - len(x), *x.shape[1:]), 0.5)])
    framed = torch.nn.functional.pad(x, (1, 1, 1, 1), value=0.5)                # [n,14,14]
    side = framed.shape[-1]
    return framed.view(rows, columns, side, side).permute(0, 2, 1, 3).reshape(rows * side, -1)


def draw_pages(ax, x, rows, columns):
    ax.imshow(sheet(x, rows, columns).numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def save_picture(path, pages_of, result):
    """Above six pages of each, below the shares of the glyphs on them beside the true ones."""
    figure, (above, below) = pyplot().subplots(
        2, len(pages_of), figsize=(2.6 * len(pages_of), 4.6), layout="constrained",
        height_ratios=(1.25, 1), sharey="row")
    for (name, x), picture, histogram in zip(pages_of.items(), above, below):
        draw_pages(picture, x, *SHOWN)
        picture.set_title(f"{LABELS[name]}\nlegible pages {result[name]['page']:.2f}", fontsize=9)
        histogram.bar(range(len(SHARES)), result[name]["shares"], color="C0")
        histogram.step([k - 0.5 for k in range(len(SHARES) + 1)], [*SHARES, SHARES[-1]], "k",
                       where="post", lw=1)
        histogram.set(xticks=range(len(SHARES)), xlabel="glyph (line: its true share)")
        histogram.set_title(f"tv of shares {result[name]['tv']:.2f}", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")     # or it cuts the labels on the left


def main():
    args = parse()
    torch.set_num_threads(1)
    began = time.time()
    folder_for(args.out)
    setting = replace(SHORT.scaled(args.scale), dt=args.dt)
    students = train_all(args, setting)

    pages_of = {"data": pages(setting.count, stream(args.seed)),
                "teacher": kept_pairs(args.out, args.seed)[1]}
    result = {name: dict(measure(x), seconds=0.0) for name, x in pages_of.items()}
    for name, path in students.items():
        pages_of[name] = student_pages(load_student(path), SHOWN[0] * SHOWN[1])
        kept = facts_of(path)
        result[name] = dict(kept["measured"], seconds=kept["seconds"])
    print_table(result)
    save_picture(args.out / "adm.png", pages_of, result)
    facts = dict(seconds=time.time() - began, true_shares=SHARES.tolist(), **result)
    (args.out / "result.json").write_text(json.dumps(facts, indent=1))
    print(f"wrote {args.out}/adm.png and {args.out}/result.json ({facts['seconds']:.0f} s)")


if __name__ == "__main__":
    run_main(main)
