"""ablations.py: rows are runs of train_sdxl.py that go on from one another, and the README's table is what was measured. And quality.py's CLIP score."""
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ablations
import pipelines
import train_sdxl
from cli import ROOT, Run, failed, succeeded
from plumbing import Failure

QUICK = ("--pairs 4 --pair-steps 2 --iterations-adp 2 --iterations-adm 2 --batch-size 2 --save-every 100 --sample-every 100 --head-channels 8").split()


@pytest.fixture
def forked(monkeypatch):
    """Runs by cli.py's forks, and a list of their command lines."""
    commands = []

    def run(command, stdout, **how):
        commands.append(command)
        done = Run(*command[1:]).wait()
        stdout.write(done.stdout + done.stderr)
        return SimpleNamespace(returncode=done.returncode)
    monkeypatch.setattr(ablations, "SETTING", QUICK)
    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(run=run))
    return commands


def call(monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(sys, "argv", ["ablations.py", *flags, "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")])
    ablations.main()
    return json.loads((tmp_path / "results" / "ablations.json").read_text())


def test_rows_go_on_from_one_another(forked, monkeypatch, tmp_path, capsys):
    figures = call(monkeypatch, tmp_path, "--rows", "A1", "B4", "--seeds", "1")
    assert list(figures) == ["teacher", "A5", "A1", "B4"] and len(forked) == 4
    assert all(len(v) == 1 and all(0 <= x <= 1 for x in v) for row in figures.values() for key, v in row.items() if key != "seconds")
    stages = [json.loads(line)["stage"] for line in (tmp_path / "out" / "seed1" / "B4" / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["adp", "adm"], "B4 goes on from A5's ADP, and does not do it again"
    assert ablations.table(figures) in capsys.readouterr().out and (tmp_path / "results" / "ablations.png").stat().st_size > 1000

    (tmp_path / "out" / "seed1" / "B4" / "result.json").unlink()
    assert call(monkeypatch, tmp_path, "--rows", "B4", "--seeds", "1")["A5"] == figures["A5"]
    again = [c for c in forked[4:] if "pairs" not in c]
    assert [str(c[c.index("--out") + 1]) for c in again] == [str(tmp_path / "out" / "seed1" / "B4")], "finished rows are kept"


def test_a_row_that_fails_is_named(forked, monkeypatch, tmp_path):
    monkeypatch.setitem(ablations.ROWS, "A1", ("broken", None, "--lr-fake 0", None))
    with pytest.raises(Failure, match="A1.log: train_sdxl.py: error: --lr-fake 0.0"):
        call(monkeypatch, tmp_path, "--rows", "A1", "--seeds", "0")


@pytest.mark.parametrize("flags", [row[2] for row in ablations.ROWS.values()] + [failure[1] for failure in ablations.FAILURES.values()])
def test_flags_of_rows_are_right(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *ablations.SETTING, *flags.format(out="x").split()])
    train_sdxl.parse("", train_sdxl.PIPELINES, True)


def test_failures_have_healthy_twins():
    assert {twin for twin, *_ in ablations.FAILURES.values()} <= (ablations.ROWS | ablations.LONGER).keys()
    assert all((ROOT / "hacks" / diff).exists() for _, _, diff in ablations.FAILURES.values() if diff)


def test_the_readmes_table_is_what_was_measured():
    figures = json.loads((ROOT / "results" / "ablations.json").read_text())
    assert figures.keys() == {"teacher", *ablations.ROWS}
    assert all(len(figures[name][key]) == 3 for name in ablations.ROWS for key in ("accuracy", "coverage_tv", "precision", "seconds"))
    readme = (ROOT / "README.md").read_text()
    for line in ablations.table(figures).splitlines():
        assert line in readme, line


def test_the_readmes_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]


def test_clip_score_is_the_cosine(tmp_path):
    """Against the two halves of a small random CLIP, called one by one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    tok = pipelines.clip_tokenizer()
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(text_config=dict(sizes, vocab_size=len(tok), max_position_embeddings=32, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id),
                                 vision_config=dict(sizes, image_size=32, patch_size=8), projection_dim=16)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)), tok)
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    prompts, expected = ["a dog", "two small cats", "rain"], []
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "images").mkdir()
    for i, prompt in enumerate(prompts):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{i}.png")
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(**processor.image_processor(image, return_tensors="pt")).pooler_output)
            said = model.text_projection(model.text_model(**tok(prompt, return_tensors="pt")).pooler_output)
        expected.append(100 * torch.cosine_similarity(seen, said).item())
    run = lambda *flags: Run(ROOT / "quality.py", tmp_path / "images", *flags, "--out", tmp_path / "out").wait()
    succeeded(run("--clip", tmp_path / "clip", "--prompts", tmp_path / "prompts.txt"))
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["pictures"] == 3 and abs(found["clip"] - sum(expected) / 3) < 1e-3, (found, expected)
    (tmp_path / "prompts.txt").write_text("a dog")
    failed(run("--clip", tmp_path / "clip", "--prompts", tmp_path / "prompts.txt"), 1, "1 prompts for 3 pictures")
    failed(run("--lpips", tmp_path / "none"), 1, "--lpips", "not there")
    file = tmp_path / "clip" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "visual_projection" not in k}, file, metadata=dict(format="pt"))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    failed(run("--clip", tmp_path / "clip", "--prompts", tmp_path / "prompts.txt"), 1, "visual_projection")
