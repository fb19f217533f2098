"""Whole runs under attack: closed terminals, lost ranks, diverged weights, kills inside of Phased
DMD and of an export; and ADM's warm starts."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipelines
from cli import ROOT, Run, failed, in_background, succeeded, two_at_a_time
from sdxl import LIGHT, appears, command, same, start, train, weights
from training.export import load_student
from training.folders import verify

ADM = (*LIGHT, "--stage", "adm", "--iterations", "2", "--save-every", "1")
ENDLESS = ("--iterations", "1000000", "--save-every", "1000000")
LONG = {}
long = in_background(LONG)


@pytest.fixture(scope="module")
def background(small, request, tmp_path_factory):
    asked = {item.name for item in request.session.items}
    jobs = {name: (test, small, tmp_path_factory.mktemp(name))
            for name, test in LONG.items() if name in asked}
    with two_at_a_time(jobs) as futures:
        yield futures


# runs a script that dies when it is about to do, or has just done, the rename that ends in argv[2]
AT_RENAME = """
import os, runpy, signal, sys
rename, (when, name) = os.rename, sys.argv[1:3]
def fatal(a, b):
    if when == "after" and str(b).endswith(name):
        rename(a, b)
    if str(b).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
os.rename, sys.argv = fatal, sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(when, name, *words):
    done = Run("-c", AT_RENAME, when, name, *words).wait()
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr[-2000:])


# ------------------------------------------------------------------------------------ terminals

# runs a script whose standard error is on a full disk
FULL = """
import os, runpy, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@long
def test_a_closed_terminal_loses_nothing(small, folder):
    """SIGHUP, also more than one, saves as SIGTERM does; and nothing that cannot be said on the way
    ends the run."""
    out = folder / "out"
    run = Run("-c", FULL, *command(small, out, *ADM, *ENDLESS))
    appears(out / "prompts" / "00000", run)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        run.send(number)
    succeeded(run.wait())
    saved, = (out / "checkpoints").iterdir()
    assert verify(saved)["iteration"] >= 1 and "--resume auto" in run.stdout


# ---------------------------------------------------------------------------------------- ranks

@long
def test_a_rank_that_is_lost(small, folder):
    """The other says so in one line."""
    out = folder / "out"
    run = start(small, out, *ADM, "--batch-size", "1", "--iterations", "1000000", ranks=2)
    appears(out / "checkpoints" / "adm-00000001", run)
    os.kill(run.processes[1].pid, signal.SIGKILL)
    run.wait()
    assert [p.exitcode for p in run.processes] == [1, -signal.SIGKILL]
    assert "Traceback" not in run.stderr
    assert run.stderr.count("another rank has ended") == 1


# ------------------------------------------------------------------------------- diverged weights

@long
def test_the_cure_of_a_diverged_run_works(small, folder):
    """Every checkpoint that is left holds what diverged; the message names it."""
    out = folder / "out"
    checkpoint = out / "checkpoints" / "adm-00000001"
    failed(train(small, out, *ADM, "--lr-generator", "1e6"), 1, "adm, iteration 2", "not finite",
           f"delete {checkpoint}", "--resume auto", "lower learning rate")
    shutil.rmtree(checkpoint)
    succeeded(train(small, out, *ADM, "--resume", "auto"))


# ---------------------------------------------------------------------- kills in phase 2 and export

PHASED = (*LIGHT, *"--method phased_dmd --accumulate 1 --ttur 1 --iterations 3 --save-every 1 "
          "--ema 0.9".split())


@long
def test_killed_in_phase_2_and_in_the_export(small, folder):
    """Resumed each time, it ends as a run that was left alone; and a half-written export does not
    look like a whole one."""
    whole = folder / "whole"
    out = folder / "out"
    succeeded(train(small, whole, *PHASED))
    resumed = command(small, out, *PHASED, "--resume", "auto")
    killed("after", "phase2-00000002", *resumed)
    killed("before", "export", *resumed)
    assert (out / "export.tmp").exists() and not (out / "export").exists()
    assert not (out / "result.json").exists()
    succeeded(Run(*resumed).wait())
    for stage in ("phase1", "phase2"):
        same(weights(out, stage, 3), weights(whole, stage, 3), rtol=0, atol=0)
    files = [path.relative_to(whole) for path in sorted((whole / "export").rglob("*.safetensors"))]
    assert len(files) > 5 and not list(out.glob("**/*.tmp"))
    for file in files:
        same(load_file(out / file), load_file(whole / file), rtol=0, atol=0)
    load_student(out / "export")


@long
def test_killed_in_a_video_run(small, folder):
    """The same of train_cogvideox.py, in the middle of ADM and at the end of its export."""
    pipelines.cogvideox("2b", blocks=3).save_pretrained(folder / "model")
    flags = ("--batch-size 1 --text-tokens 16 --steps 2 --iterations 2 --save-every 1 "
             "--sample-every 100 --head-channels 8 --pair-steps 2 --samples 1 "
             "--resume auto").split()
    out = folder / "out"
    words = (ROOT / "train_cogvideox.py", "--model", folder / "model", "--prompts",
             small / "prompts.txt", "--out", out, *flags)
    killed("before", "adm-00000002", *words)
    assert (out / "checkpoints" / "adm-00000002.tmp").exists()
    killed("after", "export", *words)
    assert (out / "export" / "README.md").exists() and not (out / "result.json").exists()
    succeeded(Run(*words).wait())
    assert (out / "result.json").exists() and not list(out.glob("**/*.tmp"))
    load_student(out / "export")


# -------------------------------------------------------------------------- --warm-heads, --warm-up

# runs a script and keeps, in the folder argv[1], the heads that ADM starts with, and the generator
# before ADM and after each of its iterations
SPY = """
import os, runpy, sys
from safetensors.torch import save_file
import adm
plain, folder = adm.adm, sys.argv[1]
def keep(name, net):
    save_file({k: p.detach().clone() for k, p in net.named_parameters()}, f"{folder}/{name}")
