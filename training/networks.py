"""What is done to networks before they run: place, copy, compile, recompute, autocast.

A network may be several, its `units` (Wan 2.2's two transformers); most are one unit, themselves.
"""
import gc
from copy import copy, deepcopy
from types import MethodType

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from training.draws import stream
from training.errors import Failure
from training.lora import Lora, active, at_work, rank_flag
from training.ranks import is_rank_0
from training.sharding import blocks_of, copy_of_shards, local_part, part_like, receive, shard


def units_of(net):
    """The networks that a network consists of: mostly itself alone."""
    return getattr(net, "units", [net])


def tensors_to(device, value, dtype=None):
    """A value with its tensors, also inside dicts and tuples, on a device; floats of this dtype, if
    one is given. Other values stay as they are."""
    if isinstance(value, dict):
        return {name: tensors_to(device, inner, dtype) for name, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(tensors_to(device, inner, dtype) for inner in value)
    if torch.is_tensor(value):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


# ------------------------------------------------------------------------- how a network computes

def autocast(net, device, enabled):
    """Run a network in bf16 arithmetic, if enabled; the weights keep their type. Returns net.

    Its `forward` is bound to net again, so that a deepcopy runs itself and not net. One that this
    instance alone has is kept.
    """
    if not enabled:
        return net
    bound = net.forward
    function = getattr(bound, "__func__", bound)
    if not getattr(function, "in_autocast", False):             # a copy of a network may be already
        function = torch.autocast(device.type, torch.bfloat16)(function)
        function.in_autocast = True
    if hasattr(bound, "__func__"):
        function = MethodType(function, net)
    net.forward = function
    return net


def decode_in_bf16(vae):
    """Let a VAE decode in bf16 throughout. Under autocast its normalisations, and the activations
    after them, would be float32: 17 GiB more for four pictures of SDXL in ADP."""
    vae.to(torch.bfloat16)
    decode = vae.decode

    def in_bf16(x, *args, **kwargs):
        return decode(x.to(torch.bfloat16), *args, **kwargs)
    vae.decode = in_bf16
    return vae


def one_by_one(function):
    """A function of a batch that gives a tensor or a list of them, made to do each sample alone and
    to keep nothing for the backward pass, where it does them once more."""
    def each(batch):
        parts = []
        for x in batch.split(1):
            parts.append(checkpoint(function, x, use_reentrant=False, preserve_rng_state=False,
                                    determinism_check="none"))
        if torch.is_tensor(parts[0]):
            return torch.cat(parts)
        return [torch.cat(maps) for maps in zip(*parts)]
    return each


def compile_blocks(net, backend):
    """Compile each block by itself, with torch.compile. So hooks stay outside of compiled code, and
    blocks of one class share theirs. Bound to the block, as in `autocast`.

    Where diffusers says which blocks are repeated, only those: a UNet's ResNets have a dozen
    shapes, each in half a dozen modes, and beyond the limit torch goes on uncompiled, silently.
    """
    # one block runs with and without gradients, under each adapter, and on guidance's double batch
    torch._dynamo.config.recompile_limit = 64
    compiled = {}                                               # class of a block -> its forward
    for unit in units_of(net):
        for block in blocks_of(unit, getattr(unit, "_repeated_blocks", None)):
            kind = type(block)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, backend=backend)
            block.forward = MethodType(compiled[kind], block)


def recompute_activations(net):
    """Keep no activations inside of blocks, and recompute them in the backward pass (activation
    checkpointing)."""
    for unit in units_of(net):
        unit.enable_gradient_checkpointing(checkpoint_under_adapter(unit))


def checkpoint_under_adapter(unit):
    """-> the function that diffusers calls in place of a block. It recomputes under the adapter of
    the forward pass: by the time of the backward pass another may be at work.

    Networks are in eval mode throughout, so no dropout draws: there is no random state to restore,
    and what a block saves is what it saved before. To look costs the host more than the block.
    """
    def checkpointed(block, *args):
        name = at_work(unit)

        def run_block(*args):
            with active(unit, name):
                return block(*args)
        return checkpoint(run_block, *args, use_reentrant=False, preserve_rng_state=False,
                          determinism_check="none")
    return checkpointed


