"""train_sdxl.py from its command line on a small random SDXL pipeline: stages, resume, export. What
goes wrong is in test_reliability.py."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from cli import ROOT, Run, failed, stock_difference, succeeded, two_at_a_time
from families.family import of_medium
from sdxl import PHASED, PROMPTS, command, part_of, same, stop_when, train, weights
from teachers import embedded
from teachers.shapes import CAPTIONS
from training.export import load_student
from training.flags import PHASED as OF_PHASED_DMD
from training.flags import Help, parse, parser_of

EMA = ["--ema", "0.9"]
LOOK_AT = CAPTIONS[40:43]                       # none of PROMPTS
VARIANTS = {
    "finished": EMA,
    "phased": [*PHASED, *EMA],
    "one at a time": [*EMA, "--batch-size", "1"],
    "checkpointing": [*EMA, "--batch-size", "1", "--grad-checkpointing"],
    "look at": [*EMA, *"--look-at FILE --samples 5 --sample-every 2".split()],
    "two ranks": [*EMA, "--batch-size", "1"],
    "dmd": ["--method", "dmd", "--grad-checkpointing"],
    "lora": "--lora-rank 4 --lora-rank-fake 4 --lora-alpha 2 --accumulate 2 "
            "--grad-checkpointing".split(),
    "four steps without ADP": "--stage adm --steps 4 --ttur 2 --lora-rank 4".split(),
    "three phases, lora": [*PHASED, *"--steps 3 --phases 3 --lora-rank 4 --lora-alpha 1 "
                           "--lora-rank-fake 2 --weighting paper".split()],
    "bf16": ["--bf16", "--clip", "0"],
    "bf16, lora": ["--bf16", "--lora-rank", "4"],
}


@pytest.fixture(scope="session")
def runs(small, tmp_path_factory):
    """name -> a future of the run's folder: two at a time in the background, in the order the tests
    ask."""
    root = tmp_path_factory.mktemp("runs")
    (root / "look_at.txt").write_text("\n".join(LOOK_AT))

    def whole(name, flags):
        flags = [root / "look_at.txt" if flag == "FILE" else flag for flag in flags]
        succeeded(train(small, root / name, *flags, ranks=2 if name == "two ranks" else 0))
        return root / name

    jobs = {name: (whole, name, flags) for name, flags in VARIANTS.items()}
    with two_at_a_time(jobs) as futures:
        yield futures


@pytest.fixture(scope="session")
def finished(runs):
    return runs["finished"].result()


@pytest.fixture(scope="session")
def phased(runs):
    return runs["phased"].result()


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_what_the_readme_promises(finished):
    for name in ("samples.png", "losses.png", "metrics.jsonl", "result.json",
                 "export/model_index.json", "export/README.md"):
        assert (finished / name).stat().st_size > 100 or name == "result.json", name
    entries = logged(finished)
    assert {entry["stage"] for entry in entries} == {"adp", "adm"}
    assert {"fake", "dmd", "generator", "discriminator"} <= entries[-1].keys()
    assert json.loads((finished / "result.json").read_text())["seconds"] > 0


def test_export_reproduces_the_trainers_samples(finished):
    assert stock_difference(finished, PROMPTS) < 1e-4


def test_model_card_snippet_runs(finished, tmp_path):
    card = (finished / "export" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) <= 5
    succeeded(Run("-c", snippet, folder=tmp_path).wait())
    assert (tmp_path / "sample.png").exists()


def test_sample_draws_student_beside_teacher(small, finished, tmp_path):
    succeeded(Run("-m", "tools.sample", finished / "export", "--teacher", small / "model",
                  "--prompts", small / "prompts.txt", "--steps", "2", "--out", tmp_path).wait())
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == ["result.json", "samples.png", "student", "teacher"]
    for who in ("student", "teacher"):
        assert len(list((tmp_path / who).glob("*.png"))) == len(PROMPTS)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["student"]["steps"] == 1 and result["student"]["seconds"] > 0
    assert result["teacher"]["steps"] == 2
    failed(Run("-m", "tools.sample", finished, "--out", tmp_path / "no").wait(), 1,
           "not an exported student", "export/")


def test_a_loaded_student_switches_its_experts_as_the_card_does(phased):
    pipe, call = load_student(phased / "export")
    kept = load_file(phased / "samples" / "samples.safetensors")
    pipe.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[i] for i in kept["prompt"]]
    images = pipe(prompts, latents=kept["x_T"], output_type="pt", **call).images * 2 - 1
    assert_close(images, kept["images"].clamp(-1, 1), rtol=0, atol=1e-4)


def test_phased_dmd_stopped_and_resumed_is_bit_equal(small, phased, tmp_path):
    for checkpoint in ("phase1-00000004", "phase2-00000004"):
        stop_when(small, tmp_path / "out", checkpoint, *PHASED, *EMA)
    succeeded(train(small, tmp_path / "out", *PHASED, *EMA, "--resume", "auto"))
    for stage in ("phase1", "phase2"):
        same(weights(tmp_path / "out", stage, 8), weights(phased, stage, 8), rtol=0, atol=0)


def test_phased_dmd_export(phased):
    """Both experts, switched at their boundary by the pipeline's own callback."""
    facts = json.loads((phased / "export" / "experts.json").read_text())
    assert facts == dict(network="unet", steps=[2, 2], switch=True, boundaries=[499.0],
                         call=dict(num_inference_steps=4, guidance_scale=0))
    first, second = (load_file(phased / "export" / name / "diffusion_pytorch_model.safetensors")
                     for name in ("unet", "unet_2"))
    assert any((first[k] != second[k]).any() for k in first)
    assert stock_difference(phased, PROMPTS) < 1e-4
    assert {entry["stage"] for entry in logged(phased)} == {"phase1", "phase2"}


