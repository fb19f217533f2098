"""lesson/ablations.py: rows are runs of train_sdxl.py that go on from one another, and the table in
docs/results.md is what was measured. And tools/quality.py's CLIP score."""
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pipelines
from cli import ROOT, Run, failed, succeeded
from families.family import of_medium
from lesson import ablations, runs
from lesson.gallery import FAILURES, LONGER
from teachers import embedded
from training.errors import Failure
from training.flags import parse

QUICK = ("--pairs 4 --pair-steps 2 --iterations-adp 2 --iterations-adm 2 --batch-size 2 "
         "--save-every 100 --sample-every 100 --head-channels 8").split()
ALL_FLAGS = ([row.flags for row in runs.ROWS.values()]
             + [mistake.flags for mistake in FAILURES.values()])


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


def call(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(sys, "argv", ["ablations.py", *flags, "--out", str(tmp_path / "out"),
                                      "--results", str(tmp_path / "results")])
    ablations.main()
    return json.loads((tmp_path / "results" / "ablations.json").read_text())


def out_of(command):
    return str(command[command.index("--out") + 1])


def test_rows_go_on_from_one_another(forked, monkeypatch, tmp_path, capsys):
    figures = call(monkeypatch, tmp_path, "--rows", "A1", "B4", "--seeds", "1")
    assert list(figures) == ["teacher", "A5", "A1", "B4"] and len(forked) == 4
    for row in figures.values():
        for key, values in row.items():
            assert len(values) == 1
            assert key == "seconds" or 0 <= values[0] <= 1
    b4 = tmp_path / "out" / "seed1" / "B4"
    log = (b4 / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in log]
    assert stages == ["adp", "adm"], "B4 goes on from A5's ADP, and does not do it again"
    assert ablations.table(figures) in capsys.readouterr().out
    assert (tmp_path / "results" / "ablations.png").stat().st_size > 1000

    (b4 / "result.json").unlink()
    again = call(monkeypatch, tmp_path, "--rows", "B4", "--seeds", "1")
    assert again["A5"] == figures["A5"]
    trained = [out_of(c) for c in forked[4:] if "pairs" not in c]
    assert trained == [str(b4)], "finished rows are kept"


def test_a_row_that_fails_is_named(forked, monkeypatch, tmp_path):
    monkeypatch.setitem(runs.ROWS, "A1", runs.Row("broken", "--lr-fake 0"))
    with pytest.raises(Failure, match="A1.log: train_sdxl.py: error: --lr-fake 0.0"):
        call(monkeypatch, tmp_path, "--rows", "A1", "--seeds", "0")


@pytest.mark.parametrize("flags", ALL_FLAGS)
def test_flags_of_rows_are_right(flags, monkeypatch):
    words = ["train_sdxl.py", *runs.SETTING, *flags.format(out="x").split()]
    monkeypatch.setattr(sys, "argv", words)
    parse("", of_medium("image"), embedded.SDXL)


def test_failures_have_healthy_twins():
    assert {mistake.twin for mistake in FAILURES.values()} <= (runs.ROWS | LONGER).keys()
    diffs = [mistake.diff for mistake in FAILURES.values() if mistake.diff]
    assert diffs and all((runs.HACKS / diff).exists() for diff in diffs)


def test_the_table_of_the_results_is_what_was_measured():
    figures = json.loads((runs.RESULTS / "ablations.json").read_text())
    assert figures.keys() == {"teacher", *runs.ROWS}
    for name in runs.ROWS:
        for key in ("accuracy", "coverage_tv", "precision", "seconds"):
            assert len(figures[name][key]) == 3
    page = (ROOT / "docs" / "results.md").read_text()
    for line in ablations.table(figures).splitlines():
        assert line in page, line


@pytest.mark.parametrize("page, least", [("README.md", 5), ("lesson/README.md", 5),
                                         ("docs/results.md", 4), ("docs/real_models.md", 1)])
def test_links_lead_somewhere(page, least):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert len(links) >= least
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


# ---------------------------------------------------------------------------- tools/quality.py

PROMPTS = ["a dog", "two small cats", "rain"]


def small_clip():
    """-> (model, processor), random."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    tok = pipelines.clip_tokenizer()
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=len(tok), max_position_embeddings=32,
                eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id)
    vision = dict(sizes, image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    images = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    return model, CLIPProcessor(images, tok)


@torch.no_grad()
def cosine(model, processor, image, prompt):
    """By the two halves of a CLIP, called one by one; times 100."""
    pixels = processor.image_processor(image, return_tensors="pt")
    seen = model.visual_projection(model.vision_model(**pixels).pooler_output)
    words = processor.tokenizer(prompt, return_tensors="pt")
    said = model.text_projection(model.text_model(**words).pooler_output)
    return 100 * torch.cosine_similarity(seen, said).item()


def test_clip_score_is_the_cosine(tmp_path):
    def run(*flags):
        return Run("-m", "tools.quality", tmp_path / "images", *flags, "--out",
                   tmp_path / "out").wait()

    model, processor = small_clip()
    clip, prompts = tmp_path / "clip", tmp_path / "prompts.txt"
    model.save_pretrained(clip)
    processor.save_pretrained(clip)
    prompts.write_text("\n".join(PROMPTS))
    (tmp_path / "images").mkdir()
    expected = []
    for i, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.save(tmp_path / "images" / f"{i}.png")
        expected.append(cosine(model, processor, image, prompt))
    succeeded(run("--clip", clip, "--prompts", prompts))
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["pictures"] == 3
    assert abs(found["clip"] - sum(expected) / 3) < 1e-3, (found, expected)
    prompts.write_text("a dog")
    failed(run("--clip", clip, "--prompts", prompts), 1, "1 prompts for 3 pictures")
    failed(run("--lpips", tmp_path / "none"), 1, "--lpips", "not there")
    file = clip / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "visual_projection" not in k}
    save_file(state, file, metadata=dict(format="pt"))
    prompts.write_text("\n".join(PROMPTS))
    failed(run("--clip", clip, "--prompts", prompts), 1, "visual_projection")
