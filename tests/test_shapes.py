"""The reader that marks students must itself be right, and the shipped teacher must be as good as
the README says."""
import json

import pytest
import torch

from cli import ROOT, Run, succeeded
from teachers import make_sdxl, shapes
from teachers.alphabet import GLYPHS, SHARES, shares_of, shares_tv


def some_drawings(n=1440):
    index, images = shapes.drawings(n)
    return [shapes.CAPTIONS[i] for i in index], images


def test_reader_reads_true_drawings_even_under_noise():
    captions, images = some_drawings()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.15 * noise
    assert shapes.accuracy(images, captions) == 1.0
    assert shapes.accuracy(noisy, captions) > 0.99
    for drawn in (images, noisy):
        glyphs, legible = shapes.read_line(drawn)
        assert legible.all()
        for image, line in zip(images[:20], glyphs[:20]):
            dots = torch.cat([GLYPHS[k] for k in line], 1)                      # [4,16]
            assert torch.equal(image[:, shapes.PLATE::2, ::2], dots.expand(3, -1, -1))


def test_drawings_have_every_caption_every_place_and_the_true_shares():
    captions, images = some_drawings(7200)
    assert sorted(set(captions)) == sorted(shapes.CAPTIONS)
    said, cells = shapes.read(images)
    assert said == captions and set(cells.tolist()) == set(range(16))
    glyphs, legible = shapes.read_line(images)
    shares = shares_of(glyphs, legible)
    # 28,800 glyphs: a standard error of at most 0.0026
    assert (shares - SHARES).abs().max() < 0.01 and shares_tv(shares) < 0.01


def test_a_blurred_line_is_illegible_and_a_lost_glyph_is_missed():
    captions, images = some_drawings(360)
    _, legible = shapes.read_line(torch.nn.functional.avg_pool2d(images, 5, 1, 2))
    assert legible.float().mean() < 0.1
    lost = torch.stack([shapes.draw(captions[0], 0, 0, (0, 3, 5, 3))] * 4)
    glyphs, legible = shapes.read_line(lost)
    assert legible.all() and glyphs.tolist() == [[0, 3, 5, 3]] * 4
    missing = 1 - (SHARES[0] + SHARES[3] + SHARES[5]).item()
    assert shares_tv(shares_of(glyphs, legible)) >= missing


def test_reader_finds_the_place():
    caption = "a small red circle on blue"
    for top, left, cell in ((0, 0, 0), (0, 19, 3), (11, 0, 12), (11, 19, 15), (6, 10, 10)):
        captions, cells = shapes.read(shapes.draw(caption, top, left)[None])
        assert captions == [caption] and cells.tolist() == [cell], (top, left, cells)


def test_reader_refuses_what_is_no_drawing():
    generator = torch.Generator().manual_seed(0)
    blank = shapes.draw("a small red circle on blue", 0, 0)[:, 23:24, -1:].expand(3, 32, 32)
    square = "a small blue square on yellow"
    two = torch.minimum(shapes.draw(square, 0, 2), shapes.draw(square, 11, 19))
    noise = torch.randn(3, 32, 32, generator=generator)
    captions, cells = shapes.read(torch.stack([blank, two, noise]))
    assert captions == [None] * 3 and cells.tolist() == [-1] * 3


def test_coverage_is_zero_for_equal_sets_and_one_for_opposite_corners():
    def corner(place):
        drawn = shapes.draw("a small red circle on blue", place, place)
        return shapes.read(torch.stack([drawn] * 4))[1]

    assert shapes.places_tv(corner(0), corner(0)) == 0
    assert shapes.places_tv(corner(0), corner(11)) == 1


def test_each_word_of_a_caption_is_one_token_and_other_words_still_encode():
    tokenizer = make_sdxl.tokenizer()
    tokens = tokenizer("a small red circle on blue").input_ids
    assert len(tokens) == 8                                     # six words, start and end
    others = tokenizer("zebra!").input_ids[1:-1]
    assert tokenizer.unk_token_id not in others or tokenizer.unk_token == tokenizer.eos_token


def test_marks_of_drawings_whose_report_is_known():
    """Two captions. The first drawn twice in one place and once in another: of its three pairs two
    differ. The second once, and once illegible."""
    first, second = "a small red circle on blue", "a large green square on yellow"
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.stack([
        shapes.draw(first, 0, 0), shapes.draw(first, 0, 0), shapes.draw(first, 11, 19),
        shapes.draw(second, 0, 0), noise])
    marks = shapes.marks(images, [first, first, first, second, second], images)
    glyph_tv = 1 - SHARES[0].item()                 # every line is 0 0 0 0; the noise is no glyph
    expected = dict(accuracy=0.8, legible=0.8, glyph_tv=glyph_tv, coverage_tv=0.0,
                    diversity=2 / 3)
    assert marks == pytest.approx(expected), marks
    marks = shapes.marks(images, [first, first, second, second, second])
    assert marks["accuracy"] == 0.6 and "coverage_tv" not in marks
    assert marks["diversity"] == 1 / 2, "one pair a caption, the first in one place, the second two"


def test_shipped_teacher_draws_its_captions():
    """99 % at 20 steps; 144 samples leave a standard error of less than 1 %, so 0.96 is the bar of
    the test."""
    right, images = shapes.mark(shapes.shipped_teacher(), 144)
    assert right >= 0.96 and images.shape == (144, 3, 32, 32), right
    assert shapes.SHIPPED == ROOT / "teachers" / "sdxl"
    files = [file for file in shapes.SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6


def test_the_lesson_of_the_ring_writes_its_table(tmp_path):
    succeeded(Run("-m", "lesson.ring", "--iterations", "2", "--samples", "2000", "--data", "grid",
                  "--out", tmp_path).wait())
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["modes"] == 25
    for name in ("teacher", "a1", "adp", "dmdx", "dmd"):
        assert {"tv", "precision", "modes", "shares", "share_error"} == result[name].keys()
        assert len(result[name]["shares"]) == 25
    assert (tmp_path / "ring.png").stat().st_size > 1000
