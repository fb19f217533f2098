"""Why this file exists: the papers' ablations, on the embedded teacher, by one command; and the ways a run goes wrong, to know them by.

    python ablations.py                # Tables 4, 5, 6 and Fig. 3 of ADM, Phased DMD beside SGTS; three seeds, two cores, about 40 minutes
    python ablations.py --gallery      # five failures beside their healthy twins, seed 0 (twins that the first command made are not made again)

Every row is `train_sdxl.py` with the flags below and no others, on one thread, two rows at a time. All rows share one setting, a third of the embedded
run's length at half its batch; none was tuned. Finished rows are kept: a second call goes on where the first was stopped.
Writes results/ablations.json (row -> lists over seeds) and .png and prints the README's table; with --gallery results/gallery.png and .json.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plumbing import Failure, logged, losses_in, pyplot, run

HERE = Path(__file__).parent
SETTING = "--pairs 1024 --iterations-adp 600 --iterations-adm 100 --batch-size 16 --save-every 1000 --sample-every 100000".split()
WITHOUT_ADP = "--stage adm --iterations-adm 300 --lr-generator 3e-4"              # ADP's rate, and half of the time ADP takes
FOUR_STEPS = "--steps 4 --ttur 5 --lr-generator 1e-4"                             # as Phased DMD's
# row -> (what it is, the paper's HPSv2 (Tab. 4, 5), flags, the row whose finished ADP it goes on from)
ROWS = {
    "A5": ("ADP alone", 27.35, "--method adp", None),
    "A1": ("squared error alone: rectified flow, one round", 23.61, "--method reflow", None),
    "A2": ("ADP, DINOv2 for SAM", 27.10, "--method adp --pixel-backbone {out}/dinov2", None),
    "A3": ("ADP, weights 0.7, 0.3", 26.89, "--method adp --lambdas 0.7 0.3", None),
    "A4": ("ADP, latent discriminator alone", 26.79, "--method adp --lambdas 1 0", None),
    "B1": ("ADM without ADP", 26.87, WITHOUT_ADP, None),
    "B2": ("DMD without ADP", 25.97, f"--method dmd {WITHOUT_ADP}", None),
    "B3": ("ADP, then DMD", 27.40, "--method dmd", "A5"),
    "B4": ("ADP, then ADM: DMDX", 27.70, "", "A5"),
    "TTUR 4": ("DMDX, 4 fake updates a step", 27.73, "--ttur 4", "A5"),
    "TTUR 8": ("DMDX, 8 fake updates a step", 27.76, "--ttur 8", "A5"),
    "SGTS": ("four steps, DMD, 80 iterations", None, f"--method dmd --iterations-adm 80 {FOUR_STEPS}", None),
    "Phased DMD": ("four steps, two experts, 40 each", None, "--method phased_dmd --iterations-phase 40", None),
}
LONGER = {"Phased DMD, longer": ("four steps, two experts, 150 each", None, "--method phased_dmd", None)}
# what goes wrong -> (its healthy twin, flags, a change of the code where flags cannot do it)
FAILURES = {
    "D too strong": ("A5", "--method adp --lr-discriminator 3e-2 --lr-generator-adp 3e-5", None),
    "no ADP": ("B4", WITHOUT_ADP, None),
    "guidance the wrong way round": ("SGTS", f"--method dmd --iterations-adm 80 {FOUR_STEPS} --guidance -3 -1", None),   # w counted from the prompt: 1 - w
    "stale fake score": ("SGTS", f"--method dmd --iterations-adm 80 {FOUR_STEPS} --lr-fake 1e-9", None),
    "biased subinterval target": ("Phased DMD, longer", "--method phased_dmd", "biased_target.diff"),
}


def training_seconds(folder):
    """metrics.jsonl counts from the start of each stage, and anew where a run went on."""
    total, before = 0.0, 0.0
    for row in logged(folder):
        total += before if row["seconds"] < before else 0.0
        before = row["seconds"]
    return total + before


def start_from(source, folder, parts):
    """A folder that a run can go on from: what another one collected or trained. Whole, or not there."""
    if not folder.exists():
        new = Path(f"{folder}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for part in parts:
            (shutil.copytree if (source / part).is_dir() else shutil.copy)(source / part, new / part)
        new.rename(folder)


def train(folder, seed, flags, code=HERE):
    """train_sdxl.py on one thread, to its end; what it prints goes to FOLDER.log. Raises Failure with its last line if it does not get there."""
    if (folder / "result.json").exists():
        return
    log = Path(f"{folder}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        ended = subprocess.run([sys.executable, code / "train_sdxl.py", "--out", folder, "--seed", str(seed), "--resume", "auto", *SETTING, *flags],
                               stdout=file, stderr=file, env=dict(os.environ, OMP_NUM_THREADS="1")).returncode
    if ended or not (folder / "result.json").exists() and "pairs" not in flags:
        raise Failure(f"{log}: {(log.read_text().splitlines() or ['nothing printed'])[-1]}")


def train_row(out, seed, name, flags, follows, code=HERE):
    """-> the row's folder, trained if it was not yet."""
    folder = out / f"seed{seed}" / name.replace(" ", "-")
    source, parts = (folder.parent / follows, ["pairs", "prompts", "checkpoints", "metrics.jsonl"]) if follows else (folder.parent / "pairs", ["pairs", "prompts"])
    start_from(source, folder, parts)
    train(folder, seed, flags.format(out=out).split(), code)
    student = json.loads((folder / "result.json").read_text())["student"]
    print(f"{time.strftime('%H:%M:%S')}  seed {seed}  {name:30s} accuracy {student['accuracy']:.3f}   coverage TV {student['coverage_tv']:.3f}", flush=True)
    return folder


