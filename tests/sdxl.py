"""The small random SDXL pipeline, and how train_sdxl.py is run on it, for the tests that share
them."""
import shutil
import signal
import time

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import pipelines
from cli import ROOT, Run, succeeded
from teachers import make_sdxl
from teachers.shapes import CAPTIONS

QUICK = ("--pairs 12 --pair-steps 2 --iterations 4 --batch-size 2 --save-every 2 "
         "--sample-every 100 --samples 3 --head-channels 16 --lr-generator-adp 1e-3 "
         "--lr-generator 1e-3 --lr-fake 1e-3 --lr-discriminator 1e-3").split()
PROMPTS = CAPTIONS[:5]
PHASED = "--method phased_dmd --accumulate 1 --ttur 2 --lora-rank 0 --decay".split()
# checkpoints of 2 MB and not of 40
LIGHT = "--lora-rank 2 --lora-rank-fake 2 --head-channels 8".split()


def build(root):
    """A random pipeline, a random vision encoder and a prompt file."""
    torch.manual_seed(0)
    make_sdxl.build().save_pretrained(root / "model")
    pipelines.sam().save_pretrained(root / "vision")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def command(small, out, *flags):
    return (ROOT / "train_sdxl.py", "--model", small / "model", "--prompts", small / "prompts.txt",
            "--pixel-backbone", small / "vision", "--out", out, *QUICK, *flags)


def start(small, out, *flags, **options):
    return Run(*command(small, out, *flags), **options)


def train(*args, **options):
    return start(*args, **options).wait()


def appears(path, run):
    """Wait for it, as long as the run lives."""
    while not path.exists() and run.alive():
        time.sleep(0.01)


def stop_when(small, out, checkpoint, *flags):
    """Ctrl-C once this checkpoint is there."""
    run = start(small, out, *flags, "--resume", "auto")
    appears(out / "checkpoints" / checkpoint, run)
    run.send(signal.SIGINT)
    succeeded(run.wait())
    assert not (out / "result.json").exists(), "the run was over before the signal came"
    assert "--resume auto" in run.stdout


def part_of(reference, out, *checkpoints):
    """What a run had on the disk when it had come to these checkpoints."""
    for name in ("prompts", *(f"checkpoints/{c}" for c in checkpoints)):
        shutil.copytree(reference / name, out / name)
    return out


def weights(out, stage="adm", iteration=4):
    folder = out / "checkpoints" / f"{stage}-{iteration:08d}"
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.stem}.{name}"] = tensor
    return found


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], msg=lambda m: f"{name}: {m}", **tolerance)
