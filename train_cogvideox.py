"""Distil a CogVideoX pipeline (2b, 5b, 1.5) to a few steps by ADM, DMD or Phased DMD: train_sdxl.py's stages on a video family.

    python train_cogvideox.py --model THUDM/CogVideoX-2b --prompts prompts.txt --out out/cogvideox \\
        --bf16 --grad-checkpointing --lora-rank 64 --lora-rank-fake 64 --batch-size 1         # one GPU
    torchrun --nproc-per-node 8 train_cogvideox.py --model THUDM/CogVideoX-5b ... (the same flags)

Writes what train_sdxl.py writes; samples.png is a contact sheet, and every sampled video is a GIF beside it.
"""
from plumbing import run
from train_sdxl import ATTENTION, main


def encode_cogvideox(pipe, prompts, height, width, device, **tokens):
    """-> (cond, uncond), the transformer's keyword arguments for these prompts and for no prompt, each batch first."""
    text, no_text = pipe.encode_prompt(prompts, do_classifier_free_guidance=True, device=device, **tokens)
    return dict(encoder_hidden_states=text), dict(encoder_hidden_states=no_text)


def latent_video(pipe, network, args):
    """-> ((T,C,h,w) of a latent, height, width in pixels, leading frames to drop). 1.5 looks at pairs of latent frames: to an odd
    number its pipeline adds one in front, which is not decoded."""
    config, space = network.config, pipe.vae_scale_factor_spatial
    height, width = args.height or config.sample_height * space, args.width or config.sample_width * space
    frames = ((args.frames or config.sample_frames) - 1) // pipe.vae_scale_factor_temporal + 1
    drop = -frames % (config.patch_size_t or 1)
    return (frames + drop, config.in_channels, height // space, width // space), height, width, drop


def rotary(pipe, shape, height, width):
    """What the network is told besides the prompt, the same for every sample: 5b's and 1.5's rotary embeddings."""
    if not pipe.transformer.config.use_rotary_positional_embeddings:
        return {}
    return dict(image_rotary_emb=pipe._prepare_rotary_positional_embeddings(height, width, shape[0], pipe.transformer.device))


def decode_video(vae, x0, drop):
    """Latents [B,T,C,h,w] -> videos [B,3,F,H,W] in [-1,1]."""
    return vae.decode(x0[:, drop:].transpose(1, 2) / vae.config.scaling_factor, return_dict=False)[0].float()


def schedulers_cogvideox(scheduler, line, rows):
    """-> (the stock scheduler that does to a student what the trainer did, the arguments its pipeline must be called with)."""
    from diffusers import CogVideoXDDIMScheduler
    return CogVideoXDDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False), dict(num_inference_steps=len(rows) - 1)


def video_problems(args):
    """What is wrong with these flags for a video family."""
    wrong = [f"--steps {args.steps}: must divide 1000, or the stock scheduler would take other steps"] * (args.steps < 1 or 1000 % args.steps > 0)
    wrong += [f"--frames {args.frames}: must be 1 more than a multiple of 4"] * (args.frames is not None and (args.frames < 1 or args.frames % 4 != 1))
    return wrong + ["--stage adp: ADP is for images; leave the flag out"] * (args.stage == "adp")


PIPELINES = {
    "CogVideoXPipeline": dict(
        network="transformer", encode=encode_cogvideox, schedulers=schedulers_cogvideox, latent=latent_video, constant=rotary, decode=decode_video,
        last=None, lora=[*ATTENTION, "ff.net.0.proj", "ff.net.2"], problems=video_problems, tag="text-to-video",
        defaults=lambda config: dict(steps=8, guidance=[5.0, 7.0], pair_guidance=6.0, pair_steps=50),
        result=("frames", 'from diffusers.utils import export_to_gif\nexport_to_gif(sample, "sample.gif")')),
}

if __name__ == "__main__":
    run(lambda: main(__doc__, PIPELINES, embedded=False))
