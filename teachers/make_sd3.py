"""Train the small SD3 that ships: a flow model that draws the captioned shapes.

    python -m teachers.make_sd3 --out teachers/sd3      # 35 to 67 minutes on one core
    python -m teachers.shapes --mark teachers/sd3       # its marks, by its model card

The small SDXL's VAE and text encoder, a new transformer, and no T5: one empty token stands in its
place.
"""
import time

import torch

from adm import score_loss
from families import sd3
from families.family import Latent
from teachers.make_sdxl import encode_all, pretrain
from teachers.shapes import CAPTIONS, PX, drawings, legibility, mark, shipped_teacher
from training.errors import run_main
from training.schedules import from_diffusers
from training.scripts import a_count, folder_for, parser_for, zero_or_more

CALL = "num_inference_steps=25, guidance_scale=3.0, max_sequence_length=1"
CARD = f"""```python
pipe = StableDiffusion3Pipeline.from_pretrained(".", text_encoder_3=None, tokenizer_3=None)
sample = pipe("a small red circle on blue", {CALL}).images[0]
```
"""


def build():
    """The pipeline with an untrained transformer. It samples unshifted: the shift is for large
    images, and of eight by eight latents it would leave the last of four steps half of the way."""
    from diffusers import (FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    sdxl = shipped_teacher()
    sdxl.vae.register_to_config(shift_factor=0.0, _name_or_path="teachers/sdxl/vae")
    net = SD3Transformer2DModel(
        sample_size=PX // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
        attention_head_dim=24, num_attention_heads=5, joint_attention_dim=64,
        caption_projection_dim=120, pooled_projection_dim=64, pos_embed_max_size=PX // 8)
    return StableDiffusion3Pipeline(
        transformer=net, vae=sdxl.vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        tokenizer=sdxl.tokenizer_2, text_encoder=sdxl.text_encoder_2,
        tokenizer_2=sdxl.tokenizer_2, text_encoder_2=sdxl.text_encoder_2,
        tokenizer_3=None, text_encoder_3=None)


@torch.no_grad()
def embed_captions(pipe):
    """The transformer's arguments for all captions and, last, for the empty one."""
    latent = Latent((4, PX // 4, PX // 4), PX, PX)
    cond, uncond = sd3.FAMILY.encode(pipe, CAPTIONS, latent, "cpu", max_sequence_length=1)
    return {name: torch.cat([cond[name], uncond[name][:1]]) for name in cond}


def train(pipe, index, images, iterations, batch=64):
    """Velocity targets (Eq. 3) at SD3's shifted noise levels."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    schedule = from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0))
    net = pipe.transformer
    latents = encode_all(pipe.vae, images)
    embedded = embed_captions(pipe)

    def loss_of():
        pick = torch.randint(len(latents), (batch,))
        caption = index[pick].where(torch.rand(batch) > 0.1, len(CAPTIONS))     # or the empty one
        cond = {name: value[caption] for name, value in embedded.items()}
        eps = torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1, schedule.T + 1, (batch,))
        return score_loss(net, schedule, latents[pick], eps, t, cond)

    def marks_of(nets):
        pipe.transformer, = nets
        right, images = mark(pipe, 144, max_sequence_length=1)
        return dict(accuracy=right, legible=legibility(images))

    pipe.transformer, = pretrain("sd3", torch.nn.ModuleList([net]), loss_of, marks_of,
                                 iterations)


def main():
    p = parser_for(__doc__)
    p.add_argument("--out", default="out/sd3-teacher", help="where the pipeline goes")
    p.add_argument("--iterations", type=a_count, default=12000)
    p.add_argument("--seed", type=zero_or_more, default=0)
    args = p.parse_args()
    began = time.time()
    out = folder_for(args.out)

    torch.manual_seed(args.seed)
    index, images = drawings(65536, args.seed)
    pipe = build()
    train(pipe, index, images, args.iterations)
    pipe.to(torch.bfloat16).save_pretrained(out)
    (out / "README.md").write_text(CARD, encoding="utf-8")   # for --mark
    print(f"saved {out} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
