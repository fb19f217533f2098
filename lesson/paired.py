"""A critic that is asked which of two samples is real, beside the paper's, asked about each.

    python -m lesson.paired                     # three seeds, an hour; two processes
    python -m lesson.paired --scale 0.01 --out out/quick        # does it run?

x_fake and x_real start from one x_t and differ by dt times the difference of the two scores. The
paper's hinge asks of each whether it is real, and learns no more from a sample once D passes a
margin, be it for the x_t that the two share. The paired hinge (`paired_hinge` in
lesson/students.py) is of the difference of D's answers. hinge is the critic's loss, a mean over the
last quarter: it cannot tell at 2, or at 1 if paired. After two ADPs: with the paper's weights of
its discriminators, and with row A3's. Writes lesson/results/paired.json.
"""
import json
import time
from dataclasses import replace

import torch

from lesson.dt import dt_of, last_quarter
from lesson.rows import PAIRS, Job, add_run_flags, facts_of, name_of, parse_with_results, run_jobs
from lesson.students import Setting
from lesson.tables import cells_of, values_of
from training.errors import run_main
from training.scripts import parser_for, zero_or_more

WEIGHTS = (0.85, 0.7)                           # of ADP's D_1: the paper's, and row A3's
CASES = {                       # label -> in words, row, what is changed in its setting
    "A5": ("ADP", "A5", {}),
    "B3": ("then DMD", "B3", {}),
    "B4": ("then ADM, T/6", "B4", {}),
    "B4-paired": ("then ADM, paired, T/6", "B4", dict(paired=True)),
    "B4-paired-T16": ("then ADM, paired, T/16", "B4", dict(paired=True, dt=dt_of(16))),
    "B4-paired-T64": ("then ADM, paired, T/64", "B4", dict(paired=True, dt=dt_of(64))),
}
COLUMNS = ("hinge", "cell", "page", "tv", "seconds")


def jobs_of(seeds, setting):
    jobs = [Job(PAIRS, seed, setting) for seed in seeds]
    for label, (_, row, changed) in CASES.items():
        for seed in seeds:
            jobs.append(Job(row, seed, replace(setting, **changed), label))
    return jobs


def figures_of(out, seeds):
    """{label: {column: [its value for each seed]}}"""
    figures = {}
    for label, (_, row, _) in CASES.items():
        of_case = {column: [] for column in COLUMNS}
        for seed in seeds:
            facts = facts_of(out / name_of(seed, label))
            if row == "B4":
                of_case["hinge"].append(last_quarter(values_of(facts["log"], "discriminator")))
            for column in ("cell", "page", "tv"):
                of_case[column].append(facts["measured"][column])
            of_case["seconds"].append(facts["seconds"])
        figures[label] = of_case
    return figures


def table(figures):
    lines = ["| D_1's weight | | " + " | ".join(COLUMNS) + " |", "|---" * 7 + "|"]
    for weight, of_weight in figures.items():
        for label, of_case in of_weight.items():
            lines.append(f"| {weight} | {CASES[label][0]} | {cells_of(of_case, COLUMNS)} |")
    return "\n".join(lines)


def main():
    p = parser_for(__doc__)
    p.add_argument("--seeds", nargs="+", type=zero_or_more, default=[0, 1, 2])
    add_run_flags(p, out="out/paired")
    args = parse_with_results(p)
    torch.set_num_threads(1)
    began = time.time()
    figures = {}
    for weight in WEIGHTS:
        out = args.out / str(weight)
        setting = replace(Setting().scaled(args.scale), lambda_1=weight)
        run_jobs(out, jobs_of(args.seeds, setting), args.processes)
        figures[str(weight)] = figures_of(out, args.seeds)
    (args.results / "paired.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
