"""The pages are true: their commands parse, what they name exists, and the figures that a result
file holds are the ones that are printed."""
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from cli import ROOT
from families.family import of_medium
from lesson import families
from teachers import embedded
from training.flags import parser_of

PAGES = sorted([ROOT / "README.md", ROOT / "lesson" / "README.md", *(ROOT / "docs").glob("*.md")])
name_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands_of(page):
    """Lines of a page's bash blocks and its inline `python ...` code, continued ones joined."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        found += block.replace("\\\n", " ").splitlines()
    found += re.findall(r"`(python [^`]+)`", text)
    commands = []
    for line in found:
        line = line.split("#")[0].split(" && ")[-1].strip()
        if line.startswith(("python ", "torchrun ")):
            commands.append(shlex.split(line))
    return commands


def words_after(command, name):
    return [word for word in command[command.index(name) + 1:] if word != "..."]


def check_training(command, script):
    medium = "image" if script == "train_sdxl.py" else "video"
    parser = parser_of("", of_medium(medium), embedded.of_medium(medium))
    parser.parse_args(words_after(command, script))


def check_module(command):
    """A module's own parser is made when it runs: its flags must stand in its source."""
    name = command[command.index("-m") + 1]
    if name == "pytest":
        return
    source = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
    if "add_run_flags(" in source:
        source += (ROOT / "lesson" / "rows.py").read_text(encoding="utf-8")
    for flag in [word for word in words_after(command, name) if word.startswith("--")]:
        assert f'"{flag}"' in source or f'"{flag[2:]}"' in source, (name, flag)


@name_of
def test_every_command_parses(page):
    for command in commands_of(page):
        scripts = [word for word in command if word in ("train_sdxl.py", "train_cogvideox.py")]
        if scripts:
            check_training(command, scripts[0])
        elif "-m" in command:
            check_module(command)
        else:
            assert (ROOT / command[1]).exists(), command


@name_of
def test_every_link_and_picture_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@name_of
def test_every_file_named_is_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.(?:py|diff|json|txt))`", text):
        written_by_a_run = name in ("experts.json", "result.json", "model_index.json",
                                    "prompts.txt", "manifest.json")
        places = [ROOT / name, page.parent / name, ROOT / "lesson" / "results" / name]
        assert written_by_a_run or any(place.exists() for place in places), name


def test_every_symbol_of_the_lesson_exists():
    """A `Code:` paragraph names a file and symbols of it."""
    text = (ROOT / "lesson" / "README.md").read_text(encoding="utf-8")
    paragraphs = re.findall(r"^Code: (.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    assert len(paragraphs) >= 8
    for paragraph in paragraphs:
        module = None
        for name in re.findall(r"`([^`]+)`", paragraph.split("Picture:")[0]):
            if name.endswith(".py"):
                module = importlib.import_module(name[:-3].replace("/", "."))
                continue
            found = module
            for part in name.split("."):
                found = getattr(found, part, None) or getattr(module.Schedule, part)
            assert found is not None, (paragraph, name)


def test_the_readme_is_a_page_that_gets_read():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


@pytest.mark.parametrize("script, file", [
    ("tables", "glyphs"), ("dt", "dt"), ("paired", "paired"), ("scores", "scores"),
    ("families", "families")])
def test_the_tables_printed_are_those_that_ship(script, file):
    """Every line of the table that the script makes of the figures in lesson/results/."""
    figures = json.loads((ROOT / "lesson" / "results" / f"{file}.json").read_text())
    lines = importlib.import_module(f"lesson.{script}").table(figures).splitlines()
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(lines) >= 6
    for line in lines:
        assert line in text, line


def test_the_readme_has_the_families_that_ship():
    figures = json.loads((ROOT / "lesson" / "results" / "families.json").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert list(figures) == ["sdxl", "sd3", "cogvideox"]
    for line in families.summary(figures).splitlines():
        assert line in text, line


def test_the_log_that_ships_is_as_healthy_as_the_page_says():
    """| STAGE `loss` | LEAST to MOST | of docs/results.md, in means over a stage's last half."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rules = re.findall(r"^\| (ADP|ADM) `(\w+)` \| (-?[\d.]+) to (-?[\d.]+) \|", text, re.MULTILINE)
    assert len(rules) >= 6
    file = ROOT / "lesson" / "results" / "reference" / "dmdx.jsonl"
    log = [json.loads(line) for line in file.read_text().splitlines()]
    for stage, loss, least, most in rules:
        values = [entry[loss] for entry in log if entry["stage"] == stage.lower()]
        half = values[len(values) // 2:]
        assert float(least) <= sum(half) / len(half) <= float(most), (stage, loss, half)
