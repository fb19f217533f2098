"""The world of the embedded teacher: captioned shapes over a line of glyphs, and the exact reader
that marks drawings of them. It is why the main job needs no download and no learned metric.

    python -m teachers.shapes                               # mark the shipped teacher (a minute)
        teacher, 25 steps: accuracy 1.000   legible 0.944   glyph_tv 0.045   coverage_tv 0.111
                           diversity 0.903 ...
    python -m teachers.shapes --mark out/sdxl/export        # mark a student, or any other pipeline
                                                            # that draws these captions, as its
                                                            # model card samples it

A caption such as "a small red circle on blue" fixes shape, size, colour and background. It leaves
two things open: the *place* of the shape, and the four glyphs written under it, each drawn
independently from eight with unequal shares (teachers/alphabet.py). So the reader measures

    accuracy        is what the caption asked for there? (the part of CLIP score in the paper)
    legible         share of legible glyphs: a blurred student has few
    glyph_tv        total variation between the legible glyphs' shares and the true ones: a student
                    that loses modes loses the rare ones
    coverage_tv     total variation between the places drawn by student and teacher
    diversity       how often two drawings of one caption are in different places

The teacher itself is trained by teachers/make_sdxl.py.
"""
import itertools
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from teachers.alphabet import GLYPHS, SIDE, read_cells, shares_of, shares_tv, write
from training.errors import run_main
from training.export import load_student
from training.pictures import grid
from training.scripts import a_count, folder_for, parser_for, zero_or_more
from training.terminal import quiet

SHIPPED = Path(__file__).parent / "sdxl"

# -------------------------------------------------------------------------- captions and drawings

PX = 32                                         # images are [B,3,32,32] in [-1,1]
PLATE = 24                                      # rows for the shape; below it the line of glyphs
GLYPH_PX = PX - PLATE                           # of a glyph along each side
LINE = PX // GLYPH_PX                           # glyphs in the line
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.1),
}
PALETTE = torch.tensor(list(COLOURS.values()))  # [4,3] in [0,1]
SIZES = {"small": 13, "large": 18}              # pixels
SHAPES = ("circle", "square", "triangle")
CELLS = 4                                       # places are counted in a 4x4 grid


def every_caption():
    captions = []
    for size, colour, shape, ground in itertools.product(SIZES, COLOURS, SHAPES, COLOURS):
        if colour != ground:
            captions.append(f"a {size} {colour} {shape} on {ground}")
    return captions


CAPTIONS = every_caption()                      # 72 of them