@pytest.mark.parametrize("name", list(VARIANTS)[6:])
def test_variants_train_and_export(runs, name):
    most = 0.1 if "bf16" in name else 1e-4                      # bf16 trainer, float32 export
    assert stock_difference(runs[name].result(), PROMPTS) < most


def test_dmd_has_no_discriminator(runs):
    """Neither heads nor their moments are kept: only ADP's, whose discriminators it trained."""
    checkpoints = runs["dmd"].result() / "checkpoints"
    nets = {"generator.safetensors", "optimizer_generator.safetensors"}
    fakes = {"fake_score.safetensors", "optimizer_fake score.safetensors"}
    found = {p.name for p in (checkpoints / "adm-00000004").iterdir()}
    assert found == {"manifest.json"} | nets | fakes
    assert (checkpoints / "adp-00000004" / "heads.safetensors").exists()


def test_checkpointing_changes_nothing(runs):
    """Of one sample at a time: of several, ADP's decoder does each alone, and rounds otherwise."""
    kept = weights(runs["one at a time"].result())
    same(weights(runs["checkpointing"].result()), kept, rtol=0, atol=0)


def test_two_ranks_train_as_one(runs, finished):
    """Half the batch on each of two ranks: the same global batch, the same weights."""
    def generator(out):
        return {k: v for k, v in weights(out, "adp").items() if k.startswith("generator")}
    same(generator(runs["two ranks"].result()), generator(finished), rtol=1e-3, atol=2e-4)


def test_prompts_to_look_at_are_drawn_and_not_trained_on(small, runs, finished, tmp_path):
    """Five images of three prompts; a run that differs in its length alone draws them from the same
    noise; and what is trained is, to the bit, what it is without them."""
    out, flags = runs["look at"].result(), VARIANTS["look at"]
    kept = load_file(out / "samples" / "samples.safetensors")
    assert kept["images"].shape == (5, 3, 32, 32)
    assert kept["prompt"].tolist() == [5, 6, 7, 5, 6]           # numbered on after the PROMPTS
    assert stock_difference(out, [*PROMPTS, *LOOK_AT]) < 1e-4
    for stage in ("adp", "adm"):
        assert (out / f"samples-{stage}-000002.png").stat().st_size > 1000
        same(weights(out, stage), weights(finished, stage), rtol=0, atol=0)

    shorter = part_of(out, tmp_path / "shorter", "adp-00000004")
    flags = [out.parent / "look_at.txt" if flag == "FILE" else flag for flag in flags]
    succeeded(train(small, shorter, *flags, "--stage", "adm", "--iterations", "2", "--resume",
                    "auto"))
    other = load_file(shorter / "samples" / "samples.safetensors")
    for name in ("x_T", "prompt"):
        assert_close(other[name], kept[name], rtol=0, atol=0)
    assert len({tuple(x.flatten().tolist()) for x in kept["x_T"]}) == 5
    assert (other["images"] - kept["images"]).abs().max() > 1e-3


def test_dt_from_the_command_line(small, finished, tmp_path):
    """16 is T/64, to the bit; two of them train something else; no other dt goes on from there."""
    def adm(name, *dt):
        out = part_of(finished, tmp_path / name, "adp-00000004")
        flags = [*EMA, "--stage", "adm", "--resume", "auto", "--dt", *dt]
        succeeded(train(small, out, *flags))
        return out

    same(weights(adm("16", "16")), weights(finished), rtol=0, atol=0)
    out = adm("8 32", "8", "32")
    found, without = weights(out), weights(finished)
    assert any((found[k] - without[k]).abs().max() > 1e-3 for k in found if "generator" in k)
    facts = json.loads((out / "checkpoints" / "adm-00000004" / "manifest.json").read_text())
    assert facts["dt"] == [8, 32]
    (out / "result.json").unlink()
    failed(train(small, out, *EMA, "--stage", "adm", "--resume", "auto", "--dt", "8"), 1,
           "adm-00000004: its dt is [8, 32], this run's is [8]")


