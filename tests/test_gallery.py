"""lesson/gallery.py: failures and their healthy twins are runs of train_sdxl.py, which go on from
one another and are kept."""
import json
import sys
from types import SimpleNamespace

import pytest

from cli import Run
from families.family import of_medium
from lesson import gallery, runs
from teachers import embedded
from training.errors import Failure
from training.flags import parse

QUICK = ("--pairs 4 --pair-steps 2 --iterations-adp 2 --iterations-adm 2 --batch-size 2 "
         "--save-every 100 --sample-every 100 --head-channels 8").split()
ALL_FLAGS = ([twin.flags for twin in gallery.TWINS.values()]
             + [mistake.flags for mistake in gallery.FAILURES.values()])
ONE_FAILURE = {"D too strong": gallery.FAILURES["D too strong"]}


@pytest.fixture
def forked(monkeypatch):
    """Runs by cli.py's forks, and a list of their command lines."""
    commands = []

    def run(command, stdout, **options):
        commands.append(command)
        done = Run(*command[1:]).wait()
        stdout.write(done.stdout + done.stderr)
        return SimpleNamespace(returncode=done.returncode)
    monkeypatch.setattr(runs, "SETTING", QUICK)
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run))
    return commands


def out_of(command):
    return str(command[command.index("--out") + 1])


def call(monkeypatch, tmp_path, failures):
    twins = {name: gallery.TWINS[name] for name in ("ADP", "DMDX")}
    monkeypatch.setattr(gallery, "TWINS", twins)
    monkeypatch.setattr(gallery, "FAILURES", failures)
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--out", str(tmp_path / "out"),
                                      "--results", str(tmp_path / "results")])
    gallery.main()
    return json.loads((tmp_path / "results" / "gallery.json").read_text())


def test_runs_go_on_from_one_another_and_are_kept(forked, monkeypatch, tmp_path):
    without_adp = gallery.WITHOUT_ADP.replace("300", "2")
    two = dict(ONE_FAILURE, again=gallery.Mistake("DMDX", without_adp))
    facts = call(monkeypatch, tmp_path, two)
    assert facts.keys() == {"healthy (ADP)", "healthy (DMDX)", *two} and len(forked) == 5
    for marks in facts.values():
        assert 0 <= marks["accuracy"] <= 1 and 0 <= marks["legible"] <= 1
    dmdx = tmp_path / "out" / "seed0" / "DMDX"
    log = (dmdx / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in log]
    assert stages == ["adp", "adm"], "DMDX goes on from ADP's run, and does not do it again"
    assert (tmp_path / "results" / "gallery.png").stat().st_size > 1000

    (dmdx / "result.json").unlink()
    assert call(monkeypatch, tmp_path, two) == facts
    trained = [out_of(c) for c in forked[5:] if "pairs" not in c]
    assert trained == [str(dmdx)], "finished runs are kept"


def test_a_run_that_fails_is_named(forked, monkeypatch, tmp_path):
    broken = {"broken": gallery.Mistake("ADP", "--lr-fake 0")}
    with pytest.raises(Failure, match="broken.log: train_sdxl.py: error: --lr-fake 0.0"):
        call(monkeypatch, tmp_path, broken)


@pytest.mark.parametrize("flags", ALL_FLAGS)
def test_flags_are_right(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *runs.SETTING, *flags.split()])
    parse("", of_medium("image"), embedded.of_medium("image"))


def test_failures_have_healthy_twins():
    assert {mistake.twin for mistake in gallery.FAILURES.values()} <= gallery.TWINS.keys()
    diffs = [mistake.diff for mistake in gallery.FAILURES.values() if mistake.diff]
    assert diffs and all((runs.HACKS / diff).exists() for diff in diffs)
