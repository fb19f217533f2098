"""What every training script needs around the algorithm, so that no method file needs it: one-line errors, the output
directory, processes, optimizers, checkpoints, logs and pictures."""
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import warnings
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from importlib.metadata import version
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------------------- errors


class Failure(Exception):
    """Something a user can mend, said in one line that names the file, flag or value and the cure."""


class NotFinite(Failure):
    """The same, of a gradient; raised on every rank, in one iteration."""


def usage(problems):
    """Bad usage: everything that is wrong, on one line, exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: " + " ".join("; ".join(problems).splitlines()), file=sys.stderr)
    raise SystemExit(2)


AT_ONCE = "stopped at once; checkpoints already written are whole"


def first_to_fail():
    """Of several ranks only this one speaks; the others' collectives fail because it left, or they stopped for the same reason."""
    try:
        return not dist.is_initialized() or dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:                                        # the store was rank 0's, which left with a message
        return False


def run(main):
    """Call main; a Failure or a full disk ends in one line, of one rank, and exit code 1 instead of a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        line, first = AT_ONCE, first_to_fail()
    except Exception as e:
        line, first = " ".join(str(e).splitlines()), first_to_fail()
        if "No space left" in line:                             # safetensors says it in an error of its own
            line += "; free some space, then --resume auto"
        elif first and not isinstance(e, Failure):
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    raise SystemExit(f"\n{Path(sys.argv[0]).name}: {line}" if first else 1)       # below a progress bar


def none_missing(names):
    """names: of weights that a file had no value for, which libraries draw at random. Raises ValueError if there are any."""
    if names := sorted(names):
        raise ValueError(f"no value there for {names[0]}")


def read_prompts(path):
    """One prompt a line -> list of strings. Raises Failure, with the line, for what is not such a file."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except OSError as e:
        raise Failure(f"--prompts {path}: {e.strerror}; give a text file with one prompt a line")
    except UnicodeDecodeError as e:
        raise Failure(f"--prompts {path}: line {e.object[:e.start].count(10) + 1} is not UTF-8; save the file as UTF-8")
    blank = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise Failure(f"--prompts {path}: line {blank[0]} is blank; take blank lines out ({len(blank)} in all)")
    if not lines:
        raise Failure(f"--prompts {path}: the file is empty; write one prompt a line")
    return [line.strip() for line in lines]


# ------------------------------------------------------------------------------------------------------------ processes

def world():
    """(rank, world size); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def quiet():
    """Libraries raise their errors from here on, and say nothing besides."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers
    for library in (of_diffusers, of_transformers):
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()


def start(alone=False):
    """Join torchrun's process group if there is one -> this process's device. alone: make a group of one if there is none, for sharding."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"          # gloo as well: offloaded tensors, and flags, are on the host
    if dist.is_initialized():
        pass
    elif "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
        barrier()                                               # a rank that fails at once would break this step of those still in it
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def any_rank(flag):
    """Is it so on any of the ranks?"""
    if dist.is_initialized():
        flag = torch.tensor(float(flag))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gather(values):
    """The ranks' lists as one, on every rank."""
    lists = [values] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(lists, values)
    return sum(lists, [])


