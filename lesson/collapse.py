"""Three ways a run goes wrong on pages of glyphs, each beside a healthy twin.

    python -m lesson.collapse                   # seed 0; students that lesson.tables and lesson.dt
                                                # have trained are taken from there
    python -m lesson.collapse --scale 0.01 --out out/quick      # does it run?

    mode dropping       DMD from the teacher: every page is legible, and one glyph is left
    blind critic        ADM at dt = T/64: the hinge stays at 2, the student has no guide
    standing still      ADM at a rate of 1e-6: rate times iterations is too small to go anywhere

Writes lesson/results/collapse.png and collapse.json: the shares of the eight glyphs, the loss that
a log shows, legible pages and tv over time. For the failures of the SDXL runs: lesson/gallery.py.
"""
import json
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from lesson.dt import dt_of, label_of
from lesson.glyphs import SHARES
from lesson.rows import (Job, add_results_flag, add_run_flags, facts_of, pairs_job, results_folder,
                         run_jobs)
from lesson.students import Setting
from lesson.tables import smooth
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import parser_for, zero_or_more

STILL = "B4-still"


class Failure(NamedTuple):
    failed: str                 # label of its file
    healthy: str
    sign: str                   # the loss that shows it, or hides it


FAILURES = {
    "mode dropping": Failure("B2", "B1", "dmd"),
    "blind critic": Failure("B1-T64", "B1", "discriminator"),
    "standing still": Failure(STILL, "B4", "discriminator"),
}


def jobs_of(seed, setting):
    blind = replace(setting, dt=dt_of(64))
    return [pairs_job(seed, setting), Job("A5", seed, setting), Job("B1", seed, setting),
            Job("B2", seed, setting), Job("B4", seed, setting),
            Job("B1", seed, blind, label_of("B1", 64, setting)),
            Job("B4", seed, replace(setting, lr_adm=1e-6), STILL)]


def history(log):
    """What was measured on the way -> {name: [value, ...]}."""
    watched = [entry for entry in log if "shares" in entry]
    return {name: [entry[name] for entry in watched]
            for name in ("iteration", "cell", "page", "tv", "shares")}


def draw_shares(ax, found, title):
    """The shares of the glyphs over time, one band for each."""
    ax.stackplot(found["iteration"], list(zip(*found["shares"])), colors=pyplot().cm.tab10.colors)
    for edge in SHARES.cumsum(0)[:-1].tolist():
        ax.axhline(edge, color="w", lw=0.8, ls=":")
    ax.set(ylim=(0, 1), title=title)


def save_picture(path, out, seed):
    """A line for each failure: shares of both runs, then the loss, pages and tv of both."""
    figure, axes = pyplot().subplots(len(FAILURES), 5, figsize=(15, 2.7 * len(FAILURES)),
                                     layout="constrained")
    for (name, failure), line in zip(FAILURES.items(), axes):
        runs = {"healthy": failure.healthy, name: failure.failed}
        for ax, (label, file) in zip(line, runs.items()):
            found = history(facts_of(out / f"seed{seed}" / file)["log"])
            draw_shares(ax, found, f"{label} ({file}): shares")
        for (label, file), colour in zip(runs.items(), ("C7", "C3")):
            log = facts_of(out / f"seed{seed}" / file)["log"]
            found = history(log)
            sign = smooth([entry[failure.sign] for entry in log if failure.sign in entry])
            line[2].plot([20 * k for k in range(len(sign))], sign, color=colour, label=label)
            line[3].plot(found["iteration"], found["page"], color=colour)
            line[4].plot(found["iteration"], found["tv"], color=colour)
        line[2].set_title("hinge" if failure.sign == "discriminator" else "DMD loss")
        line[2].legend(fontsize=7)
        line[3].set(title="legible pages", ylim=(-0.02, 1.02))
        line[4].set(title="tv of shares", ylim=(-0.02, 1.02))
    figure.savefig(path, dpi=80)


def main():
    p = parser_for(__doc__)
    p.add_argument("--seed", type=zero_or_more, default=0)
    add_run_flags(p)
    add_results_flag(p)
    args = p.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    results = results_folder(p, args)
    run_jobs(args.out, jobs_of(args.seed, Setting().scaled(args.scale)), args.processes)
    facts = {}
    for name, failure in FAILURES.items():
        facts[name] = {}
        for which in ("failed", "healthy"):
            label = getattr(failure, which)
            log = facts_of(args.out / f"seed{args.seed}" / label)["log"]
            losses = smooth([entry[failure.sign] for entry in log if failure.sign in entry])
            facts[name][which] = dict(history(log), run=label, loss=failure.sign, losses=losses)
    (results / "collapse.json").write_text(json.dumps(facts, indent=1))
    save_picture(results / "collapse.png", args.out, args.seed)
    print(f"wrote {results}/collapse.png and collapse.json ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    run_main(main)
