"""Discriminators: a frozen backbone, taps that read its features, and one small trainable head on each tap.

    python discriminators.py        # taps, shapes and parameters of every family (meta device), a picture (seconds)

        backbone         frozen  heads  trained   maps (channels x [frames x] height x width)
        SDXL             2567.5      7     31.0   2 of 320x128x128, 2 of 640x64x64, 3 of 1280x32x32
        CogVideoX-2b     1693.8     10    162.3   10 of 1920x13x30x45

The latent discriminator's backbone *is* the frozen teacher (one copy of the weights); the pixel discriminator's is a
frozen vision encoder, SAM or DINOv2. Only the heads are trained (ADM supplement, B.1 and B.2).
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------- heads

def group_norm(channels, area):
    """GroupNorm(32), or fewer groups where the map is so small that a group would hold under 16 values: over one or two
    values normalisation leaves a constant, whose gradient is zero, silently."""
    groups = min(32, channels)
    while channels % groups or (groups > 1 and channels // groups * area < 16):
        groups -= 1
    return nn.GroupNorm(groups, channels)


class Head(nn.Module):
    """One tap's critic: [B,C,H,W] (or [B,C,T,H,W] for video) -> a map of logits.

    shape: the tap's (C,H,W) or (C,T,H,W). 2-D block: 4x4 convolution of stride 2, GroupNorm, SiLU (B.1). 3-D block: 3x3x3
    convolution, then 3x3 of stride 2 in each frame, GroupNorm, SiLU (B.2). The depth is capped by the map, which each
    block halves. Choices of ours: `hidden` = 256 channels (as wide as the tap is out of reach for a DiT: 7 billion for
    SD3.5-Large), two blocks, a 1x1 convolution to logits, and a GroupNorm in front, because taps differ in scale by
    orders of magnitude. Raises ValueError if the map is under 2x2.
    """

    def __init__(self, shape, hidden=256, blocks=2):
        super().__init__()
        (channels, *frames, height, width), video = shape, len(shape) == 4
        depth = min(blocks, min(height, width).bit_length() - 1)
        if depth < 1:
            raise ValueError(f"a head needs a map of at least 2x2, but this tap gives {tuple(shape)}: use larger images or fewer taps")
        area = height * width * (frames[0] if video else 1)
        layers = [group_norm(channels, area)]
        for _ in range(depth):
            if video:
                layers += [nn.Conv3d(channels, hidden, 3, padding=1), nn.Conv3d(hidden, hidden, (1, 3, 3), (1, 2, 2), (0, 1, 1))]
            else:
                layers += [nn.Conv2d(channels, hidden, 4, 2, padding=1)]
            area //= 4
            layers += [group_norm(hidden, area), nn.SiLU()]
            channels = hidden
        layers += [(nn.Conv3d if video else nn.Conv2d)(hidden, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features):
        return self.layers(features)


class Heads(nn.Module):
    """All heads of one discriminator: list of feature maps -> D's value [B]. The mean over each head's map, then over heads,
    so that the loss grows with neither the resolution nor the number of heads (choice)."""

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features):
        logits = [head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)]
        return torch.stack([l.mean(1, dtype=torch.promote_types(l.dtype, torch.float32)) for l in logits]).mean(0)    # never a bf16 mean


def hinge(fake, real):
    """The discriminator's loss on values [B] (Eq. 8). 2 when it cannot tell them apart, 0 when it can with a margin."""
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


# ----------------------------------------------------------------------------------------------------------------- taps