def goodbye(out):
    print(f"stopped; everything is in {out.path}; go on with --resume auto")


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop after the iteration; a second one ends at once."""

    def __init__(self):
        self.asked = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number, frame):
        if self.asked:                                          # not by an exception, which a library in mid-call may turn into one of its own
            if world()[0] == 0:                                 # torchrun signals all ranks
                os.write(2, f"\n{Path(sys.argv[0]).name}: {AT_ONCE}\n".encode())
            os._exit(1)
        self.asked = True
        os.write(2, b"\nstopping after this iteration; once more to stop at once\n")   # print would fail inside another print

    def __bool__(self):
        self.asked = any_rank(self.asked)
        return self.asked


def tensors_to(device, values):
    """Tensors, and tuples of them, moved; what is neither is left."""
    return {k: v.to(device) if torch.is_tensor(v) else tuple(u.to(device) for u in v) if isinstance(v, tuple) else v for k, v in values.items()}


def autocast(net, device, enabled, method="forward"):
    """bf16 arithmetic inside a method of net; weights keep their type. Bound to net, so that a deepcopy runs itself, not net."""
    if enabled:
        setattr(net, method, MethodType(torch.autocast(device.type, torch.bfloat16)(getattr(type(net), method)), net))
    return net


def compiled(net, backend):
    """Compile each block by itself, bound as autocast binds: hooks stay outside, blocks alike share their code, a deepcopy runs itself."""
    torch._dynamo.config.recompile_limit = 64                   # a block runs with and without gradients, adapters and guidance's double batch
    code = {}
    for block in (block for unit in getattr(net, "units", [net]) for block in blocks(unit)):
        kind = type(block)
        block.forward = MethodType(code.setdefault(kind, torch.compile(kind.forward, backend=backend)), block)


class Adam:
    """The paper's optimizer as the loops use it, step and zero_grad: AdamW without weight decay, betas (0.0, 0.99) (B.5).
    A step averages the gradients over the ranks (sharded ones were averaged in the backward pass), clips their norm, and refuses what
    is not finite, on every rank alike."""

    def __init__(self, name, params, lr, clip, betas=(0.0, 0.99)):
        self.name, self.params, self.clip, self.rate = name, [p for p in params if p.requires_grad], clip, lr
        self.adam = torch.optim.AdamW(self.params, lr, betas=betas, weight_decay=0.0, fused=True)

    def step(self):
        for p in self.params:
            if p.grad is None:                                  # of a network that no sample went to (train_wan.py)
                p.grad = torch.zeros_like(p)
            if dist.is_initialized() and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params, self.clip or math.inf))
        if not torch.isfinite(norm):
            raise NotFinite(f"the gradient of the {self.name} is not finite: nothing was stepped or saved; "
                            f"resume from the last checkpoint with a lower learning rate")
        self.adam.param_groups[0]["lr"] = self.rate
        self.adam.step()

    def zero_grad(self):
        self.adam.zero_grad(set_to_none=True)


def checkpointing(net):
    """Recompute activations in the backward pass, under the adapter the forward pass ran with."""
    for unit in getattr(net, "units", [net]):
        def recompute(module, *args, unit=unit):
            name = unit.__dict__.get("adapter")

            def again(*args):
                with active(unit, name):
                    return module(*args)
            return checkpoint(again, *args, use_reentrant=False)
        unit.enable_gradient_checkpointing(recompute)


def switch(base, name):
    """One adapter of `base` works from here on, or none (None). Not peft's set_adapter: that also turns requires_grad of all
    others off, and a backward pass then skips them, silently."""
    base.__dict__["adapter"] = name
    for layer in base.__dict__.get("adapted", ()):
        layer._disable_adapters, layer._active_adapter = name is None, [name]


@contextmanager
def active(base, name):
    """The same, inside only."""
    before = base.__dict__.get("adapter")
    switch(base, name)
    try:
        yield
    finally:
        switch(base, before)


class Lora(nn.Module):
    """A LoRA on a base that others share: called as the base is, its parameters are the adapter's alone. Called directly, the
    base is what it was, so generator, fake score, real score and backbone are one copy of the frozen weights.

    targets: names of the layers to adapt. The update is scaled by alpha/rank.
    """

    def __init__(self, base, name, rank, alpha, targets):
        super().__init__()
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")   # yes, several adapters
        trained = [p for p in base.parameters() if p.requires_grad]               # other adapters, which add_adapter would freeze
        base.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets), name)
        base.__dict__["adapted"] = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
        self.__dict__.update(base=base, name=name, how=(rank, alpha, targets), config=base.config)   # past nn.Module: the base is not a part of this
        for p in self.parameters():                             # also on a bf16 base, and where the base itself rests on the host
            p.data = p.data.to(device_of(base, p), torch.promote_types(p.dtype, torch.float32))
        for p in (*trained, *self.parameters()):
            p.requires_grad_(True)
        switch(base, None)

    def named_parameters(self, *args, **kwargs):
        return ((k.replace(f".{self.name}.", "."), p) for k, p in self.base.named_parameters() if ".lora_" in k and f".{self.name}." in k)

    def forward(self, *args, **kwargs):
        with active(self.base, self.name):
            return self.base(*args, **kwargs)

    def twin(self, name):
        """Another adapter of the same base with the same weights."""
        other = Lora(self.base, name, *self.how)
        with torch.no_grad():
            torch._foreach_copy_(list(other.parameters()), list(self.parameters()))
        return other

    def save(self, pipe, folder, prefix):
        """A file for pipe.load_lora_weights. The strength is folded into B, as a reader without metadata assumes alpha = rank; the
        names stay peft's, as diffusers' own (lora.down, lora.up) are passed over, silently, in a file that also has lora_A."""
        rank, alpha, _ = self.how
        state = {k: p.detach() * (alpha / rank if "lora_B" in k else 1) for k, p in self.named_parameters()}
        pipe.save_lora_weights(folder, **{f"{prefix}_lora_layers": state})


def full_copy(net):
    """A network's own weights, without the adapters it may carry. Of a sharded network, a sharded copy to train."""
    if "sharded" in net.__dict__:
        return copy_of_shards(net)
    if any("sharded" in part.__dict__ for part in net.children()):                # two networks as one (train_wan.py)
        twin = copy(net)
        twin._modules = {name: full_copy(part) for name, part in net.named_children()}
        return twin
    twin = deepcopy(net)
    if net.__dict__.get("adapted"):
        twin.unload_lora()
        twin.__dict__.pop("adapted")
    return twin