def patched(out, diff):
    """A copy of the code with a change applied."""
    folder = out / Path(diff).stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (*HERE.glob("*.py"), HERE / "teacher"):
        (shutil.copytree if file.is_dir() else shutil.copy)(file, folder / file.name)
    subprocess.run(["git", "apply", HERE / "hacks" / diff], cwd=folder, check=True, env=dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent)))
    return folder


def another_backbone(folder, iterations):
    """A2's DINOv2, as large as the embedded SAM and trained for the same task, by the function that trained that."""
    if not folder.exists():
        import torch

        import shapes
        torch.manual_seed(0)
        torch.set_num_threads(1)
        shapes.train_vision_encoder(*shapes.every_drawing(), iterations, kind="dinov2").save_pretrained(f"{folder}.new")
        Path(f"{folder}.new").rename(folder)


def table(results):
    """The README's, in Markdown: mean over seeds ± standard deviation."""
    keys = ("accuracy", "coverage_tv", "precision", "diversity", "seconds")
    lines = ["| row | | " + " | ".join(keys) + " | paper, HPSv2 |", "|---" * 8 + "|"]
    for name, figures in results.items():
        what, paper, *_ = ROWS.get(name, ("20 steps with guidance", 27.37))
        cells = []
        for key in keys:
            values, digits = figures.get(key, []), 0 if key == "seconds" else 3
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "".join(f"{v:.{digits}f}" for v in values))
        lines.append(f"| {name} | {what} | " + " | ".join(cells) + f" | {f'{paper:.2f}' if paper else ''} |")
    return "\n".join(lines)


def losses(folder, stage=None):
    """{"stage: loss": [(iteration, value), ...]} of a run, or of one of its stages."""
    found = {}
    for row in [row for row in logged(folder) if stage in (None, row["stage"])]:
        for key in losses_in([row]):
            found.setdefault(f"{row['stage']}: {key}", []).append((row["iteration"], row[key]))
    return found


def tables(args, out, results):
    """Train all rows of all seeds, then write and print what the head of this file says."""
    needed = {*args.rows, *(ROWS[name][3] for name in args.rows)}
    names = [name for name in ROWS if name in needed]
    folders = trained(args, out, [(seed, name, *ROWS[name][2:]) for name in names for seed in args.seeds])
    result_of = {key: json.loads((folder / "result.json").read_text()) for key, folder in folders.items()}
    measured = {"teacher": [result_of[seed, names[0]]["teacher"] for seed in args.seeds]}
    measured |= {name: [dict(result_of[seed, name]["student"], seconds=training_seconds(folders[seed, name])) for seed in args.seeds] for name in names}
    figures = {name: {key: [round(one[key], 4) for one in seeds] for key in seeds[0]} for name, seeds in measured.items()}
    (results / "ablations.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))

    plt = pyplot()
    figure, (*panels, recorded) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1, 1, 0.8))
    for ax, key in zip(panels, ("accuracy", "coverage_tv")):
        for y, values in enumerate(figures.values()):
            ax.plot(values[key], [y] * len(values[key]), "o", color="C0", alpha=0.6)
        ax.set(yticks=range(len(figures)), yticklabels=figures, title=key)
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    for k, name in enumerate(n for n in ("B1", "B4", "TTUR 8") if n in names):
        for seed in args.seeds:
            recorded.plot(*zip(*losses(folders[seed, name], "adm")["adm: dmd"]), color=f"C{k}", alpha=0.6, label=name if seed == args.seeds[0] else None)
    recorded.set(title="DMD loss during ADM (Fig. 3)", xlabel="iteration", yscale="log")
    if recorded.lines:
        recorded.legend()
    figure.savefig(results / "ablations.png", dpi=90)


