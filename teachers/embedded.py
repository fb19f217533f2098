"""The embedded teachers: pipelines that ship with the code, and what a run of one of them wants in
place of the paper's values."""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from teachers.report import report
from teachers.shapes import CAPTIONS

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Embedded:
    folder: Path
    prompts: list
    settings: dict              # {flag: value}
    settings_phased: dict       # the same, on top, for --method phased_dmd
    report: Callable            # (run, experts, schedule) -> the table, dict for result.json


# three orders of magnitude fewer weights and iterations than the paper's
SDXL = Embedded(
    folder=HERE / "sdxl",
    prompts=CAPTIONS,
    settings=dict(
        pairs=2048, pair_steps=20, pair_guidance=3.0, iterations_adp=2000, iterations_adm=100,
        batch_size=32, decay=True, lr_generator_adp=3e-4, lr_generator=1e-5, lr_fake=1e-3,
        lr_discriminator=1e-3, guidance=[2.0, 4.0], ema=0.98, head_channels=64,
        pixel_backbone=str(HERE / "sdxl" / "vision_encoder"), sample_every=250, save_every=250,
        # few samples: heads that know something already, and a step that shows them more; chosen on
        # seeds 10 and 11 of an earlier teacher (docs/notebook.md)
        warm_heads=True, dt=[64]),
    settings_phased=dict(iterations_phase=150, lr_generator=1e-4, lora_rank=0, accumulate=1),
    report=report)