def stencil(shape, side):
    """The shape as a 0/1 mask [side,side]."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = torch.ones_like(x, dtype=torch.bool)
    else:
        inside = x.abs() <= (y + 1) / 2
    return inside.float()


STENCILS = [(shape, size, stencil(shape, side)) for shape in SHAPES for size, side in SIZES.items()]


def colour_of(name):
    return torch.tensor(COLOURS[name])[:, None, None]                           # [3,1,1]


def drawn_glyphs():
    """The eight as they are drawn, a dot two pixels wide, black and white, [8,8,8] in [-1,1]."""
    wide = GLYPH_PX // SIDE
    return GLYPHS.repeat_interleave(wide, 1).repeat_interleave(wide, 2)


DRAWN_GLYPHS = drawn_glyphs()


def draw(caption, top, left, glyphs=(0,) * LINE):
    """One true drawing, [3,32,32] in [-1,1], with the shape's bounding box at (top, left) of the
    plate. glyphs: the four of the line."""
    _, size, colour, shape, _, ground = caption.split()
    side = SIZES[size]
    mask = torch.zeros(PLATE, PX)
    mask[top:top + side, left:left + side] = stencil(shape, side)
    plate = (colour_of(colour) * mask + colour_of(ground) * (1 - mask)) * 2 - 1     # [3,24,32]
    line = torch.cat([DRAWN_GLYPHS[k] for k in glyphs], 1)                          # [8,32]
    return torch.cat([plate, line.expand(3, -1, -1)], 1)


def drawings(n, seed=0):
    """n true drawings, every caption as often: captions [n] as indices, images [n,3,32,32]."""
    generator = torch.Generator().manual_seed(seed)
    lines = write(n * LINE, generator).view(n, LINE).tolist()
    place = torch.rand(n, 2, generator=generator).tolist()
    index, images = [], []
    for i, (line, (down, across)) in enumerate(zip(lines, place)):
        caption = CAPTIONS[i % len(CAPTIONS)]
        side = SIZES[caption.split()[1]]
        top = int(down * (PLATE - side + 1))
        left = int(across * (PX - side + 1))
        index.append(i % len(CAPTIONS))
        images.append(draw(caption, top, left, line))
    return torch.tensor(index), torch.stack(images)


# ------------------------------------------------------------------------------------- the reader


def read(images):
    """What is drawn on the plate? images [B,3,32,32] in [-1,1] -> (captions, a list of B strings,
    None where nothing is legible; places LongTensor [B], the cell of the 4x4 grid of possible
    places, -1 where illegible).

    Every pixel is named by its nearest colour. The commonest name is the ground, the next the
    shape's colour. The stencil and place with the fewest misnamed pixels win. More misnamed pixels
    than a quarter of the stencil: illegible.
    """
    names = names_of_pixels(images.float().cpu()[:, :, :PLATE])                     # [B,24,32]
    ground, colour = grounds_and_colours(names.flatten(1))                          # [B]
    stencils, cells, misfit = best_fit(names, ground, colour)
    colours = list(COLOURS)
    captions = []
    for k, c, g, part in zip(stencils.tolist(), colour.tolist(), ground.tolist(),
                             misfit.tolist()):
        shape, size, _ = STENCILS[k]
        legible = part <= 0.25
        captions.append(f"a {size} {colours[c]} {shape} on {colours[g]}" if legible else None)
    return captions, cells.masked_fill(misfit > 0.25, -1)


def names_of_pixels(images):
    """The nearest colour of each pixel. images [B,3,H,W] in [-1,1] -> LongTensor [B,H,W]."""
    rgb = (images.clamp(-1, 1) + 1) / 2
    distance = (rgb[:, None] - PALETTE[None, :, :, None, None]).square().sum(2)     # [B,4,H,W]
    return distance.argmin(1)


def grounds_and_colours(names):
    """names [B,p] of pixels -> the commonest, which is the ground's, and the next, the shape's;
    each LongTensor [B]."""
    count = F.one_hot(names, len(COLOURS)).sum(1)                                   # [B,4]
    ground = count.argmax(1)                                                        # [B]
    colour = count.scatter(1, ground[:, None], -1).argmax(1)
    return ground, colour


def misnamed(names, ground, colour, mask):
    """How badly a shape fits at each place: pixels outside of it that are not ground and pixels
    inside that are not its colour, as a part of its area. names [B,H,W], ground and colour [B],
    mask [h,w] -> [B,H-h+1,W-w+1]."""
    off_ground = (names != ground[:, None, None]).float()[:, None]                  # [B,1,H,W]
    is_colour = (names == colour[:, None, None]).float()[:, None]
    off_ground_inside = F.conv2d(off_ground, mask[None, None])[:, 0]        # [B,rows,columns]
    right_inside = F.conv2d(is_colour, mask[None, None])[:, 0]
    off_ground_outside = off_ground.sum((2, 3))[:, :, None] - off_ground_inside
    return (off_ground_outside + mask.sum() - right_inside) / mask.sum()


def best_fit(names, ground, colour):
    """The stencil and place that fit best. names [B,24,32] of the pixels, ground and colour [B] ->
    (index into STENCILS [B], cell [B], misnamed pixels as a part of the stencil [B])."""
    B = len(names)
    best = torch.full((B,), float("inf"))
    which = torch.zeros(B, dtype=torch.long)
    cell = torch.zeros(B, dtype=torch.long)
    for k, (_, _, mask) in enumerate(STENCILS):
        wrong = misnamed(names, ground, colour, mask)
        rows, columns = wrong.shape[1:]                                 # of possible places
        least, place = wrong.flatten(1).min(1)                                       # [B]
        down, across = place // columns, place % columns
        cell_here = (down * CELLS // rows) * CELLS + across * CELLS // columns
        better = least < best
        best = best.where(~better, least)
        which = which.masked_fill(better, k)
        cell = cell.where(~better, cell_here)
    return which, cell, best


def read_line(images):
    """What is written under it? images [B,3,32,32] in [-1,1] -> (the nearest glyph of each of the
    four cells, LongTensor [B,4]; whether it is legible, bool [B,4])."""
    line = images.float().cpu()[:, :, PLATE:]                                       # [B,3,8,32]
    cells = line.unflatten(3, (LINE, GLYPH_PX)).permute(0, 3, 1, 2, 4)              # [B,4,3,8,8]
    return read_cells(cells, DRAWN_GLYPHS[:, None].expand(-1, 3, -1, -1))


# -------------------------------------------------------------------------------------- the marks


def agreement(said, captions):
    return sum(a == b for a, b in zip(said, captions)) / len(captions)


def accuracy(images, captions):
    """Fraction of images that show exactly what their caption says."""
    said, _ = read(images)
    return agreement(said, captions)


def legibility(images):
    """Fraction of the glyphs that are legible."""
    _, legible = read_line(images)
    return legible.float().mean().item()


def cell_shares(cells):
    """Cells LongTensor [B], -1 where illegible -> their shares [17]."""
    return torch.bincount(cells + 1, minlength=CELLS**2 + 1) / len(cells)


def places_tv(cells, reference):
    """Total variation, in [0,1], between the places of two sets of images, as they were read:
    LongTensors [B] and [B'] (illegible ones form a cell of their own)."""
    return 0.5 * (cell_shares(cells) - cell_shares(reference)).abs().sum().item()


def pairs_that_differ(captions, cells):
    """Of the pairs of legible drawings of one caption, the share in different cells. cells:
    LongTensor, -1 where illegible."""
    legible = [(caption, cell) for caption, cell in zip(captions, cells.tolist()) if cell >= 0]
    differ = []
    for (caption, cell), (other_caption, other_cell) in itertools.combinations(sorted(legible), 2):
        if caption == other_caption:
            differ.append(cell != other_cell)
    return sum(differ) / max(len(differ), 1)


def marks(images, captions, reference=None):
    """The whole report on images [B,3,32,32] drawn for these captions -> dict of what stands above,
    each in [0,1]; coverage_tv only beside the images of a reference.

    diversity is of legible plates, and of cells of the grid of places (the part of LPIPS in the
    paper's Tab. 6).
    """
    said, cells = read(images)
    glyphs, glyph_legible = read_line(images)
    found = dict(accuracy=agreement(said, captions),
                 legible=glyph_legible.float().mean().item(),
                 glyph_tv=shares_tv(shares_of(glyphs, glyph_legible)))
    if reference is not None:
        _, reference_cells = read(reference)
        found["coverage_tv"] = places_tv(cells, reference_cells)
    found["diversity"] = pairs_that_differ(captions, cells)
    return found


def captions_in_turn(n):
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]


