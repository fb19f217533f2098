"""Runs stages of small pipelines on the pretended GPU and prints what it saw, as JSON. For
test_pretend.py, in a process of its own: torch must not be imported before tools.simulate."""
from tools import simulate      # first: before torch

import json
import sys
import warnings
from functools import partial

import pipelines
from families.family import of_medium
from teachers import make_sdxl
from tools.cards import CAN_SHARD
from training.flags import parser_of

FAMILIES = of_medium("image") | of_medium("video")
VIDEO = "--height 32 --width 32 --frames 9"
LORA = "--lora-rank 2 --lora-rank-fake 2"
# name: (how the pipeline is built, flags, ranks)
CASES = {
    "sd3, ADP and ADM": (partial(pipelines.sd3, blocks=2), "--text-tokens 7 --ema 0.9", 1),
    "sd3, DMD by LoRA": (partial(pipelines.sd3, "3.5-medium", blocks=3),
                         f"--text-tokens 7 --method dmd --steps 2 {LORA} --dt 16 32", 1),
    "sdxl, A1": (make_sdxl.build, "--method reflow", 1),
    "cogvideox, ADM": (partial(pipelines.cogvideox, "5b", blocks=3),
                       f"--text-tokens 16 --steps 2 {LORA}", 1),
    "wan 2.2, Phased DMD": (partial(pipelines.wan, "2.2", blocks=1),
                            f"{VIDEO} --method phased_dmd --steps 4 --ttur 2", 1),
    "qwen, ADM by LoRA": (partial(pipelines.qwen, blocks=3),
                          f"--height 64 --width 96 --text-tokens 16 --steps 4 {LORA}", 1),
    "sd3, ADM offloaded": (partial(pipelines.sd3, blocks=2),
                           "--text-tokens 7 --steps 2 --fsdp --cpu-offload", 2),
    "sd3, ADM offloaded, alone": (partial(pipelines.sd3, blocks=2),
                                  "--text-tokens 7 --steps 2 --cpu-offload", 1),
}


def flags(line):
    common = "--bf16 --grad-checkpointing --head-channels 8 --batch-size 2 --pair-steps 3"
    return parser_of("", FAMILIES, ()).parse_args([*common.split(), *line.split()])


def sam(path, device=None):
    return simulate.without_values(pipelines.sam()).to(device)


def main():
    warnings.simplefilter("ignore")
    results = {}
    for name in sys.argv[1:] or CASES:
        build, line, ranks = CASES[name]
        if "--cpu-offload" in line and not CAN_SHARD:
            continue
        pipe = build()
        family = FAMILIES[type(pipe).__name__]
        results[name] = simulate.in_fork(simulate.simulate, flags(line), pipe, family, ranks, sam)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
