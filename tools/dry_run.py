"""What a run would cost, memory and arithmetic, from configurations alone: what --dry-run prints.

    python train_sdxl.py --dry-run                                      # the embedded teacher
    python train_sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --dry-run 8 \\
        --fsdp --bf16 --grad-checkpointing                              # on eight GPUs

No weights are loaded. Shapes run on the meta device, where the operations of each network pass and
the bytes it keeps for the backward pass are counted. A real run adds the allocator's slack and
CUDA's own.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from discriminators import Discriminator
from tools.cards import CARDS, LAUNCH
from tools.passes import (
    FAKE_LEARNS, GENERATOR_LEARNS, THROUGH_FAKE, THROUGH_TAPS, blank_prompt, work_and_activations)
from training.heads import heads_for
from training.model_checks import latent_of
from training.networks import tensors_to, units_of
from training.sharding import blocks_of
from training.terminal import tell, warn

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------- what is held

def count(module):
    return sum(p.numel() for p in module.parameters())


def frozen_bytes(args):
    """Of a frozen weight."""
    return 2 if args.bf16 else 4


class Row(NamedTuple):
    """What one network takes: its trained or frozen parameters, and bytes on a rank."""
    name: str
    parameters: int
    weights: float
    gradients: float = 0
    optimizer: float = 0
    average: float = 0
    offloaded: bool = False     # by --cpu-offload

    def kept(self):
        """Bytes besides the gradients."""
        return self.weights + self.optimizer + self.average


class Rows(NamedTuple):
    """Of the networks of a run."""
    real: Row
    generator: Row
    fake: Row
    heads: Row
    vae: Row


def student_row(name, parameters, lora_rank, shards, average=False):
    """A trained network: float32 weights and gradients, Adam's second moment (there is no first:
    beta_1 = 0). Adapters are small: whole on every rank, and never offloaded."""
    if lora_rank:
        name, shards = f"{name}, LoRA {lora_rank}", 1
    part = parameters / shards
    return Row(name, parameters, 4 * part, 4 * part, 4 * part, 4 * part if average else 0,
               offloaded=not lora_rank)


def memory_rows(args, pipe, net, heads, family, networks, shards):
    """Rows, and the bytes of the teacher that lie outside of its blocks: of a frozen network they
    are whole on every rank, and not offloaded.

    networks: how many like `net` the teacher has. shards: ranks that share a network's weights.
    """
    bytes_of = frozen_bytes(args)
    size = count(net) * networks
    outside = (count(net) - sum(map(count, blocks_of(net)))) * networks
    inside = size - outside
    real = Row("real score and backbone", size, (inside / shards + outside) * bytes_of,
               offloaded=True)

    adapted = [module for name, module in net.named_modules()
               if isinstance(module, torch.nn.Linear) and name.endswith(family.lora_layers)]
    widths = sum(module.in_features + module.out_features for module in adapted)

    def trained(rank):
        return networks * rank * widths if rank else size

    rows = Rows(
        real,
        student_row("generator", trained(args.lora_rank), args.lora_rank, shards, args.ema > 0),
        student_row("fake score", trained(args.lora_rank_fake), args.lora_rank_fake, shards),
        student_row("heads", count(heads), 0, shards),
        Row("VAE", count(pipe.vae), bytes_of * count(pipe.vae)))
    return rows, outside * bytes_of


def rest_on(rows, offload, pinned):
    """(bytes on the device, bytes on the host) between passes. Gradients of the fake score are gone
    before the generator's and the heads' are there. pinned: see pinned_over_plain."""
    if rows.fake.gradients > rows.generator.gradients + rows.heads.gradients:
        with_gradients = [rows.fake]
    else:
        with_gradients = [rows.generator, rows.heads]
    device, host = 0, 0
    for row in rows:
        gradients = row.gradients if row in with_gradients else 0
        if offload and row.offloaded:
            host += (row.weights + row.average + gradients) * pinned + row.optimizer
        else:
            device += row.kept() + gradients
    return device, host


def pinned_over_plain(net, shards):
    """How much more the pinned memory of a network's offloaded weights is than the weights: torch
    rounds each block up to a power of two, unless PYTORCH_CUDA_ALLOC_CONF sets
    pinned_max_round_threshold_mb."""
    plain, pinned = 0, 0
    for p in net.parameters():
        size = math.ceil(p.numel() / shards) * 4
        plain += size
        pinned += 2 ** math.ceil(math.log2(size))
    return pinned / plain


# ----------------------------------------------------------------------------------- the report

class Costs(NamedTuple):
    """Of one rank, in bytes; work in operations."""
    rows: Rows
    held: float             # on the device between passes
    offloaded: float        # on the host
    gathered: float         # whole blocks while they run, of sharded or offloaded networks
    activations: float      # most that is kept for a backward pass at once
    work: dict              # {pass: operations}

    def device(self):
        return self.held + self.gathered + self.activations


def costs(args, pipe, units, family, latent, ranks):
    """units: the networks that the teacher consists of; Wan 2.2 has two."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = units[-1]
    constant = tensors_to("meta", family.constant(pipe, latent))
    net = net.to("meta", dtype).requires_grad_(False)       # buffers as well
    n = args.batch_size
    x = torch.zeros(n, *latent.shape, device="meta", dtype=dtype)
    t = torch.zeros(n, device="meta")

    def conditioning(n, dtype):
        prompt = blank_prompt(family, net.config, n, tokens=args.text_tokens, dtype=dtype)
        return prompt | constant

    heads = heads_for(family.taps, net, x[:1].float(), args.head_channels, timestep=t[:1],
                      **conditioning(1, torch.float32)).to("meta", dtype)
    discriminator = Discriminator(family.taps(net), heads)

    rows, outside = memory_rows(args, pipe, net, heads, family, len(units),
                                shards=ranks if args.fsdp else 1)
    prompt = conditioning(n, dtype)
    is_guided = set(args.guidance) != {1}
    work, kept = work_and_activations(net, discriminator, x, t, prompt,
                                      prompt if is_guided else None, args.grad_checkpointing)
    held, offloaded = rest_on(rows, args.cpu_offload,
                              pinned_over_plain(net, ranks if args.fsdp else 1))
    if args.cpu_offload:
        held += outside
        offloaded -= outside
    gathered = 0
    if args.fsdp or args.cpu_offload:
        largest = max(map(count, blocks_of(net)), default=rows.real.parameters)
        gathered = 2 * largest * dtype.itemsize
    of_generator = kept[GENERATOR_LEARNS] + kept[THROUGH_FAKE] + kept[THROUGH_TAPS]
    return Costs(rows, held, offloaded, gathered,
                 activations=max(kept[FAKE_LEARNS], of_generator), work=work)


