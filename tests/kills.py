"""Kill a run two hundred times at random moments and resume it each time: nothing may be lost. Not
for CI: minutes.

    python tests/kills.py --kills 200
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

FLAGS = ("--stage adm --save-every 1 --batch-size 1 --ema 0.9 --head-channels 8 "
         "--iterations").split()
ENDLESS = "1000000"


def number(path):
    return int(path.name[-8:])


def loras(rank):
    return "--lora-rank", str(rank), "--lora-rank-fake", str(rank)


def saved(out):
    return sorted(out.glob("checkpoints/adm-????????"))


def newest_of(checkpoints):
    """The last iteration that was saved, 0 if none was."""
    return number(checkpoints[-1]) if checkpoints else 0


def say_nothing(text):
    pass


def punish(small, out, kills, dice, rank=2, told=say_nothing):
    """Kill -9 a run that saves after every iteration, `kills` times -> counts. Every second one is
    killed while it starts, the others at a moment after they saved: each of these gets at least
    one iteration further, on however slow a machine."""
    from cli import Run
    from sdxl import start
    Run("-c", "pass").wait()            # the process that runs are forked from imports all first
    newest = 0
    counts = Counter()
    to_first_save = None                                                            # in seconds
    before = set()
    for k in range(kills):
        began = time.time()
        run = start(small, out, *loras(rank), *FLAGS, ENDLESS, "--resume", "auto")
        if k % 2 == 0:
            while newest_of(saved(out)) == newest and run.alive():
                time.sleep(0.01)
            to_first_save = time.time() - began
        time.sleep(dice.uniform(0, to_first_save))
        assert run.alive(), run.wait().stderr[-2000:]
        run.send(signal.SIGKILL)
        run.wait()
        there = saved(out)
        counts["unreadable"] += unreadable(there, told)
        last = newest_of(there)
        counts["lost"] += last < newest or (newest > 1 and len(there) < 2)
        leftovers = {(str(p), p.stat().st_ino) for p in out.glob("**/*.tmp")}
        counts["leftovers"] += len(leftovers - before)
        counts["in mid-save"] += len(leftovers - before) > 0
        newest = last
        before = leftovers
        told(f"{k + 1}: killed after {time.time() - began:.2f} s, newest {newest}, left over "
             f"{[Path(p).name for p, _ in leftovers]}")
    counts["kills"] = kills
    counts["iterations"] = newest
    return counts


def unreadable(checkpoints, told):
    """How many of them are not whole."""
    from training.errors import Failure
    from training.folders import verify
    count = 0
    for path in checkpoints:
        try:
            verify(path)
        except Failure as e:
            count += 1
            told(str(e))
    return count


def finish(small, out, rank=2):
    """Resume once more, Ctrl-C after another save: the last iteration it reached."""
    from sdxl import stop_when
    newest = newest_of(saved(out))
    stop_when(small, out, f"adm-{newest + 1:08d}", *loras(rank), *FLAGS, ENDLESS)
    assert not list(out.glob("**/*.tmp")), "what a killed save left was not cleaned"
    return newest_of(saved(out))


def print_now(text):
    print(text, flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    from cli import succeeded
    from sdxl import build, same, train, weights
    root = Path(tempfile.mkdtemp())
    rank = 16                           # of the LoRAs: saving then takes as long as training
    small = build(root)
    out = root / "out"
    whole = root / "whole"
    counts = punish(small, out, args.kills, random.Random(args.seed), rank, told=print_now)
    last = finish(small, out, rank)
    succeeded(train(small, whole, *loras(rank), *FLAGS, str(last), "--save-every", ENDLESS))
    same(weights(out, "adm", last), weights(whole, "adm", last), rtol=0, atol=0)
    shutil.rmtree(root)
    print(f"{counts['kills']} kills over {last} iterations: {counts['lost']} checkpoints lost, "
          f"{counts['unreadable']} unreadable, {counts['leftovers']} half-written ones left over "
          f"by {counts['in mid-save']} kills and cleaned; final weights, averages and moments "
          f"bit-equal to an uninterrupted run's")
    assert not counts["lost"] and not counts["unreadable"]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])    # for the forked runs
    main()
