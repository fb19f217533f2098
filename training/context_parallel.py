"""Context parallelism for CogVideoX (--context-parallel N): N ranks share every sample.

From the first block to the last, each rank holds 1/N of the text tokens and 1/N of the video
tokens. Attention needs all tokens, so it swaps, by one all-to-all, 1/N of the tokens of all heads
for all tokens of 1/N of the heads, and back afterwards (Ulysses, arXiv 2309.14509). What does not
divide by N is padded, and padded keys are left out.

Every rank computes the whole loss from the gathered tokens. So the gradient of a block's weight is
N times this rank's share of the sum over tokens, and the mean over all ranks, which the optimizer
takes anyway, is the gradient.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd

from training.ranks import MOST_WAIT


class Group:
    """The ranks that share this rank's samples. A process is in one group, so these are class
    attributes, set by `context_parallel`."""
    ranks = None            # torch's process group
    rank = 0                # this process's place in it
    size = 1
    lengths = (0, 0)        # video tokens and text tokens before padding, in the latest pass


# -------------------------------------------------------------------------------- shares of tokens

def pad(x, dim):
    """Zeros at the end of `dim`, up to a multiple of the group's size."""
    later_dims = [0, 0] * (x.dim() - 1 - dim)                   # F.pad counts from the last one
    return F.pad(x, later_dims + [0, -x.shape[dim] % Group.size])


def own_share(x, dim):
    """This rank's 1/N of `dim`, of a tensor that is the same on every rank."""
    return pad(x, dim).chunk(Group.size, dim)[Group.rank]


def gather_shares(x):
    """The shares [B,s,C] of all ranks -> [B,N*s,C] on every rank."""
    parts = [torch.empty_like(x) for _ in range(Group.size)]
    dist.all_gather(parts, x.contiguous(), group=Group.ranks)
    return torch.cat(parts, 1)


