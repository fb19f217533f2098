"""train_sdxl.py from its command line on a small random SDXL pipeline: stages, resume, export, and what a user gets wrong."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import shapes

ROOT = Path(__file__).parent.parent
QUICK = ("--pairs 12 --pair-steps 2 --iterations 4 --batch-size 2 --save-every 2 --sample-every 100 --head-channels 16 "
         "--lr-generator-adp 1e-3 --lr-generator 1e-3 --lr-fake 1e-3 --lr-discriminator 1e-3").split()
STOCK = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
kept = load_file(sys.argv[2] + "/samples/samples.safetensors")
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
prompts = [sys.argv[4:][i] for i in kept["prompt"]]
images = pipe(prompts, latents=kept["x_T"], num_inference_steps=int(sys.argv[3]), guidance_scale=0, output_type="pt").images
print((images * 2 - 1 - kept["images"].clamp(-1, 1)).abs().max().item(), kept["images"].std().item())
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random pipeline, a random vision encoder and a prompt file."""
    from transformers import SamVisionConfig, SamVisionModel
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    shapes.build().save_pretrained(root / "model")
    SamVisionModel(SamVisionConfig(image_size=32, patch_size=4, hidden_size=16, mlp_dim=16, num_hidden_layers=4, num_attention_heads=2,
                                   output_channels=16, window_size=0, global_attn_indexes=[0, 1, 2, 3])).save_pretrained(root / "vision")
    (root / "prompts.txt").write_text("\n".join(shapes.CAPTIONS[:5]))
    return root


def train(small, out, *flags, ranks=0, background=False):
    command = [sys.executable] + (["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(29500 + os.getpid() % 1000)] if ranks else [])
    command += [str(ROOT / "train_sdxl.py"), "--model", str(small / "model"), "--prompts", str(small / "prompts.txt"),
                "--pixel-backbone", str(small / "vision"), "--out", str(out), *QUICK, *flags]
    start = subprocess.Popen if background else subprocess.run
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start(command, env=dict(os.environ, OMP_NUM_THREADS="1"), **pipes)


def succeeded(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def failed(done, code, *words):
    """The exit code, and one line on standard error that holds these words: no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("warning")]
    assert done.returncode == code and len(lines) == 1, (done.returncode, done.stderr[-2000:])
    for word in words:
        assert word in lines[0], (word, lines[0])


def stock_difference(out, steps):
    """A new process, stock diffusers, the exported directory: largest difference from the trainer's own samples."""
    done = subprocess.run([sys.executable, "-c", STOCK, str(out / "export"), str(out), str(steps), *shapes.CAPTIONS[:5]],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    difference, spread = map(float, done.stdout.split())
    assert spread > 0.01, "the samples are blank: nothing was compared"
    return difference


def weights(out, stage="adm", iteration=4):
    folder = out / "checkpoints" / f"{stage}-{iteration:08d}"
    return {f"{f.stem}.{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for k in a:
        assert_close(a[k], b[k], msg=lambda m: f"{k}: {m}", **tolerance)


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    succeeded(train(small, out, "--ema", "0.9"))
    return out


def test_run_leaves_what_the_readme_promises(finished):
    for name in ("samples.png", "losses.png", "metrics.jsonl", "result.json", "export/model_index.json", "export/README.md"):
        assert (finished / name).stat().st_size > 100 or name == "result.json", name
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in rows} == {"adp", "adm"} and {"fake", "dmd", "generator", "discriminator"} <= rows[-1].keys()
    assert json.loads((finished / "result.json").read_text())["seconds"] > 0


def test_export_reproduces_the_trainers_samples(finished):
    assert stock_difference(finished, 1) < 1e-4


def test_model_card_snippet_runs(finished, tmp_path):
    card = (finished / "export" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) <= 5
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "image.png").exists(), done.stderr[-2000:]


def test_stopped_and_resumed_is_bit_equal(small, finished, tmp_path):
    """Ctrl-C in ADP, again in ADM, resumed each time: the same weights, averages and moments as in one go."""
    out = tmp_path / "out"
    for wait_for in ("adp-00000002", "adm-00000002"):
        process = train(small, out, "--ema", "0.9", "--resume", "auto", background=True)
        while not (out / "checkpoints" / wait_for).exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr[-2000:]
        if (out / "result.json").exists():
            pytest.fail("the run was over before the signal came")
        assert "--resume auto" in stdout
    succeeded(train(small, out, "--ema", "0.9", "--resume", "auto"))
    same(weights(out), weights(finished), rtol=0, atol=0)


def test_killed_pair_collection_goes_on_to_the_same_bytes(small, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ("--stage", "pairs", "--pairs", "600")
    succeeded(train(small, a, *flags))
    process = train(small, b, *flags, background=True)
    while not (b / "pairs" / "00000").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    succeeded(train(small, b, *flags, "--resume", "auto"))
    for k in range(3):
        name = f"pairs/{k:05d}/pairs.safetensors"
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    (b / "pairs/00001/pairs.safetensors").write_bytes((b / "pairs/00001/pairs.safetensors").read_bytes()[:-1])
    failed(train(small, b, "--stage", "adp", "--pairs", "600", "--resume", "auto"), 1, "00001/pairs.safetensors", "truncated")
    failed(train(small, a, "--stage", "adp", "--pairs", "600", "--pair-steps", "3", "--resume", "auto"), 1, "steps 2", "has 3")


@pytest.mark.parametrize("flags, steps", [
    (["--method", "dmd", "--grad-checkpointing"], 1),
    (["--lora-rank", "4", "--lora-rank-fake", "4", "--accumulate", "2"], 1),
    (["--stage", "adm", "--steps", "4", "--ttur", "2"], 4),
    (["--bf16", "--clip", "0"], 1)], ids=["dmd", "lora", "four steps without ADP", "bf16"])
def test_variants_train_and_export(small, tmp_path, flags, steps):
    succeeded(train(small, tmp_path / "out", *flags))
    assert stock_difference(tmp_path / "out", steps) < (0.1 if "--bf16" in flags else 1e-4)   # bf16 trainer, float32 export


def test_checkpointing_changes_nothing(small, finished, tmp_path):
    succeeded(train(small, tmp_path / "out", "--ema", "0.9", "--grad-checkpointing"))
    same(weights(tmp_path / "out"), weights(finished), rtol=1e-4, atol=1e-5)


def test_two_ranks_train_as_one(small, finished, tmp_path):
    """Half the batch on each of two ranks: the same global batch, the same weights."""
    succeeded(train(small, tmp_path / "out", "--ema", "0.9", "--batch-size", "1", ranks=2))
    same({k: v for k, v in weights(tmp_path / "out", "adp").items() if k.startswith("generator")},
         {k: v for k, v in weights(finished, "adp").items() if k.startswith("generator")}, rtol=1e-3, atol=2e-4)


def test_bad_flags_are_reported_at_once(small, tmp_path):
    failed(train(small, tmp_path / "out", "--lr-fake", "-1", "--steps", "0", "--wrong", "--ema", "1"), 2,
           "--lr-fake -1.0", "--steps 0", "--wrong", "--ema 1.0")
    failed(train(small, tmp_path / "out", "--stage", "everything"), 2, "--stage", "everything")
    failed(train(small, tmp_path / "out", "--steps", "4"), 2, "--stage adm")
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
    failed(train(small, tmp_path / "b", "--model", str(other)), 1, "StableDiffusionPipeline", "SDXL")


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
