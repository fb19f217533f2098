"""The network passes of an iteration of ADM, each alone: what to run, the operations it takes, and
the bytes it keeps for its backward pass. On the meta device it takes no memory and no weights."""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from adm import frozen
from discriminators import hinge_discriminator
from ode import join_batches


def zeros_of(shapes, n, device, dtype):
    """A (nested) dict of shapes -> zeros of these shapes, for n samples."""
    zeros = {}
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            zeros[name] = zeros_of(shape, n, device, dtype)
        else:
            zeros[name] = torch.zeros(n, *shape, device=device, dtype=dtype)
    return zeros


def blank_prompt(family, config, n, device="meta", tokens=None, dtype=torch.float32):
    """Conditioning of the right shapes for n samples, all zero.

    config: of the network. tokens: T5's; None: what the pipeline of this family takes.
    """
    return zeros_of(family.prompt_shapes(config, tokens), n, device, dtype)


# ------------------------------------------------------------------------------------- the passes

# of one iteration of ADM, as --dry-run prints them
SAMPLES = "G samples for f"
FAKE_LEARNS = "f learns"
GENERATOR_LEARNS = "G, forward and backward"
THROUGH_FAKE = "f, gradient of its input"
TEACHER = "F, with its guidance"
THROUGH_TAPS = "taps of x_fake, with gradient"
TAPS_OF_REAL = "taps of x_real"
HEADS = "heads"
TRAIN = (FAKE_LEARNS, GENERATOR_LEARNS)         # the network's weights
KEEP = (*TRAIN, THROUGH_FAKE, THROUGH_TAPS)     # activations for a backward pass


def start_of_graph(x):
    """x, as where a gradient is wanted. A view of the leaf, because FlopCounterMode cannot end at a
    leaf itself."""
    return x.detach().requires_grad_().view_as(x)


def passes(generator, fake_score, real_score, discriminator, x, t, cond, uncond=None):
    """The network passes of one iteration of ADM at one step and TTUR 1, in the order of adm.adm ->
    {name: function that does this pass alone}.

    x [B,...], t [B] timesteps. uncond: None where the real score is not guided. What two passes
    share is in neither; no optimizer and no noise.
    """
    taps, heads = discriminator
    both_prompts = None if uncond is None else join_batches(uncond, cond)

    def output(net, x):
        return net(x, timestep=t, **cond, return_dict=False)[0]

    def learn(net):
        out = output(net, x)
        out.backward(torch.ones_like(out))

    @torch.no_grad()
    def generator_samples():
        output(generator, x)

    def input_gradient_of_fake_score():
        start = start_of_graph(x)
        with frozen(fake_score):
            out = output(fake_score, start)
            torch.autograd.grad(out, start, torch.ones_like(out))

    @torch.no_grad()
    def real_score_says():
        if both_prompts is None:
            output(real_score, x)
            return
        real_score(torch.cat([x, x]), timestep=torch.cat([t, t]), **both_prompts, return_dict=False)

    def input_gradient_of_taps():
        start = start_of_graph(x)
        with frozen(taps.net):
            maps = taps(start, timestep=t, **cond)
            torch.autograd.grad(maps, start, [torch.ones_like(m) for m in maps])

    @torch.no_grad()
    def features():
        return taps(x, timestep=t, **cond)

    maps = features()

    def heads_for_both_updates():
        starts = [start_of_graph(m) for m in maps]
        torch.autograd.grad(heads(starts).mean(), starts)
        hinge_discriminator(heads(maps), heads(maps)).backward()

    return {SAMPLES: generator_samples, FAKE_LEARNS: partial(learn, fake_score),
            GENERATOR_LEARNS: partial(learn, generator),
            THROUGH_FAKE: input_gradient_of_fake_score, TEACHER: real_score_says,
            THROUGH_TAPS: input_gradient_of_taps, TAPS_OF_REAL: features,
            HEADS: heads_for_both_updates}


# ----------------------------------------------------------------------------- what they cost

@contextmanager
def flash_attention():
    """On the meta device attention would be counted with its whole matrix. Every kernel in use
    keeps query, key, value, result and their norms instead."""
    before = F.scaled_dot_product_attention
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    # the names of torch's own, by which diffusers passes them for some networks
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                  **more):
        return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def bytes_in(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def saved_bytes(function, net, recompute):
    """Bytes that a pass keeps for its backward, the weights of `net` aside.

    recompute: as checkpointing keeps them, the inputs of each block and all of the fullest one.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    inputs = {}                                 # of blocks, by identity: two may share one
    totals = []                                 # of each block, and at the end of the rest

    def counted(function, *args):
        held = {}                               # by storage: views share it

        def pack(x):
            storage = x.untyped_storage()._cdata
            if storage not in weights:
                held[storage] = x
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            out = function(*args)
        totals.append(bytes_in(held.values()))
        return out

    def block(module, *args):
        """In the place of torch's checkpoint()."""
        if not torch.is_grad_enabled():
            return module(*args)
        inputs.update({id(a): a for a in args if torch.is_tensor(a)})
        return counted(module, *args)

    if recompute:
        net.enable_gradient_checkpointing(block)
    with flash_attention():
        counted(function)
    if not recompute:
        return totals[-1]
    net.disable_gradient_checkpointing()
    return totals[-1] + bytes_in(inputs.values()) + max(totals[:-1], default=0)


def work_and_activations(net, discriminator, x, t, cond, uncond, recompute):
    """Of an ADM iteration of one step, a micro-batch: ({pass: operations}, {each of KEEP: bytes it
    keeps for its backward})."""
    work, kept = {}, {}
    each = passes(generator=net, fake_score=net, real_score=net, discriminator=discriminator,
                  x=x, t=t, cond=cond, uncond=uncond)
    for name, function in each.items():
        net.requires_grad_(name in TRAIN)
        with FlopCounterMode(display=False) as counter:
            function()
        work[name] = counter.get_total_flops()
        if name in KEEP:
            kept[name] = saved_bytes(function, net, recompute)
        net.requires_grad_(False)
        net.zero_grad()
        discriminator.heads.zero_grad()
    if recompute:
        again = work[SAMPLES] * 3 + work[TAPS_OF_REAL]
        work["blocks' forward passes once more, for checkpointing"] = again
    return work, kept
