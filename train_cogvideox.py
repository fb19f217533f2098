"""Distil a CogVideoX pipeline (2b, 5b, 1.5) to a few steps by ADM, DMD or Phased DMD: train_sdxl.py's stages on a video family.

    python train_cogvideox.py --model THUDM/CogVideoX-2b --prompts prompts.txt --out out/cogvideox \\
        --bf16 --grad-checkpointing --lora-rank 64 --lora-rank-fake 64 --batch-size 1         # one GPU
    torchrun --nproc-per-node 8 train_cogvideox.py --model THUDM/CogVideoX-5b --context-parallel 2 ... (the same flags)

Writes what train_sdxl.py writes; samples.png is a contact sheet, and every sampled video is a GIF beside it.
"""
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch.distributed._functional_collectives import all_to_all_single_autograd

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
    return dict(image_rotary_emb=pipe._prepare_rotary_positional_embeddings(height, width, shape[0], "cpu"))


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
    group, ranks = args.context_parallel, int(os.environ.get("WORLD_SIZE", 1))
    wrong += [f"--context-parallel {group}: must be above 0, and divide the number of ranks, {ranks}"] * (group < 1 or ranks % group > 0)
    return wrong + ["--stage adp: ADP is for images; leave the flag out"] * (args.stage == "adp")


# ------------------------------------------------------------------------------------------------------ context parallelism
#
# --context-parallel N: N ranks share every sample. From the first block to the last each holds 1/N of the text and of the video
# tokens; attention swaps that, by one all-to-all, for all tokens of 1/N of the heads (Ulysses, arXiv 2309.14509), and back. What
# does not divide by N is padded, and padded keys are masked. Every rank computes the whole loss from the gathered tokens, so the
# gradient of a block's weight is N times its share of the tokens' sum, and the mean over all ranks, which the optimizer
# takes anyway, is the gradient.

class Group:
    """The ranks that share this rank's samples; `lengths`: how many (video, text) tokens there are before padding."""
    ranks, rank, size, lengths = None, 0, 1, (0, 0)


def pad(x, dim):
    """Zeros at the end of `dim`, up to a multiple of the group's size."""
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, -x.shape[dim] % Group.size])


def mine(x, dim):
    """This rank's 1/N of `dim`, of something that is the same on every rank."""
    return pad(x, dim).chunk(Group.size, dim)[Group.rank]


class Share(torch.autograd.Function):
    """Tokens [B,S,C], the same on every rank -> this rank's 1/N of them. Backward: all shares, whose gradients are N times too large."""

    @staticmethod
    def forward(ctx, x):
        ctx.length = x.shape[1]
        return mine(x, 1).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return gather(gradient)[:, :ctx.length] / Group.size


class Whole(torch.autograd.Function):
    """This rank's share -> all tokens [B,S,C] on every rank, padding dropped. Backward: the ranks' gradients are equal, so their sum is N times one."""

    @staticmethod
    def forward(ctx, x, length):
        return gather(x)[:, :length]

    @staticmethod
    def backward(ctx, gradient):
        return mine(gradient, 1) * Group.size, None


def gather(x):
    parts = [torch.empty_like(x) for _ in range(Group.size)]
    dist.all_gather(parts, x.contiguous(), group=Group.ranks)
    return torch.cat(parts, 1)


def swap(x):
    """[N,...], a slice for each rank -> [N,...], a slice from each rank."""
    return all_to_all_single_autograd(x.contiguous(), None, None, Group.ranks)


class UlyssesProcessor:
    """CogVideoX's attention on a share of its tokens."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text, n = encoder_hidden_states.shape[1], Group.size
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)             # [B,s,C], s = 1/N of all
        q, k, v = (project(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v))   # [B,H,s,d]
        q, k = attn.norm_q(q) if attn.norm_q else q, attn.norm_k(k) if attn.norm_k else k
        if image_rotary_emb is not None:
            tables = [mine(table, 0) for table in image_rotary_emb]
            q, k = (torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], tables)], 2) for x in (q, k))
        # all tokens of H/N heads: [B,H,s,d] -> [N,B,H/N,s,d], swapped -> [B,H/N,N*s,d]
        q, k, v = (swap(pad(x, 1).unflatten(1, (n, -1)).movedim(1, 0)).movedim(0, 2).flatten(2, 3) for x in (q, k, v))
        place = torch.arange(q.shape[2], device=q.device)                         # tokens now lie by rank, each rank's text before its video
        rank, within = place // tokens.shape[1], place % tokens.shape[1]
        real = torch.where(within < text, rank * text + within < Group.lengths[1],
                           rank * hidden_states.shape[1] + within - text < Group.lengths[0])                               # [N*s]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if real.all() else real[None, None, None])
        out = swap(out.unflatten(2, (n, -1)).movedim(2, 0)).movedim(0, 1).flatten(1, 2)[:, :attn.heads]                    # [B,H,s,d]
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, text:], out[:, :text]


def context_parallel(net, size):
    """Make a CogVideoX transformer, and with it every later copy of it, share its tokens among groups of `size` neighbouring ranks."""
    groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
    Group.size, Group.rank, Group.ranks = size, dist.get_rank() % size, groups[dist.get_rank() // size]

    def share(module, args, kwargs):
        both = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])   # recomputation passes them in order
        Group.lengths = tuple(x.shape[1] for x in both)
        video, text = map(Share.apply, both)
        return ((video, text, *args[2:]), kwargs) if args else ((), dict(kwargs, hidden_states=video, encoder_hidden_states=text))

    net.transformer_blocks[0].register_forward_pre_hook(share, with_kwargs=True)
    net.transformer_blocks[-1].register_forward_hook(lambda module, args, out: tuple(map(Whole.apply, out, Group.lengths)))
    net.set_attn_processor(UlyssesProcessor())
    net.whole = lambda tokens: tokens if tokens.shape[1] == Group.lengths[0] else Whole.apply(tokens, Group.lengths[0])   # for taps inside


# what train_sdxl.py's rows hold, for videos; no ADP, which is for images
VIDEO = dict(network="transformer", encode=encode_cogvideox, last=None, tag="text-to-video",
             result=("frames", 'from diffusers.utils import export_to_gif\nexport_to_gif(sample, "sample.gif")'))
PIPELINES = {
    "CogVideoXPipeline": dict(
        VIDEO, schedulers=schedulers_cogvideox, latent=latent_video, constant=rotary, decode=decode_video, problems=video_problems,
        parallel=context_parallel, lora=[*ATTENTION, "ff.net.0.proj", "ff.net.2"],
        defaults=lambda config: dict(steps=8, guidance=[5.0, 7.0], pair_guidance=6.0, pair_steps=50)),
}

if __name__ == "__main__":
    run(lambda: main(__doc__, PIPELINES, embedded=False))
