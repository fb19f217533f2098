"""--report-to: what a tracker is told, that a run which is stopped goes on in the same curves, and
that no tracker can end a run. Neither tensorboard nor wandb is installed here: a small tracker of
accelerate's own kind records the calls, and small modules stand in for the libraries."""
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from accelerate.tracking import GeneralTracker

from cli import NEVER, ROOT, Run, failed, succeeded
from families.family import of_medium
from sdxl import command
from teachers import embedded
from training import stage, tracking
from training.errors import Failure
from training.flags import parse
from training.output import Output
from training.pictures import grid, losses_in
from training.tracking import Report, report_of


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""
    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def tracker(self):
        return self

    def log(self, values, step=None):
        self.told.append((step, values))

    def log_images(self, values, step=None, dataformats=None):
        (name, pixels), = values.items()
        self.told.append((step, {name: (pixels.shape, pixels.dtype, dataformats)}))

    def finish(self):
        self.told.append("finished")


class Broken(Recorder):
    def log(self, values, step=None):
        super().log(values, step)
        raise ConnectionError("the server is gone\nmore of it")


def drive(folder, report, start, end, sample_every=100):
    """training.stage.follow alone, for the iterations from start + 1 to end of 40."""
    net = torch.nn.Linear(2, 2)
    out = Output(folder, "auto")

    def losses():
        for i in range(start + 1, end + 1):
            yield dict(iteration=i, global_iter=2 * i, generator=torch.tensor(i / 4), fake=1.5)

    def show(file, experts, schedule):
        grid(out.path / file, dict(student=torch.zeros(1, 3, 8, 8)), ["a dog"])

    args = SimpleNamespace(decay=False, save_every=100, sample_every=sample_every)
    run = stage.Run(args, out, None, NEVER, ["adm"], None, None, show, report=report)
    ema = SimpleNamespace(update=lambda: None, networks=lambda: dict(generator=net))
    one = stage.Stage("adm", 40, ema, (SimpleNamespace(rate=1.0),), {}, {}, [], None)
    run.done[one.name] = start
    stage.follow(run, one, losses())
    out.lock.close()


@pytest.fixture
def no_checkpoints(monkeypatch):
    monkeypatch.setattr(stage, "save_checkpoint", lambda *arguments: None)


def test_losses_are_told_at_the_runs_own_iterations(tmp_path, no_checkpoints):
    """Stopped after 20 of 40 and resumed."""
    first, second = Recorder(), Recorder()
    drive(tmp_path, Report(first), 0, 20)
    drive(tmp_path, Report(second), 20, 40)
    assert first.told == [(10, {"adm/generator": 2.5, "adm/fake": 1.5}),
                          (20, {"adm/generator": 5.0, "adm/fake": 1.5})]
    assert second.told == [(30, {"adm/generator": 7.5, "adm/fake": 1.5}),
                           (40, {"adm/generator": 10.0, "adm/fake": 1.5})]


def test_pictures_are_told_as_pixels(tmp_path, no_checkpoints):
    recorder = Recorder()
    drive(tmp_path, Report(recorder), 20, 29, sample_every=25)
    (step, entry), = recorder.told
    (name, (shape, dtype, dataformats)), = entry.items()
    assert (step, name, dtype, dataformats) == (25, "adm/samples", numpy.uint8, "NHWC")
    assert shape[0] == 1 and min(shape[1:3]) > 50 and shape[3] == 3
    Report(recorder).picture("adm", 26, tmp_path / "lost.png")
    assert len(recorder.told) == 1


def test_a_sheet_of_videos_takes_any_caption(tmp_path):
    """Dollars are no formula there either; and in a notebook the backend is one nobody knows."""
    code = ("import sys, torch; from training.pictures import contact_sheet; "
            "contact_sheet(sys.argv[1], {'teacher, 2 steps': torch.zeros(1, 3, 4, 8, 8)}, "
            "['cash $$ in the hat'])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "sheet.png"], cwd=ROOT,
                          env=dict(os.environ, MPLBACKEND="module://nobody.knows"))
    assert done.returncode == 0 and (tmp_path / "sheet.png").exists()


def test_half_a_picture_is_one_warning(tmp_path, capfd):
    """As a full disk leaves it."""
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n")
    report = Report(Recorder())
    report.picture("adm", 1, tmp_path / "half.png")
    assert report.tracker is None
    assert "--report-to recorder: cannot identify image file" in capfd.readouterr().err


def test_a_tracker_that_fails_is_one_warning(tmp_path, no_checkpoints, capfd):
    broken = Broken()
    report = Report(broken)
    drive(tmp_path, report, 0, 40)
    report.finish()
    assert len(broken.told) == 1                                # and it is not asked again
    said = [line for line in capfd.readouterr().err.splitlines() if "--report-to" in line]
    assert len(said) == 1, said
    assert "--report-to recorder: the server is gone; training goes on without it" in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


# ---------------------------------------------------------------------------------- the libraries

@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_what_is_not_installed_is_a_wrong_flag(monkeypatch, capsys, name):
    """Beside all others that are wrong."""
    monkeypatch.setitem(sys.modules, name, None)                # as if it were not there
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", "--report-to", name, "--steps", "0"])
    with pytest.raises(SystemExit) as left:
        parse("", of_medium("image"), embedded.of_medium("image"))
    line, = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert f"--report-to {name}: not installed; pip install {name}" in line and "--steps 0" in line


