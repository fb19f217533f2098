"""Runs the scripts as a user does. Every run is a process of its own, forked from one that has
imported the libraries already: a second each instead of six."""
import gc
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait as readable
from pathlib import Path

ROOT = Path(__file__).parent.parent
# before the folder the tests were started from, which may be another copy
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
import torch.distributed.run  # noqa: F401
import transformers.utils.logging

# what it says of missing extras would be in every run's output
transformers.utils.logging.set_verbosity_error()
from diffusers import (CogVideoXPipeline, DPMSolverMultistepScheduler,  # noqa: E402, F401
                       StableDiffusion3Pipeline, StableDiffusionXLPipeline,
                       UniPCMultistepScheduler)
from transformers import Dinov2Model, SamVisionModel  # noqa: E402, F401

import tools.quality  # noqa: E402, F401
import tools.sample  # noqa: E402, F401
import train_sdxl  # noqa: E402, F401
from families.family import of_medium  # noqa: E402
from lesson.runs import FOLDERS  # noqa: E402

of_medium("image")                              # imports their files
of_medium("video")
gc.collect()
gc.freeze()                                     # or every run's collections go through all of it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cli"])
# starting a process polls all others: two threads that poll one read its exit code once, and 255
ONE = threading.Lock()


# --------------------------------------------------------------------------------- in the child

def script(argv, group, folder, out, err):
    """Be `python ARGV`, started in `folder`."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(group)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    argv = [str(a) for a in argv]
    use_code_of(Path.cwd() if argv[0] in ("-c", "-m") else Path(argv[0]).parent)
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "-c", "exec"), dict(__name__="__main__"))
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(argv[1], None)                          # or runpy would warn
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def use_code_of(home):
    """home: the folder that Python would look in first. If it is another copy of the repository,
    forget the modules that this process was forked with."""
    if home == ROOT or not (home / "train_sdxl.py").exists():
        return
    ours = {file.stem for file in ROOT.glob("*.py")} | set(FOLDERS)
    for name in list(sys.modules):
        if name.split(".")[0] in ours:
            del sys.modules[name]
    sys.path.insert(0, str(home))


# -------------------------------------------------------------------------------- in the parent

class Run:
    """One script under way: `python ARGV`; with ranks, the processes torchrun would start."""

    def __init__(self, *argv, ranks=0, folder=ROOT):
        self.folder = tempfile.mkdtemp()
        self.store = None
        if ranks:                                               # outlives rank 0
            self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True,
                                                    wait_for_workers=False)
        self.processes = []
        for rank in range(ranks or 1):
            for file in self.files(rank):
                Path(file).touch()                              # it may be killed before that
            arguments = (argv, self.group(rank, ranks), str(folder), *self.files(rank))
            self.processes.append(FORKS.Process(target=script, args=arguments))
            with ONE:
                self.processes[-1].start()

    def group(self, rank, ranks):
        """The environment that torchrun gives a rank."""
        if not ranks:
            return {}
        return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port),
                    TORCHELASTIC_USE_AGENT_STORE="True")

    def files(self, rank):
        return f"{self.folder}/{rank}.out", f"{self.folder}/{rank}.err"

    def alive(self):
        with ONE:
            return any(p.is_alive() for p in self.processes)

    def send(self, number):
        for p in self.processes:
            os.kill(p.pid, number)

    def wait(self):
        """-> self, with returncode, stdout and stderr as subprocess gives them; of several ranks
        the worst, and all together."""
        for p in self.processes:
            readable([p.sentinel])              # without the lock: it takes as long as the run
            with ONE:
                p.join()
        self.returncode = max((p.exitcode for p in self.processes), key=abs)
        files = [self.files(rank) for rank in range(len(self.processes))]
        self.stdout = "".join(Path(out).read_text() for out, _ in files)
        self.stderr = "".join(Path(err).read_text() for _, err in files)
        shutil.rmtree(self.folder)
        return self


def succeeded(done):
    assert done.returncode == 0, (done.returncode, done.stdout[-1000:], done.stderr[-3000:])
    return done


def failed(done, code, *words):
    """The exit code, and one line on standard error that holds these words: no traceback."""
    lines = [line for line in done.stderr.splitlines()
             if line.strip() and not line.startswith("warning")
             and "%|" not in line]                              # nor a progress bar
    assert done.returncode == code and len(lines) == 1, (done.returncode, done.stderr[-2000:])
    for word in words:
        assert word in lines[0], (word, lines[0])


class StopAt:
    """In the place of a StopSignal: asked to stop, the n-th time somebody looks."""

    def __init__(self, n):
        self.left = n

    def asked_of_any_rank(self):
        self.left -= 1
        return self.left == 0


NEVER = StopAt(-1)


def in_background(waiting):
    """-> a decorator for tests that wait for several runs: they are done in the background, two at
    a time, from the moment the first is asked for. waiting: {name: test}, filled by it, for a
    fixture `background` that starts them by two_at_a_time."""
    def long(test):
        waiting[test.__name__] = test

        def wait(background):
            background[test.__name__].result()
        wait.__name__ = test.__name__
        wait.__doc__ = test.__doc__
        return wait
    return long


@contextmanager
def two_at_a_time(jobs):
    """{name: (function, arguments)} -> {name: future}, worked off in the background in this order;
    what was not asked for is dropped at the end."""
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for name, (function, *arguments) in jobs.items():
            futures[name] = pool.submit(function, *arguments)
        yield futures
        for future in futures.values():
            future.cancel()


# the model card's own lines, given the trainer's noise, against the trainer's samples
CARD = """
import sys, torch
from safetensors.torch import load_file
kept, prompts = load_file(sys.argv[1]), sys.argv[2:]
{}
if sample.dim() == 5:
    sample = sample.transpose(1, 2)
images = kept["images"]
print((sample * 2 - 1 - images.clamp(-1, 1)).abs().max().item(), images.std().item())
"""
CALL = "pipe([prompts[i] for i in kept['prompt']], latents=kept['x_T'], output_type='pt', "


def stock_difference(out, prompts):
    """A new process, stock diffusers, the model card's lines: largest difference from the trainer's
    own samples."""
    code = (out / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code, calls = re.subn(re.escape(f"pipe({prompts[0]!r}, "), CALL, code)
    code, ends = re.subn(r"\)\.(images|frames)\[0\]\n(.|\n)*", r").\1\n", code)
    assert calls == ends == 1, code
    done = succeeded(Run("-c", CARD.format(code), out / "samples" / "samples.safetensors",
                         *prompts).wait())
    difference, spread = map(float, done.stdout.split()[-2:])
    assert spread > 0.01, "the samples are blank: nothing was compared"
    return difference
