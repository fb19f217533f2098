"""Nothing is lost and nobody gets in: the 22 cases, each really done to the real scripts. Kills,
full disks, flipped bits, bad usage; then a fuzz."""
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cli import Run, failed, in_background, succeeded, two_at_a_time
from families.family import of_medium
from families.vision import load_vision_encoder
from kills import finish, punish
from sdxl import (LIGHT, PROMPTS, appears, command, part_of, same, start, stop_when, train,
                  weights)
from teachers import embedded, make_sdxl
from training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from training.draws import Draws
from training.errors import Failure, read_prompts
from training.flags import parse, parser_of
from training.folders import read_folder, seal, sha256, verify, write_folder
from training.loading import load_pipeline
from training.optimizer import Optimizer
from training.output import Output
from training.pairs import load_pairs
from training.ranks import ECHO

LONG = {}
long = in_background(LONG)


@pytest.fixture(scope="session")
def background(small, reference, request, tmp_path_factory):
    asked = {item.name for item in request.session.items}
    jobs = {}
    for name, test in LONG.items():
        if name in asked:
            jobs[name] = (test, small, reference, tmp_path_factory.mktemp(name))
    with two_at_a_time(jobs) as futures:
        yield futures


@pytest.fixture(scope="session")
def reference(small, tmp_path_factory):
    """An uninterrupted run of four iterations of ADP and four of ADM."""
    out = tmp_path_factory.mktemp("reference") / "out"
    succeeded(train(small, out, *LIGHT, "--ema", "0.9"))
    return out


SAME = (*LIGHT, "--ema", "0.9", "--resume", "auto")             # the flags to go on with
ADP, ADM_2, ADM_4 = "adp-00000004", "adm-00000002", "adm-00000004"


def facts_of(out):
    facts = json.loads((out / "checkpoints" / ADM_4 / "manifest.json").read_text())
    facts.pop("flags")
    facts.pop("seal")
    return facts


def like(reference, out):
    """Weights, averages, moments and counters are those of the uninterrupted run, to the bit, and
    nothing is left over."""
    for stage in ("adp", "adm"):
        same(weights(out, stage), weights(reference, stage), rtol=0, atol=0)
    assert facts_of(out) == facts_of(reference)
    assert not list(out.glob("**/*.tmp"))


def mount(path, options):
    """-> 0 if it could be done."""
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
                          capture_output=True).returncode


@contextlib.contextmanager
def disk(path, size, mode="rw"):
    """A small one of its own -> a function that gives it another size."""
    path.mkdir()
    if mount(path, f"{mode},size={size}"):
        pytest.skip("may not mount a small disk here; test_disks_without_that_right does it "
                    "instead")
    try:
        yield lambda size: mount(path, f"remount,size={size}")
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# ------------------------------------------------------------------------------- kills and disks

@long
def test_01_killed_at_random_moments(small, reference, folder):
    """Ten times; tests/kills.py does it two hundred times and compares the weights."""
    counts = punish(small, folder / "out", 10, random.Random(1))
    assert counts["lost"] == counts["unreadable"] == 0 and counts["iterations"] >= 5, counts
    assert finish(small, folder / "out") > counts["iterations"]


