"""The first ten minutes of a lent card: the rows of `python -m tools.bench --full`, the most
important first. Each is a process of its own, so one that runs out of memory, or out of its time,
is a row that says so. result.json is written after each."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COMMON = "--bf16 --grad-checkpointing --head-channels 256 --repeat 2"
LORA = "--lora-rank 64"


class Row(NamedTuple):
    name: str
    flags: str
    seconds: int                # after which it is given up
    simulated: float = None     # GiB of its stage, by tools.simulate; None: not simulated


ROWS = [
    Row("SDXL, ADM, 4", "--models SDXL --batch-size 4", 150, 55.6),
    Row("SDXL, ADP, 4", "--models SDXL --batch-size 4 --stage adp", 120),
    Row("SDXL, ADM by LoRA, 1", f"--models SDXL --batch-size 1 {LORA}", 90, 10.2),
    Row("SDXL, ADM by LoRA, 4", f"--models SDXL --batch-size 4 {LORA}", 90),
    Row("SDXL, ADM offloaded, 4", "--models SDXL --batch-size 4 --cpu-offload --threads 16", 180),
    Row("SD3.5-Large, ADM by LoRA, 1", f"--models SD3.5-Large --batch-size 1 {LORA}", 120),
    Row("CogVideoX-5b, ADM by LoRA, 1", f"--models CogVideoX-5b --batch-size 1 {LORA}", 180),
    Row("SDXL, ADM compiled, 4",
        "--models SDXL --batch-size 4 --no-comparison --compile", 180),
]


def run_row(row, out, pretend):
    """-> its figures, or {"error": why there are none}."""
    size = ["--full"]
    if pretend:
        size = "--pretend --no-comparison --repeat 1 --head-channels 8".split()
    command = [sys.executable, "-m", "tools.bench", *COMMON.split(), *row.flags.split(), *size,
               "--out", str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * row.seconds
                              if pretend else row.seconds, env=dict(os.environ, PYTHONPATH=path))
    except subprocess.TimeoutExpired:
        return dict(error=f"not over after {row.seconds} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        told = [line for line in lines if "OutOfMemory" in line or "out of memory" in line]
        return dict(error=(told or lines)[-1][:300])
    figures, = json.loads((out / "result.json").read_text(encoding="utf-8")).values()
    return figures


def run(out, pretend, rows=None):
    """All rows -> OUT/result.json, {row: figures}, written after each."""
    results = {}
    print(f"{'':32s}{'s/iteration':>12s}{'samples/s':>11s}{'peak GiB':>10s}{'simulated':>11s}"
          f"{'TFLOP/s':>9s}{'kernels':>9s}")
    for number, row in enumerate(rows or ROWS):
        found = run_row(row, out / f"row-{number}", pretend)
        if row.simulated is not None and not pretend:
            found["simulated_peak_bytes"] = row.simulated * 2**30
        results[row.name] = found
        part = out / "result.json.tmp"
        part.write_text(json.dumps(results, indent=1), encoding="utf-8")
        part.rename(out / "result.json")
        print(line_of(row.name, found), flush=True)
    print(f"wrote {out}/result.json")


def line_of(name, found):
    if "error" in found:
        return f"{name:32s}{found['error']}"
    line = f"{name:32s}{found['lean']:12.3f}{found['samples_per_second']:11.2f}"
    line += f"{found['peak_bytes'] / 2**30:10.2f}"
    for key, width, unit in (("simulated_peak_bytes", 11, 2**30), ("flop_per_second", 9, 1e12),
                             ("kernel_share", 9, 1)):
        line += f"{found[key] / unit:{width}.2f}" if key in found else f"{'-':>{width}s}"
    return line
