"""Checkpoints: folders named STAGE-NUMBER with the trained weights, the optimizers' moments and the
facts of the run. The number is the fake score's update, if the stage has one, else the iteration.
There are no states of random number generators: see training/draws.py."""
from importlib.metadata import version
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from training.errors import Failure, first_not_finite
from training.folders import (
    read_folder, read_manifest, remove, same_facts, verify, write_folder)
from training.ranks import barrier, is_rank_0, world
from training.sharding import on_rank_0, put
from training.terminal import warn

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")
NUMBER = "[0-9]" * 8            # in a checkpoint's name: global_iter
KEPT = 2                        # of each stage


# ------------------------------------------------------------------------------------------ saving

def save_checkpoint(folder, facts, nets, optimizers):
    """Write FOLDER/STAGE-NUMBER, then delete all but the newest KEPT of the stage. All ranks
    must call it together; rank 0 writes.

    facts: of the run, with stage and global_iter.
    nets: {name: network, trained or averaged as a whole}. optimizers: [Optimizer, ...].
    """
    files = {f"{name}.safetensors": dict(net.named_parameters()) for name, net in nets.items()}
    for optimizer in optimizers:
        files[f"optimizer_{optimizer.name}.safetensors"] = moments(optimizer)
    if is_rank_0():
        write_checkpoint(Path(folder), facts, files)
    else:
        for tensors in files.values():
            on_rank_0(tensors)
    barrier()                   # or another rank could look for it before it is there


def write_checkpoint(folder, facts, files):
    """What rank 0 does of save_checkpoint. files: {name: tensors}."""
    stage = facts["stage"]
    path = folder / f"{stage}-{facts['global_iter']:08d}"
    versions = {name: version(name) for name in LIBRARIES}
    write_folder(path, files, dict(facts, versions=versions, world_size=world()[1]), on_rank_0)
    # later ones are damaged, or the run would have gone on from there: they do not count
    written = [old for old in sorted(folder.glob(f"{stage}-{NUMBER}")) if old.name <= path.name]
    for old in written[:-KEPT]:
        remove(old)


def moments(optimizer):
    """An optimizer's state as a file keeps it, {"PARAMETER.WHAT": tensor}: the parameter's number,
    then step, exp_avg_sq and, with momentum, exp_avg."""
    tensors = {}
    for number, state in optimizer.adam.state_dict()["state"].items():
        for what, tensor in state.items():
            tensors[f"{number}.{what}"] = tensor
    return tensors


# ----------------------------------------------------------------------------------------- loading

def load_checkpoint(path, facts, nets, optimizers):
    """Load a checkpoint into networks and optimizers, whole or not at all -> the checkpoint's
    facts.

    facts: of this run, which the checkpoint's must equal. nets, optimizers: as in save_checkpoint.
    Raises Failure if it is damaged, or of another run, model or shape.
    """
    found, files = read_folder(path)
    same_facts(path, found, facts)
    check_counters(path, found)
    for name, net in nets.items():
        check_tensors(path, name, dict(net.named_parameters()),
                      files.get(f"{name}.safetensors", {}))
    for optimizer in optimizers:
        name = f"optimizer_{optimizer.name}"
        check_tensors(path, name, expected_moments(optimizer),
                      files.get(f"{name}.safetensors", {}))
    for name, tensors in files.items():
        wrong = first_not_finite(tensors)
        if wrong:
            raise Failure(f"{path}: {wrong} of {name} is not finite; delete {path} and go on with "
                          f"--resume auto")
    with torch.no_grad():
        for name, net in nets.items():
            for key, p in net.named_parameters():
                put(p, files[f"{name}.safetensors"][key])
    for optimizer in optimizers:
        load_moments(optimizer, files[f"optimizer_{optimizer.name}.safetensors"])
    return found


def check_counters(path, found):
    """Raises Failure unless a checkpoint's facts count its iterations."""
    for name in ("iteration", "global_iter"):
        if type(found.get(name)) is not int or found[name] < 1:
            raise Failure(f"{path}: its {name} is {found.get(name, 'missing')}, no number of "
                          f"iterations; delete {path} and go on with --resume auto")