# --------------------------------------------------------------------------------- copy and place

def full_copy(net):
    """A copy of a network with its own weights, without the adapters it may carry. The copy of a
    sharded network is sharded, too, and to be trained."""
    if hasattr(net, "sharded"):
        return copy_of_shards(net)
    if any(hasattr(unit, "sharded") for unit in net.children()):        # several networks as one
        twin = copy(net)
        twin._modules = {name: full_copy(unit) for name, unit in net.named_children()}
        return twin
    twin = deepcopy(net)
    for unit in units_of(twin):
        if hasattr(unit, "at_work"):
            unit.unload_lora()
            del unit.at_work
    return twin


def prepare(args, net, device):
    """What every network gets before it runs, trained or frozen: --grad-checkpointing, --compile,
    --bf16. Returns net."""
    if args.grad_checkpointing:
        recompute_activations(net)
    if args.compile:
        compile_blocks(net, args.compile)
    return autocast(net, device, args.bf16)


def place(args, net, fsdp, device):
    """Bring a frozen network to where it runs, and prepare it. Returns net.

    fsdp: see sharding.fsdp_arguments. None: whole, on this device. Else in shards over the ranks,
    with rank 0's weights; the other ranks' may be on the meta device.
    """
    if args.bf16:
        for p in net.parameters():      # no buffers: Wan's positions would be off by 0.002
            p.data = p.data.to(torch.bfloat16)
    if fsdp:
        weights = net.state_dict() if is_rank_0() else {}
        receive(shard(net, fsdp, device), weights)
    else:
        net.to(device)
    return prepare(args, net, device)


def trainable(args, teacher, name, rank, source=None):
    """A network to train that starts as the teacher.

    name: of the adapter, if it is one: "generator", "fake", ...
    rank: of a LoRA on the teacher's own weights; 0 for a float32 copy of all weights.
    source: the teacher's net, unless one of its units is given.
    Raises Failure where there can be no LoRA.
    """
    source = source or teacher.net
    if rank and source not in teacher.units:
        raise Failure(f"{rank_flag(name, rank)}: this teacher is two networks, and what replaces "
                      f"both is trained fully; give 0")
    if rank and teacher.fsdp and teacher.fsdp["mesh"].ndim == 2:
        raise Failure(f"{rank_flag(name, rank)}: peft has no adapters for weights sharded inside "
                      f"of nodes and copied across; leave --fsdp out")
    if rank:
        return Lora(source, name, rank, args.lora_alpha or rank, teacher.family.lora_layers)
    gc.collect()        # an earlier stage's networks: their own forward keeps them, in a circle
    net = full_copy(source).float().requires_grad_(True)
    if args.bf16:
        spread_between_bf16(net)
    return prepare(args, net, teacher.device)


@torch.no_grad()
def spread_between_bf16(net):
    """Let each float32 weight, a bf16 number so far, be anywhere among those that round to it.

    In bf16 a network computes with its weights rounded. From a bf16 number a weight would have to
    go half the way to the next, 6e-5 at 0.02, before its network saw any of it: more than a run at
    the papers' rates of 1e-7 goes. Spread evenly, of many weights the right share rounds
    to the next number, however small the change.
    """
    for number, p in enumerate(parameters_in_bf16(net)):
        shift = torch.rand(p.shape, generator=stream(number)) - 0.5     # the same on every rank
        value = local_part(p)
        shift = local_part(part_like(p, shift)).to(value.device)
        fraction, exponent = value.abs().frexp()                        # fraction: 0.5 to 1, or 0
        spacing = torch.ldexp(fraction.sign(), exponent - 8)
        # below a power of 2 the numbers lie twice as close
        is_below = (fraction == 0.5) & (shift * value < 0)
        value += torch.where(is_below, spacing / 2, spacing) * shift


def parameters_in_bf16(net):
    """Those that are rounded where they are used: all of a sharded network, as they are gathered;
    else, by autocast, those of linear layers and convolutions. Norms compute in float32."""
    for module in net.modules():
        for p in module.parameters(recurse=False):
            if isinstance(p, DTensor) or isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                yield p
