"""What a hostile or broken surrounding may not do: every finding of the attack on an earlier state,
done to the parts that were at fault. Pairs and checkpoints are in test_attack_state.py, models and
model cards in test_attack_models.py, whole runs in test_attack_runs.py.
"""
import argparse
import ast
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cli import ROOT, Run
from families.family import of_medium
from limits import within
from teachers import embedded
from training import errors, ranks
from training.errors import Failure, read_prompts, run_main
from training.flags import parse
from training.folders import remove, verify, write_folder
from training.output import MARK, Output
from training.pictures import logged
from training.ranks import StopSignal
from training.scripts import a_count, a_factor, folder_for, parser_for, zero_or_more


def line_of(error, capsys):
    """The one line that run_main makes of an error."""
    def fail():
        raise error
    with pytest.raises(SystemExit):
        run_main(fail)
    line, = (line for line in capsys.readouterr().err.splitlines() if line)
    return line


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ----------------------------------------------------------------------- 3, 24, 27, 28: directories

def clean(out):
    """As train_sdxl.main does, once --resume is found good."""
    output = Output(out, "auto")
    output.clean()
    output.lock.close()


def test_a_folder_of_the_users_is_left_as_it_is(tmp_path):
    for name in ("notes.tmp", "work/thesis.tmp", "work/deep/y.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("mine")
    before = names_in(tmp_path)
    clean(tmp_path)
    clean(tmp_path)                                     # by now it is a run's
    assert [name for name in names_in(tmp_path) if name != ".lock"] == before


OURS = ("checkpoints/adm-00000004.tmp", "checkpoints/phase2-00000004.old.tmp", "pairs/00001.tmp",
        "prompts/00000.tmp", "prompts/empty.tmp", "prompts/look-at-0123456789abcdef-00000.tmp",
        "samples.tmp", "export.tmp", "export.old.tmp")
THEIRS = ("checkpoints/backup.tmp", "checkpoints/adm-00000004.tmp.tmp", "pairs/mine.tmp",
          "export/x.tmp", "old/checkpoints/adm-00000004.tmp", "result.tmp")


def test_what_a_killed_run_left_is_deleted_and_nothing_else(tmp_path):
    write_folder(tmp_path / "prompts" / "00000", {}, {})
    for name in (*OURS, *THEIRS):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "result.json.tmp").write_text("{")
    (tmp_path / "pairs" / "00002.tmp").symlink_to(tmp_path / "old")
    clean(tmp_path)
    for name in (*OURS, "result.json.tmp"):
        assert not (tmp_path / name).exists(), name
    for name in THEIRS:
        assert (tmp_path / name / "file").exists(), name
    assert (tmp_path / "pairs" / "00002.tmp").is_symlink()


def test_a_replacement_killed_between_its_renames_is_finished(tmp_path, monkeypatch):
    shard = tmp_path / "pairs" / "00000"
    write_folder(shard, {}, dict(count=1))
    rename = os.rename

    def killed(a, b):
        if Path(b) == shard:
            raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        write_folder(shard, {}, dict(count=2))
    assert not shard.exists()
    (tmp_path / ".lock").write_text(MARK)
    clean(tmp_path)
    assert verify(shard)["count"] == 2 and not list(tmp_path.glob("**/*.tmp"))


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    theirs = tmp_path / "elsewhere"
    write_folder(theirs, {}, dict(count=1))
    for name in ("00000", "00001"):
        (tmp_path / name).symlink_to(theirs)
    write_folder(tmp_path / "00000", {}, dict(count=2))
    remove(tmp_path / "00001")
    assert verify(theirs)["count"] == 1 and verify(tmp_path / "00000")["count"] == 2
    assert sorted(os.listdir(tmp_path)) == ["00000", "elsewhere"]


@pytest.mark.parametrize("name", ["samples", "export", "checkpoints", "metrics.jsonl"])
def test_what_a_run_would_replace_is_refused_in_a_folder_of_the_users(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(Failure, match=f"never a run and holds {name}"):
        Output(tmp_path, "auto")
    assert names_in(tmp_path) == [name]


def test_a_refused_directory_gets_no_lock(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Failure, match="holds no run"):
        Output(tmp_path, None)
    assert names_in(tmp_path) == ["notes.txt"]


def test_a_lock_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with within(5), pytest.raises(Failure, match="not a file"):
        Output(tmp_path, None)


@pytest.mark.parametrize("flags, words", [
    (["--height", "64"], "--height 64: an embedded teacher has one size"),
    (["--model", ""], "--model: empty")])
def test_flags_beside_an_embedded_teacher(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *flags])
    with pytest.raises(SystemExit):
        parse("", of_medium("image"), embedded.of_medium("image"))
    assert words in capsys.readouterr().err


