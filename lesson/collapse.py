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
from lesson.rows import PAIRS, Job, add_run_flags, facts_of, name_of, parse_with_results, run_jobs
from lesson.students import Setting
from lesson.tables import WIDTH, smoothed
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import parser_for, zero_or_more

STILL = "B4-still"


class Mistake(NamedTuple):
    failed: str                 # label of its file
    healthy: str
    sign: str                   # the loss that shows it, or hides it


MISTAKES = {
    "mode dropping": Mistake("B2", "B1", "dmd"),
    "blind critic": Mistake("B1-T64", "B1", "discriminator"),
    "standing still": Mistake(STILL, "B4", "discriminator"),
}


def jobs_of(seed, setting):
    blind = replace(setting, dt=dt_of(64))
    return [Job(PAIRS, seed, setting), Job("A5", seed, setting), Job("B1", seed, setting),
            Job("B2", seed, setting), Job("B4", seed, setting),
            Job("B1", seed, blind, label_of("B1", 64, setting)),
            Job("B4", seed, replace(setting, lr_adm=1e-6), STILL)]


def history(out, seed, label, sign):
    """A run, as collapse.json has it: {name: [value, ...]} of what was measured on the way, and the
    means of the loss that is the sign."""
    log = facts_of(out / name_of(seed, label))["log"]
    watched = [entry for entry in log if "shares" in entry]
    measured = {name: [entry[name] for entry in watched]
                for name in ("iteration", "cell", "page", "tv", "shares")}
    _, means = smoothed(log, sign)
    return dict(measured, run=label, loss=sign, losses=means)


def draw_shares(ax, found, title):
    """The shares of the glyphs over time, one band for each."""
    ax.stackplot(found["iteration"], list(zip(*found["shares"])), colors=pyplot().cm.tab10.colors)
    for edge in SHARES.cumsum(0)[:-1].tolist():
        ax.axhline(edge, color="w", lw=0.8, ls=":")
    ax.set(ylim=(0, 1), title=title)


def save_picture(path, facts):
    """A line for each failure: shares of both runs, then the loss, pages and tv of both. facts:
    {failure: {"healthy", "failed": `history`}}."""
    figure, axes = pyplot().subplots(len(facts), 5, figsize=(15, 2.7 * len(facts)),
                                     layout="constrained")
    for (name, of_failure), line in zip(facts.items(), axes):
        runs = {"healthy": of_failure["healthy"], name: of_failure["failed"]}
        for ax, (label, run), colour in zip(line, runs.items(), ("C7", "C3")):
            draw_shares(ax, run, f"{label} ({run['run']}): shares")
            iterations = range(0, WIDTH * len(run["losses"]), WIDTH)
            line[2].plot(iterations, run["losses"], color=colour, label=label)
            line[3].plot(run["iteration"], run["page"], color=colour)
            line[4].plot(run["iteration"], run["tv"], color=colour)
        line[2].set_title("hinge" if run["loss"] == "discriminator" else "DMD loss")
        line[2].legend(fontsize=7)
        line[3].set(title="legible pages", ylim=(-0.02, 1.02))
        line[4].set(title="tv of shares", ylim=(-0.02, 1.02))
    figure.savefig(path, dpi=80)


def main():
    p = parser_for(__doc__)
    p.add_argument("--seed", type=zero_or_more, default=0)
    add_run_flags(p)
    args = parse_with_results(p)
    torch.set_num_threads(1)
    began = time.time()
    run_jobs(args.out, jobs_of(args.seed, Setting().scaled(args.scale)), args.processes)
    facts = {}
    for name, mistake in MISTAKES.items():
        facts[name] = {which: history(args.out, args.seed, getattr(mistake, which), mistake.sign)
                       for which in ("failed", "healthy")}
    (args.results / "collapse.json").write_text(json.dumps(facts, indent=1))
    save_picture(args.results / "collapse.png", facts)
    print(f"wrote {args.results}/collapse.png and collapse.json ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    run_main(main)