# runs a script that dies when it is about to do, or has just done, the rename ending in argv[2]
AT_RENAME = """
import os, runpy, signal, sys
rename, (when, name) = os.rename, sys.argv[1:3]
def fatal(a, b):
    if when == "after" and str(b).endswith(name):
        rename(a, b)
    if str(b).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
os.rename, sys.argv = fatal, sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@long
def test_02_killed_at_the_rename(small, reference, folder):
    """Just before it the new checkpoint does not count; just after it, it does. At the rename that
    prunes, nothing counts that is not whole."""
    for when, name, newest in (("before", ADM_4, 2), ("after", ADM_4, 4)):
        out = part_of(reference, folder / when, ADP, ADM_2)
        run = Run("-c", AT_RENAME, when, name, *command(small, out, *SAME)).wait()
        assert run.returncode == -signal.SIGKILL, run.stderr
        left = [p.name for p in out.glob("**/*.tmp")]
        assert left == (["adm-00000004.tmp"] if when == "before" else [])
        assert newest_checkpoint(out / "checkpoints", "adm").name == f"adm-{newest:08d}"
        if when == "before":
            succeeded(train(small, out, *SAME))
            like(reference, out)


@long
def test_03_disk_full_while_saving(small, reference, folder):
    """A disk with room for two checkpoints; then for the checkpoints but not for the export; then
    for all."""
    size = sum(f.stat().st_size for f in (reference / "checkpoints" / ADM_4).iterdir())
    with disk(folder / "disk", int(2.6 * size)) as resize:
        out = folder / "disk" / "out"
        flags = (*SAME, "--stage", "adm", "--save-every", "1")
        failed(train(small, out, *flags), 1, f"{out}/checkpoints/adm-00000003", "bytes",
               "No space left", "--resume auto")
        there = sorted(p.name for p in (out / "checkpoints").iterdir())
        assert there == ["adm-00000001", "adm-00000002"]
        for path in (out / "checkpoints").iterdir():
            verify(path)
        resize(int(3.8 * size))
        failed(train(small, out, *flags), 1, "No space left", "free some space", "--resume auto")
        assert verify(out / "checkpoints" / ADM_4)["iteration"] == 4
        assert not (out / "result.json").exists()
        resize("200m")
        succeeded(train(small, out, *flags))
        assert (out / "result.json").exists()


def test_04_output_directory_not_writable(small, tmp_path):
    """Refused before a model is loaded: here there is none to load."""
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json"):
        shutil.copy(small / "model" / name, model / name)
    (tmp_path / "notes.txt").write_text("mine")
    failed(train(small, tmp_path / "notes.txt" / "out", "--model", model), 1, "notes.txt",
           "choose a directory")
    with disk(tmp_path / "disk", "64k", mode="ro"):
        for out in (tmp_path / "disk", tmp_path / "disk" / "out"):
            failed(train(small, out, "--model", model), 1, str(out), "Read-only",
                   "choose a directory")


@long
def test_05_truncated_checkpoints(small, reference, folder):
    out = part_of(reference, folder / "out", ADP, ADM_2, ADM_4)
    victim = out / "checkpoints" / ADM_4 / "generator.safetensors"
    whole = victim.read_bytes()
    for percent in (0, 10, 50, 99):
        victim.write_bytes(whole[:len(whole) * percent // 100])
        failed(train(small, out, *SAME, "--resume", victim.parent), 1, str(victim), "truncated")
    done = succeeded(train(small, out, *SAME))
    assert f"warning: {victim}" in done.stderr and "the one before" in done.stderr
    like(reference, out)                                        # the damaged one was written anew


def test_06_one_bit_flipped(small, reference, tmp_path):
    """In any file; in the manifest, which has a hash of its own, in any place."""
    folder = part_of(reference, tmp_path / "out", ADM_4) / "checkpoints" / ADM_4
    facts = verify(folder)
    dice = random.Random(0)
    for victim in folder.glob("*.safetensors"):
        bit = dice.randrange(8 * victim.stat().st_size)
        flip(victim, bit)
        with pytest.raises(Failure, match=f"{victim}: .*altered"):
            verify(folder)
        flip(victim, bit)
    for bit in dice.sample(range(8 * (folder / "manifest.json").stat().st_size), 200):
        flip(folder / "manifest.json", bit)
        with contextlib.suppress(Failure):
            assert verify(folder) == facts, bit                 # white space only
        flip(folder / "manifest.json", bit)
    flip(folder / "heads.safetensors", 70000)
    failed(train(small, tmp_path / "out", *SAME, "--resume", folder), 1,
           str(folder / "heads.safetensors"), "altered")


@long
def test_07_resume_without_a_checkpoint_there(small, reference, folder):
    """Only auto may start afresh, and nothing that cannot be gone on from is passed over in
    silence."""
    def resumed(path, *flags):
        return train(small, folder / "new", "--resume", path, *flags)

    (folder / "empty").mkdir()
    (folder / "x.pt").write_bytes(b"")
    for where in ("gone", "empty", "x.pt"):
        failed(resumed(folder / where), 1, f"--resume {folder / where}: no checkpoint there")
    assert [p.name for p in (folder / "new").iterdir()] == [".lock"]
    checkpoint = reference / "checkpoints" / ADM_4
    failed(resumed(checkpoint, "--method", "phased_dmd"), 1, str(checkpoint), "its stage is adm",
           "no such stage")
    failed(resumed(reference / "pairs" / "00000"), 1, "pairs/00000", "no such stage")
    failed(resumed(reference / "checkpoints" / ADP, "--stage", "adm"), 1, "its stage is adp",
           "no such stage")
    out = part_of(reference, folder / "out", ADP, ADM_2, ADM_4)
    failed(train(small, out, *SAME, "--resume", out / "checkpoints" / ADM_2), 1, ADM_2,
           str(out / "checkpoints" / ADM_4), "--resume auto")


def nets(width=3):
    torch.manual_seed(0)
    net = nn.Linear(width, 2)
    net(torch.ones(1, width)).sum().backward()
    opt = Optimizer("net", net.parameters(), 0.1, 1.0)
    opt.step()
    return dict(net=net), (opt,)


FACTS = dict(stage="adm", iteration=1, global_iter=1)


def test_08_checkpoint_of_another_optimizer(tmp_path):
    """One line that says what differs; and nothing was touched."""
    save_checkpoint(tmp_path, FACTS, *nets())
    path = tmp_path / "adm-00000001"
    assert load_checkpoint(path, FACTS, *nets())["iteration"] == 1
    facts, files = read_folder(path)
    moments = files["optimizer_net.safetensors"]
    for changed, words in (
            (moments | {"0.exp_avg": torch.zeros(4, 4)},
             r"optimizer_net.0.exp_avg is \[4, 4\] there and missing here"),
            (moments | {"7.exp_avg": torch.zeros(2)},
             r"optimizer_net.7.exp_avg is \[2\] there and missing here"),
            (None, "optimizer_net.0.exp_avg_sq is missing there")):
        other = files | {"optimizer_net.safetensors": changed}
        write_folder(tmp_path / "other", {k: v for k, v in other.items() if v is not None}, FACTS)
        with pytest.raises(Failure, match=words):
            load_checkpoint(tmp_path / "other", FACTS, *nets())
    mine, opts = nets(width=4)
    before = mine["net"].weight.clone()
    with pytest.raises(Failure, match=r"net.weight is \[2, 3\] there and \[2, 4\] here"):
        load_checkpoint(path, FACTS, mine, opts)
    assert (mine["net"].weight == before).all()
    with pytest.raises(Failure, match="its iteration is 1, this run's is 2"):
        load_checkpoint(path, dict(FACTS, iteration=2), *nets())


@long
def test_08_checkpoint_of_another_model(small, reference, folder):
    torch.manual_seed(5)
    make_sdxl.build().save_pretrained(folder / "model")
    flags = (*LIGHT, "--ema", "0.9", "--resume", reference / "checkpoints" / ADM_4,
             "--stage", "adm")
    failed(train(small, folder / "a", *flags, "--model", folder / "model"), 1, "its teacher is",
           "this run's is")
    failed(train(small, folder / "b", *flags, "--head-channels", "16"), 1, "adm-00000004: heads.",
           "there and", "here")
    failed(train(small, folder / "b", *flags, "--lora-rank", "4"), 1,
           "its lora_rank is 2, this run's is 4")
    failed(train(small, folder / "b", *flags, "--lora-alpha", "3"), 1,
           "its lora_alpha is None, this run's is 3.0")
    failed(train(small, folder / "b", *flags, "--cfg-student", "3"), 1,
           "its cfg_student is None, this run's is 3.0")
    failed(train(small, folder / "b", *flags, "--dt", "8"), 1, "its dt is None, this run's is [8]")


@long
def test_09_stopped_and_resumed_is_bit_equal(small, reference, folder):
    """Ctrl-C in ADP, again in ADM, resumed each time: the same weights, averages, moments and
    counters as in one go."""
    for checkpoint in ("adp-00000002", ADM_2):
        stop_when(small, folder / "out", checkpoint, *SAME)
    succeeded(train(small, folder / "out", *SAME))
    like(reference, folder / "out")


def images_of(out):
    return load_file(out / "samples" / "samples.safetensors")["images"]


@long
def test_10_resumed_on_another_number_of_ranks(small, reference, folder):
    """1 -> 2 -> 1: the same draws, so the same samples as on one all along."""
    two = part_of(reference, folder / "two", ADM_2)
    one = folder / "one"
    succeeded(train(small, two, *SAME, "--stage", "adm", "--batch-size", "1", "--save-every", "1",
                    ranks=2))
    succeeded(train(small, part_of(two, one, "adm-00000003"), *SAME, "--stage", "adm"))
    for out, ranks in ((two, 2), (one, 1)):
        assert verify(out / "checkpoints" / ADM_4)["world_size"] == ranks
        assert (images_of(out) - images_of(reference)).abs().max() < 1e-5


def drawn(seed, iteration, sample):
    """The prompt of a sample of ADM."""
    draws = Draws((seed, 2), iteration, [sample], (1,))
    return draws.integers(0, len(PROMPTS) - 1).item()


def is_bad_late(seed):
    """Whether the prompt of iteration 3's second sample comes up nowhere before."""
    others = [drawn(seed, i, k) for i in (1, 2, 3) for k in (0, 1) if (i, k) != (3, 1)]
    return drawn(seed, 3, 1) not in others


