"""Sharding by FSDP2 (--fsdp, --cpu-offload): every rank keeps a part of each weight, gradient and
moment, and gathers a block's weights only while the block runs.

Blocks are the modules that diffusers says must not be split. What lies outside of blocks
(embeddings, a few per cent) is sharded where the network is trained, and whole where it is frozen:
the discriminator leaves a frozen network by its taps, so a group of weights that ends with the
network's own output would never be gathered for its backward pass. Adapters are small: they are
whole on every rank, and training.optimizer averages their gradients.
"""
import os
from copy import deepcopy
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.ranks import is_rank_0, world


class Sharded(NamedTuple):
    """What a sharded network remembers, as its attribute `sharded`."""
    skeleton: nn.Module     # the network without weights; a sharded module itself cannot be copied
    arguments: dict         # fully_shard's
    device: torch.device    # where it runs


# -------------------------------------------------------------------------------------- to shard

def fsdp_arguments(fsdp, offload, bf16, device):
    """fully_shard's arguments, or None if neither --fsdp nor --cpu-offload is given: then each rank
    keeps whole copies.

    On one node the shards go over all ranks. On several, they go over the ranks of a node, and the
    nodes hold equal copies (HSDP). With bf16, gathered weights are bf16; what is kept, averaged and
    stepped stays float32.
    """
    if not (fsdp or offload):
        return None
    ranks = world()[1]
    node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks > node:
        shape = (ranks // node, node)
        names = ("replicate", "shard")
    else:
        shape = (ranks,)
        names = None            # peft takes a named dimension for tensor parallelism
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    arguments = dict(mesh=mesh, reshard_after_forward=True)
    if offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    if bf16:
        # inputs are not cast: above 256 not every timestep is a bf16 number
        arguments["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return arguments


def blocks_of(net, kinds=None):
    """The blocks of a network: the modules that diffusers says must stay in one piece, and of those
    that contain each other the innermost. kinds: names of classes, for other modules."""
    names = kinds or getattr(net, "_no_split_modules", None) or ()
    found = []
    for module in net.modules():
        if type(module).__name__.removeprefix("FSDP") in names:     # FSDP2 puts that in front
            found.append(module)
    innermost = []
    for module in found:
        if not any(inner is not module and inner in found for inner in module.modules()):
            innermost.append(module)
    return innermost


def shard(net, arguments, device):
    """Shard a network in place, over the ranks, and return it. arguments: see fsdp_arguments."""
    is_trained = any(p.requires_grad for p in net.parameters())
    # deepcopy takes what is in its memo for copied already: here, weights without memory
    hollow = {}
    for p in net.parameters():
        hollow[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    skeleton = deepcopy(net, hollow)
    blocks = blocks_of(net)
    outside = set()             # parameters that stay whole
    if not is_trained:
        inside = {p for block in blocks for p in block.parameters()}
        outside = set(net.parameters()) - inside
    for block in blocks:
        fully_shard(block, **arguments)
    fully_shard(net, **arguments, ignored_params=outside)
    for tensor in (*outside, *net.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    net.sharded = Sharded(skeleton, arguments, device)
    return net


def device_of(net, p):
    """Where a network runs. It need not be where its parameter p is kept: offloaded weights rest on
    the host."""
    if hasattr(net, "sharded"):
        return net.sharded.device
    return p.device


def materialise(net):
    """Give the weights of a sharded network that are on the meta device memory, without values."""
    _, arguments, device = net.sharded
    rests_on_host = "offload_policy" in arguments

    def with_memory(tensor):
        if not tensor.is_meta:
            return tensor
        if rests_on_host and isinstance(tensor, DTensor):
            return torch.empty_like(tensor, device="cpu")
        return torch.empty_like(tensor, device=device)
    return net._apply(with_memory)


@torch.no_grad()
def receive(net, weights):
    """Load whole weights {name: tensor} into a sharded network. Only rank 0 needs to have them; the
    others pass {}.

    One at a time goes through the device. torch's set_model_state_dict refuses a network of which
    some weights rest on the host and others on the device.
    """
    materialise(net)
    device = net.sharded.device
    rank, ranks = world()
    for name, kept in net.state_dict().items():
        if rank == 0:
            value = weights[name].to(device, kept.dtype)
        else:
            value = torch.empty(kept.shape, dtype=kept.dtype, device=device)
        if ranks > 1:
            dist.broadcast(value, 0)
        put(kept, value)


@torch.no_grad()
def copy_of_shards(net):
    """A copy of a sharded network, in float32 and sharded as well, to train. Without its adapters,
    if it has any."""
    skeleton, arguments, device = net.sharded
    twin = shard(deepcopy(skeleton).float().requires_grad_(True), arguments, device)
    twin = materialise(twin)
    # buffers, too: those of a checkpoint need not be what its configuration computes (SD3's
    # positions), and only rank 0 has read the checkpoint
    values = {}
    for name, value in chain(net.named_parameters(), net.named_buffers()):
        if ".lora_" not in name:
            values[name.replace(".base_layer", "")] = value     # the name it has without adapters
    for name, kept in chain(twin.named_parameters(), twin.named_buffers()):
        put(kept, values[name])
    return twin


# ------------------------------------------------------------------------------ sharded tensors

def whole(tensor):
    """All of a tensor of which every rank may hold only a part. All ranks must call it together."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def local_part(tensor):
    """What this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def on_rank_0(tensors):
    """{name: tensor}, sharded or not -> all of them, whole, on the host of rank 0; on other ranks
    {}. All ranks must call it together."""
    host = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())     # one at a time: all may not fit on the device
        if is_rank_0():
            host[name] = tensor.cpu()
    return host


def put(p, value):
    """Copy a value, whole or sharded as p is, into a parameter p that may be sharded."""
    p.copy_(part_like(p, value))


def part_like(p, value):
    """A value of p's shape, whole or sharded as p is -> sharded, if p is."""
    if isinstance(p, DTensor) and not isinstance(value, DTensor):
        # without a source rank: each rank has the whole value, and cuts out its own part
        value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return value