@torch.no_grad()
def drawn_by(pipe, captions, seed=0, **call):
    """Draw these captions, as the teacher samples or as `call` says -> images [n,3,32,32] in
    [-1,1]."""
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=25, guidance_scale=3.0) | call
    drawn = pipe(captions, **call, generator=torch.Generator().manual_seed(seed), output_type="pt")
    return drawn.images * 2 - 1


def mark(pipe, n=576, seed=0, **call):
    """Draw n captions in turn, see `drawn_by` -> (accuracy, images [n,3,32,32] in [-1,1])."""
    captions = captions_in_turn(n)
    images = drawn_by(pipe, captions, seed, **call)
    return accuracy(images, captions), images


def teacher_at(folder):
    """A trained pipeline of this world, float32."""
    quiet()
    from diffusers import StableDiffusionXLPipeline
    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder), add_watermarker=False)
    return pipe.to(torch.float32)


def shipped_teacher():
    """The one of teachers/sdxl."""
    return teacher_at(SHIPPED)


def one_line_of(found):
    """What `marks` found, on one line."""
    return "   ".join(f"{name} {value:.3f}" for name, value in found.items())


def mark_student(folder, samples, seed, out):
    pipe, call = load_student(folder, dtype=torch.float32)
    captions = captions_in_turn(samples)
    found = marks(drawn_by(pipe, captions, seed, **call), captions)
    (out / "result.json").write_text(json.dumps(dict(found, samples=samples)), encoding="utf-8")
    print(f"{folder}, {samples} images: {one_line_of(found)}")


def mark_teacher(out):
    """Print the shipped teacher's marks at 25, 8, 4 and 1 steps, and write a picture."""
    began = time.time()
    pipe = shipped_teacher()
    shown, result = {}, {}
    captions = captions_in_turn(288)
    for steps in (25, 8, 4, 1):
        images = drawn_by(pipe, captions, num_inference_steps=steps)
        found = marks(images[144:], captions[144:], images[:144])
        result[str(steps)] = found
        print(f"teacher, {steps:2d} steps: {one_line_of(found)}")
        shown[f"{steps} steps"] = images[:72:9]
    grid(out / "shapes.png", shown, CAPTIONS[::9])
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"wrote {out}/shapes.png and {out}/result.json in {time.time() - began:.0f} s")


def main():
    p = parser_for(__doc__)
    p.add_argument("--mark", metavar="FOLDER", help="an exported student (default: the teacher)")
    p.add_argument("--samples", type=a_count, default=576, help="drawn for --mark")
    p.add_argument("--seed", type=zero_or_more, default=0, help="of --mark")
    p.add_argument("--out", default="out/shapes", help="folder for the picture and result.json")
    args = p.parse_args()
    out = folder_for(args.out)
    if args.mark:
        mark_student(args.mark, args.samples, args.seed, out)
    else:
        mark_teacher(out)


if __name__ == "__main__":
    run_main(main)
