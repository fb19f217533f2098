"""Why this file exists: --dry-run tells what a run would cost, memory and arithmetic, from configurations alone, before anybody pays for it."""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from adm import frozen
from discriminators import Taps, heads_for, hinge
from ode import both
from plumbing import blocks, tensors_to

# class of the network -> its conditioning for one sample: {argument: shape}, from its own configuration
PROMPT = {
    "UNet2DConditionModel": lambda c, tokens: dict(encoder_hidden_states=(77, c.cross_attention_dim), added_cond_kwargs=dict(
        text_embeds=(c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim,), time_ids=(6,))),
    "SD3Transformer2DModel": lambda c, tokens: dict(encoder_hidden_states=(77 + (tokens or 256), c.joint_attention_dim),
                                                    pooled_projections=(c.pooled_projection_dim,)),
    "CogVideoXTransformer3DModel": lambda c, tokens: dict(encoder_hidden_states=(tokens or c.max_text_seq_length, c.text_embed_dim)),
    "WanTransformer3DModel": lambda c, tokens: dict(encoder_hidden_states=(tokens or 512, c.text_dim)),
    "QwenImageTransformer2DModel": lambda c, tokens: dict(encoder_hidden_states=(tokens or 512, c.joint_attention_dim), encoder_hidden_states_mask=(tokens or 512,)),
}


def prompt(net, n, device="meta", tokens=None, dtype=torch.float32):
    """Conditioning of the right shapes for n samples."""
    fill = lambda v: {k: fill(u) for k, u in v.items()} if isinstance(v, dict) else torch.zeros(n, *v, device=device, dtype=dtype)
    return fill(PROMPT[type(net).__name__.removeprefix("FSDP")](net.config, tokens))


def passes(generator, fake_score, real_score, backbone, heads, x, t, cond, uncond):
    """The network passes of one iteration of ADM at one step and TTUR 1, each as a function that does it alone, in the order of adm.adm:
    {name: function}. x [B,...], t [B] timesteps. What two passes share is not in either; no optimizer, no noise."""
    run = lambda net, x, t, cond: net(x, timestep=t, **cond, return_dict=False)[0]
    taps, guided, ones = Taps(backbone), both(uncond, cond), torch.ones_like
    leaf = lambda x: x.detach().requires_grad_().view_as(x)     # where a gradient ends; the view because FlopCounterMode cannot end at a leaf itself

    @torch.no_grad()
    def features():
        return taps(x, timestep=t, **cond)

    def learn(net):
        out = run(net, x, t, cond)
        out.backward(ones(out))

    def through(net, look):
        inlet = leaf(x)
        with frozen(net):
            out = look(inlet)
            torch.autograd.grad(out, inlet, [ones(o) for o in out] if isinstance(out, list) else ones(out))

    maps = features()

    def critics():
        inlets = [leaf(m) for m in maps]
        torch.autograd.grad(heads(inlets).mean(), inlets)
        hinge(heads(maps), heads(maps)).backward()

    @torch.no_grad()
    def sampled():
        run(generator, x, t, cond)

    @torch.no_grad()
    def real():
        run(real_score, torch.cat([x, x]), torch.cat([t, t]), guided)
    return {"G samples for f": sampled, "f learns": lambda: learn(fake_score), "G, forward and backward": lambda: learn(generator),
            "f, gradient of its input": lambda: through(fake_score, lambda x: run(fake_score, x, t, cond)),
            "F with guidance": real, "taps of x_fake, with gradient": lambda: through(backbone, lambda x: taps(x, timestep=t, **cond)),
            "taps of x_real": features, "heads": critics}


@contextmanager
def flash_attention():
    """On the meta device attention would be counted with its whole matrix; every kernel in use keeps query, key, value, result and their norms instead."""
    before, flash = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more: \
        flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def saved_bytes(function, nets, recompute):
    """Bytes a pass keeps for its backward, weights aside. recompute: as checkpointing keeps them, the inputs of each block and all of the fullest one."""
    weights = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
    inputs, totals = {}, []

    def counted(function, *args):
        held = {}

        def pack(x):
            if x.untyped_storage()._cdata not in weights:
                held[x.untyped_storage()._cdata] = x
            return x
        with saved_tensors_hooks(pack, lambda x: x):
            out = function(*args)
        totals.append(sum(x.numel() * x.element_size() for x in held.values()))
        return out

    def block(module, *args):
        if not torch.is_grad_enabled():
            return module(*args)
        inputs.update({id(a): a for a in args if torch.is_tensor(a)})
        return counted(module, *args)

    if recompute:
        for net in nets:
            net.enable_gradient_checkpointing(block)
    with flash_attention():
        counted(function)
    if recompute:
        for net in nets:
            net.disable_gradient_checkpointing()
    return totals[-1] + (sum(a.numel() * a.element_size() for a in inputs.values()) + max(totals[:-1], default=0) if recompute else 0)


def count(module):
    return sum(p.numel() for p in module.parameters())