ABSENT = """
import runpy, sys
sys.modules["tensorboard"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_is_told_before_any_work(small, tmp_path):
    argv = command(small, tmp_path / "out", "--report-to", "tensorboard")
    failed(Run("-c", ABSENT, *argv).wait(), 2, "--report-to tensorboard",
           "pip install tensorboard")
    assert not (tmp_path / "out").exists()


class Library:
    """Stands in for wandb, or its run: keeps the calls."""

    def __init__(self):
        self.calls = []

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))
        return self

    def define_metric(self, name, step_metric):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def wandb(monkeypatch, library):
    module = ModuleType("wandb")
    module.init = library.init
    module.Image = lambda pixels: pixels.shape[2]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_is_told_iterations_as_a_value_and_keeps_its_run(tmp_path, monkeypatch,
                                                               no_checkpoints):
    """ADM begins at 1 after ADP's thousands, and W&B drops steps that go back."""
    library = Library()
    wandb(monkeypatch, library)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    args = SimpleNamespace(report_to="wandb", steps=1)
    for start in (0, 10):                                       # as is, and resumed
        report = report_of(args, SimpleNamespace(path=tmp_path), ["adp", "adm"])
        drive(tmp_path, report, start, start + 10, sample_every=10)
        report.finish()
    inits = [call[1] for call in library.calls if call[0] == "init"]
    assert inits[0] == inits[1] and len(inits[0]["id"]) == 8
    assert inits[0]["project"] == "distillation" and inits[0]["resume"] == "allow"
    assert inits[0]["config"] == dict(report_to="wandb", steps=1)
    assert library.calls[1:3] == [("define_metric", "adp/*", "adp/iteration"),
                                  ("define_metric", "adm/*", "adm/iteration")]
    told = [call[1:] for call in library.calls if call[0] == "log"]
    rows = [(None, {"adm/generator": i / 4, "adm/fake": 1.5, "adm/iteration": i})
            for i in (10, 20)]
    pictures = [(None, {"adm/samples": 3, "adm/iteration": i}) for i in (10, 20)]
    assert told == [rows[0], pictures[0], rows[1], pictures[1]]
    assert library.calls[-1] == ("finish",)


def test_a_tracker_that_does_not_start_ends_the_run_in_one_line(tmp_path, monkeypatch):
    library = Library()
    wandb(monkeypatch, library)

    def refuse(**kwargs):
        raise ValueError("no API key configured\nmore of it")

    library.init = refuse
    wandb(monkeypatch, library)
    args = SimpleNamespace(report_to="wandb")
    with pytest.raises(Failure, match="--report-to wandb: no API key configured; put that right"):
        report_of(args, SimpleNamespace(path=tmp_path), ["adm"])


@pytest.mark.parametrize("name", [None, "tensorboard"])
def test_only_the_first_rank_reports(monkeypatch, tmp_path, name):
    monkeypatch.setattr(tracking, "is_rank_0", lambda: False)
    assert report_of(SimpleNamespace(report_to=name), SimpleNamespace(path=tmp_path),
                     []).tracker is None
    monkeypatch.setattr(tracking, "is_rank_0", lambda: True)
    assert report_of(SimpleNamespace(report_to=None), None, []).tracker is None


# a writer in the place of tensorboard's, which prints what it gets; then a run of two ranks
WRITER = """
import runpy, sys
from pathlib import Path
from types import ModuleType
import training.flag_problems
training.flag_problems.problem_of = lambda name: None
sys.modules["tensorboard"] = None               # then accelerate takes tensorboardX

class SummaryWriter:
    def __init__(self, folder):
        print("opened", Path(folder).name, flush=True)
    def add_scalar(self, name, value, global_step):
        print("scalar", name, global_step, flush=True)
    def add_images(self, name, pixels, global_step, dataformats):
        print("images", name, pixels.ndim, global_step, dataformats, flush=True)
    def flush(self):
        pass
    def close(self):
        print("closed", flush=True)

sys.modules["tensorboardX"] = ModuleType("tensorboardX")
sys.modules["tensorboardX"].SummaryWriter = SummaryWriter
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_whole_run_of_two_ranks_reports_once(small, tmp_path):
    """Stopped after two iterations of ADM, by its length, and resumed for two more."""
    told = []
    for iterations in ("2", "4"):
        argv = command(small, tmp_path / "out", "--stage", "adm", "--iterations", iterations,
                       "--sample-every", "3", "--report-to", "tensorboard", "--resume", "auto")
        done = succeeded(Run("-c", WRITER, *argv, ranks=2).wait())
        (tmp_path / "out" / "result.json").unlink()
        words = ("opened", "scalar", "images", "closed")
        told.append([line for line in done.stdout.splitlines() if line.split(" ")[0] in words])
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    losses = [f"adm/{name}" for name in losses_in([line])]
    assert len(losses) >= 3
    assert told[0] == ["opened tensorboard", *[f"scalar {name} 2" for name in losses],
                       "images adm/samples 4 2 NHWC", "closed"]
    assert told[1] == ["opened tensorboard", "images adm/samples 4 3 NHWC",
                       *[f"scalar {name} 4" for name in losses], "images adm/samples 4 4 NHWC",
                       "closed"]