def gib(size):
    return f"{size / 2**30:10.2f}"


def print_table(found, args):
    if args.method != "dmdx":
        print("Counted as ADM would take it, discriminator and all. The stages of --method "
              f"{args.method} are simulated below.\n")
    print(f"{'GiB a rank':32s}{'parameters':>14s}"
          f"{'weights':>10s}{'gradients':>10s}{'optimizer':>10s}{'EMA':>10s}")
    for row in found.rows:
        print(f"{row.name:32s}{row.parameters / 1e6:12.1f} M{gib(row.weights)}"
              f"{gib(row.gradients)}{gib(row.optimizer)}{gib(row.average)}")
    remark = "blocks recomputed" if args.grad_checkpointing else "all kept"
    loading = gib(frozen_bytes(args) * found.rows.real.parameters).strip()
    print(f"\n{'held between passes, on the device':42s}{gib(found.held)}")
    print(f"{'gathered blocks, two at a time':42s}{gib(found.gathered)}")
    print(f"{'activations for the backward pass':42s}{gib(found.activations)}   ({remark})")
    print(f"{'device, at least':42s}{gib(found.device())}")
    print(f"{'host, a rank':42s}{gib(found.offloaded)}   and while loading {loading}")
    print(f"\n{'network passes of an ADM iteration, one step, one micro-batch':73s}TFLOP")
    for name, operations in (found.work | {"together": sum(found.work.values())}).items():
        print(f"  {name:64s}{operations / 1e12:12.4g}")


