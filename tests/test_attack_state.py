"""What a hostile or broken surrounding may not do to what a run keeps: pairs and checkpoints."""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cli import NEVER, StopAt
from training.checkpoints import checkpoint_to_resume, load_checkpoint, save_checkpoint
from training.errors import Failure
from training.folders import seal, verify, write_folder
from training.optimizer import Optimizer
from training.pairs import collect_pairs, load_pairs
from training.stage import Run, Stage, cure_of_divergence, rate_at

# ------------------------------------------------------------------------------ 7, 8, 18: ODE pairs

class Teacher(SimpleNamespace):
    """Its samples are its noise, twice."""

    def __init__(self, factor=2.0):
        super().__init__(facts=dict(teacher="x"), shape=(2,), prompts=["a", "b", "c"],
                         ranks_draw_together=False, schedule=SimpleNamespace(stops=range),
                         factor=factor, drawn=0)

    def sampler(self, stops, w, order):
        return None

    def draw(self, sampler, x_T, index, batch):
        self.drawn += len(x_T)
        return self.factor * x_T


def collect(out, pairs, teacher=None, stop=NEVER):
    args = SimpleNamespace(pairs=pairs, pair_steps=2, pair_guidance=7.0, seed=0, batch_size=8,
                           context_parallel=1)
    teacher = teacher or Teacher()
    is_done = collect_pairs(args, SimpleNamespace(path=out), teacher, stop)
    return is_done, args, teacher


def bytes_of(out):
    return [file.read_bytes() for file in sorted(out.glob("pairs/*/pairs.safetensors"))]


def test_pairs_raised_later(tmp_path):
    _, args, _ = collect(tmp_path / "a", 300)
    args.pairs = 500
    with pytest.raises(Failure, match="pairs/00001: .*44.*--stage pairs"):
        load_pairs(args, SimpleNamespace(path=tmp_path / "a"), Teacher())
    _, _, teacher = collect(tmp_path / "a", 500)
    assert 200 <= teacher.drawn < 256                   # what was there was not drawn anew
    assert len(load_pairs(args, SimpleNamespace(path=tmp_path / "a"), Teacher())[2]) == 500
    collect(tmp_path / "b", 500)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_short_shard_of_another_teacher_is_not_overwritten(tmp_path):
    collect(tmp_path, 44)
    other = Teacher()
    other.facts = dict(teacher="y")
    with pytest.raises(Failure, match="its teacher is x, this run's is y"):
        collect(tmp_path, 100, other)


def test_pairs_are_stopped_between_batches(tmp_path):
    is_done, _, teacher = collect(tmp_path / "a", 256, stop=StopAt(3))
    assert not is_done and teacher.drawn == 48
    for n in (1, 2):                                    # and get on, however often they are stopped
        assert not collect(tmp_path / "a", 256, stop=StopAt(n))[0]
    _, _, teacher = collect(tmp_path / "a", 256)
    assert teacher.drawn == 256 - 6 * 16
    collect(tmp_path / "b", 256)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_pairs_that_are_not_finite_are_not_kept(tmp_path):
    with pytest.raises(Failure, match="pairs/00000: .*not finite"):
        collect(tmp_path, 8, Teacher(factor=float("nan")))
    assert not list(tmp_path.glob("pairs/*"))


# --------------------------------------------------------------------------- 9, 16, 17: checkpoints

FACTS = dict(stage="adm", iteration=1, global_iter=1)


def trained():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    optimizer = Optimizer("net", net.parameters(), 0.1, 1.0)
    optimizer.step()
    return dict(net=net), (optimizer,)


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path, FACTS, *trained())
    return tmp_path / "adm-00000001"


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """The run's directory is gone, or cannot be written."""
    save_checkpoint(tmp_path / "gone" / "checkpoints", FACTS, *trained())
    assert verify(tmp_path / "gone" / "checkpoints" / "adm-00000001")["iteration"] == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="file/checkpoints/adm-00000001: could not write") as told:
        save_checkpoint(tmp_path / "file" / "checkpoints", FACTS, *trained())
    assert "free some space" not in str(told.value)


@pytest.mark.parametrize("changed", [
    dict(iteration=None), dict(iteration="4"), dict(iteration=-3), dict(iteration=4.5),
    dict(iteration=True), dict(iteration=[1]), dict(global_iter=None), dict(global_iter="x")])
def test_a_manifest_that_counts_wrongly(checkpoint, changed):
    facts = verify(checkpoint)
    facts.update(changed)
    facts = {name: value for name, value in facts.items() if value is not None}
    rewrite(checkpoint, facts)
    name, = changed
    with pytest.raises(Failure, match=f"its {name} is"):
        load_checkpoint(checkpoint, dict(stage="adm"), *trained())


def rewrite(checkpoint, facts):
    """A manifest with a good seal, as an attacker can make it."""
    text = json.dumps(dict(facts, seal=seal(facts)))
    (checkpoint / "manifest.json").write_text(text, encoding="utf-8")