def quarters(layers):
    """Layers 3, 6, 9 and 12 of a ViT of twelve; of deeper ones the same four places."""
    return [layers[len(layers) * k // 4 - 1] for k in (1, 2, 3, 4)]


def to_grid(tokens, *grid):
    """[B, T*H*W, C] -> [B,C,T,H,W], or without T."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def whole(net, tokens):
    """All tokens, where ranks share them (train_cogvideox.py); the last block gives all of them anyway."""
    return net.whole(tokens) if hasattr(net, "whole") else tokens


# class of the backbone -> (the modules to tap, what turns a module's output into a map; `x` is the backbone's input, `cond` its other arguments)
FAMILIES = {
    "UNet2DConditionModel": (                                   # the last ResNet of each block: 3 down, mid, 3 up for SDXL
        lambda net: [block.resnets[-1] for block in (*net.down_blocks, net.mid_block, *net.up_blocks)],
        lambda net, x, out, cond: out),
    "SD3Transformer2DModel": (                                  # every block, which returns (text, image)
        lambda net: net.transformer_blocks,
        lambda net, x, out, cond: to_grid(out[1], *(n // net.config.patch_size for n in x.shape[2:]))),
    "CogVideoXTransformer3DModel": (                            # every third block, which returns (video, text); x is [B,T,C,H,W]
        lambda net: net.transformer_blocks[2::3],
        lambda net, x, out, cond: to_grid(whole(net, out[0]), x.shape[1] // (net.config.patch_size_t or 1), *(n // net.config.patch_size for n in x.shape[3:]))),
    "WanTransformer3DModel": (                                  # every third block (choice); x is [B,C,T,H,W], patches are 1x2x2
        lambda net: net.blocks[2::3],
        lambda net, x, out, cond: to_grid(out, *(n // p for n, p in zip(x.shape[2:], net.config.patch_size)))),
    "QwenImageTransformer2DModel": (                            # every third block (choice), which returns (text, image); x is tokens [B,h*w,C]
        lambda net: net.transformer_blocks[2::3],
        lambda net, x, out, cond: to_grid(out[1], *cond["img_shapes"][0][0][1:])),
    "SamVisionModel": (                                         # channels last
        lambda net: quarters(net.vision_encoder.layers),
        lambda net, x, out, cond: out.permute(0, 3, 1, 2)),
    "Dinov2Model": (                                            # the first token is CLS
        lambda net: quarters(net.encoder.layer),
        lambda net, x, out, cond: to_grid(out[:, 1:], *(n // net.config.patch_size for n in x.shape[2:]))),
}


class Taps(nn.Module):
    """A frozen backbone that returns its features. forward takes the backbone's own arguments and gives a list of maps,
    [B,C,H,W] or [B,C,T,H,W], with gradient to the input and none to the weights.

    The features are the *return value* on purpose: wrapped by FSDP2 as a root, a module may only be used through its
    output. (Around a network whose blocks are sharded and whose rest is whole, as plumbing.shard leaves a frozen one, it needs no root.) Raises ValueError for a backbone of a class without a row in FAMILIES.
    """

    def __init__(self, net):
        super().__init__()
        kind = type(net).__name__.removeprefix("FSDP")          # which FSDP2 puts before the class of what it shards
        if kind not in FAMILIES:
            raise ValueError(f"no taps are known for a {kind}; known backbones: {', '.join(FAMILIES)}")
        self.net = net.eval()
        for name, p in net.named_parameters():
            p.requires_grad_("lora_" in name and p.requires_grad)                 # LoRAs that share the backbone's weights stay as they are
        self.modules_of, self.to_map = FAMILIES[kind]
        self.is_vision = kind in ("SamVisionModel", "Dinov2Model")

    def see(self, images):
        """Images [B,3,H,W] in [-1,1] as a vision encoder wants them: its own size, ImageNet's mean and deviation."""
        images = F.interpolate(images, size=(self.net.config.image_size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        return ((images + 1) / 2 - mean) / std

    def forward(self, x, **kwargs):
        x = self.see(x) if self.is_vision else x
        maps = []                                               # contiguous: torch 2.13's channels-last GroupNorm crashes on the CPU
        hooks = [module.register_forward_hook(                  # in the backward of detached features
            lambda _, args, out: maps.append(self.to_map(self.net, x, out, kwargs).contiguous()))
                 for module in self.modules_of(self.net)]
        try:
            self.net(x, **kwargs, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        return maps


def tap_shapes(net, x, **kwargs):
    """Shapes of the maps, without the batch, that Taps(net)(x, ...) would give: a twin on the meta device runs, nothing is computed."""
    to_meta = lambda v: {k: to_meta(u) for k, u in v.items()} if isinstance(v, dict) else tuple(map(to_meta, v)) if isinstance(v, tuple) \
        else v.to("meta", torch.float32 if v.is_floating_point() else v.dtype) if torch.is_tensor(v) else v
    with torch.device("meta"):
        twin = type(net).from_config(net.config) if hasattr(type(net), "from_config") else type(net)(net.config)
        return [tuple(f.shape[1:]) for f in Taps(twin)(to_meta(x), **to_meta(kwargs))]


def heads_for(net, x, hidden=256, blocks=2, **kwargs):
    """Untrained heads that fit the features Taps(net) gives for inputs shaped like x."""
    return Heads([Head(shape, hidden, blocks) for shape in tap_shapes(net, x, **kwargs)])


# ----------------------------------------------------------------------------------------------------------------- demo

def released():
    """Name -> (meta-device backbone, x, its other arguments) from the configurations of the released models."""
    from diffusers import CogVideoXTransformer3DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import Dinov2Config, Dinov2Model, SamVisionConfig, SamVisionModel
    t = torch.zeros(1)
    sd3 = lambda **k: (SD3Transformer2DModel(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
                                             joint_attention_dim=4096, pooled_projection_dim=2048, **k), torch.zeros(1, 16, 128, 128),
                       dict(timestep=t, encoder_hidden_states=torch.zeros(1, 154, 4096), pooled_projections=torch.zeros(1, 2048)))
    video = lambda rotary, **k: (CogVideoXTransformer3DModel(use_rotary_positional_embeddings=rotary, **k), torch.zeros(1, 13, 16, 60, 90),
                                 dict(timestep=t, encoder_hidden_states=torch.zeros(1, 226, 4096),
                                      image_rotary_emb=(torch.zeros(17550, 64), torch.zeros(17550, 64)) if rotary else None))
    return {
        "SDXL": (UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
            torch.zeros(1, 4, 128, 128), dict(timestep=t, encoder_hidden_states=torch.zeros(1, 77, 2048),
                                              added_cond_kwargs=dict(text_embeds=torch.zeros(1, 1280), time_ids=torch.zeros(1, 6)))),
        "SD3-Medium": sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
        "SD3.5-Medium": sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                            qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        "SD3.5-Large": sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"),
        "CogVideoX-2b": video(False, num_attention_heads=30, num_layers=30),
        "CogVideoX-5b": video(True, num_attention_heads=48, num_layers=42),
        "Qwen-Image": (QwenImageTransformer2DModel(), torch.zeros(1, 4096, 64), dict(
            timestep=t, encoder_hidden_states=torch.zeros(1, 512, 3584), encoder_hidden_states_mask=torch.ones(1, 512, dtype=torch.long),
            img_shapes=[[(1, 64, 64)]])),
        "SAM ViT-B": (SamVisionModel(SamVisionConfig()), torch.zeros(1, 3, 1024, 1024), {}),
        "DINOv2-B": (Dinov2Model(Dinov2Config(image_size=518, patch_size=14)), torch.zeros(1, 3, 518, 518), {}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/discriminators", help="folder for the picture and result.json")
    parser.add_argument("--hidden", type=int, default=256, help="channels inside a head (choice; the paper is silent)")
    parser.add_argument("--blocks", type=int, default=2, help="most stride-2 blocks in a head (choice)")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from diffusers import StableDiffusionXLPipeline

    print(f"heads of {args.hidden} channels, at most {args.blocks} blocks; parameters in millions\n")
    print(f"{'backbone':14s}{'frozen':>9s}{'heads':>7s}{'trained':>9s}   maps (channels x [frames x] height x width)")
    result = {}
    with torch.device("meta"):
        for name, (net, x, kwargs) in released().items():
            maps = tap_shapes(net, x, **kwargs)
            heads = Heads([Head(shape, args.hidden, args.blocks) for shape in maps])
            frozen, trained = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (net, heads))
            runs = [[shape, sum(s == shape for s in maps)] for shape in dict.fromkeys(maps)]
            print(f"{name:14s}{frozen:9.1f}{len(maps):7d}{trained:9.1f}   " + ", ".join(f"{n} of {'x'.join(map(str, s))}" for s, n in runs))
            result[name] = dict(frozen_millions=frozen, heads=len(maps), trained_millions=trained, maps=maps)
    (out / "result.json").write_text(json.dumps(result, indent=1))

    # What the taps see: the embedded teacher's features of one drawing, at three noise levels.
    import shapes
    from ode import Schedule
    pipe = StableDiffusionXLPipeline.from_pretrained(Path(__file__).parent / "teacher").to(torch.float32)
    schedule, taps = Schedule.from_diffusers(pipe.scheduler), Taps(pipe.unet)
    caption = "a large red circle on blue"
    tokens, _, pooled, _ = pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
    cond = dict(encoder_hidden_states=tokens, added_cond_kwargs=dict(text_embeds=pooled, time_ids=torch.tensor([[32., 32, 0, 0, 32, 32]])))
    scale = pipe.vae.config.scaling_factor
    figure, axes = plt.subplots(3, 8, figsize=(13, 5))
    with torch.no_grad():
        x0 = pipe.vae.encode(shapes.draw(caption, 3, 12)[None]).latent_dist.mode() * scale
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        for row, i in zip(axes, (100, 400, 800)):
            x = schedule.noise(x0, eps, i)
            shown = [((pipe.vae.decode(x / scale).sample[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0)]
            shown += [f[0].square().mean(0).sqrt() for f in taps(x, timestep=schedule.timestep[i], **cond)]
            for ax, image, name in zip(row, shown, ["x_t"] + ["down 1", "down 2", "down 3", "mid", "up 1", "up 2", "up 3"]):
                ax.imshow(image)
                ax.set(xticks=[], yticks=[], title=f"{name}, t = {i}" if name.startswith("x") else name)
    figure.suptitle("what the seven heads of the latent discriminator are given (root mean square over channels)")
    figure.tight_layout()
    figure.savefig(out / "taps.png", dpi=100)
    print(f"\nwrote {out}/taps.png and {out}/result.json")


if __name__ == "__main__":
    main()
