"""train_sdxl.py from its command line on a small random SDXL pipeline: stages, resume, export. What goes wrong is in test_reliability.py."""
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from cli import ROOT, Run, failed, stock_difference, succeeded, two_at_a_time
from sample import load_student
from sdxl import PHASED, PROMPTS, command, same, stop_when, train, weights

VARIANTS = {
    "finished": ["--ema", "0.9"],
    "phased": [*PHASED, "--ema", "0.9"],
    "checkpointing": ["--ema", "0.9", "--grad-checkpointing"],
    "two ranks": ["--ema", "0.9", "--batch-size", "1"],
    "dmd": ["--method", "dmd", "--grad-checkpointing"],
    "lora": ["--lora-rank", "4", "--lora-rank-fake", "4", "--lora-alpha", "2", "--accumulate", "2", "--grad-checkpointing"],
    "four steps without ADP": ["--stage", "adm", "--steps", "4", "--ttur", "2", "--lora-rank", "4"],
    "three phases, lora": [*PHASED, "--steps", "3", "--phases", "3", "--lora-rank", "4", "--lora-alpha", "1", "--lora-rank-fake", "2", "--weighting", "paper"],
    "bf16": ["--bf16", "--clip", "0"],
    "bf16, lora": ["--bf16", "--lora-rank", "4"]}


@pytest.fixture(scope="session")
def runs(small, tmp_path_factory):
    """name -> a future of the run's folder: two at a time in the background, in the order the tests ask."""
    root = tmp_path_factory.mktemp("runs")

    def whole(name, flags):
        succeeded(train(small, root / name, *flags, ranks=2 if name == "two ranks" else 0))
        return root / name

    with two_at_a_time({name: (whole, name, flags) for name, flags in VARIANTS.items()}) as futures:
        yield futures


@pytest.fixture(scope="session")
def finished(runs):
    return runs["finished"].result()


@pytest.fixture(scope="session")
def phased(runs):
    return runs["phased"].result()


def test_run_leaves_what_the_readme_promises(finished):
    for name in ("samples.png", "losses.png", "metrics.jsonl", "result.json", "export/model_index.json", "export/README.md"):
        assert (finished / name).stat().st_size > 100 or name == "result.json", name
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in rows} == {"adp", "adm"} and {"fake", "dmd", "generator", "discriminator"} <= rows[-1].keys()
    assert json.loads((finished / "result.json").read_text())["seconds"] > 0


def test_export_reproduces_the_trainers_samples(finished):
    assert stock_difference(finished, PROMPTS) < 1e-4


def test_model_card_snippet_runs(finished, tmp_path):
    card = (finished / "export" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) <= 5
    succeeded(Run("-c", snippet, folder=tmp_path).wait())
    assert (tmp_path / "sample.png").exists()


def test_sample_draws_student_beside_teacher(small, finished, phased, tmp_path):
    """And the experts of Phased DMD switch as they do by the card."""
    succeeded(Run(ROOT / "sample.py", finished / "export", "--teacher", small / "model", "--prompts", small / "prompts.txt", "--steps", "2", "--out", tmp_path).wait())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "samples.png", "student", "teacher"]
    assert all(len(list((tmp_path / who).glob("*.png"))) == len(PROMPTS) for who in ("student", "teacher"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["student"]["steps"] == 1 and result["teacher"]["steps"] == 2 and result["student"]["seconds"] > 0
    pipe, call = load_student(phased / "export")
    kept = load_file(phased / "samples" / "samples.safetensors")
    pipe.set_progress_bar_config(disable=True)
    images = pipe([PROMPTS[i] for i in kept["prompt"]], latents=kept["x_T"], output_type="pt", **call).images * 2 - 1
    assert_close(images, kept["images"].clamp(-1, 1), rtol=0, atol=1e-4)
    failed(Run(ROOT / "sample.py", finished, "--out", tmp_path / "no").wait(), 1, "not an exported student", "export/")


def test_phased_dmd_stopped_and_resumed_is_bit_equal(small, phased, tmp_path):
    for checkpoint in ("phase1-00000004", "phase2-00000004"):
        stop_when(small, tmp_path / "out", checkpoint, *PHASED, "--ema", "0.9")
    succeeded(train(small, tmp_path / "out", *PHASED, "--ema", "0.9", "--resume", "auto"))
    for stage in ("phase1", "phase2"):
        same(weights(tmp_path / "out", stage, 8), weights(phased, stage, 8), rtol=0, atol=0)


def test_phased_dmd_export(phased):
    """Both experts, switched at their boundary by the pipeline's own callback."""
    facts = json.loads((phased / "export" / "experts.json").read_text())
    assert facts == dict(network="unet", steps=[2, 2], switch=True, boundaries=[499.0], call=dict(num_inference_steps=4, guidance_scale=0))
    first, second = (load_file(phased / "export" / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "unet_2"))
    assert any((first[k] != second[k]).any() for k in first)
    assert stock_difference(phased, PROMPTS) < 1e-4
    assert {json.loads(line)["stage"] for line in (phased / "metrics.jsonl").read_text().splitlines()} == {"phase1", "phase2"}


@pytest.mark.parametrize("name", list(VARIANTS)[4:])
def test_variants_train_and_export(runs, name):
    assert stock_difference(runs[name].result(), PROMPTS) < (0.1 if "bf16" in name else 1e-4)   # bf16 trainer, float32 export


def test_checkpointing_changes_nothing(runs, finished):
    same(weights(runs["checkpointing"].result()), weights(finished), rtol=1e-4, atol=1e-5)


def test_two_ranks_train_as_one(runs, finished):
    """Half the batch on each of two ranks: the same global batch, the same weights."""
    generator = lambda out: {k: v for k, v in weights(out, "adp").items() if k.startswith("generator")}
    same(generator(runs["two ranks"].result()), generator(finished), rtol=1e-3, atol=2e-4)


def test_torchrun_from_the_readme(small, tmp_path):
    """The real launcher, once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(list(map(str, launcher + [*command(small, tmp_path / "out", "--stage", "adm")])), env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "result.json").exists(), done.stderr[-3000:]


def test_wrong_models(small, tmp_path):
    failed(train(small, tmp_path / "a", "--model", str(tmp_path / "nothing")), 1, "nothing", "model_index.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    failed(train(small, tmp_path / "b", "--model", str(other)), 1, "StableDiffusionPipeline", "StableDiffusionXLPipeline")
    failed(train(small, tmp_path / "b", "--model", str(other), "--lr-fake", "0"), 2, "--lr-fake 0")


def test_the_embedded_run_marks_its_student(tmp_path):
    """Phased DMD on the shipped teacher, hardly trained: experts that are still the teacher hand on x_s with the noise it should have."""
    succeeded(Run(ROOT / "train_sdxl.py", *"--method phased_dmd --pairs 48 --pair-steps 4 --iterations-phase 1 --batch-size 2 --ttur 1 --lr-generator 1e-9".split(),
                  "--out", tmp_path / "out").wait())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for row in ("teacher", "untrained", "student"):
        assert result[row].keys() == {"accuracy", "coverage_tv", "precision", "diversity"} and 0 <= result[row]["accuracy"] <= result[row]["precision"] <= 1, result
    left, = result["noise_left"]
    assert 0.9 < left < 1.05, left