def gallery(args, out, results):
    """Each failure beside its healthy twin: four samples and all losses of both."""
    from safetensors.torch import load_file
    rows = ROWS | LONGER
    twins = dict.fromkeys(name for twin, *_ in FAILURES.values() for name in (rows[twin][3], twin) if name)     # and what they go on from
    jobs = [(0, name, *rows[name][2:]) for name in twins]
    jobs += [(0, name, flags, None, patched(out, diff) if diff else HERE) for name, (_, flags, diff) in FAILURES.items()]
    folders = trained(args, out, jobs)
    plt, facts = pyplot(), {}
    figure, axes = plt.subplots(len(FAILURES), 6, figsize=(15, 2.5 * len(FAILURES)), layout="constrained", width_ratios=(1.2, 1.2, 1, 1, 1, 1))
    for (name, (twin, *_)), line in zip(FAILURES.items(), axes):
        pair = {f"healthy ({twin})": folders[0, twin], name: folders[0, name]}
        for ax, (label, folder) in zip(line, pair.items()):
            images = load_file(folder / "samples" / "samples.safetensors")["images"][:4]              # [4,3,32,32]
            ax.imshow(four_in_one(images))
            ax.set(xticks=[], yticks=[])
            result = json.loads((folder / "result.json").read_text())
            facts[label] = dict(result["student"], noise_left=result["noise_left"])
            ax.set_title(f"{label}\naccuracy {facts[label]['accuracy']:.2f}, coverage TV {facts[label]['coverage_tv']:.2f}"
                         + "".join(f"\nnoise left {left:.2f}" for left in facts[label]["noise_left"]), fontsize=9)
        healthy, failed = (losses(folder) for folder in pair.values())
        for ax, key in zip(line[2:], [*failed, *[None] * 4]):
            if key is None:
                ax.axis("off")
                continue
            ax.plot(*zip(*healthy.get(key, [(0, float("nan"))])), color="C7", lw=1, label="healthy")
            ax.plot(*zip(*failed[key]), color="C3", lw=1, label="failed")
            ax.set_title(key, fontsize=9)
        line[2].legend(fontsize=7)
    figure.savefig(results / "gallery.png", dpi=80)
    (results / "gallery.json").write_text(json.dumps(facts, indent=1))


def four_in_one(images):
    """[4,3,H,W] in [-1,1] -> one picture [2H,2W,3] in [0,1]."""
    rows = (images.clamp(-1, 1) + 1).div(2).permute(0, 2, 3, 1).unflatten(0, (2, 2))                  # [2,2,H,W,3]
    return rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def trained(args, out, jobs):
    """[(seed, row, flags, the row it goes on from, its code), ...] -> {(seed, row): folder}, --jobs at a time; one that fails stops those not yet begun."""
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            first = [pool.submit(train, out / f"seed{seed}" / "pairs", seed, ["--stage", "pairs"]) for seed in {seed for seed, *_ in jobs}]
            if "A2" in {name for _, name, *_ in jobs}:
                first.append(pool.submit(another_backbone, out / "dinov2", args.vision_iterations))
            for future in first:
                future.result()
            futures = {}
            for seed, name, flags, follows, *code in sorted(jobs, key=lambda job: job[3] is not None):   # what others go on from comes first
                if follows:
                    futures[seed, follows].result()
                futures[seed, name] = pool.submit(train_row, out, seed, name, flags, follows, *code)
            return {key: future.result() for key, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gallery", action="store_true", help="the failures, not the tables")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="of the tables: " + ", ".join(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--vision-iterations", type=int, default=1500, help="of A2's backbone")
    p.add_argument("--jobs", type=int, default=2, help="rows at a time, one thread each")
    p.add_argument("--out", default="out/ablations", help="where the runs are kept")
    p.add_argument("--results", help="where figures and pictures go (default: results/, and for a part of the tables OUT/results)")
    args = p.parse_args()
    if args.jobs < 1 or args.vision_iterations < 1 or min(args.seeds) < 0:
        p.error("--jobs and --vision-iterations must be above 0, --seeds 0 or above")
    began, out = time.time(), Path(args.out).resolve()
    part = not args.gallery and (args.rows, args.seeds) != (p.get_default("rows"), p.get_default("seeds"))
    results = Path(args.results) if args.results else out / "results" if part else HERE / "results"
    for folder in (out, results):
        folder.mkdir(parents=True, exist_ok=True)
    (gallery if args.gallery else tables)(args, out, results)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run(main)