def squeezed(value):
    return "".join(str(value).split())


def described(text, action):
    """What --help says of a flag, without white space: a terminal's width breaks lines anywhere."""
    parts = re.split(r"\n  (?=-)|\n\n", text)
    invocation = squeezed(Help("")._format_action_invocation(action))
    found, = [squeezed(part) for part in parts if squeezed(part).startswith(invocation)]
    return found.removeprefix(invocation)


@pytest.mark.parametrize("script, medium", [
    ("train_sdxl.py", "image"), ("train_cogvideox.py", "video")])
def test_help_says_what_every_flag_does_and_is_by_default(script, medium):
    """And what the embedded teachers set in its place."""
    teachers = embedded.of_medium(medium)
    text = succeeded(Run(ROOT / script, "--help").wait()).stdout
    actions = [action for action in parser_of("", of_medium(medium), teachers)._actions
               if action.dest != "help"]
    assert len(actions) > 40
    for action in actions:
        said = described(text, action)
        assert len(re.sub(r"\(default:.*\)|;embedded.*", "", said)) > 4, (action, said)
        if action.default is not None:
            assert f"(default:{squeezed(action.default)})" in said, said
        for teacher in teachers:
            name = squeezed(teacher.name)
            for whose, settings in ((name, teacher.settings),
                                    (f"{name},PhasedDMD", teacher.settings_phased)):
                if action.dest in settings:
                    assert f"{whose}:{squeezed(settings[action.dest])}" in said, said
        if action.dest in OF_PHASED_DMD:
            numbers = re.findall(r"PhasedDMD:?(\d+(?:e-\d+)?)", said)
            assert OF_PHASED_DMD[action.dest] in [float(number) for number in numbers], said


@pytest.mark.parametrize("model, expected", [
    (None, embedded.SDXL), ("teachers/sd3", embedded.SD3), (embedded.SD3.folder, embedded.SD3),
    ("./teachers/../teachers/sdxl/", embedded.SDXL)])
def test_an_embedded_teacher_has_settings_and_prompts_of_its_own(model, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [] if model is None else ["--model", str(model)]
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *words, "--lr-fake", "0.5"])
    args, teacher = parse("", of_medium("image"), embedded.of_medium("image"))
    assert teacher is expected
    assert args.lr_fake == 0.5 and args.pairs == expected.settings["pairs"]
    assert args.steps == (1 if expected is embedded.SDXL else 4)


def test_a_copy_of_an_embedded_teacher_is_any_model(tmp_path, monkeypatch, capsys):
    shutil.copytree(embedded.SD3.folder, tmp_path / "sd3")
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", "--model", str(tmp_path / "sd3")])
    with pytest.raises(SystemExit):
        parse("", of_medium("image"), embedded.of_medium("image"))
    assert "--prompts is needed" in capsys.readouterr().err


def test_torchrun_from_the_readme(small, tmp_path):
    """The real launcher, once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2"]
    words = [str(word) for word in (*launcher, *command(small, tmp_path / "out", "--stage", "adm",
                                                         "--iterations", "1"))]
    done = subprocess.run(words, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True,
                          text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "result.json").exists(), done.stderr[-3000:]


def test_wrong_models(small, tmp_path):
    failed(train(small, tmp_path / "a", "--model", str(tmp_path / "nothing")), 1, "nothing",
           "model_index.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    failed(train(small, tmp_path / "b", "--model", str(other)), 1, "StableDiffusionPipeline",
           "StableDiffusionXLPipeline")
    failed(train(small, tmp_path / "b", "--model", str(other), "--lr-fake", "0"), 2, "--lr-fake 0")


def test_the_embedded_run_marks_its_student(tmp_path):
    """Phased DMD on the shipped teacher, hardly trained: experts that are still the teacher hand on
    x_s with the noise it should have."""
    flags = ("--method phased_dmd --pairs 48 --pair-steps 4 --iterations-phase 1 --batch-size 2 "
             "--ttur 1 --lr-generator 1e-9").split()
    succeeded(Run(ROOT / "train_sdxl.py", *flags, "--out", tmp_path / "out").wait())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for name in ("teacher", "untrained", "unguided", "student"):
        row = result[name]
        assert row.keys() == {"accuracy", "legible", "glyph_tv", "coverage_tv", "diversity"}, result
        assert all(0 <= mark <= 1 for mark in row.values()), result
    assert result["student"] == pytest.approx(result["unguided"]), result       # not learnt a thing
    left, = result["noise_left"]
    assert 0.9 < left < 1.05, left
