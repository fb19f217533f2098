"""Runs of train_sdxl.py on the embedded teacher, for lesson/ablations.py and lesson/gallery.py.

A run is a row of ROWS: train_sdxl.py with SETTING, the row's own flags and no others, on one
thread. Several run at a time. Finished runs are kept: a second call goes on where the first was
stopped.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from training.errors import Failure
from training.pictures import logged, losses_in

ROOT = Path(__file__).parents[1]                # of the repository
HACKS = Path(__file__).parent / "hacks"
RESULTS = Path(__file__).parent / "results"
FOLDERS = ("training", "families", "teachers", "tools", "lesson")       # of code, beside *.py

# All rows share one setting, a third of the embedded run's length at half its batch. It was chosen
# on seed 0 for the time it takes; no row was tuned.
SETTING = ["--pairs", "1024", "--iterations-adp", "600", "--iterations-adm", "100",
           "--batch-size", "16", "--save-every", "1000", "--sample-every", "100000"]
PLAIN = "--no-warm-heads --dt 16"               # ADM as the paper has it
WITHOUT_ADP = "--stage adm --iterations-adm 300 --lr-generator 3e-4"    # ADP's rate, half its time
FOUR_STEPS = "--steps 4 --ttur 5 --lr-generator 1e-4"                   # as Phased DMD's
SGTS = f"--method dmd --iterations-adm 80 {FOUR_STEPS}"


class Row(NamedTuple):
    what: str                   # in words
    flags: str                  # {out} is the folder of all runs
    paper: float = None         # HPSv2 of the paper's Tab. 4 and 5
    follows: str = None         # the row whose finished ADP it goes on from


ROWS = {
    "A5": Row("ADP alone", "--method adp", 27.35),
    "A1": Row("squared error alone: rectified flow, one round", "--method reflow", 23.61),
    "A2": Row("ADP, DINOv2 for SAM", "--method adp --pixel-backbone {out}/dinov2", 27.10),
    "A3": Row("ADP, weights 0.7, 0.3", "--method adp --lambdas 0.7 0.3", 26.89),
    "A4": Row("ADP, latent discriminator alone", "--method adp --lambdas 1 0", 26.79),
    "B1": Row("ADM without ADP", f"{WITHOUT_ADP} {PLAIN}", 26.87),
    "B2": Row("DMD without ADP", f"--method dmd {WITHOUT_ADP}", 25.97),
    "B3": Row("ADP, then DMD", "--method dmd", 27.40, follows="A5"),
    "B4": Row("ADP, then ADM: DMDX", PLAIN, 27.70, follows="A5"),
    "TTUR 4": Row("DMDX, 4 fake updates a step", f"--ttur 4 {PLAIN}", 27.73, follows="A5"),
    "TTUR 8": Row("DMDX, 8 fake updates a step", f"--ttur 8 {PLAIN}", 27.76, follows="A5"),
    "SGTS": Row("four steps, DMD, 80 iterations", SGTS),
    "Phased DMD": Row("four steps, two experts, 40 each",
                      "--method phased_dmd --iterations-phase 40"),
}


class Job(NamedTuple):
    seed: int
    name: str                   # of its folder
    flags: str
    follows: str = None
    code: Path = ROOT           # a copy of the repository, where flags cannot make the change


# ------------------------------------------------------------------------------------- making them


def patched(out, diff):
    """A copy of the code with a change applied -> its folder, OUT/NAME. diff: NAME.diff of hacks/.
    Raises Failure if it does not fit the code as it is now."""
    folder = out / Path(diff).stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # git would otherwise look for a repository above the copy, and patch that
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))
    applied = subprocess.run(["git", "apply", HACKS / diff], cwd=folder, env=environment,
                             capture_output=True, text=True)
    if applied.returncode != 0:
        raise Failure(f"{HACKS / diff}: does not fit the code as it is now; make the change again "
                      f"by hand and save `git diff` there ({applied.stderr.strip()})")
    return folder


def start_from(source, folder, parts):
    """Make a folder that a run can go on from: copies of the `parts` that another run collected or
    trained. It is there as a whole, or not at all."""
    if folder.exists():
        return
    new = Path(f"{folder}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, new / part)
        else:
            shutil.copy(source / part, new / part)
    new.rename(folder)


def train(folder, seed, flags, code=ROOT):
    """train_sdxl.py on one thread, to its end; what it prints goes to FOLDER.log. Raises Failure
    with the last line of that if it does not get there."""
    if (folder / "result.json").exists():
        return
    log = Path(f"{folder}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, code / "train_sdxl.py", "--out", folder, "--seed", str(seed),
               "--resume", "auto", *SETTING, *flags]
    with open(log, "w") as file:
        ended = subprocess.run(command, stdout=file, stderr=file,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    only_pairs = "pairs" in flags                       # which leaves no result
    finished = only_pairs or (folder / "result.json").exists()
    if ended.returncode != 0 or not finished:
        printed = log.read_text().splitlines() or ["nothing printed"]
        raise Failure(f"{log}: {printed[-1]}")


def train_job(out, job):
    """Train a job, if that is not done yet -> its folder."""
    of_seed = out / f"seed{job.seed}"
    folder = of_seed / job.name.replace(" ", "-")
    if job.follows:
        parts = ["pairs", "prompts", "checkpoints", "metrics.jsonl"]
        start_from(of_seed / job.follows, folder, parts)
    else:
        start_from(of_seed / "pairs", folder, ["pairs", "prompts"])
    train(folder, job.seed, job.flags.format(out=out).split(), job.code)
    student = result_of(folder)["student"]
    print(f"{time.strftime('%H:%M:%S')}  seed {job.seed}  {job.name:30s} "
          f"accuracy {student['accuracy']:.3f}   coverage TV {student['coverage_tv']:.3f}",
          flush=True)
    return folder


def trained(out, jobs, at_a_time, first=()):
    """Train all jobs, so many at a time -> {(seed, name): folder}. If one fails, those not yet
    begun are not.

    first: functions without arguments that make what the jobs need besides the pairs.
    """
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            needed = []
            for seed in {job.seed for job in jobs}:
                folder = out / f"seed{seed}" / "pairs"
                needed.append(pool.submit(train, folder, seed, ["--stage", "pairs"]))
            needed += [pool.submit(make) for make in first]
            for future in needed:
                future.result()
            futures = {}
            # jobs that others go on from come first
            for job in sorted(jobs, key=lambda job: job.follows is not None):
                if job.follows:
                    futures[job.seed, job.follows].result()
                futures[job.seed, job.name] = pool.submit(train_job, out, job)
            return {key: future.result() for key, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------ reading them


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def losses(folder, stage=None):
    """{"stage: loss": [(iteration, value), ...]} of a run, or of one of its stages."""
    found = {}
    for entry in logged(folder):
        if stage not in (None, entry["stage"]):
            continue
        for name in losses_in([entry]):
            points = found.setdefault(f"{entry['stage']}: {name}", [])
            points.append((entry["iteration"], entry[name]))
    return found


def training_seconds(folder):
    """Seconds of all stages. metrics.jsonl counts from the start of each stage, and anew where a
    run went on."""
    total = 0.0
    before = 0.0
    for entry in logged(folder):
        if entry["seconds"] < before:
            total += before
        before = entry["seconds"]
    return total + before
