"""Discriminators: a frozen backbone, taps that read its features, a small trained head on each tap.

    D(x) = heads(taps(x)):    taps(x) -> a list of feature maps    heads(features) -> D's value [B]

The latent discriminator's backbone *is* the frozen teacher (one copy of the weights); the pixel
discriminator's is a frozen vision encoder, SAM or DINOv2. Only the heads are trained. What is
tapped (ADM supplement, B.1 and B.2) stands in each family's own file, `taps` in families/:

    SDXL                the last ResNet of each block: 3 down, mid, 3 up         7 heads
    SD3, SD3.5          every DiT block                                         24 or 38
    CogVideoX           every third DiT block                                   10 or 14
    SAM, DINOv2         layers 3, 6, 9 and 12 of the ViT                         4
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


def group_norm(channels, values):
    """GroupNorm(32) for so many values a channel, or fewer groups where one would hold under 16:
    over one or two values normalisation leaves a constant, whose gradient is zero, silently."""
    groups = min(32, channels)
    while channels % groups or (groups > 1 and channels // groups * values < 16):
        groups -= 1
    return nn.GroupNorm(groups, channels)


class Head(nn.Module):
    """One tap's critic: [B,C,H,W], or [B,C,T,H,W] for video -> a map of logits.

    shape: the tap's (C,H,W) or (C,T,H,W). Raises ValueError if the map is under 2x2.
    2-D block (B.1): 4x4 convolution of stride 2, GroupNorm, SiLU.
    3-D block (B.2): 3x3x3 convolution, then 3x3 of stride 2 in each frame, GroupNorm, SiLU.
    A block halves the map, so a small map has fewer of them. *(choice)*: two blocks, a 1x1
    convolution to logits, a GroupNorm in front, as taps differ in scale by orders of magnitude, and
    `hidden` channels: heads as wide as their taps would be 7 billion parameters for SD3.5-Large.
    """

    def __init__(self, shape, hidden=256, blocks=2):
        super().__init__()
        is_video = len(shape) == 4
        channels = shape[0]
        height, width = shape[-2:]
        depth = min(blocks, int(math.log2(min(height, width))))
        if depth < 1:
            raise ValueError(f"a head needs a map of at least 2x2, but this tap gives "
                             f"{tuple(shape)}: use larger images or fewer taps")
        values = math.prod(shape[1:])                                   # of a channel
        layers = [group_norm(channels, values)]
        for _ in range(depth):
            if is_video:
                layers.append(nn.Conv3d(channels, hidden, 3, padding=1))
                layers.append(nn.Conv3d(hidden, hidden, (1, 3, 3), stride=(1, 2, 2),
                                        padding=(0, 1, 1)))
            else:
                layers.append(nn.Conv2d(channels, hidden, 4, stride=2, padding=1))
            values //= 4
            layers += [group_norm(hidden, values), nn.SiLU()]
            channels = hidden
        if is_video:
            layers.append(nn.Conv3d(hidden, 1, 1))
        else:
            layers.append(nn.Conv2d(hidden, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, features):
        return self.layers(features)


class Heads(nn.Module):
    """All heads of one discriminator: list of feature maps -> D's value [B]. The mean over each
    head's map, then over heads: the loss grows with neither resolution nor heads *(choice)*."""

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features):
        values = []
        for head, feature in zip(self.heads, features, strict=True):
            logits = head(feature).flatten(1)                                   # [B,pixels]
            dtype = torch.promote_types(logits.dtype, torch.float32)            # never a bf16 mean
            values.append(logits.mean(1, dtype=dtype))                          # [B]
        return torch.stack(values).mean(0)


class AdversarialLoss(NamedTuple):
    """What generator and discriminator minimise, two functions of D's values d_fake, d_real [B].
    A generator's loss that reads d_real gets it as a constant. x_real does depend on the generator,
    through the x_t it starts from, but the paper's loss (Eq. 7) has no such term."""
    generator: object
    discriminator: object


def hinge_generator(d_fake, d_real):
    """-D(x_fake) (Eq. 7)."""
    return -d_fake.mean()


def hinge_discriminator(d_fake, d_real):
    """max(0, 1 + D(x_fake)) + max(0, 1 - D(x_real)) (Eq. 8). 2 when it cannot tell them apart, 0
    when it can with a margin."""
    return F.relu(1 + d_fake).mean() + F.relu(1 - d_real).mean()


HINGE = AdversarialLoss(hinge_generator, hinge_discriminator)


class Taps(nn.Module):
    """A frozen backbone that returns its features: its own arguments -> a list of maps, [B,C,H,W]
    or [B,C,T,H,W], with gradient to the input and none to the weights.

    tapped: the modules of `net` to read, in order.
    to_map(x, output, cond): a tapped module's output as a map, beside the backbone's arguments.
    prepare: what is done to x first (vision encoders want their own size and colours).
    """

    def __init__(self, net, tapped, to_map, prepare=None):
        super().__init__()
        self.net = net.eval()                   # and frozen: no network that is trained
        for name, p in net.named_parameters():
            is_adapter = "lora_" in name        # a LoRA that shares these weights stays as it is
            p.requires_grad_(is_adapter and p.requires_grad)
        self.tapped = list(tapped)              # a list: they are in `net` already
        self.to_map = to_map
        self.prepare = prepare

    def forward(self, x, **cond):
        if self.prepare is not None:
            x = self.prepare(x)
        maps = []

        def read(module, args, output):
            # contiguous: channels-last GroupNorm crashes in torch 2.13's backward on the CPU
            maps.append(self.to_map(x, output, cond).contiguous())

        hooks = [module.register_forward_hook(read) for module in self.tapped]
        try:
            self.net(x, **cond, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        return maps


def to_grid(tokens, *grid):
    """Tokens [B, T*H*W, C] -> [B,C,T,H,W]; without T, [B,C,H,W]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class Discriminator(NamedTuple):
    """D_tau of the paper: D(x) = heads(taps(x))."""
    taps: Taps
    heads: Heads