def test_a_damaged_line_of_the_log_is_passed_over(tmp_path):
    good = dict(stage="adp", iteration=10.0, generator=1.0)
    damaged = b"\xff\xfe\n[1]\n{\"stage\": \"adp\"}\n{\"sta"
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + damaged)
    assert logged(tmp_path) == [good]


def test_results_are_not_written_over_those_of_a_training_run(tmp_path):
    write_folder(tmp_path / "prompts" / "00000", {}, {})
    with pytest.raises(Failure, match="--out .* holds a training run"):
        folder_for(tmp_path)
    assert folder_for(tmp_path / "new").is_dir()


@pytest.mark.parametrize("kind, text", [
    (a_count, "0"), (a_count, "2.5"), (a_count, str(2**63)), (zero_or_more, "-1"),
    (a_factor, "nan"), (a_factor, "0"), (a_factor, "x")])
def test_numbers_of_the_small_scripts(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        kind(text)
    assert a_count("3") == 3 and zero_or_more("0") == 0 and a_factor("0.5") == 0.5


def test_a_wrong_flag_of_a_small_script_is_one_line(monkeypatch, capsys):
    p = parser_for("What it does.")
    p.add_argument("--seed", type=zero_or_more)
    monkeypatch.setattr(sys, "argv", ["lesson/adm.py", "--seed", "-1"])
    with pytest.raises(SystemExit) as ended:
        p.parse_args()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("adm.py: error: argument --seed: -1") and said.count("\n") == 1, said


def parsed(monkeypatch, small, *flags):
    words = ["--model", small / "model", "--prompts", small / "prompts.txt", *flags]
    monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *map(str, words)])
    return parse("", of_medium("image"), ())[0]


@pytest.mark.parametrize("flags, words", [
    (["--out", ""], ["--out: empty"]),
    (["--out", "x\udcff"], ["not UTF-8"]),
    (["--batch-size", "1000000000"], ["--batch-size 1000000000", "at most"]),
    (["--pairs", "1" + 12 * "0"], ["--pairs 1000000000000", "at most"]),
    (["--head-channels", "1"], ["--head-channels 1", "above 1"]),
    (["--look-at", " "], ["--look-at: empty"]),
    (["--resume", ""], ["--resume: empty"]),
    (["--compile", "foo"], ["--compile foo: not a backend"]),
    (["--warm-heads", "--steps", "4"], ["--warm-heads: ADP", "leave the flag out"])])
def test_flags_that_were_let_through(small, monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, small, *flags)
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    said.encode()                                       # the terminal got no half of a character


# ------------------------------------------------------------- 11, 12, 13, 19, 28: errors, one line

@pytest.mark.parametrize("error, words", [
    (OSError(errno.EDQUOT, "", "out/x"), ["out/x", "quota", "free some space"]),
    (OSError(errno.EROFS, "", "out/x"), ["out/x", "Read-only", "make it writable"]),
    (FileNotFoundError(errno.ENOENT, "", "out/gone"), ["out/gone", "No such file"]),
    (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), ["free some space"]),
    (MemoryError(), ["--batch-size", "--grad-checkpointing", "--cpu-offload"]),
    (torch.OutOfMemoryError("CUDA out of memory."), ["out of memory", "--cpu-offload"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
     ["out of memory", "--batch-size"]),
    (Failure("prompt \x1b]0;title\x07 \x9b31m \u202e\nline two"), ["prompt ?]0;title? ?31m ?"])])
def test_errors_that_are_one_line(capsys, error, words):
    line = line_of(error, capsys)
    assert all(word in line for word in words), line


def test_a_mistake_of_ours_keeps_its_traceback():
    def fail():
        raise KeyError("x")
    with pytest.raises(KeyError):
        run_main(fail)