def next_experts(lengths):
    """Experts of so many steps each -> after each step, which of them (from 0) does the next; after the last, the first again."""
    return [k for k, n in enumerate(lengths) for _ in range(n)][1:] + [0]


class Average:
    """Exponential moving average of a generator's trained weights, as a network to sample from (decay 0: the generator itself).
    prepare: what a copy of a network needs before it runs."""

    def __init__(self, net, decay, prepare=lambda net: net):
        twin = (lambda: net.twin(f"{net.name}_average")) if isinstance(net, Lora) else lambda: prepare(full_copy(net))
        self.source, self.decay, self.net = net, decay, twin() if decay else net

    def both(self):
        """What a checkpoint holds of the generator."""
        return dict(generator=self.source, average=self.net) if self.decay else dict(generator=self.source)

    def pairs(self):
        return zip(*((a, b) for a, b in zip(self.net.parameters(), self.source.parameters()) if b.requires_grad))

    @torch.no_grad()
    def update(self):
        if self.decay:
            mine, theirs = self.pairs()
            torch._foreach_lerp_(mine, theirs, 1 - self.decay)

    @torch.no_grad()
    def restart(self):
        """The generator goes on from its average."""
        for mine, theirs in zip(*self.pairs()):
            theirs.copy_(mine)


# ------------------------------------------------------------------------------------------------------------- sharding
#
# --fsdp, --cpu-offload: FSDP2. Every rank keeps a part of each weight, gradient and moment, and gathers a block's weights while it runs. Blocks are
# what diffusers says must not be split. What lies outside of blocks (embeddings, a few per cent) is sharded where it is trained and whole
# where it is frozen: the discriminator leaves the network by its taps, so a group that ends with the network's own output would never be
# gathered for its backward pass. Adapters are small: whole on every rank, averaged by Adam.

