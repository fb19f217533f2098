"""train_sdxl.py from its command line on a small random SDXL pipeline: stages, resume, export, and what a user gets wrong."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import pipelines
import shapes
from cli import ROOT, Run, failed, stock_difference, succeeded, two_at_a_time

QUICK = ("--pairs 12 --pair-steps 2 --iterations 4 --batch-size 2 --save-every 2 --sample-every 100 --head-channels 16 "
         "--lr-generator-adp 1e-3 --lr-generator 1e-3 --lr-fake 1e-3 --lr-discriminator 1e-3").split()
PROMPTS = shapes.CAPTIONS[:5]
PHASED = "--method phased_dmd --accumulate 1 --ttur 2 --lora-rank 0 --decay".split()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random pipeline, a random vision encoder and a prompt file."""
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    shapes.build().save_pretrained(root / "model")
    pipelines.sam().save_pretrained(root / "vision")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def start(small, out, *flags, **how):
    return Run(ROOT / "train_sdxl.py", "--model", small / "model", "--prompts", small / "prompts.txt", "--pixel-backbone", small / "vision",
               "--out", out, *QUICK, *flags, **how)


def train(*args, **how):
    return start(*args, **how).wait()


def weights(out, stage="adm", iteration=4):
    folder = out / "checkpoints" / f"{stage}-{iteration:08d}"
    return {f"{f.stem}.{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for k in a:
        assert_close(a[k], b[k], msg=lambda m: f"{k}: {m}", **tolerance)


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


def stop_when(small, out, checkpoint, *flags):
    """Ctrl-C once this checkpoint is there."""
    run = start(small, out, *flags, "--resume", "auto")
    while not (out / "checkpoints" / checkpoint).exists() and run.alive():
        time.sleep(0.01)
    run.send(signal.SIGINT)
    succeeded(run.wait())
    assert not (out / "result.json").exists(), "the run was over before the signal came"
    assert "--resume auto" in run.stdout


def test_stopped_and_resumed_is_bit_equal(small, finished, tmp_path):
    """Ctrl-C in ADP, again in ADM, resumed each time: the same weights, averages and moments as in one go."""
    for checkpoint in ("adp-00000002", "adm-00000002"):
        stop_when(small, tmp_path / "out", checkpoint, "--ema", "0.9")
    succeeded(train(small, tmp_path / "out", "--ema", "0.9", "--resume", "auto"))
    same(weights(tmp_path / "out"), weights(finished), rtol=0, atol=0)


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


def test_killed_pair_collection_goes_on_to_the_same_bytes(small, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ("--stage", "pairs", "--pairs", "600")
    succeeded(train(small, a, *flags))
    run = start(small, b, *flags)
    while not (b / "pairs" / "00000").exists() and run.alive():
        time.sleep(0.01)
    run.send(signal.SIGKILL)
    run.wait()
    succeeded(train(small, b, *flags, "--resume", "auto"))
    for k in range(3):
        name = f"pairs/{k:05d}/pairs.safetensors"
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    (b / "pairs/00001/pairs.safetensors").write_bytes((b / "pairs/00001/pairs.safetensors").read_bytes()[:-1])
    failed(train(small, b, "--stage", "adp", "--pairs", "600", "--resume", "auto"), 1, "00001/pairs.safetensors", "truncated")
    failed(train(small, a, "--stage", "adp", "--pairs", "600", "--pair-steps", "3", "--resume", "auto"), 1, "steps is 2", "run's is 3")


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train_sdxl.py", "--model", small / "model",
               "--prompts", small / "prompts.txt", "--pixel-backbone", small / "vision", "--out", tmp_path / "out", *QUICK, "--stage", "adm"]
    done = subprocess.run(list(map(str, command)), env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "result.json").exists(), done.stderr[-3000:]


def test_bad_flags_are_reported_at_once(small, tmp_path):
    failed(train(small, tmp_path / "out", "--lr-fake", "-1", "--steps", "0", "--wrong", "--ema", "1", "--clip", "nan"), 2,
           "--lr-fake -1.0", "--steps 0", "--wrong", "--ema 1.0", "--clip nan")
    failed(train(small, tmp_path / "out", "--stage", "everything"), 2, "--stage", "everything")
    failed(train(small, tmp_path / "out", "--stage", "adp", "--steps", "4"), 2, "--stage adm")
    failed(train(small, tmp_path / "out", "--method", "phased_dmd", "--phases", "3", "--stage", "adm"), 2, "--phases 3", "--steps 4", "--stage adm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, words", [
    (b"", ["empty"]), (b"a cat\n\n  \na dog\n", ["line 2", "blank"]), (b"fine\nnot \xff fine\n", ["line 2", "UTF-8"]), (None, ["No such file"])])
def test_bad_prompt_files(small, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    failed(train(small, tmp_path / "out", "--prompts", str(path)), 1, str(path), *words)


def test_wrong_models(small, tmp_path):
    failed(train(small, tmp_path / "a", "--model", str(tmp_path / "nothing")), 1, "nothing", "model_index.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    failed(train(small, tmp_path / "b", "--model", str(other)), 1, "StableDiffusionPipeline", "StableDiffusionXLPipeline")
    failed(train(small, tmp_path / "b", "--model", str(other), "--lr-fake", "0"), 2, "--lr-fake 0")


def test_output_directories_are_respected(small, finished, tmp_path):
    failed(train(small, finished, "--resume", "auto"), 1, "finished run")
    (tmp_path / "notes.txt").write_text("mine")
    failed(train(small, tmp_path), 1, "not empty", "--resume auto")
    failed(train(small, tmp_path / "notes.txt" / "out"), 1, "notes.txt")
    failed(train(small, tmp_path / "new", "--resume", str(tmp_path / "gone")), 1, "gone", "no whole checkpoint")


def test_damaged_checkpoints_are_named_and_passed_over(small, finished, tmp_path):
    import shutil
    for name in ("pairs", "checkpoints"):
        shutil.copytree(finished / name, tmp_path / name)
    victim = tmp_path / "checkpoints" / "adm-00000004" / "heads.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    failed(train(small, tmp_path, "--ema", "0.9", "--resume", str(victim.parent)), 1, str(victim), "altered")
    done = succeeded(train(small, tmp_path, "--ema", "0.9", "--resume", "auto"))
    assert str(victim) in done.stderr
    same({k: v for k, v in weights(tmp_path).items() if k.startswith("generator")},
         {k: v for k, v in weights(finished).items() if k.startswith("generator")}, rtol=0, atol=0)
