"""Why this file exists: a run is killed two hundred times at random moments, resumed each time, and nothing may be lost. Not for CI: minutes.

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

FLAGS = "--stage adm --save-every 1 --batch-size 1 --ema 0.9 --head-channels 8 --iterations".split()


def number(path):
    return int(path.name[-8:])


def loras(rank):
    return "--lora-rank", str(rank), "--lora-rank-fake", str(rank)


def punish(small, out, kills, dice, rank=2, told=lambda text: None):
    """Kill -9 a run that saves after every iteration, at a moment between its start and a while after its first save; `kills` times -> counts."""
    from cli import Run
    from plumbing import Failure, verify
    from sdxl import start
    Run("-c", "pass").wait()                                    # the process that the runs are forked from has to import everything first
    newest, counts, patience, before = 0, Counter(), None, set()
    for k in range(kills):
        began, run = time.time(), start(small, out, *loras(rank), *FLAGS, "1000000", "--resume", "auto")
        if patience is None:                                    # how long that takes here
            while not list(out.glob("checkpoints/adm-????????")) and run.alive():
                time.sleep(0.01)
            patience = 2 * (time.time() - began)
        time.sleep(max(0, began + dice.uniform(0, patience) - time.time()))
        assert run.alive(), run.wait().stderr[-2000:]
        run.send(signal.SIGKILL)
        run.wait()
        there = sorted(out.glob("checkpoints/adm-????????"))
        for path in there:
            try:
                verify(path)
            except Failure as e:
                counts["unreadable"] += 1
                told(str(e))
        last = number(there[-1]) if there else 0
        counts["lost"] += last < newest or (newest > 1 and len(there) < 2)
        leftovers = {(str(p), p.stat().st_ino) for p in out.glob("**/*.tmp")}
        counts["leftovers"] += len(leftovers - before)
        counts["in mid-save"] += len(leftovers - before) > 0
        newest, before = last, leftovers
        told(f"{k + 1}: killed after {time.time() - began:.2f} s, newest {newest}, left over {[Path(p).name for p, _ in leftovers]}")
    counts["kills"], counts["iterations"] = kills, newest
    return counts


def finish(small, out, rank=2):
    """Resume once more, Ctrl-C after another save: the last iteration it reached."""
    from sdxl import stop_when
    newest = number(max(out.glob("checkpoints/adm-????????")))
    stop_when(small, out, f"adm-{newest + 1:08d}", *loras(rank), *FLAGS, "1000000")
    assert not list(out.glob("**/*.tmp")), "what a killed save left was not cleaned"
    return number(max(out.glob("checkpoints/adm-????????")))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    from cli import succeeded
    from sdxl import build, same, train, weights
    root, rank = Path(tempfile.mkdtemp()), 16                   # of the LoRAs: saving then takes as long as training
    small, out, whole = build(root), root / "out", root / "whole"
    counts = punish(small, out, args.kills, random.Random(args.seed), rank, told=lambda text: print(text, flush=True))
    last = finish(small, out, rank)
    succeeded(train(small, whole, *loras(rank), *FLAGS, str(last), "--save-every", "1000000"))
    same(weights(out, "adm", last), weights(whole, "adm", last), rtol=0, atol=0)
    shutil.rmtree(root)
    print(f"{counts['kills']} kills over {last} iterations: {counts['lost']} checkpoints lost, {counts['unreadable']} unreadable, {counts['leftovers']} "
          f"half-written ones left over by {counts['in mid-save']} kills and cleaned; final weights, averages and moments bit-equal to an uninterrupted run's")
    assert not counts["lost"] and not counts["unreadable"]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])    # for the forked runs
    main()
