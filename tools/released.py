"""The released models in their own sizes, from the configurations they were published with: on the
meta device, which has shapes but no memory.

    python -m tools.released            # each with its parameters, in millions
"""
from typing import Callable, NamedTuple

import torch

from families import cogvideox, qwen, sd3, sdxl, wan
from families.family import Family
from families.vision import vision_taps
from tools.passes import blank_prompt


class Released(NamedTuple):
    net: torch.nn.Module    # on the meta device, as everything here
    x: torch.Tensor         # one sample of the size that the model was made for
    cond: dict              # the network's other keyword arguments, timestep included
    taps_of: Callable       # net -> discriminators.Taps
    family: Family = None   # None for a vision encoder


def of_family(family, net, *shape, **more):
    """shape: of a sample. more: what the network is told beside the prompt."""
    cond = blank_prompt(family, net.config, 1) | dict(more, timestep=torch.zeros(1))
    return Released(net, torch.zeros(1, *shape), cond, family.taps, family)


def stable_diffusion_xl():
    from diffusers import UNet2DConditionModel
    net = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)
    return of_family(sdxl.FAMILY, net, 4, 128, 128)


def stable_diffusion_3(**config):
    """config: what differs between SD3-Medium, SD3.5-Medium and SD3.5-Large."""
    from diffusers import SD3Transformer2DModel
    net = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
        joint_attention_dim=4096, pooled_projection_dim=2048, **config)
    return of_family(sd3.FAMILY, net, 16, 128, 128)


def cogvideox_of(rotary, **config):
    """rotary: with rotary positional embeddings, as 5b has them. config: what else differs."""
    from diffusers import CogVideoXTransformer3DModel
    net = CogVideoXTransformer3DModel(use_rotary_positional_embeddings=rotary, **config)
    embedded = None
    if rotary:
        embedded = (torch.zeros(17550, 64), torch.zeros(17550, 64))
    return of_family(cogvideox.FAMILY, net, 13, 16, 60, 90, image_rotary_emb=embedded)


def wan_2_1(**config):
    """81 frames of 480x832 pixels. config: what differs from the largest."""
    from diffusers import WanTransformer3DModel
    return of_family(wan.FAMILY, WanTransformer3DModel(**config), 16, 21, 60, 104)


def qwen_image():
    from diffusers import QwenImageTransformer2DModel
    return of_family(qwen.FAMILY, QwenImageTransformer2DModel(), 4096, 64,
                     img_shapes=[[(1, 64, 64)]])


def sam():
    from transformers import SamVisionConfig, SamVisionModel
    return Released(SamVisionModel(SamVisionConfig()), torch.zeros(1, 3, 1024, 1024), {},
                    vision_taps)


def dinov2():
    from transformers import Dinov2Config, Dinov2Model
    net = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    return Released(net, torch.zeros(1, 3, 518, 518), {}, vision_taps)


def released():
    """{name: Released} of all of them."""
    with torch.device("meta"):
        return {
            "SDXL": stable_diffusion_xl(),
            "SD3-Medium": stable_diffusion_3(
                num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                pos_embed_max_size=192),
            "SD3.5-Medium": stable_diffusion_3(
                num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                pos_embed_max_size=384, qk_norm="rms_norm",
                dual_attention_layers=tuple(range(13))),
            "SD3.5-Large": stable_diffusion_3(
                num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                pos_embed_max_size=192, qk_norm="rms_norm"),
            "CogVideoX-2b": cogvideox_of(False, num_attention_heads=30, num_layers=30),
            "CogVideoX-5b": cogvideox_of(True, num_attention_heads=48, num_layers=42),
            "Wan2.1-1.3B": wan_2_1(num_attention_heads=12, num_layers=30, ffn_dim=8960),
            "Wan2.1-14B": wan_2_1(num_attention_heads=40, num_layers=40, ffn_dim=13824),
            "Qwen-Image": qwen_image(),
            "SAM ViT-B": sam(),
            "DINOv2-B": dinov2(),
        }


def main():
    for name, model in released().items():
        size = sum(p.numel() for p in model.net.parameters())
        print(f"{name:14s}{size / 1e6:9.1f}")


if __name__ == "__main__":
    main()
