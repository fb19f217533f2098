"""Eight glyphs with unequal shares, and their exact reader: something to blur, and something to
lose.

Each glyph is a fixed pattern of 4x4 dots, -1 or +1. The shares in which they are written are
unequal, so that a student that loses modes loses the rare ones first. Both worlds are written in
them: the lesson's pages (lesson/glyphs.py) and the line under the embedded teacher's shapes
(teachers/shapes.py).
"""
import torch

SIDE = 4                                        # dots along each side of a glyph
SHARES = torch.tensor([3, 1, 1, 2, 1, 2, 1, 1.]) / 12
LEGIBLE = 0.15                                  # largest mean squared distance from a pattern


def draw_glyphs(count, generator):
    """`count` patterns of -1 and +1, none nearly blank, any two of them six or more of the sixteen
    dots apart, [count,4,4]."""
    found = []
    while len(found) < count:
        pattern = (torch.rand(SIDE, SIDE, generator=generator) > 0.5).float() * 2 - 1
        if abs(pattern.sum()) <= 4 and all((pattern != other).sum() >= 6 for other in found):
            found.append(pattern)
    return torch.stack(found)


GLYPHS = draw_glyphs(len(SHARES), torch.Generator().manual_seed(7))             # [8,4,4]


def write(n, generator=None):
    """n glyphs drawn by their shares, LongTensor [n]."""
    return torch.multinomial(SHARES, n, replacement=True, generator=generator)


def read_cells(cells, glyphs=GLYPHS):
    """What is written in cells [n,c,...]? -> (the nearest glyph, LongTensor [n,c]; whether it is
    legible: within LEGIBLE of it, bool [n,c]).

    glyphs: [8,...], the patterns as they are drawn in one cell."""
    cells = cells.flatten(2)[:, :, None].clamp(-1.5, 1.5)                       # [n,c,1,p]
    distance = (cells - glyphs.flatten(1)).square().mean(-1)                    # [n,c,8]
    least, index = distance.min(-1)                                             # [n,c]
    return index, least < LEGIBLE


def shares_of(index, legible):
    """The shares of the legible glyphs, [8]."""
    count = torch.bincount(index[legible], minlength=len(SHARES))
    return count / legible.sum().clamp(min=1)


def shares_tv(shares):
    """Total variation, in [0,1], between these shares and the true ones."""
    return 0.5 * (shares - SHARES).abs().sum().item()