def test_a_manifest_that_is_nested_too_deeply(checkpoint):
    (checkpoint / "manifest.json").write_text("[" * 100000 + "]" * 100000, encoding="utf-8")
    with pytest.raises(Failure, match="not whole"):
        verify(checkpoint)


def without(moments, *keys):
    return {key: tensor for key, tensor in moments.items() if key not in keys}


@pytest.mark.parametrize("change, words", [
    (lambda m: {}, "net.0.exp_avg_sq is missing there"),
    (lambda m: without(m, "1.step", "1.exp_avg", "1.exp_avg_sq"), "1.exp_avg_sq is missing"),
    (lambda m: without(m, "0.exp_avg_sq"), "net.0.exp_avg_sq is missing there"),
    (lambda m: m | {"0.a.b": torch.zeros(2, 3)}, r"net.0.a.b is \[2, 3\] there"),
    (lambda m: m | {"99999.step": torch.zeros(())}, r"net.99999.step is \[\] there"),
    (lambda m: m | {"0.step": torch.zeros(7, 3)}, r"net.0.step is \[7, 3\] there"),
    (lambda m: m | {"0.step": torch.tensor(float("nan"))}, "0.step of .* is not finite"),
    (lambda m: m | {"0.exp_avg_sq": torch.zeros(2, 3, dtype=torch.int8)}, "is torch.int8 there")])
def test_moments_that_are_not_whole(checkpoint, change, words):
    name = "optimizer_net.safetensors"
    files = {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}
    files[name] = change(files[name])
    write_folder(checkpoint, files, FACTS)
    with pytest.raises(Failure, match=words):
        load_checkpoint(checkpoint, FACTS, *trained())


@pytest.mark.parametrize("value, words", [
    (torch.zeros(2, 3, dtype=torch.int8), "net.weight is torch.int8 there and torch.float32 here"),
    (torch.full((2, 3), float("nan")), "weight of net.safetensors is not finite")])
def test_weights_of_another_kind(checkpoint, value, words):
    files = {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}
    files["net.safetensors"]["weight"] = value
    write_folder(checkpoint, files, FACTS)
    with pytest.raises(Failure, match=words):
        load_checkpoint(checkpoint, FACTS, *trained())


def run_record(out, done):
    return Run(None, SimpleNamespace(path=out), None, None, ["adp", "adm"], None, None, None,
                     done)


def test_the_cure_of_a_diverged_run(tmp_path):
    """What the last step before it left has to go; what good steps came after may stay."""
    assert "no checkpoint is there yet" in cure_of_divergence(run_record(tmp_path, dict(adm=0)))
    save_checkpoint(tmp_path / "checkpoints", dict(FACTS, stage="adp", global_iter=4), *trained())
    cure = cure_of_divergence(run_record(tmp_path, dict(adp=4, adm=0)))
    assert f"delete {tmp_path}/checkpoints/adp-00000004" in cure
    save_checkpoint(tmp_path / "checkpoints", FACTS, *trained())
    cure = cure_of_divergence(run_record(tmp_path, dict(adp=4, adm=1)))
    assert f"delete {tmp_path}/checkpoints/adm-00000001" in cure and "lower" in cure
    cure = cure_of_divergence(run_record(tmp_path, dict(adp=4, adm=7)))
    assert f"go on from {tmp_path}/checkpoints/adm-00000001" in cure and "delete" not in cure


# ---------------------------------------------------------------------------------------- --warm-up

def test_the_generator_rests_in_a_warm_up():
    """Its rate in each iteration; with --decay the line to zero starts after the warm-up."""
    stage = Stage("adm", 10, None, (), {}, {}, [], None, warm_up=4)
    constant = [rate_at(SimpleNamespace(decay=False), 2.0, i, stage) for i in range(10)]
    falling = [rate_at(SimpleNamespace(decay=True), 2.0, i, stage) for i in range(11)]
    assert constant == [0.0] * 4 + [2.0] * 6
    assert falling[:5] == [0.0] * 4 + [2.0] and falling[-1] == 0.0
    assert falling[5] == pytest.approx(2.0 * 5 / 6)


# --------------------------------------------------------------------------- an ADP made longer

def test_an_adp_that_an_adm_started_from_is_not_made_longer(tmp_path):
    """The next run would export the student of the shorter one, and say it had the longer."""
    for name, facts in (("adp-00000004", dict(stage="adp", iteration=4, global_iter=4)),
                        ("adm-00000002", dict(stage="adm", iteration=2, after_adp=True))):
        write_folder(tmp_path / "checkpoints" / name, {}, facts)
    out = SimpleNamespace(path=tmp_path)

    def resumed(iterations):
        args = SimpleNamespace(resume="auto", iterations_adp=iterations)
        return checkpoint_to_resume(args, out, ["adp"])

    with pytest.raises(Failure, match="adm-00000002 started from an ADP"):
        resumed(8)
    assert resumed(4) == (tmp_path / "checkpoints" / "adp-00000004", "adp")
