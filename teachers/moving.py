"""The world of the video teacher: captioned moving shapes, and the exact reader that marks videos
of them.

    python -m teachers.moving                               # mark the shipped teacher
    python -m teachers.moving --mark out/cogvideox/export   # mark a student, as its model card
                                                            # samples it

A caption such as "a red circle moving left on blue" fixes shape, colours and direction. It leaves
one thing open: the *place*. The shape moves one pixel a frame. So the reader measures

    accuracy        does the video show what the caption asked for?
    steady          share of videos whose shape is, in every frame, within one pixel of where a
                    steady motion of a pixel a frame would have it
    diversity       how often two legible videos of one caption are in different places

The teacher itself is trained by teachers/make_cogvideox.py.
"""
import itertools
import json
import time
from pathlib import Path

import torch

from teachers.shapes import (COLOURS, SHAPES, agreement, colour_of, grounds_and_colours,
                             misnamed, names_of_pixels, one_line_of, pairs_that_differ, stencil)
from training.errors import run_main
from training.export import load_student
from training.pictures import contact_sheet
from training.scripts import a_count, folder_for, parser_for, zero_or_more
from training.terminal import quiet

SHIPPED = Path(__file__).parent / "cogvideox"

# ---------------------------------------------------------------------------- captions and videos

PX = 24                                         # videos are [B,3,9,24,24] in [-1,1]
FRAMES = 9
SIDE = 10                                       # of a shape, pixels
FREE = PX - SIDE + 1                            # places along an axis
DIRECTIONS = dict(left=(0, -1), right=(0, 1), up=(-1, 0), down=(1, 0))     # pixels a frame
CELLS = 3                                       # places are counted in a 3x3 grid


def every_caption():
    captions = []
    for colour, shape, direction, ground in itertools.product(COLOURS, SHAPES, DIRECTIONS,
                                                              COLOURS):
        if colour != ground:
            captions.append(f"a {colour} {shape} moving {direction} on {ground}")
    return captions


CAPTIONS = every_caption()                      # 144 of them
TOKENS = 8                                      # of a caption: seven words and the end


def draw(caption, top, left):
    """One true video, [3,9,24,24] in [-1,1]. (top, left): of the shape's bounding box in the first
    frame."""
    _, colour, shape, _, direction, _, ground = caption.split()
    down, across = DIRECTIONS[direction]
    mask = torch.zeros(FRAMES, PX, PX)
    for i in range(FRAMES):
        y, x = top + i * down, left + i * across
        mask[i, y:y + SIDE, x:x + SIDE] = stencil(shape, SIDE)
    of_shape = colour_of(colour)[:, None]                                       # [3,1,1,1]
    of_ground = colour_of(ground)[:, None]
    return (of_shape * mask + of_ground * (1 - mask)) * 2 - 1


def first_place(velocity, share):
    """Where an axis begins, so that nothing leaves the frame. velocity: -1, 0 or 1 pixels a frame;
    share: in [0,1)."""
    path = velocity * (FRAMES - 1)
    return int(share * (FREE - abs(path))) + max(0, -path)