def test_a_lost_rank_is_one_line(capsys, monkeypatch):
    """And it does not wait for the others: NCCL's destroy_process_group would."""
    monkeypatch.setattr(errors.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(errors.dist, "destroy_process_group", lambda: pytest.fail("waits"))
    monkeypatch.setattr(errors.os, "_exit", sys.exit)
    monkeypatch.setattr(errors, "first_to_fail", lambda: True)
    line = line_of(RuntimeError("[gloo/pair.cc:554] Connection closed by peer [127.0.0.1]"), capsys)
    assert "another rank has ended" in line and "--resume auto" in line


def test_free_some_space_is_said_once(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("training.folders._write_files", full)
    with pytest.raises(Failure) as told:
        write_folder(tmp_path / "x", {}, {})
    assert line_of(told.value, capsys).count("free some space") == 1


# --------------------------------------------------------------- 4, 5, 6, 27: signals and terminals

def test_a_closed_terminal_asks_to_stop():
    """However often it says so, and also if torchrun adds a SIGTERM. Nothing can be written there.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    kept = os.dup(2)
    try:
        with open("/dev/full", "wb", buffering=0) as full:
            os.dup2(full.fileno(), 2)
        stop = StopSignal()
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, None)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.asked_of_any_rank()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN            # under nohup
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        for number, handler in before.items():
            signal.signal(number, handler)


# a run whose standard error is closed, and whose standard output is a pipe that nobody reads
DEAF = """
import os, sys
from tqdm import tqdm
read, write = os.pipe()
os.dup2(write, 1)
os.close(write)
os.close(read)
os.close(2)
sys.stderr = None
from training.errors import run_main
def main():
    for _ in tqdm(range(3), desc="x"):
        print("y" * 100000, flush=True)
    with open(sys.argv[1], "w") as file:
        file.write(str(file.fileno()))
run_main(main)
"""


def test_nobody_reads_what_a_run_says(tmp_path):
    done = Run("-c", DEAF, tmp_path / "done").wait()
    assert done.returncode == 0
    # no file of the run took the place of standard error, where messages would go into it
    assert int((tmp_path / "done").read_text()) > 2


def test_ctrl_c_while_the_libraries_are_imported():
    code = ("import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "import training.interrupt; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.split("\n") == ["", "stopped before it began", ""]
    for script in ("train_sdxl.py", "train_cogvideox.py"):
        body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
        assert body[1].names[0].name == "training.interrupt"        # below the docstring


# ---------------------------------------------------------------------------------- 22, 23: prompts

def test_prompts_end_at_line_feeds_only(tmp_path):
    odd = ["a\u2028b", "c\x0bd", "e\x0cf", "g\x85h", "i\x1cj", "k\rl"]
    path = tmp_path / "prompts.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes((end.join(odd) + end).encode())
        assert read_prompts(path) == odd


def test_every_text_file_is_utf_8():
    """Under an ASCII locale an emoji in a prompt would end a run in its export."""
    wrong = []
    files = [*ROOT.glob("*.py"), *ROOT.glob("training/*.py"), *ROOT.glob("families/*.py"),
             *ROOT.glob("tools/*.py"), *ROOT.glob("teachers/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and is_text(node):
                if "encoding" not in {keyword.arg for keyword in node.keywords}:
                    wrong.append(f"{file.name}:{node.lineno}")
    assert not wrong and len(files) > 30


def is_text(call):
    """Whether a call opens, reads or writes text."""
    name = ast.unparse(call.func)
    if name.endswith((".read_text", ".write_text")):
        return True
    mode = ast.unparse(call.args[1]) if len(call.args) > 1 else ""
    return name == "open" and "b" not in mode


# ---------------------------------------------------------------------------------------- 26: ranks

@pytest.mark.parametrize("value", ["x", "0", "-1", "", "2.5"])
def test_a_number_of_ranks_that_torchrun_would_not_give(small, monkeypatch, capsys, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(SystemExit):
        parsed(monkeypatch, small)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "torchrun" in said


def test_a_rank_alone_says_what_is_wrong(small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, small, "--steps", "0")
    assert "--steps 0" in capsys.readouterr().err


def test_ranks_that_cannot_meet(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Failure, match="cannot meet .*torchrun"):
        ranks.start()


WAITING = """
import os, training.ranks
training.ranks.PATIENCE = 0.1
os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
training.ranks.start()
"""


def test_a_rank_that_waits_says_so(tmp_path):
    run = Run("-c", WAITING)
    said = tmp_path / run.files(0)[1]
    with within(20):
        while "waiting for 2 ranks" not in said.read_text() and run.alive():
            pass
    run.send(signal.SIGKILL)
    assert "torchrun" in run.wait().stderr


# ----------------------------------------------------------------------- --warm-up and --warm-heads

@pytest.mark.parametrize("flags, words", [
    (["--warm-heads", "--method", "dmd"], "--warm-heads"),
    (["--warm-heads", "--method", "phased_dmd"], "--warm-heads"),
    (["--warm-up", "5", "--method", "adp"], "--warm-up 5"),
    (["--warm-up", "-1"], "--warm-up -1: must be 0 or above"),
    (["--warm-up", "9", "--iterations", "9"], "--warm-up 9: must be below --iterations-adm 9")])
def test_warm_starts_of_other_methods(small, monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, small, *flags)
    assert words in capsys.readouterr().err


def test_warm_starts_are_off(small, monkeypatch):
    args = parsed(monkeypatch, small)
    assert not args.warm_heads and args.warm_up == 0