def sharding(fsdp, offload, bf16, device):
    """-> fully_shard's arguments, or None: each rank keeps whole copies. One node: shards over all ranks. Several: shards inside a node, equal
    copies across nodes (HSDP). Gathered weights are bf16 with --bf16, what they are kept, averaged and stepped in is float32."""
    if not (fsdp or offload):
        return None
    ranks, node = world()[1], int(os.environ.get("LOCAL_WORLD_SIZE", world()[1]))
    shape, names = ((ranks // node, node), ("replicate", "shard")) if ranks > node else ((ranks,), None)   # peft takes a named dimension for tensor parallelism
    how = dict(mesh=dist.init_device_mesh(device.type, shape, mesh_dim_names=names), reshard_after_forward=True)
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    if bf16:                                                    # inputs stay as they are: timesteps above 256 are not all bf16 numbers
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return how


def blocks(net):
    """The innermost of the modules that diffusers says must stay in one piece."""
    found = [m for m in net.modules() if type(m).__name__.removeprefix("FSDP") in (getattr(net, "_no_split_modules", None) or ())]
    return [m for m in found if not any(other is not m and other in found for other in m.modules())]


def shard(net, how, device):
    """Shard a network in place. Frozen ones keep a skeleton without weights, to make copies from: a sharded module cannot be copied itself."""
    trained = any(p.requires_grad for p in net.parameters())
    hollow = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in net.parameters()}
    skeleton, parts = deepcopy(net, hollow), blocks(net)
    inside = {p for block in parts for p in block.parameters()}
    outside = set() if trained else set(net.parameters()) - inside
    for block in parts:
        fully_shard(block, **how)
    fully_shard(net, **how, ignored_params=outside)
    for t in (*outside, *net.buffers()):
        if not t.is_meta:
            t.data = t.data.to(device)
    net.__dict__["sharded"] = (skeleton, how, device)
    return net


def device_of(net, p):
    """Where a network runs, which need not be where it, or its parameter p, rests."""
    return net.__dict__["sharded"][2] if "sharded" in net.__dict__ else p.device


def materialise(net):
    """Memory, without values, for the weights of a sharded network that has none."""
    _, how, device = net.__dict__["sharded"]
    host = "offload_policy" in how
    return net._apply(lambda t: torch.empty_like(t, device="cpu" if host and isinstance(t, DTensor) else device) if t.is_meta else t)


def receive(net, weights):
    """Rank 0's whole weights {name: tensor} into a sharded network, of which the other ranks may not have had any."""
    materialise(net)
    set_model_state_dict(net, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


@torch.no_grad()
def copy_of_shards(net):
    skeleton, how, device = net.__dict__["sharded"]
    twin = materialise(shard(deepcopy(skeleton).float().requires_grad_(True), how, device))
    mine = {k.replace(".base_layer", ""): p for k, p in net.named_parameters() if ".lora_" not in k}
    for name, p in twin.named_parameters():
        put(p, mine[name])
    return twin


def whole(tensor):
    """All of a tensor of which every rank may hold a part. Ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_rank_0(tensors):
    """{name: tensor}, sharded or not -> all of them, whole, on rank 0's host; nothing on the others, which must call it as well."""
    host = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())                         # one at a time: together they may not fit on the device
        if world()[0] == 0:
            host[name] = tensor.cpu()
    return host


def put(p, value):
    """A value, whole or sharded alike, into a parameter that may be sharded."""
    if isinstance(p, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)   # each rank cuts out its own part
    p.copy_(value)


# ---------------------------------------------------------------------------------------------------- output and lock

class Output:
    """A run's directory, locked while the run lives. Refuses, before anything is loaded, a directory that cannot be written,
    is in use, or holds what this run should not overwrite."""

    def __init__(self, path, resume):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a")
        except OSError as e:
            raise Failure(f"--out {path}: {e.strerror}; choose a directory that can be written")
        if world()[0] == 0:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Failure(f"--out {path}: another run is writing there; wait for it or choose another directory")
            if (self.path / "result.json").exists():
                raise Failure(f"--out {path} holds a finished run; choose another directory or remove this one")
            held = [p.name for p in self.path.iterdir() if p.name != ".lock"]
            if held and not resume:
                raise Failure(f"--out {path} is not empty ({sorted(held)[0]}, ...); go on with --resume auto or choose another directory")
            for leftover in self.path.glob("**/*.tmp"):         # of a run killed in mid-save
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        barrier()                                               # what is refused is refused before any rank goes on

    def log(self, **row):
        """One line of metrics.jsonl. A full disk costs the line, not the run."""
        try:
            with open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            print(f"warning: {self.path}/metrics.jsonl: {e.strerror}; training goes on", file=sys.stderr)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def seal(facts):
    """The hash a manifest carries of itself."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remove(path):
    """A folder, of which no half may stay under its name."""
    if Path(path).exists():
        os.rename(path, f"{path}.old.tmp")
        shutil.rmtree(f"{path}.old.tmp")


def write_folder(path, files, facts):
    """All or nothing: tensors {file: {name: tensor}} and a manifest of sizes and hashes appear under `path` together, in place of what was there.

    Written to PATH.tmp, synced to the disk, manifest last, then renamed. Raises Failure naming path and bytes when the disk is full.
    """
    path, tmp = Path(path), Path(f"{path}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        for name, tensors in files.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, tmp / name)
            sync(tmp / name)
        facts = dict(facts, files={name: dict(bytes=(tmp / name).stat().st_size, sha256=sha256(tmp / name)) for name in files})
        (tmp / "manifest.json").write_text(json.dumps(dict(facts, seal=seal(facts)), indent=1))
        sync(tmp / "manifest.json"), sync(tmp)
        remove(path)
        os.rename(tmp, path)
        sync(path.parent)
    except Exception as e:                                      # safetensors reports a full disk as an error of its own
        shutil.rmtree(tmp, ignore_errors=True)
        size = sum(v.numel() * v.element_size() for t in files.values() for v in t.values())
        raise Failure(f"{path}: could not write {size:,} bytes ({e}); free some space, then --resume auto") from e


def verify(path):
    """The facts of a folder write_folder wrote, once every file in it is found whole. Raises Failure naming the one that is not."""
    path = Path(path)
    try:
        facts = json.loads((path / "manifest.json").read_text())
        if facts.pop("seal") != seal(facts):
            raise ValueError
        expected = facts["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Failure(f"{path}: no whole checkpoint there (manifest.json is missing or damaged)")
    for name, stamp in expected:
        file = path / Path(name).name                           # a name with ../ in it stays inside
        try:
            intact = file.stat().st_size == stamp["bytes"] and sha256(file) == stamp["sha256"] and safe_open(file, "pt")   # a pickle has a hash, too
        except (OSError, SafetensorError, TypeError, KeyError):
            intact = False
        if not intact:
            raise Failure(f"{file}: missing, truncated or altered; delete {path} and go on with --resume auto")
    return facts


def same_facts(path, found, facts):
    """Raises Failure if a folder was written by a run that differs from this one in any of `facts`."""
    for key in facts:
        if found.get(key) != facts[key]:
            raise Failure(f"{path}: its {key} is {found.get(key)}, this run's is {facts[key]}; choose the run it belongs to, or remove it")


def open_tensors(path, facts, name):
    """A whole file of a folder that was made with these facts, open for reading: its tensors stay on the disk until asked for."""
    same_facts(path, verify(path), facts)
    return safe_open(path / name, "pt")


def read_folder(path):
    """-> (facts, {file: {name: tensor}})."""
    facts = verify(path)
    return facts, {name: load_file(Path(path) / Path(name).name) for name in facts["files"]}


# ---------------------------------------------------------------------------------------------------------- checkpoints

def trained_state(net):
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


def save_checkpoint(folder, facts, nets, optimizers, keep=2):
    """Rank 0 writes FOLDER/STAGE-ITERATION: the trained weights of `nets`, the optimizers' moments, all whole; then prunes all but `keep`."""
    files = {f"{name}.safetensors": trained_state(net) for name, net in nets.items()}
    for opt in optimizers:
        state = opt.adam.state_dict()["state"]
        files[f"optimizer_{opt.name}.safetensors"] = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items()}
    files = {name: on_rank_0(tensors) for name, tensors in files.items()}
    if world()[0]:
        return
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    path = folder / f"{facts['stage']}-{facts['global_iter']:08d}"
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "safetensors")}
    write_folder(path, files, dict(facts, versions=versions, world_size=world()[1]))
    for old in [p for p in sorted(folder.glob(f"{facts['stage']}-????????")) if p.name <= path.name][:-keep]:   # later ones are damaged ones
        remove(old)