def videos(n, seed=0):
    """n true videos, every caption as often: captions [n] as indices, videos [n,3,9,24,24]."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(n, 2, generator=generator).tolist()
    index = torch.arange(n) % len(CAPTIONS)
    drawn = []
    for i, (down, across) in zip(index.tolist(), place):
        vertical, horizontal = DIRECTIONS[CAPTIONS[i].split()[4]]
        drawn.append(draw(CAPTIONS[i], first_place(vertical, down),
                          first_place(horizontal, across)))
    return index, torch.stack(drawn)


# ------------------------------------------------------------------------------------- the reader


def read(videos):
    """What do they show? videos [B,3,9,24,24] in [-1,1] -> (captions, a list of B strings, None
    where nothing is legible; steady, bool [B]; cells LongTensor [B], where the middle frame has the
    shape in a 3x3 grid of places, -1 where illegible).

    As teachers/shapes.py reads an image. Colours and shape are the whole video's; a frame in which
    more pixels are misnamed than a quarter of the stencil makes it illegible, and so does a shape
    that goes less than half of its way.
    """
    frames = videos.float().cpu().movedim(2, 1).flatten(0, 1)                   # [9B,3,24,24]
    names = names_of_pixels(frames)                                             # [9B,24,24]
    ground, colour = grounds_and_colours(names.view(len(videos), -1))           # [B]
    misfits, places = [], []
    for shape in SHAPES:
        wrong = misnamed(names, ground.repeat_interleave(FRAMES),
                         colour.repeat_interleave(FRAMES), stencil(shape, SIDE))
        least, place = wrong.flatten(1).min(1)                                  # [9B]
        misfits.append(least.view(-1, FRAMES))
        places.append(torch.stack([place // FREE, place % FREE], 1).view(-1, FRAMES, 2))
    misfit = torch.stack(misfits, 1)                                            # [B,3,9]
    shape = misfit.mean(2).argmin(1)                                            # [B]
    each = torch.arange(len(videos))
    place = torch.stack(places, 1)[each, shape].float()                         # [B,9,2]
    way = place[:, -1] - place[:, 0]                                            # [B,2]
    legible = (misfit[each, shape].amax(1) <= 0.25) & (way.abs().amax(1) >= (FRAMES - 1) / 2)
    directions = torch.tensor(list(DIRECTIONS.values())).float()                # [4,2]
    direction = (way @ directions.T).argmax(1)                                  # [B]
    captions = []
    for k, c, g, d, is_legible in zip(shape.tolist(), colour.tolist(), ground.tolist(),
                                      direction.tolist(), legible.tolist()):
        caption = (f"a {list(COLOURS)[c]} {SHAPES[k]} moving {list(DIRECTIONS)[d]} on "
                   f"{list(COLOURS)[g]}")
        captions.append(caption if is_legible else None)
    time_from_middle = torch.arange(FRAMES)[:, None] - (FRAMES - 1) / 2         # [9,1]
    line = directions[direction][:, None] * time_from_middle                    # [B,9,2]
    off = place - line
    off = off - off.mean(1, keepdim=True)
    steady = legible & (off.abs().amax((1, 2)) <= 1)
    cell = (place[:, FRAMES // 2] * CELLS / FREE).long()                        # [B,2]
    cells = cell[:, 0] * CELLS + cell[:, 1]
    return captions, steady, cells.masked_fill(~legible, -1)


def marks(videos, captions, reference=None):
    """The whole report on videos [B,3,9,24,24] drawn for these captions -> dict of what stands
    above, each in [0,1]. reference: not needed; marks of images want one."""
    said, steady, cells = read(videos)
    return dict(accuracy=agreement(said, captions),
                steady=steady.float().mean().item(),
                diversity=pairs_that_differ(captions, cells))


def captions_in_turn(n):
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]


@torch.no_grad()
def drawn_by(pipe, captions, seed=0, batch=64, **call):
    """Draw these captions, as the teacher samples or as `call` says -> videos [n,3,9,24,24] in
    [-1,1]."""
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=25, guidance_scale=3.0, max_sequence_length=TOKENS) | call
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for first in range(0, len(captions), batch):
        part = pipe(captions[first:first + batch], **call, generator=generator, output_type="pt")
        drawn.append(part.frames.transpose(1, 2) * 2 - 1)
    return torch.cat(drawn)


def shipped_teacher():
    """The trained pipeline of teachers/cogvideox, float32."""
    quiet()
    from diffusers import CogVideoXPipeline
    return CogVideoXPipeline.from_pretrained(str(SHIPPED)).to(torch.float32)


def mark_and_tell(name, pipe, samples, seed, **call):
    captions = captions_in_turn(samples)
    drawn = drawn_by(pipe, captions, seed, **call)
    found = marks(drawn, captions)
    print(f"{name}: {one_line_of(found)}")
    return drawn, found


def mark_student(folder, samples, seed, out):
    pipe, call = load_student(folder, dtype=torch.float32)
    _, found = mark_and_tell(folder, pipe, samples, seed, **call)
    (out / "result.json").write_text(json.dumps(dict(found, samples=samples)), encoding="utf-8")


def mark_teacher(samples, seed, out):
    """Print the shipped teacher's marks at 25, 8 and 4 steps, and write a contact sheet."""
    began = time.time()
    pipe = shipped_teacher()
    shown, result = {}, {}
    for steps in (25, 8, 4):
        drawn, result[str(steps)] = mark_and_tell(f"teacher, {steps:2d} steps", pipe, samples,
                                                  seed, num_inference_steps=steps)
        shown[f"{steps} steps"] = drawn[:2]
    contact_sheet(out / "moving.png", shown, CAPTIONS)
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"wrote {out}/moving.png and {out}/result.json in {time.time() - began:.0f} s")


def main():
    p = parser_for(__doc__)
    p.add_argument("--mark", metavar="FOLDER", help="an exported student (default: the teacher)")
    p.add_argument("--samples", type=a_count, default=288, help="videos drawn")
    p.add_argument("--seed", type=zero_or_more, default=0)
    p.add_argument("--out", default="out/moving", help="folder for the pictures and result.json")
    args = p.parse_args()
    out = folder_for(args.out)
    if args.mark:
        mark_student(args.mark, args.samples, args.seed, out)
    else:
        mark_teacher(args.samples, args.seed, out)


if __name__ == "__main__":
    run_main(main)
