"""Five ways a run goes wrong, each beside a healthy twin without the mistake.

    python -m lesson.gallery            # seed 0, two cores

Writes lesson/results/gallery.png, four samples of the same noise and the failed run's losses beside
the healthy one's, and gallery.json.
"""
import json
import time
from typing import NamedTuple

from safetensors.torch import load_file

from lesson.runs import ROOT, Job, losses, parse_with_folders, patched, result_of, trained
from training.errors import run_main
from training.pictures import pyplot
from training.scripts import parser_for

FOUR_STEPS = "--steps 4 --ttur 5 --lr-generator 1e-4"                   # as Phased DMD's
SGTS = f"--method dmd --iterations-adm 80 {FOUR_STEPS}"
# ADP's rate, half its time, and no heads of its D_1 to start from
WITHOUT_ADP = "--stage adm --iterations-adm 300 --lr-generator 3e-4 --no-warm-heads"


class Twin(NamedTuple):
    """A healthy run."""
    flags: str
    follows: str = None         # the twin whose finished ADP it goes on from


TWINS = {
    "ADP": Twin("--method adp"),
    "DMDX": Twin("", follows="ADP"),
    "four steps of DMD": Twin(SGTS),
    "Phased DMD": Twin("--method phased_dmd"),
}


class Mistake(NamedTuple):
    twin: str                   # the healthy run beside it
    flags: str
    diff: str = None            # a change of the code where flags cannot do it, in hacks/


FAILURES = {
    "D too strong": Mistake(
        "ADP", "--method adp --lr-discriminator 3e-2 --lr-generator-adp 3e-5"),
    "no ADP": Mistake("DMDX", WITHOUT_ADP),
    # a guidance weight counted from the prompt is 1 - w
    "guidance the wrong way round": Mistake("four steps of DMD", f"{SGTS} --guidance -3 -1"),
    "stale fake score": Mistake("four steps of DMD", f"{SGTS} --lr-fake 1e-9"),
    "biased subinterval target": Mistake(
        "Phased DMD", "--method phased_dmd", "biased_target.diff"),
}


def train_all(out, at_a_time):
    """All failures, their twins, and what the twins go on from -> {name: folder}."""
    jobs = {name: Job(name, twin.flags, twin.follows) for name, twin in TWINS.items()}
    for name, mistake in FAILURES.items():
        code = patched(out, mistake.diff) if mistake.diff else ROOT
        jobs[name] = Job(name, mistake.flags, code=code)
    return trained(out, list(jobs.values()), at_a_time)


def four_in_one(images):
    """[4,3,H,W] in [-1,1] -> one picture [2H,2W,3] in [0,1]."""
    pixels = (images.clamp(-1, 1) + 1).div(2).permute(0, 2, 3, 1).unflatten(0, (2, 2))
    return pixels.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)    # of [2,2,H,W,3]


def draw_samples(ax, label, folder, figures):
    images = load_file(folder / "samples" / "samples.safetensors")["images"][:4]    # [4,3,32,32]
    ax.imshow(four_in_one(images))
    ax.set(xticks=[], yticks=[])
    title = (f"{label}\naccuracy {figures['accuracy']:.2f}, legible {figures['legible']:.2f}\n"
             f"TV of glyphs {figures['glyph_tv']:.2f}, of places {figures['coverage_tv']:.2f}")
    for left in figures["noise_left"]:
        title += f"\nnoise left {left:.2f}"
    ax.set_title(title, fontsize=9)


def draw_losses(axes, healthy, failed):
    """A panel for each loss of the failed run. healthy, failed: {name: [(iteration, value),
    ...]}."""
    for ax in axes[len(failed):]:
        ax.axis("off")
    for ax, name in zip(axes, failed):
        ax.plot(*zip(*healthy.get(name, [(0, float("nan"))])), color="C7", lw=1, label="healthy")
        ax.plot(*zip(*failed[name]), color="C3", lw=1, label="failed")
        ax.set_title(name, fontsize=9)
    axes[0].legend(fontsize=7)


def save_gallery(results, folders):
    """gallery.png, a line for each failure, and gallery.json."""
    figure, axes = pyplot().subplots(
        len(FAILURES), 6, figsize=(15, 2.5 * len(FAILURES)), layout="constrained",
        width_ratios=(1.2, 1.2, 1, 1, 1, 1))
    facts = {}
    for (name, mistake), line in zip(FAILURES.items(), axes):
        twin, failed = folders[mistake.twin], folders[name]
        for ax, label, folder in ((line[0], f"healthy ({mistake.twin})", twin),
                                  (line[1], name, failed)):
            result = result_of(folder)
            facts[label] = dict(result["student"], noise_left=result["noise_left"])
            draw_samples(ax, label, folder, facts[label])
        draw_losses(line[2:], losses(twin), losses(failed))
    figure.savefig(results / "gallery.png", dpi=80)
    (results / "gallery.json").write_text(json.dumps(facts, indent=1))


def main():
    p = parser_for(__doc__)
    args, out, results = parse_with_folders(p, "out/gallery")
    began = time.time()
    save_gallery(results, train_all(out, args.jobs))
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
