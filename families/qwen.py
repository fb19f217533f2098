"""Qwen-Image: a flow transformer on tokens, four steps, by LoRA. The papers have Phased DMD of it;
for ADM the values of SD3-Medium *(choice)*. The real score's guidance is the plain one, as the
other families have it; the pipeline's own brings the result back to the prompt's length *(choice)*.

A latent here is what the pipeline carries from step to step: tokens [h/2*w/2, 4C], each of them a
square of 2x2 of the VAE's latent.
"""
import math

import torch.nn.functional as F

from discriminators import Taps, to_grid
from families.family import (ATTENTION, Family, Latent, decode_normalised_video, unshifted_sigmas)
from training.schedules import from_diffusers


def encode(pipe, prompts, latent, device, empty=True, max_sequence_length=512):
    """For no prompt the model's card has a blank one. The pipeline pads to the longest prompt of a
    batch; here all are padded to one length, masked, so that any of them make a batch."""
    def embed(prompts):
        text, mask = pipe.encode_prompt(prompts, device=device,
                                        max_sequence_length=max_sequence_length)
        if mask is None:                                    # nothing was padded
            mask = text.new_ones(text.shape[:2])
        more = max_sequence_length - text.shape[1]
        return dict(encoder_hidden_states=F.pad(text, [0, 0, 0, more]),
                    encoder_hidden_states_mask=F.pad(mask.bool(), [0, more]))
    uncond = embed([" "] * len(prompts)) if empty else None
    return embed(prompts), uncond


def token_grid(pipe, height, width):
    side = 2 * pipe.vae_scale_factor
    return height // side, width // side


def latent(pipe, net, args):
    height = args.height or pipe.default_sample_size * pipe.vae_scale_factor
    width = args.width or pipe.default_sample_size * pipe.vae_scale_factor
    tokens = math.prod(token_grid(pipe, height, width))
    return Latent((tokens, net.config.in_channels), height, width)


def decode(vae, x0, latent):
    """Tokens [B,N,4C] -> images [B,3,H,W] in [-1,1]; to the VAE they are videos of one frame."""
    from diffusers import QwenImagePipeline
    x0 = QwenImagePipeline._unpack_latents(x0, latent.height, latent.width,
                                           vae.spatial_compression_ratio)       # [B,C,1,h,w]
    return decode_normalised_video(vae, x0)[:, :, 0]


def schedule(pipe, latent):
    """The shift grows with the number of tokens, and the network is told sigma itself, not 1000
    times it. The config's shift_terminal is left out: it moves the stops of a sampler of many
    steps, not the noise that a stop stands for."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
    config = pipe.scheduler.config
    shift = None
    if config.use_dynamic_shifting:
        mu = calculate_shift(latent.shape[0], config.base_image_seq_len, config.max_image_seq_len,
                             config.base_shift, config.max_shift)
        shift = {"exponential": math.exp(mu), "linear": mu}[config.time_shift_type]
    table = from_diffusers(pipe.scheduler, shift=shift)
    table.timestep /= table.T
    return table


def student_scheduler(scheduler, straight, stops):
    """The pipeline finds the shift as the trainer did; shift_terminal would move the student's
    stops."""
    stock = type(scheduler).from_config(scheduler.config, shift_terminal=None)
    return stock, unshifted_sigmas(stops)


def constant(pipe, latent):
    return dict(img_shapes=[[(1, *token_grid(pipe, latent.height, latent.width))]])


def taps(net):
    """Every third block *(choice)*, which returns (text, image)."""
    def to_map(x, output, cond):
        return to_grid(output[1], *cond["img_shapes"][0][0][1:])
    return Taps(net, net.transformer_blocks[2::3], to_map)


def prompt_shapes(config, tokens):
    return dict(encoder_hidden_states=(tokens or 512, config.joint_attention_dim),
                encoder_hidden_states_mask=(tokens or 512,))


def problems(args):
    wrong = []
    if args.cfg_student is not None:
        wrong.append("--cfg-student: the pipeline rescales what guidance gives, which the trainer "
                     "does not; leave the flag out")
    if args.text_tokens is not None and args.text_tokens > 1024:
        wrong.append(f"--text-tokens {args.text_tokens}: 1024 is the pipeline's most")
    return wrong


def defaults(config):
    return dict(steps=4, lr_generator=1e-6, lora_rank=64, guidance=[4.0, 4.0], pair_guidance=4.0,
                pair_steps=50)


FAMILY = Family(
    pipeline="QwenImagePipeline",
    medium="image",
    network="transformer",
    encode=encode,
    latent=latent,
    decode=decode,
    schedule=schedule,
    student_scheduler=student_scheduler,
    constant=constant,
    taps=taps,
    prompt_shapes=prompt_shapes,
    lora_layers=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                 "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    defaults=defaults,
    problems=problems,
    unguided=dict(true_cfg_scale=1.0),
)
