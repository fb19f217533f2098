"""The rows of the tables on pages of glyphs: how each student is trained, kept and measured.

lesson/tables.py trains all of these rows for three seeds, lesson/adm.py six of them, shorter, for
one, lesson/dt.py and lesson/collapse.py some of them at other settings. Each student is a process
of one thread. Finished ones are kept: a second call goes on where the first was stopped.
"""
import json
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from lesson.glyphs import (SCHEDULE, SHAPE, latent_discriminator, measure, no_prompt,
                           shipped_teacher, unet)
from lesson.students import (Given, Setting, Student, teacher_pairs, train_a1, train_adp,
                             train_matching, train_phased)
from phased_dmd import Expert, generate
from training.draws import stream
from training.errors import Failure
from training.scripts import a_count, a_factor, folder_for

RESULTS = Path(__file__).parent / "results"
PAIRS = "pairs"                                 # in the place of a row: the teacher's ODE pairs


class Row(NamedTuple):
    what: str                   # in words
    train: Callable             # (given) -> Student; with `follows`, (given, after=Student)
    paper: float = None         # HPSv2 of the paper's Tab. 4 and 5
    follows: str = None         # the row whose student it starts from
    pairs: bool = False         # whether it needs the teacher's ODE pairs


ROWS = {                        # in the order in which they are trained
    "A5": Row("ADP alone", train_adp, 27.35, pairs=True),
    "A1": Row("squared error alone: rectified flow", train_a1, 23.61, pairs=True),
    "B1": Row("ADM without ADP", partial(train_matching, judge="adm"), 26.87),
    "B2": Row("DMD without ADP", partial(train_matching, judge="dmd"), 25.97),
    "B3": Row("ADP, then DMD", partial(train_matching, judge="dmd"), 27.40, follows="A5"),
    "B4": Row("ADP, then ADM: DMDX", partial(train_matching, judge="adm"), 27.70, follows="A5"),
    "A2": Row("ADP, an untrained pixel backbone", partial(train_adp, backbone="random"), 27.10,
              pairs=True),
    "A3": Row("ADP, weights 0.7, 0.3", partial(train_adp, lambda_1=0.7), 26.89, pairs=True),
    "A4": Row("ADP, latent discriminator alone", partial(train_adp, lambda_1=1.0), 26.79,
              pairs=True),
    "SGTS": Row("four steps, DMD", partial(train_phased, boundaries=[])),
    "Phased DMD": Row("four steps, two experts", partial(train_phased, boundaries=[500])),
    "TTUR 4": Row("DMDX, 4 fake updates a step", partial(train_matching, judge="adm", ttur=4),
                  27.73, follows="A5"),
    "TTUR 8": Row("DMDX, 8 fake updates a step", partial(train_matching, judge="adm", ttur=8),
                  27.76, follows="A5"),
}


class Job(NamedTuple):
    """One student to train: a row, a seed, a setting; or what comes before, the pairs of a seed."""
    row: str                    # of ROWS, or PAIRS
    seed: int
    setting: Setting
    label: str = ""             # of its file, where one row is trained at several settings

    @property
    def name(self):
        return name_of(self.seed, self.label or self.row)

    def needs(self):
        """The names of the jobs that come first."""
        if self.row == PAIRS:
            return []
        row = ROWS[self.row]
        if row.follows:
            return [name_of(self.seed, row.follows)]
        return [name_of(self.seed, PAIRS)] if row.pairs else []


def name_of(seed, label):
    """Under which name OUT keeps the student of a row, or what else has this label."""
    return f"seed{seed}/{label}".replace(" ", "-")


def add_run_flags(p, out="out/tables"):
    """The flags of every script that trains and keeps students. out: the default of --out."""
    p.add_argument("--scale", type=a_factor, default=1.0,
                   help="all iterations and pairs times this, for a quick look")
    p.add_argument("--processes", type=a_count, default=2, help="students at a time, a thread each")
    p.add_argument("--out", type=Path, default=Path(out), help="where the students are kept")


def parse_with_results(p):
    """The command line of a script whose figures ship; args.results is the folder for figures and
    picture, and is there then. p: its parser, with all other flags. Figures of anything but the
    complete table do not replace those that ship."""
    p.add_argument("--results", type=Path,
                   help="where figures and picture go (default: lesson/results, and for other "
                        "rows, seeds or another scale OUT)")
    args = p.parse_args()
    what = [name for name in vars(args) if name not in ("processes", "out", "results")]
    complete = all(getattr(args, name) == p.get_default(name) for name in what)
    args.results = folder_for(args.results or (RESULTS if complete else args.out), "--results")
    return args


# ------------------------------------------------------------------------------------ keeping them