def load_checkpoint(path, facts, nets, optimizers):
    """Into place, whole or not at all -> the checkpoint's facts. Raises Failure if it is damaged or of another model or shape."""
    found, files = read_folder(path)
    same_facts(path, found, facts)
    for name, net in nets.items():
        mine, theirs = trained_state(net), files.get(f"{name}.safetensors", {})
        for k in mine.keys() | theirs.keys():
            if k not in mine or k not in theirs or mine[k].shape != theirs[k].shape:
                raise Failure(f"{path}: {name}.{k} is {list(theirs[k].shape) if k in theirs else 'missing'} there and "
                              f"{list(mine[k].shape) if k in mine else 'missing'} here; choose the run it belongs to")
    for opt in optimizers:
        expected = {str(i): list(p.shape) for i, p in enumerate(opt.params)}
        for k, v in files.get(f"optimizer_{opt.name}.safetensors", {"its file": torch.empty(0)}).items():
            i, _, what = k.partition(".")
            if what != "step" and list(v.shape) != expected.get(i):
                raise Failure(f"{path}: optimizer_{opt.name} has {k} of shape {list(v.shape)}, expected {expected.get(i)}; choose the run it belongs to")
    with torch.no_grad():
        for name, net in nets.items():
            for k, p in trained_state(net).items():
                put(p, files[f"{name}.safetensors"][k])
    for opt in optimizers:
        state = {}
        for k, v in files[f"optimizer_{opt.name}.safetensors"].items():
            i, what = k.split(".")
            p = opt.params[int(i)]
            if what != "step" and isinstance(p, DTensor):
                put(moment := torch.zeros_like(p), v)
                v = moment
            state.setdefault(int(i), {})[what] = v
        opt.adam.load_state_dict(dict(opt.adam.state_dict(), state=state))
    return found