@long
def test_11_nan_on_one_rank(small, reference, folder):
    """A prompt whose embedding is NaN comes up in the third iteration, on the second of two
    ranks."""
    seed = next(s for s in range(1000) if is_bad_late(s))
    bad, other = drawn(seed, 3, 1), drawn(seed, 3, 0)
    facts, files = read_folder(reference / "prompts" / "00000")
    for tensor in files["embeddings.safetensors"].values():
        if tensor.is_floating_point():
            tensor[bad] = float("nan")
    facts.pop("files")
    prompts = folder / "out" / "prompts"
    prompts.mkdir(parents=True)
    if (reference / "prompts" / "empty").exists():
        shutil.copytree(reference / "prompts" / "empty", prompts / "empty")
    write_folder(prompts / "00000", files, facts)
    done = train(small, folder / "out", *SAME, "--stage", "adm", "--seed", str(seed),
                 "--batch-size", "1", "--save-every", "1", ranks=2)
    failed(done, 1, "adm, iteration 3", "gradient of the fake score is not finite",
           f"{bad + 1} ({PROMPTS[bad]})", f"{other + 1} ({PROMPTS[other]})")
    checkpoints = sorted((folder / "out" / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["adm-00000001", "adm-00000002"]
    for iteration in (1, 2):
        for v in weights(folder / "out", "adm", iteration).values():
            assert v.isfinite().all()


def slow(small, out, *flags, **options):
    """A run in its first iteration, which takes minutes unless it is to end sooner."""
    run = start(small, out, *LIGHT, "--stage", "adm", "--save-every", "1000", "--iterations",
                "1000", *flags, **options)
    appears(out / "prompts" / "00000", run)
    time.sleep(0.3)
    return run


@long
def test_12_one_signal_saves_and_a_second_ends(small, reference, folder):
    """SIGTERM and SIGINT, on one and two ranks; of two, one that hears it is enough."""
    for number, ranks, who in ((signal.SIGTERM, 0, slice(None)), (signal.SIGINT, 2, slice(None)),
                               (signal.SIGTERM, 2, slice(1, 2))):
        out = folder / f"{number} {ranks} {who.start}"
        run = slow(small, out, ranks=ranks)
        for p in run.processes[who]:
            os.kill(p.pid, number)
        succeeded(run.wait())
        checkpoint, = (out / "checkpoints").iterdir()
        assert verify(checkpoint)["iteration"] >= 1
        assert "stopping after this iteration" in run.stderr
        assert "go on with --resume auto" in run.stdout
    for number, ranks, pause in ((signal.SIGINT, 0, 0.5), (signal.SIGTERM, 2, ECHO + 0.5)):
        out = folder / f"twice {number} {ranks}"
        run = slow(small, out, "--accumulate", "2000", ranks=ranks)
        run.send(number)
        if number == signal.SIGTERM:            # a batch system's, and then torchrun's own
            time.sleep(0.3)
            run.send(number)
        time.sleep(pause)
        assert run.alive()
        began = time.time()
        run.send(number)
        run.wait()
        lines = [line for line in run.stderr.splitlines()
                 if line.strip() and "stopping after" not in line]
        assert run.returncode == 1 and len(lines) == 1, run.stderr
        assert "stopped at once" in lines[0] and time.time() - began < 10, run.stderr
        assert not (out / "checkpoints").exists()


@long
def test_13_two_runs_in_one_directory(small, reference, folder):
    run = slow(small, folder / "out", "--accumulate", "2000")
    failed(train(small, folder / "out", *SAME), 1, str(folder / "out"),
           "another run is writing there")
    assert run.alive()
    run.send(signal.SIGKILL)
    run.wait()
    Output(folder / "out", "auto").lock.close()


def listing(folder):
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns)
                  for p in folder.glob("**/*") if p.is_file())


