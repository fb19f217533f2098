"""Wan 2.1, and 2.2 with its two transformers: flow models for videos, four steps. Phased DMD's own
example: two experts are exported as Wan 2.2 keeps its own, `transformer`, `transformer_2` and a
boundary, which stock diffusers runs as they are. Latents are [C,T,h,w].

*(choice)*: the empty prompt stands for no prompt, where the models' cards have a list of what is
not wanted; both networks of 2.2 are guided by one weight; that weight is drawn, as ADM's is; ADM's
discriminator reads the network for little noise at all times; ADM's rates are CogVideoX's.
"""
import torch
import torch.nn as nn

from discriminators import Taps, to_grid
from families.family import (ATTENTION, Family, Latent, decode_normalised_video, first_order_unipc,
                             video_problems)
from training.ranks import any_rank


class ByNoise(nn.Module):
    """Wan 2.2's two transformers as one network: each sample goes to the one that its timestep
    belongs to, `high` from the boundary up, else `low`."""

    def __init__(self, high, low, boundary):
        super().__init__()
        self.high = high
        self.low = low
        self.boundary = boundary
        self.config = high.config

    @property
    def units(self):
        return [self.high, self.low]

    def forward(self, x, timestep, return_dict=False, **cond):
        is_high = timestep >= self.boundary                                     # [B]
        out = torch.zeros_like(x)
        for net, mine in ((self.high, is_high), (self.low, ~is_high)):
            count = mine.sum().item()
            is_needed = count > 0
            if hasattr(net, "sharded"):
                # by another rank, which needs this one's part of the weights
                is_needed = any_rank(is_needed)
            if not is_needed:
                continue
            if count > 0:
                i = mine.nonzero()[:, 0]
            else:                                           # a sample goes along and adds nothing
                i = torch.zeros(1, dtype=torch.long, device=x.device)
            picked = {name: value[i] for name, value in cond.items()}
            part, = net(x[i], timestep=timestep[i], **picked, return_dict=False)
            out = out.index_put((i,), part.to(out.dtype) * min(count, 1), accumulate=True)
        return (out,)


def join(pipe):
    if pipe.transformer_2 is None:
        return pipe.transformer
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    return ByNoise(pipe.transformer, pipe.transformer_2, boundary)


def encode(pipe, prompts, latent, device, empty=True, max_sequence_length=512):
    tokens, no_tokens = pipe.encode_prompt(prompts, do_classifier_free_guidance=empty,
                                           device=device, max_sequence_length=max_sequence_length)
    if not empty:
        return dict(encoder_hidden_states=tokens), None
    return dict(encoder_hidden_states=tokens), dict(encoder_hidden_states=no_tokens)


def latent(pipe, net, args):
    height, width, frames = args.height or 480, args.width or 832, args.frames or 81
    space = pipe.vae_scale_factor_spatial
    frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
    shape = (net.config.in_channels, frames, height // space, width // space)
    return Latent(shape, height, width)


def decode(vae, x0, latent):
    return decode_normalised_video(vae, x0)


def student_scheduler(scheduler, straight, stops):
    shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
    steps = len(stops) - 1
    return first_order_unipc(scheduler, steps, shift), dict(num_inference_steps=steps)


def taps(net):
    """Every third block *(choice)*."""
    def to_map(x, output, cond):
        sizes = zip(x.shape[2:], net.config.patch_size)
        return to_grid(output, *(size // patch for size, patch in sizes))
    return Taps(net, net.blocks[2::3], to_map)


def prompt_shapes(config, tokens):
    return dict(encoder_hidden_states=(tokens or 512, config.text_dim))


def problems(args):
    wrong = video_problems(args)
    if args.method == "phased_dmd" and args.phases != 2:
        wrong.append(f"--phases {args.phases}: a Wan pipeline holds two experts")
    return wrong


def defaults(config):
    values = dict(steps=4, guidance=[4.0, 6.0], pair_guidance=5.0, pair_steps=50)
    if config.get("in_channels") == 48:             # 2.2 TI2V-5B, which has a VAE of its own
        values.update(height=704, width=1280, frames=121)
    return values


FAMILY = Family(
    pipeline="WanPipeline",
    medium="video",
    network="transformer",
    second_network="transformer_2",
    join=join,
    encode=encode,
    latent=latent,
    decode=decode,
    student_scheduler=student_scheduler,
    taps=taps,
    prompt_shapes=prompt_shapes,
    lora_layers=(*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
    defaults=defaults,
    problems=problems,
)
