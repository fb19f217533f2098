"""Distil Qwen-Image by Phased DMD, or by ADM: train_sdxl.py's stages on its family.

    python train_qwen.py --model Qwen/Qwen-Image --prompts prompts.txt --out out/qwen \\
        --method phased_dmd --bf16 --grad-checkpointing --lora-rank-fake 64 --batch-size 1        # one GPU of 140 GB
    torchrun --nproc-per-node 8 train_qwen.py --model Qwen/Qwen-Image ... (the same flags)        # eight
    python train_qwen.py --model Qwen/Qwen-Image --lora-rank 64 --lora-rank-fake 64 ...           # ADM

A latent here is what the pipeline carries from step to step: tokens [h/2*w/2, 4C], each a square of 2x2 of the VAE's latent.
"""
import math

import torch.nn.functional as F
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from ode import Schedule
from plumbing import run
from train_sdxl import ATTENTION, IMAGE, main
from train_wan import decode_wan


def encode_qwen(pipe, prompts, height, width, device, max_sequence_length=512):
    """-> (cond, uncond), the transformer's keyword arguments for these prompts and for a blank one, as the model's card has it. The pipeline
    pads to the longest prompt of a batch; here all are padded to one length, masked, so that any of them make a batch."""
    def encode(prompts):
        text, mask = pipe.encode_prompt(prompts, device=device, max_sequence_length=max_sequence_length)
        mask = text.new_ones(text.shape[:2]) if mask is None else mask            # None: nothing was padded
        more = max_sequence_length - text.shape[1]
        return dict(encoder_hidden_states=F.pad(text, [0, 0, 0, more]), encoder_hidden_states_mask=F.pad(mask.bool(), [0, more]))
    return encode(prompts), encode([" "] * len(prompts))


def latent_qwen(pipe, network, args):
    """-> ((tokens, channels) of a latent, height, width in pixels, and both again, which unpacking needs)."""
    height, width = (n or pipe.default_sample_size * pipe.vae_scale_factor for n in (args.height, args.width))
    return (math.prod(tokens(pipe, height, width)), network.config.in_channels), height, width, (height, width)


def tokens(pipe, height, width):
    return tuple(n // (2 * pipe.vae_scale_factor) for n in (height, width))


def schedule_qwen(pipe, shape):
    """The shift grows with the number of tokens, and the network is told sigma itself, not 1000 times it. The config's shift_terminal
    is left out: it moves the stops of a sampler of many steps, not the noise that a stop stands for."""
    config = pipe.scheduler.config
    mu = calculate_shift(shape[0], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    shift = {"exponential": math.exp(mu), "linear": mu}[config.time_shift_type] if config.use_dynamic_shifting else None
    schedule = Schedule.from_diffusers(pipe.scheduler, shift=shift)
    schedule.timestep /= schedule.T
    return schedule


def decode_qwen(vae, x0, size):
    """Tokens [B,N,4C] -> images [B,3,H,W] in [-1,1]; to the VAE they are videos of one frame."""
    return decode_wan(vae, QwenImagePipeline._unpack_latents(x0, *size, vae.spatial_compression_ratio), 0)[:, :, 0]


def schedulers_qwen(scheduler, line, rows):
    """SD3's way, unshifted sigmas; the pipeline finds the shift as the trainer did, and shift_terminal would move the student's stops."""
    return type(scheduler).from_config(scheduler.config, shift_terminal=None), dict(num_inference_steps=len(rows) - 1, sigmas=[row / rows[0] for row in rows[:-1]])


def problems(args):
    """What is wrong with these flags for Qwen-Image."""
    wrong = ["--stage adp: ADP was made for SDXL's one step; leave the flag out"] * (args.stage == "adp")
    wrong += ["--cfg-student: the pipeline rescales what guidance gives, which the trainer does not; leave the flag out"] * (args.cfg_student is not None)
    wrong += ["--frames: Qwen-Image draws images; leave the flag out"] * (args.frames is not None)
    wrong += [f"--text-tokens {args.text_tokens}: 1024 is the pipeline's most"] * ((args.text_tokens or 0) > 1024)
    return wrong + ["--context-parallel: CogVideoX only; leave the flag out"] * (args.context_parallel != 1)


PIPELINES = {
    "QwenImagePipeline": dict(                                  # for ADM the values of SD3-Medium, the paper's flow model by LoRA (choice)
        IMAGE, network="transformer", encode=encode_qwen, schedulers=schedulers_qwen, schedule=schedule_qwen, latent=latent_qwen, decode=decode_qwen,
        constant=lambda pipe, shape, height, width: dict(img_shapes=[[(1, *tokens(pipe, height, width))]]), last=None, problems=problems,
        unguided=dict(true_cfg_scale=1.0),                      # what the exported pipeline is called with in place of guidance_scale
        lora=[*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"],
        defaults=lambda config: dict(steps=4, lr_generator=1e-6, lora_rank=64, guidance=[4.0, 4.0], pair_guidance=4.0, pair_steps=50)),
}

if __name__ == "__main__":
    run(lambda: main(__doc__, PIPELINES, embedded=False))
