"""The worked experiments of hacks/: each is small, applies to the code as it is, runs, and does what it says."""
import json

import pytest

import ablations
import pipelines
import shapes
from cli import ROOT, Run, stock_difference, succeeded
from sdxl import QUICK, command

# in the child: forget the modules it was forked with, and be `python FILE FLAGS` in the changed copy
SCRIPT = """
import runpy, sys
from pathlib import Path
for name in [n for n, m in sys.modules.items() if Path(getattr(m, "__file__", None) or "/").parent == Path({root!r})]:
    del sys.modules[name]
sys.path.insert(0, {folder!r})
sys.argv = {argv!r}
runpy.run_path({folder!r} + "/" + sys.argv[0], run_name="__main__")
"""
TOY = ["adm.py", "--iterations", "3", "--batch-size", "16", "--samples", "2000", "--out"]


@pytest.fixture
def hacked(tmp_path):
    def run(diff, *argv):
        folder = ablations.patched(tmp_path / "code", diff)
        return succeeded(Run("-c", SCRIPT.format(root=str(ROOT), folder=str(folder), argv=list(map(str, argv)))).wait())
    return run


@pytest.mark.parametrize("diff", sorted(p.name for p in (ROOT / "hacks").glob("*.diff")))
def test_a_hack_is_small_and_applies(diff, tmp_path):
    changed = [line for line in (ROOT / "hacks" / diff).read_text().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) <= 15, (diff, len(changed))
    ablations.patched(tmp_path, diff)


def test_another_loss(hacked, small, tmp_path):
    """Undecided, the logistic loss is 2 ln 2 and not 2."""
    _, *flags = command(small, tmp_path / "out", "--stage", "adm", "--steps", "4", "--lr-discriminator", "1e-9", "--batch-size", "1")
    hacked("another_loss.diff", "train_sdxl.py", *flags)
    loss = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["discriminator"]
    assert abs(loss - 1.386) < 0.3, loss


def test_other_taps(hacked, small, tmp_path):
    """Seven heads become five: one ResNet in each of the small UNet's three encoder blocks, two in the middle."""
    _, *flags = command(small, tmp_path / "out", "--stage", "adm", "--steps", "4", "--batch-size", "1")
    hacked("other_taps.diff", "train_sdxl.py", *flags)
    from safetensors import safe_open
    names = safe_open(tmp_path / "out" / "checkpoints" / "adm-00000004" / "heads.safetensors", "pt").keys()
    assert len({n.split(".")[1] for n in names}) == 5


def test_two_steps(hacked, tmp_path):
    assert "DMDX (ADP, ADM), 2 steps" in hacked("two_steps.diff", *TOY, tmp_path).stdout


def test_your_data(hacked, tmp_path):
    hacked("your_data.diff", *TOY, tmp_path, "--data", "spiral")
    assert json.loads((tmp_path / "result.json").read_text())["modes"] == 12


def test_new_family(hacked, tmp_path):
    """Stable Diffusion 1.5's structure, trained, exported, and drawn alike by stock diffusers."""
    pipelines.sd15().save_pretrained(tmp_path / "model")
    prompts = shapes.CAPTIONS[:3]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    hacked("new_family.diff", "train_sdxl.py", "--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", *QUICK,
           "--stage", "adm", "--steps", "2")
    assert stock_difference(tmp_path / "out", prompts) < 1e-4