class TakeShare(torch.autograd.Function):
    """Tokens [B,S,C], the same on every rank -> this rank's 1/N of them, [B,s,C].

    Backward: the gradients of all shares. Each is N times too large, as the module's text says.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.length = x.shape[1]
        return own_share(x, 1).contiguous()

    @staticmethod
    def backward(ctx, grad_output):
        return gather_shares(grad_output)[:, :ctx.length] / Group.size


class AllTokens(torch.autograd.Function):
    """This rank's share [B,s,C] -> all tokens [B,length,C] on every rank, without the padding.

    Backward: the gradients of all ranks are equal, so their sum is N times one of them.
    """

    @staticmethod
    def forward(ctx, x, length):
        return gather_shares(x)[:, :length]

    @staticmethod
    def backward(ctx, grad_output):
        return own_share(grad_output, 1) * Group.size, None


# --------------------------------------------------------------------------------------- attention

def swap(x):
    """[N,...], a slice for each rank -> [N,...], a slice from each rank."""
    return all_to_all_single_autograd(x.contiguous(), None, None, Group.ranks)


def tokens_to_heads(x):
    """1/N of the tokens of all heads, [B,H,s,d] -> all tokens of 1/N of the heads,
    [B,H/N,N*s,d]."""
    x = pad(x, 1).unflatten(1, (Group.size, -1)).movedim(1, 0)                  # [N,B,H/N,s,d]
    return swap(x).movedim(0, 2).flatten(2, 3)                                  # [B,H/N,N*s,d]


def heads_to_tokens(x, heads):
    """The way back: [B,H/N,N*s,d] -> [B,H,s,d]. heads: H, without padding."""
    x = x.unflatten(2, (Group.size, -1)).movedim(2, 0)                          # [N,B,H/N,s,d]
    return swap(x).movedim(0, 1).flatten(1, 2)[:, :heads]                       # [B,H,s,d]


def real_runs(text, video):
    """Which of the N*s swapped tokens are no padding, as runs [(start, end), ...]. From lengths
    alone: to look at a tensor, the host would wait for the device at each attention.

    text, video: tokens in one rank's share. Swapped tokens lie by rank, and each rank's text lies
    before its video.
    """
    video_length, text_length = Group.lengths
    runs = []
    for rank in range(Group.size):
        start = rank * (text + video)
        for first, share, length in ((start, text, text_length),
                                     (start + text, video, video_length)):
            real = min(max(length - rank * share, 0), share)
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], first + real)
            elif real:
                runs.append((first, first + real))
    return runs


def without_padding(x, runs):
    """Keys or values [B,H,N*s,d] -> the real ones. Attention that needs no mask for the others runs
    on its fastest kernel."""
    if runs == [(0, x.shape[2])]:
        return x
    return torch.cat([x[:, :, start:end] for start, end in runs], 2)


class UlyssesProcessor:
    """CogVideoX's attention, on a rank's share of the tokens. diffusers calls it in place of its
    own processor."""

    def __init__(self):
        from diffusers.models.embeddings import apply_rotary_emb
        self.rotate = apply_rotary_emb

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None,
                 image_rotary_emb=None):
        """hidden_states: video tokens. encoder_hidden_states: text tokens. Returns both."""
        text = encoder_hidden_states.shape[1]
        video = hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)           # [B,s,C]
        q = attn.to_q(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)    # [B,H,s,d]
        k = attn.to_k(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        v = attn.to_v(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if attn.norm_q:
            q = attn.norm_q(q)
        if attn.norm_k:
            k = attn.norm_k(k)
        if image_rotary_emb is not None:                        # video tokens only
            tables = [own_share(table, 0) for table in image_rotary_emb]
            q = torch.cat([q[:, :, :text], self.rotate(q[:, :, text:], tables)], 2)
            k = torch.cat([k[:, :, :text], self.rotate(k[:, :, text:], tables)], 2)
        q = tokens_to_heads(q)                                                  # [B,H/N,N*s,d]
        runs = real_runs(text, video)
        k = without_padding(tokens_to_heads(k), runs)                           # [B,H/N,real,d]
        v = without_padding(tokens_to_heads(v), runs)
        out = F.scaled_dot_product_attention(q, k, v)
        out = heads_to_tokens(out, attn.heads)                                  # [B,H,s,d]
        out = out.transpose(1, 2).flatten(2)                                    # [B,s,C]
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


# ------------------------------------------------------------------------------------- the network

def take_shares(block, args, kwargs):
    """Before the first block: this rank's share of the video and the text tokens."""
    if args:                        # recomputed activations: diffusers passes them in order
        video, text, *others = args
    else:
        video, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    Group.lengths = (video.shape[1], text.shape[1])
    video = TakeShare.apply(video)
    text = TakeShare.apply(text)
    if args:
        return (video, text, *others), kwargs
    return (), dict(kwargs, hidden_states=video, encoder_hidden_states=text)


def gather_output(block, args, out):
    """After the last block: all video and all text tokens."""
    video, text = out
    return (AllTokens.apply(video, Group.lengths[0]), AllTokens.apply(text, Group.lengths[1]))


def gather_tokens(tokens):
    """All video tokens, from the output [B,S,C] of any block; the last block gives all anyway. For
    taps inside of the network, which call net.gather_tokens."""
    if tokens.shape[1] == Group.lengths[0]:
        return tokens
    return AllTokens.apply(tokens, Group.lengths[0])


def context_parallel(net, size):
    """Make a CogVideoX transformer, and with it every later copy, share its tokens among groups of
    `size` neighbouring ranks."""
    rank = dist.get_rank()
    # every rank has to make all groups, its own and the others'
    groups = [dist.new_group(range(first, first + size), timeout=MOST_WAIT)
              for first in range(0, dist.get_world_size(), size)]
    Group.ranks = groups[rank // size]
    Group.rank = rank % size
    Group.size = size
    net.transformer_blocks[0].register_forward_pre_hook(take_shares, with_kwargs=True)
    net.transformer_blocks[-1].register_forward_hook(gather_output)
    net.set_attn_processor(UlyssesProcessor())
    net.gather_tokens = gather_tokens