def memory_rows(args, pipe, net, heads, family, networks, shards):
    """[(what, parameters, bytes a rank of weights, gradients, optimizer, EMA), ...] and the bytes of the teacher that lie outside of blocks."""
    bytes_of, size = 2 if args.bf16 else 4, count(net) * networks
    outside = (count(net) - sum(map(count, blocks(net)))) * networks
    inside = size - outside
    rows = [("real score and backbone", size, (inside / shards + outside) * bytes_of, 0, 0, 0)]
    adapted = [m for k, m in net.named_modules() if isinstance(m, torch.nn.Linear) and k.endswith(tuple(family["lora"]))]
    for name, rank, average in (("generator", args.lora_rank, args.ema > 0), ("fake score", args.lora_rank_fake, False)):
        n = networks * sum(rank * (m.in_features + m.out_features) for m in adapted) if rank else size
        part = n / (1 if rank else shards)                      # adapters are whole on every rank
        rows.append((f"{name}{f', LoRA {rank}' if rank else ''}", n, 4 * part, 4 * part, 8 * part, 4 * part * average))
    critics = count(heads)
    rows += [("heads", critics, 4 * critics / shards, 4 * critics / shards, 8 * critics / shards, 0), ("VAE", count(pipe.vae), bytes_of * count(pipe.vae), 0, 0, 0)]
    return rows, outside * bytes_of


def work_and_activations(net, heads, x, t, cond, recompute):
    """({pass: operations}, {pass: bytes kept for its backward}) of an ADM iteration of one step, each micro-batch."""
    work, kept = {}, {}
    for name, function in passes(net, net, net, net, heads, x, t, cond, cond).items():
        trains = name in ("f learns", "G, forward and backward")
        net.requires_grad_(trains)
        with FlopCounterMode(display=False) as counter:
            function()
        work[name] = counter.get_total_flops()
        kept[name] = saved_bytes(function, [net], recompute) if trains or "gradient" in name else 0
        net.requires_grad_(False)
        net.zero_grad(), heads.zero_grad()
    if recompute:
        work["blocks' forward passes once more, for checkpointing"] = work["G samples for f"] * 3 + work["taps of x_real"]
    return work, kept


def report(args, pipe, family, ranks):
    """Print the table for these flags -> dict of its sums. pipe: the pipeline, all of its weights on the meta device."""
    networks = 2 if getattr(pipe, "transformer_2", None) is not None else 1       # Wan2.2 has two
    net, dtype = getattr(pipe, family["network"]), torch.bfloat16 if args.bf16 else torch.float32
    shape, height, width, _ = family["latent"](pipe, net, args)
    constant = tensors_to("meta", family["constant"](pipe, shape, height, width))
    net = net.to("meta", dtype).requires_grad_(False)           # buffers as well
    conditioning = lambda n, dtype: prompt(net, n, tokens=args.text_tokens, dtype=dtype) | constant
    x, t = torch.zeros(args.batch_size, *shape, device="meta", dtype=dtype), torch.zeros(args.batch_size, device="meta")
    heads = heads_for(net, x[:1].float(), args.head_channels, timestep=t[:1], **conditioning(1, torch.float32)).to("meta", dtype)

    rows, outside = memory_rows(args, pipe, net, heads, family, networks, ranks if args.fsdp else 1)
    work, kept = work_and_activations(net, heads, x, t, conditioning(args.batch_size, dtype), args.grad_checkpointing)
    held, size = sum(sum(row[2:]) for row in rows), rows[0][1]
    offloaded = sum(sum(row[2:]) for row in rows[:-1] if "LoRA" not in row[0]) - outside if args.cpu_offload else 0   # not the VAE
    largest = max(map(count, blocks(net)), default=size)
    gathered = 2 * largest * dtype.itemsize if args.fsdp or args.cpu_offload else 0
    activations = max(kept["f learns"], kept["G, forward and backward"] + kept["f, gradient of its input"] + kept["taps of x_fake, with gradient"])
    device, flop = held - offloaded + gathered + activations, sum(work.values())

    gib = lambda b: f"{b / 2**30:10.2f}"
    print(f"{args.model or 'the embedded teacher'}: {' x '.join(map(str, shape))} latents, {height} x {width} pixels, micro-batch {args.batch_size}, {ranks} rank{'s' * (ranks > 1)}\n")
    print(f"{'GiB a rank':32s}{'parameters':>14s}{'weights':>10s}{'gradients':>10s}{'optimizer':>10s}{'EMA':>10s}")
    for name, n, *columns in rows:
        print(f"{name:32s}{n / 1e6:12.1f} M" + "".join(map(gib, columns)))
    print(f"\n{'held between passes, on the device':42s}{gib(held - offloaded)}")
    print(f"{'gathered blocks, two at a time':42s}{gib(gathered)}")
    print(f"{'activations for the backward pass':42s}{gib(activations)}   ({'blocks recomputed' if args.grad_checkpointing else 'all kept'})")
    print(f"{'device, at least':42s}{gib(device)}")
    print(f"{'host, a rank':42s}{gib(offloaded)}   and rank 0 while loading {gib(4 * size).strip()}")
    print("\nnetwork passes of an ADM iteration, one step, one micro-batch" + " " * 12 + "TFLOP")
    for name, operations in (work | {"together": flop}).items():
        print(f"  {name:64s}{operations / 1e12:12.4g}")
    return dict(parameters=size, device_bytes=device, host_bytes=offloaded, flop=flop)
