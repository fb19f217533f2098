"""Untrained discriminator heads that fit a backbone."""
import torch

from discriminators import Head, Heads
from training.checkpoints import load_checkpoint, newest_checkpoint
from training.errors import Failure
from training.networks import autocast, tensors_to
from training.ranks import broadcast
from training.sharding import shard


def tap_shapes(taps_of, net, x, **cond):
    """Shapes, without the batch, of the maps that taps_of(net)(x, ...) would give. A twin of the
    network on the meta device runs: nothing is computed.

    taps_of: net -> Taps, such as vision_taps or a family's `taps`.
    """
    with torch.device("meta"):
        if hasattr(type(net), "from_config"):               # diffusers
            twin = type(net).from_config(net.config)
        else:                                               # transformers
            twin = type(net)(net.config)
        x, cond = tensors_to("meta", (x, cond), torch.float32)
        maps = taps_of(twin)(x, **cond)
    return [tuple(feature.shape[1:]) for feature in maps]


def heads_for(taps_of, net, x, hidden=256, **cond):
    """Untrained heads that fit the features taps_of(net) gives for inputs shaped like x."""
    shapes = tap_shapes(taps_of, net, x, **cond)
    return Heads([Head(shape, hidden) for shape in shapes])


def latent_heads(args, teacher):
    """Heads of the latent discriminator, whose backbone is the teacher, ready to train."""
    x = torch.zeros(1, *teacher.shape, device=teacher.device)
    heads = heads_for(teacher.family.taps, teacher.backbone, x, args.head_channels,
                      timestep=torch.zeros(1), **teacher.uncond(1))
    return place_heads(args, teacher, heads)


def pixel_heads(args, teacher, taps_of, vision):
    """Heads of the pixel discriminator, ready to train.

    vision: its backbone, a vision encoder of transformers. taps_of: vision -> Taps.
    """
    side = vision.config.image_size
    heads = heads_for(taps_of, vision, torch.zeros(1, 3, side, side), args.head_channels)
    return place_heads(args, teacher, heads)


def place_heads(args, teacher, heads):
    """Bring heads to the teacher's device, in shards if its weights are, and prepare them."""
    heads = heads.to(teacher.device)
    if teacher.fsdp:
        heads = shard(heads, teacher.fsdp, teacher.device)
    return autocast(heads, teacher.device, args.bf16)


# ----------------------------------------------------------------------- --warm-heads (choice)

def refuse_without_heads(args, out, stages, reached):
    """Raises Failure where --warm-heads has no ADP to start from: found before any model is
    loaded."""
    starts_with_adm = stages[:1] == ["adm"] and reached != "adm"
    if not (args.warm_heads and starts_with_adm):
        return
    if newest_checkpoint(out.path / "checkpoints", "adp") is None:
        raise Failure(f"--warm-heads: no checkpoint of ADP in {out.path}/checkpoints to take the "
                      f"heads from; run --stage adp first, or give --no-warm-heads")


def load_warm_heads(run, facts, heads):
    """Let ADM's heads start as those of ADP's latent discriminator, which is finished. facts: what
    ADP's checkpoint must agree in."""
    path = broadcast(newest_checkpoint(run.out.path / "checkpoints", "adp"))
    if path is None:
        path = run.checkpoint               # finished in another --out
    facts = {name: value for name, value in facts.items() if name != "after_adp"}
    load_checkpoint(path, facts, dict(heads=heads), ())
