"""Pages of glyphs: a world of images in which the methods differ, and the networks that learn it.

A page is 12x12 pixels, 3x3 cells. Each cell is one of eight fixed 4x4 patterns of -1 and +1, drawn
independently with *unequal* shares. So there is something to blur, the patterns, and something to
lose, the rare ones. Both are measured exactly, by a reader that compares each cell with all eight:

    cell    share of legible cells: those within 0.15 of a pattern in mean squared distance
    page    share of legible pages: all nine cells are
    tv      total variation between the shares of the legible glyphs and the true ones, 0 to 1;
            0.5 where nothing is legible, which says nothing

and, as Table 6 asks, `diversity`: how often the same cell of two pages differs (0.85 of true ones).

The network is a diffusers UNet of 0.55 million parameters, its discriminator reads the same taps as
SDXL's. `python -m lesson.train_glyphs` trained the teacher in teachers/glyphs/.
"""
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from discriminators import Discriminator, Head, Heads
from families import sdxl
from ode import Schedule, sample
from teachers.alphabet import GLYPHS, SHARES, SIDE, read_cells, shares_of, shares_tv, write
from training.draws import stream
from training.heads import heads_for

CELLS = 3                                       # along each side of a page
SHAPE = (1, CELLS * SIDE, CELLS * SIDE)         # of a page
SCHEDULE = Schedule.straight()                  # the teacher's: a flow network
TEACHER = Path(__file__).parents[1] / "teachers" / "glyphs" / "unet.safetensors"
HIDDEN = 64                                     # channels inside a discriminator's head


# ------------------------------------------------------------------------------------------- world

def pages(n, generator=None):
    """n true pages, [n,1,12,12]."""
    index = write(n * CELLS**2, generator)
    cells = GLYPHS[index].view(n, CELLS, CELLS, SIDE, SIDE)
    return cells.permute(0, 1, 3, 2, 4).reshape(n, *SHAPE)


def read(x):
    """What is written on pages x [n,1,12,12] -> (the nearest glyph of each cell, LongTensor [n,9];
    whether it is legible, bool [n,9])."""
    cells = x.view(-1, CELLS, SIDE, CELLS, SIDE).permute(0, 1, 3, 2, 4)         # [n,3,3,4,4]
    return read_cells(cells.reshape(-1, CELLS**2, SIDE, SIDE))


def measure(x):
    """What is measured of pages x [n,1,12,12], see above, and `shares`, a list of eight."""
    index, legible = read(x)
    shares = shares_of(index, legible)                                          # [8]
    differ = index != index.roll(1, 0)                                          # [n,9]
    return dict(cell=legible.float().mean().item(), page=legible.all(1).float().mean().item(),
                tv=shares_tv(shares),
                diversity=differ.float().mean().item(), shares=shares.tolist())


# ---------------------------------------------------------------------------------------- networks

def unet():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=SHAPE[-1], in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D", cross_attention_dim=8,
        attention_head_dim=8)


def no_prompt(n):
    """Conditioning for n pages. diffusers asks for a prompt; no block of this UNet reads it."""
    return dict(encoder_hidden_states=torch.zeros(n, 1, 8))


def shipped_teacher():
    """The frozen teacher of teachers/glyphs/."""
    net = unet()
    net.load_state_dict({name: value.float() for name, value in load_file(TEACHER).items()})
    return net.requires_grad_(False)


@torch.no_grad()
def generated(net, x, stops, batch=256):
    """Noise x [n,1,12,12] -> pages, [n,1,12,12], at first order in few steps, else at second."""
    order = 2 if len(stops) > 5 else 1
    parts = [sample(net, SCHEDULE, part, stops, no_prompt(len(part)), order=order)
             for part in x.split(batch)]
    return torch.cat(parts)


# ---------------------------------------------------------------------------------- discriminators

def latent_discriminator(teacher):
    """On the teacher, which it reads as SDXL's is read: 5 heads."""
    heads = heads_for(sdxl.FAMILY.taps, teacher, torch.zeros(1, *SHAPE), HIDDEN,
                      timestep=torch.zeros(1), **no_prompt(1))
    return Discriminator(sdxl.FAMILY.taps(teacher), heads)


class Encoder(nn.Module):
    """In the place of SAM: three convolutions, [B,1,12,12] -> three maps. They read what is in each
    cell, or did not learn to."""

    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, width, 3, padding=1),
                                     nn.Conv2d(width, width, 3, padding=1),
                                     nn.Conv2d(width, width, 4, stride=4)])
        self.output = nn.Conv2d(width, len(SHARES), 1)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = F.silu(layer(x))
            maps.append(x)                      # [B,32,12,12], the same, [B,32,3,3]
        return maps

    def logits(self, x):
        return self.output(self.forward(x)[-1])                                 # [B,8,3,3]


def random_encoder():
    """Its weights are as they were drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder().requires_grad_(False)


@lru_cache
def trained_encoder(iterations=300, batch=64):
    """It has learnt to read noisy pages; a few seconds, once a process."""
    encoder = random_encoder().requires_grad_(True)
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-3)
    for i in range(iterations):
        noise = stream(0, i)
        x_0 = pages(batch, noise)
        sigma = torch.rand(batch, 1, 1, 1, generator=noise)
        x = x_0 + sigma * torch.randn(x_0.shape, generator=noise)
        written, _ = read(x_0)                                                  # [B,9]
        F.cross_entropy(encoder.logits(x), written.view(-1, CELLS, CELLS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder.requires_grad_(False)


BACKBONES = {"random": random_encoder, "reader": trained_encoder}


def pixel_discriminator(backbone):
    """backbone: a name of BACKBONES."""
    taps = BACKBONES[backbone]()
    with torch.no_grad():
        shapes = [tuple(feature.shape[1:]) for feature in taps(torch.zeros(1, *SHAPE))]
    return Discriminator(taps, Heads([Head(shape, HIDDEN) for shape in shapes]))