def check_tensors(path, name, mine, there):
    """Raises Failure unless the tensors `there`, {key: tensor}, are `mine` in name, shape and type.
    torch itself would load moments of any shape, and fresh ones for none, silently."""
    for describe in (shape_of, dtype_of):
        for key in sorted(mine.keys() | there.keys()):
            expected, found = describe(mine.get(key)), describe(there.get(key))
            if expected != found:
                raise Failure(f"{path}: {name}.{key} is {found} there and {expected} here; choose "
                              f"the run it belongs to")


def shape_of(tensor):
    return "missing" if tensor is None else list(tensor.shape)


def dtype_of(tensor):
    return "missing" if tensor is None else tensor.dtype


def expected_moments(optimizer):
    """{key: a tensor of the shape and type that a file of `moments` has there}."""
    expected = {}
    for number, p in enumerate(optimizer.params):
        expected[f"{number}.step"] = torch.empty((), dtype=torch.float32)
        expected[f"{number}.exp_avg_sq"] = p
        if optimizer.has_momentum:
            expected[f"{number}.exp_avg"] = p
    return expected


def load_moments(optimizer, tensors):
    """A file's tensors into an optimizer. See `moments`."""
    state = {}
    for key, tensor in tensors.items():
        number, what = key.split(".")
        number = int(number)
        p = optimizer.params[number]
        if what != "step" and isinstance(p, DTensor):   # moments are sharded as their parameter is
            moment = torch.zeros_like(p)
            put(moment, tensor)
            tensor = moment
        state.setdefault(number, {})[what] = tensor
    optimizer.adam.load_state_dict(dict(optimizer.adam.state_dict(), state=state))


def newest_checkpoint(folder, stage):
    """The newest whole checkpoint of a stage, or None. Damaged ones are named on stderr and passed
    over."""
    for path in sorted(Path(folder).glob(f"{stage}-{NUMBER}"), reverse=True):
        try:
            verify(path)
            return path
        except Failure as e:
            warn(f"{e}; trying the one before")
    return None


def is_after_adp(path):
    """Whether the generator of an adm checkpoint started from ADP."""
    found = read_manifest(path).get("after_adp")
    if not isinstance(found, bool):
        raise Failure(f"{path}: its after_adp is {found}; delete {path} and go on with --resume "
                      f"auto")
    return found


def checkpoint_to_resume(args, out, stages):
    """-> (path of the checkpoint that --resume goes on from, name of its stage), or (None, None).
    stages: of this run, in order; the newest whole checkpoint of the last of them counts. Raises
    Failure for a checkpoint that is named and cannot be gone on from."""
    if not args.resume:
        return None, None
    newest = None
    for stage in reversed(stages):
        newest = newest or newest_checkpoint(out.path / "checkpoints", stage)
    if stages[-1:] == ["adp"]:
        refuse_before_adm(args, out, newest)
    if args.resume == "auto":
        if newest is None:
            return None, None
        return newest, newest.name.split("-")[0]
    if not Path(args.resume, "manifest.json").exists():
        raise Failure(f"--resume {args.resume}: no checkpoint there; give auto, or a folder of "
                      f"OUT/checkpoints")
    found = verify(args.resume)
    reached = found.get("stage")
    if reached not in stages:
        raise Failure(f"--resume {args.resume}: its stage is {reached}, and this run has no such "
                      f"stage; give the flags of the run it belongs to")
    if newest and newest.resolve() != Path(args.resume).resolve():
        raise Failure(f"--resume {args.resume}: --out holds {newest}, with which it would be mixed "
                      f"up; choose another --out, or --resume auto")
    check_counters(args.resume, found)
    return Path(args.resume), reached


def refuse_before_adm(args, out, newest):
    """Raises Failure if a run of ADP alone would train on where an ADM has started from what is
    there: the next run would export that ADM's student, and say that it had the longer ADP. newest:
    path of ADP's checkpoint, or None."""
    adm = newest_checkpoint(out.path / "checkpoints", "adm")
    if adm is None or not is_after_adp(adm):
        return
    if newest is None or read_manifest(newest)["iteration"] < args.iterations_adp:
        raise Failure(f"{adm} started from an ADP that this run would change; delete it and those "
                      f"beside it named adm, or choose another --out")
