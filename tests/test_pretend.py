"""Every loop, of every family, on a pretended GPU (tools/pretend.py): nothing that a GPU would
refuse, and a stated number of waits. What is run stands in pretend.py."""
import json
import os
import subprocess
import sys

import pytest

from cli import ROOT
from tools import bench, bench_rows
from tools.cards import CAN_SHARD

STAGES = {
    "sd3, ADP and ADM": ["pairs", "a picture", "adp", "adm"],
    "sd3, DMD by LoRA": ["pairs", "a picture", "adm"],
    "sdxl, A1": ["pairs", "a picture", "reflow"],
    "cogvideox, ADM": ["pairs", "a picture", "adm"],
    "wan 2.2, Phased DMD": ["pairs", "a picture", "phase1", "phase2"],
    "qwen, ADM by LoRA": ["pairs", "a picture", "adm"],
    "sd3, ADM offloaded": ["pairs", "a picture", "adm"],
    "sd3, ADM offloaded, alone": ["pairs", "a picture", "adm"],
}
# of an iteration: each step of an optimizer looks whether its gradient is finite
WAITS = dict(adp=3, reflow=1, adm=3, phase1=3, phase2=3)


def child(*argv):
    """A process that pretends -> what it printed."""
    environment = dict(os.environ, OMP_NUM_THREADS="1",
                       PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def needs_collectives():
    if not CAN_SHARD:
        pytest.skip("this torch has no collectives of fake tensors")


@pytest.fixture(scope="module")
def seen():
    """{case: {stage: figures}}."""
    return json.loads(child(ROOT / "tests" / "pretend.py").splitlines()[-1])


@pytest.mark.parametrize("case", STAGES)
def test_pretend_no_operation_mixes_devices(seen, case):
    if "offloaded" in case:
        needs_collectives()
    assert list(seen[case]) == STAGES[case]
    for stage, found in seen[case].items():
        assert found["mixed"] == {}, (stage, found["mixed"])
        assert found["peak"] >= found["held"] > 0 and found["flop"] > 0, stage


@pytest.mark.parametrize("case", [case for case in STAGES if "offloaded" not in case])
def test_pretend_an_iteration_waits_for_its_gradients_norms_alone(seen, case):
    """Besides, libraries wait: SAM, whose relative positions are indices of the host, and
    Qwen-Image, whose frequencies lie there; and Wan 2.2 asks which of its two networks is meant."""
    for stage in STAGES[case][2:]:
        own, others = 0, 0
        for place, times in seen[case][stage]["waits"].items():
            if "training/optimizer.py" in place.split(" < ")[0]:
                own += times
            elif not any(word in place for word in ("modeling_sam", "qwenimage", "wan.py")):
                others += times
        expected = WAITS[stage] - (case == "sd3, DMD by LoRA")      # which has no heads
        assert (own, others) == (expected, 0), (stage, seen[case][stage]["waits"])


PLANTED = """
from tools import pretend
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
pretend.process_group()
with pretend.pretended() as watch:
    x = torch.ones(4, 4, device="cuda", requires_grad=True)
    (x @ x).sum().backward()
    assert not watch.waits and not watch.mixed
    try:
        x + torch.ones(4, 4)
        raise SystemExit("two devices in a sum")
    except Exception as error:
        assert "cpu" in str(error)
    torch.ones(4)[torch.zeros(2, dtype=torch.long, device="cuda")]
    assert sum(watch.mixed.values()) == 1
    bool(x.sum() > 0), x.sum().item(), x[0].tolist(), x.cpu(), x.nonzero()
    torch.ones(4).to("cuda"), torch.ones(4).to("cuda", non_blocking=True)
    assert sum(watch.waits.values()) == 7, watch.waits
    torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    assert sum(watch.waits.values()) == 7, watch.waits
    watch.reset()
    before = watch.live
    big = torch.zeros(2**20, device="cuda")
    assert watch.peak - before == 2**22
    big.untyped_storage().resize_(0)                # as FSDP2 frees what it has gathered
    assert watch.live == before
    big.untyped_storage().resize_(2**22)
    assert watch.live - before == 2**22
    hollow = torch.zeros(2**20, device="meta")
    assert watch.live - before == 2**22
    mesh = pretend.with_values(dist.init_device_mesh, "cuda", (1,))
    part = DTensor.from_local(big, mesh, [Shard(0)])
    moment = torch.zeros_like(part)
    assert watch.live - before == 2 * 2**22
    del part, moment
    del big
    assert watch.live == before and watch.copied == 0
    there = torch.ones(4).to("cuda")
    there.copy_(torch.ones(4)), there.cpu(), there.double()
    assert watch.copied == 3 * 16
print("seen")
"""


def test_pretend_sees_what_was_planted():
    needs_collectives()
    assert child("-c", PLANTED) == "seen\n"


FAILS = """
from tools.pretend import in_fork
try:
    in_fork(int, "x")
except OSError as error:
    print(error)
"""


def test_pretend_says_why_a_simulation_failed():
    assert child("-c", FAILS).startswith("the simulation failed: ValueError: invalid literal")


def test_pretend_the_first_ten_minutes_reach_their_end(tmp_path):
    """A row that fails is a row, and those after it are run."""
    rows = [bench_rows.Row("of no model", "--models none", 60),
            bench_rows.Row("sd3", "--models SD3-Medium --batch-size 1", 60)]
    bench_rows.run(tmp_path, False, True, rows)
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found) == ["of no model", "sd3"]
    assert "invalid choice" in found["of no model"]["error"]
    assert found["sd3"]["peak_bytes"] > 1e6 and found["sd3"]["flop"] > 1e8


def test_pretend_every_row_of_the_first_ten_minutes_is_one_that_bench_takes(monkeypatch):
    for row in bench_rows.ROWS:
        argv = ["bench", *bench_rows.COMMON.split(), *row.flags.split(), "--full"]
        monkeypatch.setattr(sys, "argv", argv)
        args = bench.parse()
        assert args.full and not args.rows and args.bf16
