"""The reader that marks students must itself be right, and the shipped teacher must be as good as the README says."""
import json

import torch

import shapes
from cli import ROOT, Run, succeeded


def some_drawings(every=37):
    index, images = shapes.every_drawing()
    return [shapes.CAPTIONS[i] for i in index[::every]], images[::every]


def test_reader_reads_true_drawings_even_under_noise():
    captions, images = some_drawings()
    assert len(captions) > 800 and shapes.accuracy(images, captions) == 1.0
    noisy = images + 0.15 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert shapes.accuracy(noisy, captions) > 0.99


def test_reader_finds_the_place():
    for top, left, cell in ((0, 0, 0), (0, 23, 3), (23, 0, 12), (23, 23, 15), (12, 12, 10)):
        captions, cells = shapes.read(shapes.draw("a small red circle on blue", top, left)[None])
        assert captions == ["a small red circle on blue"] and cells.tolist() == [cell], (top, left, cells)


def test_reader_refuses_what_is_no_drawing():
    generator = torch.Generator().manual_seed(0)
    blank = shapes.draw("a small red circle on blue", 0, 0)[:, -1:, -1:].expand(3, 32, 32)
    two = torch.minimum(shapes.draw("a small blue square on yellow", 2, 2), shapes.draw("a small blue square on yellow", 20, 20))
    captions, cells = shapes.read(torch.stack([blank, two, torch.randn(3, 32, 32, generator=generator)]))
    assert captions == [None] * 3 and cells.tolist() == [-1] * 3


def test_coverage_is_zero_for_equal_sets_and_one_for_opposite_corners():
    corner = lambda at: torch.stack([shapes.draw("a small red circle on blue", at, at)] * 4)
    assert shapes.coverage_tv(corner(0), corner(0)) == 0 and shapes.coverage_tv(corner(0), corner(23)) == 1


def test_each_word_of_a_caption_is_one_token_and_other_words_still_encode():
    tok = shapes.tokenizer()
    assert len(tok("a small red circle on blue").input_ids) == 8                  # six words, start and end
    assert tok.unk_token_id not in tok("zebra!").input_ids[1:-1] or tok.unk_token == tok.eos_token


def test_marks_of_drawings_whose_report_is_known():
    """Two captions. The first drawn twice in one place and once in another: of its three pairs two differ. The second once, and once illegible."""
    first, second = "a small red circle on blue", "a large green square on yellow"
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.stack([shapes.draw(first, 0, 0), shapes.draw(first, 0, 0), shapes.draw(first, 23, 23), shapes.draw(second, 0, 0), noise])
    marks = shapes.marks(images, [first, first, first, second, second], images)
    assert marks == dict(accuracy=0.8, coverage_tv=0.0, precision=0.8, diversity=2 / 3), marks
    marks = shapes.marks(images, [first, first, second, second, second], images)
    assert marks["accuracy"] == 0.6 and marks["diversity"] == 1 / 2, "one pair a caption, the first in one place, the second in two"


def test_shipped_teacher_draws_its_captions():
    """95 % at 25 steps; 144 samples leave a standard error of 2 %, so 0.93 is the bar of the test."""
    from diffusers import StableDiffusionXLPipeline
    pipe = StableDiffusionXLPipeline.from_pretrained(str(ROOT / "teacher"), add_watermarker=False).to(torch.float32)
    right, images = shapes.mark(pipe, 144)
    assert right >= 0.93 and images.shape == (144, 3, 32, 32), right
    assert sum(f.stat().st_size for f in (ROOT / "teacher").rglob("*") if f.is_file()) < 10e6


def test_adm_demo_runs_and_writes_its_table(tmp_path):
    succeeded(Run(ROOT / "adm.py", "--iterations", "2", "--samples", "2000", "--data", "grid", "--out", tmp_path).wait())
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["modes"] == 25 and all({"tv", "precision", "modes"} == result[k].keys() for k in ("teacher", "a1", "adp", "dmdx", "dmd"))
    assert (tmp_path / "adm.png").stat().st_size > 1000