def test_14_finished_and_foreign_directories(small, reference, tmp_path):
    before = listing(reference)
    for flags in ((), ("--resume", "auto"), ("--resume", reference / "checkpoints" / ADM_4)):
        failed(train(small, reference, *flags), 1, "finished run", "another directory")
    assert listing(reference) == before
    (tmp_path / "notes.txt").write_text("mine")
    for ranks in (0, 2):
        failed(train(small, tmp_path, ranks=ranks), 1, "not empty", "--resume auto")
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["notes.txt"]


FIRST, SECOND = "pairs/00000/pairs.safetensors", "pairs/00001/pairs.safetensors"


@long
def test_15_pairs(small, reference, folder):
    """A killed collection goes on to the same bytes; a shard that is of another teacher or setting
    is named."""
    def go(*more):
        return train(small, a, "--stage", "adp", "--pairs", "300", "--resume", "auto", *more)

    a, b = folder / "a", folder / "b"
    flags = ("--stage", "pairs", "--pairs", "300", "--batch-size", "64")
    succeeded(train(small, a, *flags))
    run = start(small, b, *flags)
    appears(b / "pairs" / "00000", run)
    run.send(signal.SIGKILL)
    run.wait()
    succeeded(train(small, b, *flags, "--resume", "auto"))
    for name in (FIRST, SECOND):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    failed(go("--pair-steps", "3"), 1, "pairs/00000: its steps is 2", "run's is 3")
    torch.manual_seed(5)
    make_sdxl.build().save_pretrained(folder / "model")
    failed(go("--model", folder / "model"), 1, "prompts/00000: its teacher is", "this run's is")
    shutil.rmtree(a / "prompts")
    failed(go("--model", folder / "model"), 1, "pairs/00000: its teacher is", "this run's is")
    damaged_pairs_are_named(b)


