"""Pages of glyphs: the reader, and lesson.adm, tables, dt, paired and collapse, tiny."""
import json
import sys

import pytest
import torch

import lesson.adm
import lesson.chapters
import lesson.collapse
import lesson.dt
import lesson.paired
import lesson.scores
import lesson.tables
from lesson.glyphs import (CELLS, GLYPHS, SHAPE, SHARES, Encoder, measure, pages,
                           pixel_discriminator, read, trained_encoder)
from lesson.rows import ROWS, Job, load_student, run_jobs, student_pages
from lesson.students import Setting
from training.draws import stream

QUICK = ("--scale", "0.001", "--processes", "1")


def of_glyph(k, n):
    """n pages of one glyph alone."""
    return GLYPHS[k].repeat(CELLS, CELLS).expand(n, *SHAPE).clone()


def test_the_reader_reads_true_pages_under_noise():
    x = pages(64, stream(0))
    written, legible = read(x)
    assert legible.all()
    noisy, legible = read(x + 0.2 * torch.randn(x.shape, generator=stream(1)))
    assert (noisy == written).all() and legible.all()
    _, legible = read(x + 1.0 * torch.randn(x.shape, generator=stream(2)))
    assert legible.float().mean() < 0.02
    _, legible = read(0.5 * (x + x.roll(1, 0)))         # blurred: nearly all cells of two glyphs
    assert legible.float().mean() < 0.35


def test_every_glyph_is_read_as_itself():
    for k in range(len(SHARES)):
        written, legible = read(of_glyph(k, 2))
        assert (written == k).all() and legible.all()


def test_a_page_with_one_smudge_is_not_legible():
    x = pages(10, stream(0))
    x[0, 0, 5, 5] *= -1                                 # 4 of 16 pixels off by 2: 0.25 each
    found = measure(x)
    assert found["page"] == pytest.approx(0.9) and found["cell"] == pytest.approx(89 / 90)


def test_tv_of_known_shares():
    found = measure(of_glyph(0, 4))
    assert found["tv"] == pytest.approx(1 - SHARES[0].item()) and found["diversity"] == 0
    found = measure(torch.cat([of_glyph(0, 3), of_glyph(3, 1)]))
    expected = 0.5 * (abs(0.75 - 3 / 12) + abs(0.25 - 2 / 12) + 7 / 12)
    assert found["tv"] == pytest.approx(expected, abs=1e-6)
    found = measure(pages(4096, stream(3)))
    assert found["tv"] < 0.02 and found["cell"] == found["page"] == 1
    assert found["diversity"] == pytest.approx(1 - SHARES.square().sum().item(), abs=0.01)


def test_nothing_legible_is_no_error():
    found = measure(torch.zeros(4, *SHAPE))
    assert found["cell"] == found["page"] == 0 and found["tv"] == 0.5


def test_the_trained_encoder_reads():
    x = pages(64, stream(7)) + 0.5 * torch.randn(64, *SHAPE, generator=stream(8))
    written, _ = read(pages(64, stream(7)))
    right = (trained_encoder().logits(x).argmax(1).flatten(1) == written).float().mean()
    assert right > 0.9
    discriminator = pixel_discriminator("random")
    assert discriminator.heads(discriminator.taps(x)).shape == (64,)
    assert len(Encoder()(x)) == 3


def call(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *QUICK, *map(str, flags)])
    script.main()


def test_the_demo_writes_its_result(monkeypatch, tmp_path, capsys):
    call(lesson.adm, monkeypatch, "--out", tmp_path, "--dt", "16")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seconds"] > 0
    for name in ("teacher", "a1", "adp", "adm", "dmd", "adp_dmd", "dmdx"):
        assert all(0 <= result[name][key] <= 1 for key in ("cell", "page", "tv"))
        assert lesson.adm.LABELS[name] in printed
    assert (tmp_path / "adm.png").stat().st_size > 10_000

    call(lesson.adm, monkeypatch, "--out", tmp_path, "--dt", "8")
    assert "seed0/B4" in capsys.readouterr().out, "what was finished is made anew"
    (tmp_path / "result.json").unlink()
    call(lesson.adm, monkeypatch, "--out", tmp_path, "--dt", "8")
    assert "seed0/B4" not in capsys.readouterr().out, "what was stopped goes on"


