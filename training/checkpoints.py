"""Checkpoints: folders named STAGE-ITERATION with the trained weights, the optimizers' moments and
the facts of the run. There are no states of random number generators: see training/draws.py."""
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from training.errors import Failure
from training.folders import read_folder, remove, same_facts, verify, write_folder
from training.ranks import world
from training.sharding import on_rank_0, put

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def trained_state(net):
    """{name: parameter} of the parameters that are trained."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------ saving

def save_checkpoint(folder, facts, nets, optimizers, keep=2):
    """Write FOLDER/STAGE-ITERATION, then delete all but the newest `keep` of the stage. All ranks
    must call it together; rank 0 writes.

    facts: of the run, with stage and global_iter.
    nets: {name: network}. optimizers: [Optimizer, ...].
    """
    files = {f"{name}.safetensors": trained_state(net) for name, net in nets.items()}
    for optimizer in optimizers:
        files[f"optimizer_{optimizer.name}.safetensors"] = moments(optimizer)
    files = {name: on_rank_0(tensors) for name, tensors in files.items()}
    if world()[0] != 0:
        return
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    stage = facts["stage"]
    path = folder / f"{stage}-{facts['global_iter']:08d}"
    versions = {name: version(name) for name in LIBRARIES}
    write_folder(path, files, dict(facts, versions=versions, world_size=world()[1]))
    # later ones are damaged, or the run would have gone on from there: they do not count
    written = [old for old in sorted(folder.glob(f"{stage}-????????")) if old.name <= path.name]
    for old in written[:-keep]:
        remove(old)


def moments(optimizer):
    """An optimizer's state as a file keeps it, {"PARAMETER.WHAT": tensor}: the parameter's number,
    then step, exp_avg or exp_avg_sq."""
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
    for name, net in nets.items():
        check_network(path, name, net, files.get(f"{name}.safetensors", {}))
    for optimizer in optimizers:
        check_moments(path, optimizer, files.get(f"optimizer_{optimizer.name}.safetensors"))
    with torch.no_grad():
        for name, net in nets.items():
            for key, p in trained_state(net).items():
                put(p, files[f"{name}.safetensors"][key])
    for optimizer in optimizers:
        load_moments(optimizer, files[f"optimizer_{optimizer.name}.safetensors"])
    return found


def check_network(path, name, net, there):
    """Raises Failure unless a network's trained weights are `there`, {key: tensor}, in name and
    shape."""
    here = {key: list(p.shape) for key, p in trained_state(net).items()}
    there = {key: list(tensor.shape) for key, tensor in there.items()}
    for key in here.keys() | there.keys():
        if here.get(key) != there.get(key):
            raise Failure(f"{path}: {name}.{key} is {there.get(key, 'missing')} there and "
                          f"{here.get(key, 'missing')} here; choose the run it belongs to")


def check_moments(path, optimizer, there):
    """Raises Failure unless the moments `there`, a file's tensors or None, have the shapes of an
    optimizer's parameters. torch itself would load any shape, silently."""
    if there is None:
        there = {"its file": torch.empty(0)}            # fits no parameter
    expected = {str(number): list(p.shape) for number, p in enumerate(optimizer.params)}
    for key, tensor in there.items():
        number, _, what = key.partition(".")
        if what != "step" and list(tensor.shape) != expected.get(number):
            raise Failure(f"{path}: optimizer_{optimizer.name} has {key} of shape "
                          f"{list(tensor.shape)}, expected {expected.get(number)}; choose the run "
                          f"it belongs to")


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
    for path in sorted(Path(folder).glob(f"{stage}-????????"), reverse=True):
        try:
            verify(path)
            return path
        except Failure as e:
            print(f"warning: {e}; trying the one before", file=sys.stderr)
    return None


def checkpoint_to_resume(args, out, stages):
    """-> (path of the checkpoint that --resume goes on from, name of its stage), or (None, None).
    stages: of this run, in order; the newest whole checkpoint of the last of them counts. Raises
    Failure for a checkpoint that is named and cannot be gone on from."""
    if not args.resume:
        return None, None
    newest = None
    for stage in reversed(stages):
        newest = newest or newest_checkpoint(out.path / "checkpoints", stage)
    if args.resume == "auto":
        return newest, newest.name.split("-")[0] if newest else None
    reached = verify(args.resume).get("stage")
    if reached not in stages:
        raise Failure(f"--resume {args.resume}: its stage is {reached}, and this run has no such "
                      f"stage; give the flags of the run it belongs to")
    if newest and newest.resolve() != Path(args.resume).resolve():
        raise Failure(f"--resume {args.resume}: --out holds {newest}, with which it would be mixed "
                      f"up; choose another --out, or --resume auto")
    return Path(args.resume), reached
