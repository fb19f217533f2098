"""Runs of the training scripts on the embedded teachers, for lesson/gallery.py and
lesson/families.py. The gallery's are short: train_sdxl.py with SETTING, its own flags and no
others.

Each is on one thread, several at a time. Finished runs are kept: a second call goes on where the
first was stopped.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from training.errors import Failure
from training.pictures import logged, losses_in
from training.scripts import a_count, folder_for

ROOT = Path(__file__).parents[1]                # of the repository
HACKS = Path(__file__).parent / "hacks"
RESULTS = Path(__file__).parent / "results"
FOLDERS = ("training", "families", "teachers", "tools", "lesson")       # of code, beside *.py

# All share one setting, a short run with the paper's weights of ADP's discriminators. It was chosen
# on seed 0 for the time it takes; no run was tuned.
SETTING = ["--pairs", "1024", "--iterations-adp", "600", "--iterations-adm", "100",
           "--batch-size", "16", "--lr-generator-adp", "3e-4", "--lambdas", "0.85", "0.15",
           "--save-every", "1000", "--sample-every", "100000"]
SEED = 0


class Job(NamedTuple):
    name: str                   # of its folder
    flags: str
    follows: str = None         # the run whose finished ADP it goes on from
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


def train(folder, flags, code=ROOT):
    """train_sdxl.py with SETTING and these flags, as run_script runs it."""
    run_script(folder, "train_sdxl.py", ["--seed", str(SEED), *SETTING, *flags], code)


def run_script(folder, script, flags, code=ROOT):
    """A training script on one thread, to its end; what it prints goes to FOLDER.log. Raises
    Failure with the last line of that if it does not get there."""
    if (folder / "result.json").exists():
        return
    log = Path(f"{folder}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, code / script, "--out", folder, "--resume", "auto", *flags]
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
    of_seed = out / f"seed{SEED}"
    folder = of_seed / job.name.replace(" ", "-")
    if job.follows:
        parts = ["pairs", "prompts", "checkpoints", "metrics.jsonl"]
        start_from(of_seed / job.follows, folder, parts)
    else:
        start_from(of_seed / "pairs", folder, ["pairs", "prompts"])
    train(folder, job.flags.split(), job.code)
    student = result_of(folder)["student"]
    print(f"{time.strftime('%H:%M:%S')}  seed {SEED}  {job.name:30s} "
          f"accuracy {student['accuracy']:.3f}   coverage TV {student['coverage_tv']:.3f}",
          flush=True)
    return folder


@contextmanager
def side_by_side(at_a_time):
    """A pool of so many runs at a time. If one fails, those not yet begun are not."""
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def trained(out, jobs, at_a_time):
    """Train all jobs, so many at a time -> {name: folder}."""
    with side_by_side(at_a_time) as pool:
        pool.submit(train, out / f"seed{SEED}" / "pairs", ["--stage", "pairs"]).result()
        futures = {}
        # jobs that others go on from come first
        for job in sorted(jobs, key=lambda job: job.follows is not None):
            if job.follows:
                futures[job.follows].result()
            futures[job.name] = pool.submit(train_job, out, job)
        return {name: future.result() for name, future in futures.items()}


def parse_with_folders(p, out):
    """The command line of a script that makes runs -> (its flags, the folder where the runs are
    kept, that of the results), which are there then. p: its parser, with what flags it has of its
    own. out: the default of the first folder."""
    p.add_argument("--jobs", type=a_count, default=2, help="runs at a time, one thread each")
    p.add_argument("--out", default=out, help="where the runs are kept")
    p.add_argument("--results", default=RESULTS, help="where figures and pictures go")
    args = p.parse_args()
    return args, folder_for(args.out).resolve(), folder_for(args.results, "--results")


# ------------------------------------------------------------------------------------ reading them


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def losses(folder):
    """{"stage: loss": [(iteration, value), ...]} of a run."""
    found = {}
    for entry in logged(folder):
        for name in losses_in([entry]):
            points = found.setdefault(f"{entry['stage']}: {name}", [])
            points.append((entry["iteration"], entry[name]))
    return found