def damaged_pairs_are_named(out):
    """One after the other: a shard is corrupt, truncated, missing."""
    args = SimpleNamespace(pairs=300, pair_steps=2, pair_guidance=7.0, seed=0)
    facts = verify(out / "prompts" / "00000")
    facts.pop("files")
    teacher = SimpleNamespace(facts=facts)

    def load():
        return load_pairs(args, SimpleNamespace(path=out), teacher)

    assert len(load()[0]) == 300
    flip(out / SECOND, 70000)
    with pytest.raises(Failure, match="00001/pairs.safetensors: missing, truncated or altered"):
        load()
    (out / FIRST).write_bytes((out / FIRST).read_bytes()[:-1])
    with pytest.raises(Failure, match="00000/pairs.safetensors: missing, truncated or altered"):
        load()
    shutil.rmtree(out / "pairs" / "00000")
    with pytest.raises(Failure, match="pairs/00000: missing; .* --stage pairs"):
        load()


@pytest.mark.parametrize("flag", ["--prompts", "--look-at"])
@pytest.mark.parametrize("content, words", [
    (b"", ["empty"]),
    (b"a cat\n\n  \na dog\n", ["line 2", "blank"]),
    (b"fine\nnot \xff fine\n", ["line 2", "UTF-8"]),
    (None, ["No such file"])])
def test_16_bad_prompt_files(small, tmp_path, flag, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    failed(train(small, tmp_path / "out", flag, path), 1, f"{flag} {path}", *words)
    assert not (tmp_path / "out").exists()


@long
def test_17_19_odd_prompts(small, reference, folder):
    """Those longer than the tokenizer's 16 tokens are counted, once, on two ranks; no file is named
    after a prompt; dollars are no formula in a picture."""
    prompts = ["../../outside", "/etc/passwd", "a" * 5000, "a red circle on blue " * 300,
               "$5 \\frac{ $", "a small red circle on blue"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    out = folder / "a" / "b" / "out"
    flags = (*LIGHT, "--stage", "adm", "--iterations", "1", "--batch-size", "1",
             "--samples", len(prompts), "--prompts", folder / "prompts.txt")
    done = succeeded(train(small, out, *flags, ranks=2))
    assert done.stderr.count("longer than") == 1
    assert "warning: 2 of 6 prompts are longer than 16 tokens" in done.stderr
    there = sorted(folder.glob("*")) + sorted(folder.glob("a/*")) + sorted(folder.glob("a/b/*"))
    assert [str(p.relative_to(folder)) for p in there] == ["a", "prompts.txt", "a/b", "a/b/out"]
    names = [str(p.relative_to(out)) for p in out.glob("**/*")]
    for part in ("outside", "passwd", "aaaa", "circle", "frac"):
        assert not [name for name in names if part in name]


def test_disks_without_that_right(tmp_path):
    """Cases 3, 4 and 22 where only root may mount: as the root of a namespace of their own."""
    with contextlib.suppress(pytest.skip.Exception), disk(tmp_path / "disk", "64k"):
        return
    if subprocess.run(["unshare", "-Urm", "true"]).returncode:
        pytest.skip("neither mount nor a namespace of one's own is allowed here")
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "--basetemp", tmp_path / "tests", __file__, "-k", "test_03 or test_04 or test_22"],
        capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]


