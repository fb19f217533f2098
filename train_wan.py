"""Distil a Wan pipeline (2.1, and 2.2 with its two transformers) by Phased DMD, or by ADM: train_sdxl.py's stages on its families.

    python train_wan.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out out/wan \\
        --method phased_dmd --bf16 --grad-checkpointing --batch-size 1                            # one GPU
    torchrun --nproc-per-node 8 train_wan.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers ... (the same flags)

Two experts are exported as Wan2.2 keeps its own: transformer, transformer_2 and a boundary, which stock diffusers runs as they are.
"""
import torch
import torch.nn as nn

from plumbing import any_rank, run
from train_cogvideox import VIDEO, encode_cogvideox, video_problems
from train_sdxl import ATTENTION, main, unipc


class ByNoise(nn.Module):
    """Wan2.2's two transformers as one network: every sample goes to the one that its timestep belongs to."""

    def __init__(self, high, low, boundary):
        super().__init__()
        self.high, self.low, self.boundary, self.config = high, low, boundary, high.config

    @property
    def units(self):
        return [self.high, self.low]

    def forward(self, x, timestep, return_dict=False, **cond):
        high = timestep >= self.boundary                                          # [B]
        out = torch.zeros_like(x)
        for net, mine in ((self.high, high), (self.low, ~high)):
            count = mine.sum().item()
            if count or ("sharded" in net.__dict__ and any_rank(count)):          # other ranks need this one's part of the weights:
                i = mine.nonzero()[:, 0] if count else torch.zeros(1, dtype=torch.long, device=x.device)   # it goes along with a sample and adds nothing
                part, = net(x[i], timestep=timestep[i], **{k: v[i] for k, v in cond.items()}, return_dict=False)
                out = out.index_put((i,), part.to(out.dtype) * min(count, 1), accumulate=True)
        return (out,)


def join(pipe):
    if pipe.transformer_2 is None:
        return pipe.transformer
    return ByNoise(pipe.transformer, pipe.transformer_2, pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps)


def encode_wan(pipe, prompts, height, width, device, max_sequence_length=512):
    return encode_cogvideox(pipe, prompts, height, width, device, max_sequence_length=max_sequence_length)


def latent_wan(pipe, network, args):
    """-> ((C,T,h,w) of a latent, height, width in pixels, leading frames to drop)."""
    height, width, frames = args.height or 480, args.width or 832, args.frames or 81
    space = pipe.vae_scale_factor_spatial
    return (network.config.in_channels, (frames - 1) // pipe.vae_scale_factor_temporal + 1, height // space, width // space), height, width, 0


def decode_wan(vae, x0, drop):
    """Latents [B,C,T,h,w] -> videos [B,3,F,H,W] in [-1,1]."""
    mean, std = (torch.tensor(v, device=x0.device, dtype=x0.dtype).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode(x0 * std + mean, return_dict=False)[0].float()


def schedulers_wan(scheduler, line, rows):
    shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
    return unipc(scheduler, len(rows) - 1, shift), dict(num_inference_steps=len(rows) - 1)


def problems(args):
    wrong = video_problems(args) + ["--context-parallel: CogVideoX only; leave the flag out"] * (args.context_parallel != 1)
    return wrong + [f"--phases {args.phases}: a Wan pipeline holds two experts"] * (args.method == "phased_dmd" and args.phases != 2)


PIPELINES = {
    "WanPipeline": dict(
        VIDEO, join=join, encode=encode_wan, schedulers=schedulers_wan, latent=latent_wan, decode=decode_wan, problems=problems,
        constant=lambda pipe, shape, height, width: {}, lora=[*ATTENTION, "ffn.net.0.proj", "ffn.net.2"],
        defaults=lambda config: dict(steps=4, guidance=[4.0, 6.0], pair_guidance=5.0, pair_steps=50)),
}

if __name__ == "__main__":
    run(lambda: main(__doc__, PIPELINES, embedded=False))