def spied(generator, scores, discriminator, *arguments, **more):
    keep("heads", discriminator.heads)
    keep("generator-0", generator)
    for losses in plain(generator, scores, discriminator, *arguments, **more):
        keep(f"generator-{losses['iteration']}", generator)
        yield losses
adm.adm = spied
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WARM = (*LIGHT, *"--iterations 4 --save-every 1 --warm-heads --warm-up 3 --ema 0.9".split())


def is_equal(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@long
def test_a_warm_start(small, folder):
    """ADM's heads start as ADP's; the generator rests for three iterations, and moves in the
    fourth; killed and resumed in the warm-up, the run ends the same."""
    whole = folder / "whole"
    out = folder / "out"
    succeeded(Run("-c", SPY, folder, *command(small, whole, *WARM)).wait())
    adp = whole / "checkpoints" / "adp-00000004"
    assert is_equal(folder / "heads", adp / "heads.safetensors")
    for i in (1, 2, 3):
        assert is_equal(folder / "generator-0", folder / f"generator-{i}"), i
    assert not is_equal(folder / "generator-0", folder / "generator-4")
    assert verify(whole / "checkpoints" / "adm-00000004")["warm_heads"] is True
    for name in ("prompts", "pairs", "checkpoints/adp-00000004"):
        shutil.copytree(whole / name, out / name)
    resumed = command(small, out, *WARM, "--resume", "auto")
    killed("after", "adm-00000002", *resumed)
    failed(train(small, out, *WARM, "--no-warm-heads", "--resume", "auto"), 1,
           "its warm_heads is True, this run's is False")
    succeeded(Run(*resumed).wait())
    same(weights(out), weights(whole), rtol=0, atol=0)
    elsewhere = folder / "elsewhere"            # where no checkpoint of ADP is
    succeeded(train(small, elsewhere, *WARM, "--resume", adp))
    same(weights(elsewhere), weights(whole), rtol=0, atol=0)


SLOW_DISK = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from training import checkpoints
from training.heads import load_warm_heads
from training.ranks import is_rank_0, start, world
start()
out = Path(sys.argv[1])
facts, heads = dict(stage="adp", teacher="x"), torch.nn.Linear(1, 1)
write = checkpoints.write_folder
for iteration in (1, 2):
    torch.nn.init.constant_(heads.weight, iteration)
    if iteration == 2 and is_rank_0():
        checkpoints.write_folder = lambda *args: (time.sleep(1), write(*args))
    checkpoints.save_checkpoint(out / "checkpoints", dict(facts, iteration=iteration,
                                global_iter=iteration), dict(heads=heads), ())
torch.nn.init.zeros_(heads.weight)
load_warm_heads(SimpleNamespace(out=SimpleNamespace(path=out), checkpoint=None),
                dict(teacher="x"), heads)
assert heads.weight.item() == 2, (world(), heads.weight)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_all_ranks_start_from_the_same_heads(tmp_path):
    """Though rank 0 is still writing them."""
    succeeded(Run("-c", SLOW_DISK, tmp_path, ranks=2).wait())


def test_warm_heads_without_an_adp_to_take_them_from(small, tmp_path):
    done = train(small, tmp_path / "out", *ADM, "--warm-heads")
    failed(done, 1, "--warm-heads", "--stage adp", "--no-warm-heads")
    assert [path.name for path in Path(tmp_path / "out").iterdir()] == [".lock"]