# -------------------------------------------------------------------------------- nobody gets in

class Evil:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil(path, mark):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Evil(mark)))


@long
def test_18_pickles_and_code_in_models(small, reference, folder):
    """A model whose weights are a pickle, even an honest one, or which brings code along."""
    def refused(model, *words):
        failed(train(small, folder / "out", "--model", model, "--resume", "auto"), 1, str(model),
               *words)

    mark = folder / "ran"
    pickle.loads(pickle.dumps(Evil(folder / "proof")))
    assert (folder / "proof").exists()
    for part, name, pickled in (("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
                                ("text_encoder", "model", "pytorch_model.bin")):
        model = folder / part
        shutil.copytree(small / "model", model)
        file = model / part / f"{name}.safetensors"
        torch.save(load_file(file), file.with_name(pickled))
        file.unlink()
        refused(model, "safetensors")
        evil(file.with_name(pickled), mark)
        refused(model, "safetensors")
        evil(file, mark)
        refused(model)
    model = folder / "code"
    shutil.copytree(small / "model", model)
    index = json.loads((model / "model_index.json").read_text())
    index["unet"] = ["evil", "UNet2DConditionModel"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "unet" / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom diffusers import UNet2DConditionModel\n")
    refused(model, "code")
    pickles_and_code_in_a_vision_encoder(small, folder / "vision", mark)
    assert not mark.exists()


def pickles_and_code_in_a_vision_encoder(small, vision, mark):
    shutil.copytree(small / "vision", vision)
    (vision / "model.safetensors").unlink()
    evil(vision / "pytorch_model.bin", mark)
    with pytest.raises(Failure, match="safetensors"):
        load_vision_encoder(str(vision), "cpu")
    config = json.loads((vision / "config.json").read_text())
    config |= dict(model_type="new", auto_map=dict(AutoConfig="evil.Config"))
    (vision / "config.json").write_text(json.dumps(config))
    (vision / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(Failure, match="no such model"):
        load_vision_encoder(str(vision), "cpu")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet", "vae", "vision"])
def test_weights_that_a_file_lacks(small, tmp_path, part):
    """Of which transformers would draw new ones and diffusers make none, both without a word after
    quiet()."""
    is_vision = part == "vision"
    model = tmp_path / "model"
    shutil.copytree(small / ("vision" if is_vision else "model"), model)
    file, = (model / ("" if is_vision else part)).glob("*.safetensors")
    state = load_file(file)
    lost = sorted(state)[len(state) // 2]
    state.pop(lost)
    save_file(state, file, metadata=dict(format="pt"))
    words = rf"{model}: not a whole .*no value there for .*{lost.split('.')[-2]}"
    with pytest.raises(Failure, match=words):
        if is_vision:
            load_vision_encoder(str(model), "cpu")
        else:
            args = SimpleNamespace(model=str(model), no_t5=False)
            load_pipeline(args, of_medium("image"))


@long
def test_18_pickles_and_paths_in_checkpoints(small, reference, folder):
    """A checkpoint of pickles with honest hashes, and one with ../ in its manifest, are refused;
    what else lies about is not opened."""
    mark, checkpoint = folder / "ran", f"checkpoints/{ADM_4}"
    out = part_of(reference, folder / "out", ADP, ADM_4)
    for name in ("generator.pt", "optimizer.pt", ".metadata", "__0_0.distcp", "x.npy", "x.pkl"):
        for place in (checkpoint, "pairs/00000", "prompts/00000", "."):
            evil(out / place / name, mark)
    assert "warning" not in succeeded(train(small, out, *SAME)).stderr
    like(reference, out)
    bad = part_of(reference, folder / "bad", ADM_4) / checkpoint
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest.pop("seal")

    def stamp(path):
        return dict(bytes=path.stat().st_size, sha256=sha256(path))

    def refused(files, *words):
        facts = dict(manifest, files=files)
        (bad / "manifest.json").write_text(json.dumps(dict(facts, seal=seal(facts))))
        failed(train(small, folder / "new", *SAME, "--resume", bad), 1, *words)

    evil(bad / "heads.safetensors", mark)
    pickled = {"heads.safetensors": stamp(bad / "heads.safetensors")}
    refused(manifest["files"] | pickled, "heads.safetensors", "altered")
    save_file({"x": torch.zeros(1)}, folder / "outside.safetensors")
    refused({"../../../outside.safetensors": stamp(folder / "outside.safetensors")},
            f"{bad}/outside.safetensors", "missing")
    evil(folder / "x.pt", mark)
    failed(train(small, folder / "new", *SAME, "--resume", folder / "x.pt"), 1,
           "x.pt: no checkpoint there")
    assert not mark.exists()


def outcome(job):
    """-> (None, 1 or 2, what standard error got) of something that may fail only as a user is
    told."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            job()
            code = None
        except Failure as e:
            code = 1
            print(" ".join(str(e).splitlines()), file=sys.stderr)
        except SystemExit as e:
            code = e.code or None                               # --help
    return code, said.getvalue()


def parsed(monkeypatch, *words):
    """outcome() of the command line of train_sdxl.py."""
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *map(str, words)])
    return outcome(lambda: parse("", of_medium("image"), embedded.of_medium("image")))


def test_20_bad_flags_are_reported_at_once(small, tmp_path, monkeypatch):
    def run(*flags, **options):
        return train(small, tmp_path / "out", *flags, **options)

    failed(run("--lr-fake", "-1", "--steps", "0", "--wrong", "--ema", "1", "--clip", "nan"), 2,
           "--lr-fake -1.0", "--steps 0", "--wrong", "--ema 1.0", "--clip nan")
    failed(run("--steps", "-3", "--pairs", "0", "--guidance", "8", "6", "--seed", "-1", "--lambdas",
               "0", "0", "--decay", "--height", "33", "5"), 2, "--steps -3", "--pairs 0",
           "--guidance 8.0 6.0", "--seed -1", "--lambdas", "--height 33", "unknown flag 5")
    failed(run("--stage", "adp", "--steps", "4"), 2, "--stage adp",
           "leave the flag out")
    failed(run("--method", "phased_dmd", "--phases", "3", "--stage", "adm"), 2, "--phases 3",
           "--steps 4", "--stage adm")
    failed(run("--text-tokens", "8", "--steps", "2000", ranks=2), 2, "--text-tokens 8: SDXL",
           "--steps 2000")
    failed(run("--dt", "0"), 2, "--dt 0: must be in 1 to 999")
    failed(run("--dt", "16", "5000"), 2, "--dt 16 5000: must be in 1 to 999")
    failed(run("--dt", "5", "--method", "dmd"), 2, "--dt 5", "leave the flag out")
    failed(run("--cfg-student", "3", "--method", "adp"), 2, "--cfg-student 3.0: only ADM and DMD")
    failed(run("--lr-fake", "abc", "--steps", "-3"), 2, "--lr-fake: invalid float value: 'abc'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, said", [
    (["--lr-fake", "abc"], "--lr-fake: invalid float value: 'abc'"),
    (["--stage", "everything"], "--stage: invalid choice: 'everything'"),
    (["--pairs", "1e3"], "--pairs: invalid int value: '1e3'"),
    (["--decay=5"], "--decay/--no-decay: ignored explicit argument '5'"),
    (["--guidance", "1"], "--guidance: expected 2 arguments"),
    (["--seed"], "--seed: expected one argument")])
def test_20_argparses_own_error_comes_first_and_alone(monkeypatch, words, said):
    code, line = parsed(monkeypatch, "--steps", "-3", "--ema", "1", *words)
    assert code == 2 and len(line.splitlines()) == 1 and said in line, (code, line)
    assert "--steps" not in line and "--ema" not in line, line
    assert line.startswith("train_sdxl.py: error: ")


@pytest.mark.parametrize("group, wrong", [(1, 0), (4, 0), (3, 1), (0, 1)])
def test_20_ranks_that_share_samples_must_divide_all(tmp_path, monkeypatch, group, wrong):
    """Said once."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", ["train_cogvideox.py", "--model", str(tmp_path), "--prompts",
                                      "x", "--context-parallel", str(group)])
    code, line = outcome(lambda: parse("", of_medium("video"), ()))
    assert code == (2 if wrong else None)
    assert line.count("--context-parallel") == len(line.splitlines()) == wrong


# runs a script where there is no network and no wandb
ALONE = """
import ctypes, runpy, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
# CLONE_NEWNET; with CLONE_NEWUSER where the first is not allowed
if libc.unshare(0x40000000) and libc.unshare(0x50000000):
    sys.exit("no unshare")
try:
    socket.create_connection(("1.1.1.1", 80), timeout=5)
    sys.exit("there is a network")
except OSError:
    pass
sys.modules["wandb"] = None                     # which makes an import fail
time.sleep = lambda seconds: None               # between huggingface_hub's attempts
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@long
def test_21_no_network_and_no_wandb(small, reference, folder):
    done = Run("-c", ALONE, *command(small, folder / "out", *LIGHT, "--stage", "adm")).wait()
    if "no unshare" in done.stderr:
        pytest.skip("needs the right to a network namespace")
    succeeded(done)
    entries = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(entries[-1])["iteration"] == 4
    assert (folder / "out" / "result.json").exists()
    nowhere = command(small, folder / "b", "--model", "nobody/nothing")
    failed(Run("-c", ALONE, *nowhere).wait(), 1, "nobody/nothing",
           "no such pipeline, here or on the hub")


@long
def test_22_disk_full_for_logs_and_pictures(small, reference, folder):
    """They lie on a disk that has no room left; the log's last line was cut short by that."""
    names = ("metrics.jsonl", "samples-adm-000002.png", "samples.png", "losses.png")
    with disk(folder / "disk", "64k"):
        out = part_of(reference, folder / "out", ADP)
        for name in names:
            cut_short = '{"stage": "adm", "itera' if name.endswith("jsonl") else ""
            (folder / "disk" / name).write_text(cut_short)
            (out / name).symlink_to(folder / "disk" / name)
        with contextlib.suppress(OSError):
            with open(folder / "disk" / "rest", "wb", buffering=0) as f:
                while True:
                    f.write(bytes(512))
        # the page that holds that line has room for more
        with open(folder / "disk" / "metrics.jsonl", "a") as f:
            f.write("x" * 4073)
        done = succeeded(train(small, out, *SAME, "--sample-every", "2"))
        for name in names:
            assert f"{out}/{name}: No space left on device; training goes on" in done.stderr, name
    like(reference, out)
    assert (out / "result.json").exists()


# -------------------------------------------------------------------------------------- the fuzz

FLAGS = [word for word in parser_of("", of_medium("image"), [embedded.SDXL])._option_string_actions
         if word.startswith("--")]
VALUES = st.one_of(
    st.sampled_from(["0", "-1", "1", "2", "nan", "inf", "-inf", "1e400", "9" * 30, "-0.0", "abc",
                     "", " ", "--", "-", "=", "0x10", "½", "1_0", "\u2028", "a\nb", "auto",
                     "phased_dmd", "adm", "adp", "dmd", "paper", "all", "dmdx"]),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8))
GROUPS = st.one_of(
    st.tuples(st.sampled_from(FLAGS)),
    st.tuples(st.sampled_from(FLAGS), VALUES),
    st.tuples(st.sampled_from(FLAGS), VALUES, VALUES),
    st.tuples(st.sampled_from(FLAGS), VALUES).map(lambda two: ("=".join(two),)),
    st.tuples(VALUES),
    st.text("abc-", max_size=4).map(lambda text: ("--" + text,)))
WORDS = st.lists(GROUPS, max_size=6).map(lambda groups: [w for group in groups for w in group])
LINES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from([b"a cat", b"\n", b"\r\n", b" ", b"\xff", b"\xef\xbb\xbf", b"\0",
                              b"\x0c"]), max_size=8).map(b"".join))
QUIETLY = settings(deadline=None, database=None, derandomize=True, max_examples=600,
                   suppress_health_check=list(HealthCheck))


def test_fuzz_of_flags(monkeypatch, small):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = ["--model", small / "model", "--prompts", small / "prompts.txt"]
    codes = {}

    @QUIETLY
    @given(WORDS, st.booleans())
    def try_these(words, with_model):
        code, said = parsed(monkeypatch, *(model if with_model else []), *words)
        codes[code] = codes.get(code, 0) + 1
        assert code in (None, 1, 2), (code, said)
        assert len(said.splitlines()) == (code is not None), (code, said)
    try_these()
    assert codes[2] > 100 and codes[None] > 5, codes


def test_fuzz_of_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    codes = {}

    @QUIETLY
    @given(LINES)
    def try_this(content):
        path.write_bytes(content)
        prompts = []
        code, said = outcome(lambda: prompts.extend(read_prompts(path)))
        codes[code] = codes.get(code, 0) + 1
        assert code in (None, 1) and len(said.splitlines()) == (code is not None)
        if code:
            assert str(path) in said
        else:
            assert prompts and all(p and p == p.strip() for p in prompts)
    try_this()
    assert min(codes[1], codes[None]) > 30, codes