def test_tables_dt_and_collapse_share_students(monkeypatch, tmp_path, capsys):
    call(lesson.tables, monkeypatch, "--out", tmp_path, "--seeds", "0")
    figures = json.loads((tmp_path / "glyphs.json").read_text())
    assert list(figures) == ["teacher", *sorted(ROWS)]
    for of_row in figures.values():
        assert all(len(of_row[column]) == 1 for column in lesson.tables.COLUMNS)
    assert lesson.tables.table(figures) in capsys.readouterr().out

    call(lesson.dt, monkeypatch, "--out", tmp_path, "--seeds", "0")
    printed = capsys.readouterr().out
    assert "B1-T64" in printed and "seed0/A5" not in printed, "finished students are kept"
    found = json.loads((tmp_path / "dt.json").read_text())
    assert list(found["B1"]) == list(found["B4"]) == ["T/64", "T/16", "T/6", "T/3"]
    assert found["B4"]["T/6"]["page"] == figures["B4"]["page"]

    call(lesson.collapse, monkeypatch, "--out", tmp_path)
    assert "seed0/B4-still" in capsys.readouterr().out
    found = json.loads((tmp_path / "collapse.json").read_text())
    for failure in found.values():
        for run in failure.values():
            assert len(run["shares"]) == len(run["page"]) > 1 and run["losses"]
    for name in ("glyphs", "dt", "collapse"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    call(lesson.chapters, monkeypatch, "--out", tmp_path, "--pictures", tmp_path)
    assert "seed0" not in capsys.readouterr().out, "finished students are kept"
    for name in ("score", "guidance", "regression", "steps"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_paired_writes_its_table(monkeypatch, tmp_path, capsys):
    """A paired critic that cannot tell is at one, the paper's at two."""
    monkeypatch.setattr(lesson.paired, "WEIGHTS", (0.7,))
    call(lesson.paired, monkeypatch, "--out", tmp_path, "--seeds", "0")
    figures = json.loads((tmp_path / "paired.json").read_text())
    assert figures["0.7"]["B4"]["hinge"][0] > 1.5 > figures["0.7"]["B4-paired"]["hinge"][0]
    assert lesson.paired.table(figures) in capsys.readouterr().out


def test_dmd_draws_its_times_from_a_64th_whatever_the_critics_step_is(monkeypatch):
    """With T/6 it hardly loses a mode, which hid for a day what DMD does."""
    from lesson import students
    asked = {}

    def watch(*args, dt, **options):
        asked[args[2] is None] = dt
        return iter(())
    monkeypatch.setattr(students, "adm", watch)
    setting = Setting().scaled(0.001)
    given = students.Given(lesson.glyphs.shipped_teacher(), None, setting, 0)
    for judge in ("adm", "dmd"):
        students.train_matching(given, judge)
    assert asked == {False: [167], True: None}


def test_the_slope_of_a_critic_that_learns_points_where_the_scores_differ(monkeypatch, tmp_path):
    monkeypatch.setattr(lesson.scores, "SAMPLES", (256, 16384))
    monkeypatch.setattr(lesson.scores, "FRACTIONS", (6, 64))
    monkeypatch.setattr(sys, "argv", ["scores.py", "--seeds", "0", "--out", str(tmp_path)])
    lesson.scores.main()
    figures = json.loads((tmp_path / "result.json").read_text())
    start, end = figures["T/6"]["cosine"][0]
    assert end > 0.4 and end > start
    assert figures["T/64"]["hinge"][0] > figures["T/6"]["hinge"][0] > 1.5
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_direction_is_the_difference_of_the_scores():
    """Held against finite differences of the two log densities: x0_hat = (x + sigma^2 grad log
    p) / alpha."""
    from lesson.scores import DATA, SCHEDULE, STUDENT, TIME, direction, noised
    x = noised(32, stream(0)).double()
    alpha, sigma = 1 - TIME / SCHEDULE.T, TIME / SCHEDULE.T

    def log_density(world, x):
        means = alpha * world.means.double()
        variance = (alpha * world.std) ** 2 + sigma**2
        of_mode = world.weights.double().log() - torch.cdist(x, means).square() / (2 * variance)
        return of_mode.logsumexp(1)

    expected = torch.zeros_like(x)
    for axis in range(2):
        step = torch.zeros(2, dtype=torch.double)
        step[axis] = 1e-5
        for world, sign in ((DATA, 1), (STUDENT, -1)):
            slope = (log_density(world, x + step) - log_density(world, x - step)) / 2e-5
            expected[:, axis] += sign * slope
    expected *= sigma**2 / alpha
    assert torch.allclose(direction(x.float()).double(), expected, atol=1e-4)


def test_a_kept_student_is_the_one_that_was_trained(tmp_path):
    """And the same seed trains the same student again."""
    job = Job("B2", 3, Setting().scaled(0.001))
    run_jobs(tmp_path / "a", [job], 1)
    run_jobs(tmp_path / "b", [job], 1)
    a, b = (student_pages(load_student(tmp_path / name / job.name), 8) for name in ("a", "b"))
    assert torch.equal(a, b) and a.std() > 0.1