def simulated_stages(args, medium):
    """Every stage of this run on a pretended GPU, in a process of its own -> see simulate.simulate.
    Raises OSError, with the reason, where that is not possible."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-P", "-m", "tools.simulate", medium],
                          input=json.dumps(vars(args)), capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=path))
    if done.returncode != 0:
        raise OSError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def iterations_of(args, stage):
    if stage == "pairs":
        return math.ceil(args.pairs / (2 * args.batch_size))
    if stage in ("adp", "reflow"):
        return args.iterations_adp
    if stage == "adm":
        return args.iterations_adm
    return args.iterations_phase if stage.startswith("phase") else 1


def print_stages(args, stages):
    """The table of every stage, simulated."""
    card = CARDS[args.dry_run_card]
    print(f"\nsimulated: {args.dry_run_card} at {card.flop / 1e12:.0f} TFLOP/s and "
          f"{card.bytes / 1e12:.1f} TB/s, {card.copied / 1e9:.0f} GB/s to the host and back, "
          f"{LAUNCH * 1e6:.0f} us of the host a\nkernel, nothing for what ranks send each other or "
          f"for steps made on the host; add 1 to 2 GiB for CUDA itself")
    print(f"{'stage':12s}{'peak GiB':>10s}{'host GiB':>10s}{'copied':>10s}{'TFLOP':>10s}"
          f"{'s/iteration':>13s}"
          f"{'host s':>9s}{'waits':>7s}{'iterations':>12s}{'hours':>9s}")
    for name, found in stages.items():
        number = iterations_of(args, name)
        seconds = max(found["seconds"], found["host_seconds"])
        print(f"{name:12s}{gib(found['peak'])}{gib(found['host'])}{gib(found['copied'])}"
              f"{found['flop'] / 1e12:10.4g}"
              f"{found['seconds']:13.4g}{found['host_seconds']:9.3g}"
              f"{sum(found['waits'].values()):7d}{number:12d}{number * seconds / 3600:9.2f}")


def print_disk(args, rows, latent):
    """What --out grows to. Of checkpoints two are kept, and a third is written before one goes."""
    trained = rows.generator.parameters + rows.fake.parameters + rows.heads.parameters
    checkpoint = 4 * 2 * trained                # weights and second moments
    if args.ema:
        checkpoint += 4 * rows.generator.parameters
    pairs = 2 * 4 * math.prod(latent.shape) * args.pairs
    print(f"\n{'disk: a checkpoint of ADM; there are up to 3':42s}{gib(checkpoint)}")
    print(f"{'disk: pairs, of runs that have them':42s}{gib(pairs)}")


def report(args, pipe, family):
    """Print what a run with these flags takes, on --dry-run GPUs.

    pipe: the pipeline, all of its weights on the meta device. family: its Family.
    """
    ranks = args.dry_run
    net = family.net_of(pipe)
    latent = latent_of(family, pipe, net, args)
    found = costs(args, pipe, units_of(net), family, latent, ranks)
    shape = " x ".join(map(str, latent.shape))
    plural = "s" if ranks > 1 else ""
    tell(f"{args.model}: {shape} latents, {latent.height} x {latent.width} pixels, "
         f"micro-batch {args.batch_size}, {ranks} rank{plural}")
    print()
    print_table(found, args)
    print_disk(args, found.rows, latent)
    try:
        print_stages(args, simulated_stages(args, family.medium))
    except OSError as e:
        warn(f"the stages are not simulated: {e}")
