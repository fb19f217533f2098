"""The first ten minutes of a lent card: the rows of `python -m tools.bench --full`, the most
important first. Each is a process of its own, so one that runs out of memory, or out of its time,
is a row that says so. result.json is written after each. With --pretend they are simulated."""
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
    simulated: float = None     # GiB, by `python -m tools.bench --full --pretend`; None: not yet


ROWS = [
    Row("SDXL, ADM, 4", "--models SDXL --batch-size 4", 150, 55.4),
    Row("SDXL, ADP, 4", "--models SDXL --batch-size 4 --stage adp", 120, 38.3),
    Row("SDXL, ADM by LoRA, 1", f"--models SDXL --batch-size 1 {LORA}", 90, 9.3),
    Row("SDXL, ADM by LoRA, 4", f"--models SDXL --batch-size 4 {LORA}", 90, 16.6),
    Row("SDXL, ADM offloaded, 4", "--models SDXL --batch-size 4 --cpu-offload --threads 16", 180,
        9.9),
    Row("SD3.5-Large, ADM by LoRA, 1", f"--models SD3.5-Large --batch-size 1 {LORA}", 120, 30.5),
    Row("CogVideoX-5b, ADM by LoRA, 1", f"--models CogVideoX-5b --batch-size 1 {LORA}", 180, 41.3),
    Row("SDXL, ADM compiled, 4",                    # simulated, it would run uncompiled
        "--models SDXL --batch-size 4 --no-comparison --compile", 180),
]


def run_row(row, out, full, pretend):
    """-> its figures, or {"error": why there are none}."""
    command = [sys.executable, "-m", "tools.bench", *COMMON.split(), *row.flags.split(),
               "--out", str(out)]
    seconds = row.seconds
    if full:
        command.append("--full")
    else:
        command += ["--head-channels", "8"]
    if pretend:
        command += "--pretend --no-comparison --repeat 1".split()
        seconds = None                          # the CPU works out every shape, as slow as it is
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds,
                              env=dict(os.environ, PYTHONPATH=path))
    except subprocess.TimeoutExpired:
        return dict(error=f"not over after {seconds} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        told = [line for line in lines if "OutOfMemory" in line or "out of memory" in line]
        return dict(error=(told or lines)[-1][:300])
    figures, = json.loads((out / "result.json").read_text(encoding="utf-8")).values()
    return figures


def run(out, full, pretend, rows=None):
    """All rows -> OUT/result.json, {row: figures}, written after each."""
    results = {}
    if pretend:
        print("simulated on a pretended GPU: nothing is measured; steps on the host cost no time")
    print(f"{'':32s}{'s/iteration':>12s}{'samples/s':>11s}{'peak GiB':>10s}{'simulated':>11s}"
          f"{'TFLOP/s':>9s}{'kernels':>9s}")
    for number, row in enumerate(rows or ROWS):
        found = run_row(row, out / f"row-{number}", full, pretend)
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