def newest_checkpoint(folder, stage):
    """The newest whole checkpoint of a stage, or None. Damaged ones are named and passed over."""
    for path in sorted(Path(folder).glob(f"{stage}-????????"), reverse=True):
        try:
            verify(path)
            return path
        except Failure as e:
            print(f"warning: {e}; trying the one before", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------- pictures

def save_picture(path, figure):
    """A picture that cannot be written costs a warning, not the run."""
    import matplotlib.pyplot as plt
    try:
        figure.savefig(path, dpi=100)
    except OSError as e:
        print(f"warning: {path}: {e.strerror}; training goes on", file=sys.stderr)
    plt.close(figure)


def pyplot():
    """matplotlib's, without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def grid(path, rows, captions):
    """rows: {label: images [n,3,H,W] in [-1,1]}, one row each, captions [n] above."""
    plt, n = pyplot(), len(captions)
    figure, axes = plt.subplots(len(rows), n, figsize=(1.5 * n + 0.3, 1.6 * len(rows) + 0.2), squeeze=False, layout="constrained")
    for top, ((label, images), line) in enumerate(zip(rows.items(), axes)):
        for image, caption, ax in zip(images, captions, line):
            ax.imshow(((image.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu())
            ax.set(xticks=[], yticks=[])
            if top == 0:
                ax.set_title("\n".join(textwrap.wrap(caption, 24)[:3]), fontsize=7, parse_math=False)   # a prompt may have dollars in it
        line[0].set_ylabel(label, fontsize=9)
    save_picture(path, figure)


def contact_sheet(path, rows, captions, videos=2, frames=8):
    """rows: {label: videos [n,3,F,H,W] in [-1,1]}. The first `videos` of each as a row of still frames, and each as a GIF beside the sheet."""
    from diffusers.utils import export_to_gif
    from PIL import Image
    stills = {}
    for label, batch in rows.items():
        for k, video in enumerate(batch[:videos]):                                # [3,F,H,W]
            pick = torch.linspace(0, video.shape[1] - 1, frames).round().long()
            stills[f"{label}\n{textwrap.shorten(captions[k], 30)}"] = video[:, pick].transpose(0, 1)
            pixels = ((video.permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).byte().cpu().numpy()
            try:
                export_to_gif([Image.fromarray(frame) for frame in pixels], str(Path(path).with_suffix("")) + f"-{label.replace(',', '').replace(' ', '-')}-{k}.gif", fps=8)
            except OSError as e:
                print(f"warning: {path}: {e.strerror}; training goes on", file=sys.stderr)
    grid(path, stills, [f"frame {i + 1} of {frames}" for i in range(frames)])


def logged(folder):
    """The rows of a run's metrics.jsonl."""
    rows, file = [], folder / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):                              # of a line that a full disk cut short
            rows.append(json.loads(line))
    return rows


def losses_in(rows):
    """The losses that were logged, in order: what is not a counter, a clock or the stage."""
    return list(dict.fromkeys(k for row in rows for k in row if k not in ("stage", "iteration", "global_iter", "seconds")))


def curves(out):
    """metrics.jsonl -> losses.png: one panel a loss, one colour a stage."""
    plt, rows = pyplot(), logged(out.path)
    names = losses_in(rows) or ["nothing logged"]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False, layout="constrained")
    for name, ax in zip(names, axes[0]):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(row["iteration"], row[name]) for row in rows if row["stage"] == stage and name in row]
            if points:
                ax.plot(*zip(*points), lw=0.8, label=stage)
        ax.set(title=name, xlabel="iteration")
        ax.legend(fontsize=7) if rows else None
    save_picture(out.path / "losses.png", figure)