def save_student(path, student, facts):
    """PATH.safetensors has the weights, PATH.json the log and `facts`; the second is written last,
    and says that the student is finished."""
    weights = {}
    for k, expert in enumerate(student.experts):
        weights |= {f"expert{k}.{name}": value for name, value in expert.net.state_dict().items()}
    if student.heads is not None:
        weights |= {f"heads.{name}": value for name, value in student.heads.state_dict().items()}
    save_file(weights, f"{path}.safetensors")
    facts = dict(facts, stops=[expert.stops for expert in student.experts],
                 seconds=student.seconds, log=student.log)
    Path(f"{path}.json").write_text(json.dumps(facts))


def of_prefix(tensors, prefix):
    """The tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in tensors.items()
            if name.startswith(prefix)}


def load_student(path):
    """-> Student."""
    facts = json.loads(Path(f"{path}.json").read_text())
    tensors = load_file(f"{path}.safetensors")
    experts = []
    for k, stops in enumerate(facts["stops"]):
        net = unet().requires_grad_(False)
        net.load_state_dict(of_prefix(tensors, f"expert{k}."))
        experts.append(Expert(net, stops))
    heads = None
    if of_prefix(tensors, "heads."):
        heads = latent_discriminator(net).heads
        heads.load_state_dict(of_prefix(tensors, "heads."))
    return Student(experts, heads, facts["log"], facts["seconds"])


@torch.no_grad()
def student_pages(student, count):
    """`count` pages of a student, all students from the same noise, [count,1,12,12]."""
    x_T = torch.randn(count, *SHAPE, generator=stream(9))
    parts = [generate(student.experts, SCHEDULE, z, no_prompt(len(z))) for z in x_T.split(256)]
    return torch.cat(parts)


def kept_pairs(out, seed):
    """The teacher's ODE pairs (x_T, x_0) of a seed, each [pairs,1,12,12]."""
    tensors = load_file(f"{out / name_of(seed, PAIRS)}.safetensors")
    return tensors["x_T"], tensors["x_0"]


# ------------------------------------------------------------------------------------ making them

def facts_of(path):
    """What PATH.json says, or {} if there is none."""
    file = Path(f"{path}.json")
    return json.loads(file.read_text()) if file.exists() else {}


def is_finished(out, job):
    """Whether OUT has the job's result. Raises Failure for one of another setting, which the job
    would replace: an hour's work, if this is a quick look."""
    setting = facts_of(out / job.name).get("setting")
    if setting is None:
        return False
    if setting != asdict(job.setting):
        raise Failure(f"--out {out}: its {job.name} was made at another setting; choose another "
                      f"folder, or delete that")
    return True


def run_job(out, job):
    """Train one student, measure it and keep it -> the job."""
    torch.set_num_threads(1)
    teacher = shipped_teacher()
    path = out / job.name
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(setting=asdict(job.setting))
    if job.row == PAIRS:
        x_T, x_0 = teacher_pairs(teacher, job.setting, job.seed)
        save_file(dict(x_T=x_T, x_0=x_0), f"{path}.safetensors")
        Path(f"{path}.json").write_text(json.dumps(facts))
        return job
    row = ROWS[job.row]
    pairs = kept_pairs(out, job.seed) if row.pairs else None
    given = Given(teacher, pairs, job.setting, job.seed)
    further = {}
    if row.follows:
        further["after"] = load_student(out / job.needs()[0])
    student = row.train(given, **further)
    measured = measure(student_pages(student, job.setting.count))
    save_student(path, student, dict(facts, measured=measured))
    return job


def report(out, job, began):
    if job.row != PAIRS:
        found = facts_of(out / job.name)["measured"]
        print(f"{time.time() - began:5.0f} s  {job.name:24s}cell {found['cell']:.3f}   "
              f"page {found['page']:.3f}   tv {found['tv']:.3f}", flush=True)


def run_jobs(out, jobs, processes):
    """All jobs in the order given, `processes` at a time (1: in this process). One that needs
    another, which is among them, waits for it. Those that OUT has already are not made again."""
    began = time.time()
    finished = {job.name for job in jobs if is_finished(out, job)}
    waiting = [job for job in jobs if job.name not in finished]
    if processes == 1:
        for job in waiting:                     # callers list what others need first
            report(out, run_job(out, job), began)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        running = set()
        while waiting or running:
            ready = [job for job in waiting if finished.issuperset(job.needs())]
            for job in ready[:processes - len(running)]:
                running.add(pool.submit(run_job, out, job))
                waiting.remove(job)
            if not running:
                raise ValueError(f"none of the jobs makes what {waiting[0].name} needs")
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = future.result()
                finished.add(job.name)
                report(out, job, began)
