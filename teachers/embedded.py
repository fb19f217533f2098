"""The embedded teachers: pipelines that ship with the code, and what a run of one of them wants in
place of the paper's values."""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from teachers import moving, shapes


@dataclass(frozen=True)
class Embedded:
    name: str                   # as --help has it
    folder: Path
    prompts: list
    settings: dict              # {flag: value}
    settings_phased: dict       # the same, on top, for --method phased_dmd
    marks: Callable             # (samples, captions, reference samples) -> {mark: value in [0,1]}
    columns: dict               # {mark: its heading in the table}


# what the marks are stands in teachers/shapes.py
OF_SHAPES = dict(accuracy="accuracy", legible="legible glyphs", glyph_tv="TV of glyphs",
                 coverage_tv="TV of places", diversity="diversity")
# and in teachers/moving.py
OF_MOVING = dict(accuracy="accuracy", steady="steady", diversity="diversity")

EVERY = dict(
    pair_guidance=3.0, decay=True, ema=0.98, head_channels=64, sample_every=250, save_every=250)

# a thousandth of the paper's weights, and a seventh to an eightieth of its iterations
SDXL = Embedded(
    name="embedded SDXL",
    folder=shapes.SHIPPED,
    prompts=shapes.CAPTIONS,
    settings=EVERY | dict(
        pairs=2048, pair_steps=20, iterations_adp=1200, iterations_adm=100, batch_size=32,
        lr_generator_adp=1e-3, lr_generator=1e-5, lr_fake=1e-3, lr_discriminator=1e-3,
        guidance=[2.0, 4.0], pixel_backbone=str(shapes.SHIPPED / "vision_encoder"),
        # few samples: heads that know something already, and a step that shows them more; chosen on
        # seeds 10 and 11 of an earlier teacher (docs/notebook.md)
        warm_heads=True, dt=[64]),
    settings_phased=dict(iterations_phase=150, lr_generator=1e-4, lora_rank=0, accumulate=1),
    marks=shapes.marks,
    columns=OF_SHAPES)

# what SD3 and CogVideoX share; all of it was chosen on seed 10 (docs/notebook.md)
FEW_STEPS = EVERY | dict(lr_discriminator=3e-4, ttur=2)

SD3 = Embedded(
    name="embedded SD3",
    folder=Path(__file__).parent / "sd3",
    prompts=shapes.CAPTIONS,
    settings=FEW_STEPS | dict(
        out="out/sd3", no_t5=True, text_tokens=1, pairs=2048, pair_steps=20, batch_size=32,
        iterations_adm=900, lr_generator=1e-4, lr_fake=1e-3, dt=[64], guidance=[2.0, 4.0],
        lora_rank=0),
    settings_phased=dict(iterations_phase=150, ttur=5, accumulate=1),
    marks=shapes.marks,
    columns=OF_SHAPES)

COGVIDEOX = Embedded(
    name="embedded CogVideoX",
    folder=moving.SHIPPED,
    prompts=moving.CAPTIONS,
    # unguided: this teacher is as good so, and guided its students make squares of circles
    settings=FEW_STEPS | dict(
        text_tokens=moving.TOKENS, pairs=576, pair_steps=25, batch_size=16, iterations_adm=400,
        warm_up=100, lr_generator=2e-5, lr_fake=2e-4, dt=[160], guidance=[1.0, 1.0]),
    settings_phased=dict(iterations_phase=150, lr_generator=5e-5, ttur=5, lora_rank=0,
                         accumulate=1),
    marks=moving.marks,
    columns=OF_MOVING)


def of_medium(medium):
    """The embedded teachers of "image" or "video", first the one that is distilled without
    --model."""
    return [SDXL, SD3] if medium == "image" else [COGVIDEOX]
