"""What the discriminators read: taps, shapes and parameters of every family, and a picture.

    python -m lesson.taps               # seconds: released sizes on the meta device, nothing loaded

        backbone         frozen  heads  trained   maps (channels x [frames x] height x width)
        SDXL             2567.5      7     31.0   2 of 320x128x128, 2 of 640x64x64, 3 of 1280x32x32
        CogVideoX-2b     1693.8     10    162.3   10 of 1920x13x30x45

The picture shows what the seven heads of the embedded teacher's latent discriminator are given, of
one drawing at three noise levels.
"""
import json

import torch

from discriminators import Head, Heads
from families import sdxl
from families.family import Latent
from teachers.shapes import PX, draw, shipped_teacher
from tools.released import released
from training.errors import run_main
from training.heads import tap_shapes
from training.pictures import pyplot
from training.schedules import from_diffusers
from training.scripts import a_count, folder_for, parser_for

CAPTION = "a large red circle on blue"
TIMES = (100, 400, 800)


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


def sizes(hidden, blocks):
    """Print the table -> {backbone: what result.json has of it}."""
    print(f"heads of {hidden} channels, at most {blocks} blocks; parameters in millions\n")
    print(f"{'backbone':14s}{'frozen':>9s}{'heads':>7s}{'trained':>9s}"
          f"   maps (channels x [frames x] height x width)")
    result = {}
    for name, model in released().items():
        maps = tap_shapes(model.taps_of, model.net, model.x, **model.cond)
        with torch.device("meta"):
            heads = Heads([Head(shape, hidden, blocks) for shape in maps])
        described = []
        for shape in dict.fromkeys(maps):
            described.append(f"{maps.count(shape)} of {'x'.join(map(str, shape))}")
        print(f"{name:14s}{millions(model.net):9.1f}{len(maps):7d}{millions(heads):9.1f}   "
              + ", ".join(described))
        result[name] = dict(frozen_millions=millions(model.net), heads=len(maps),
                            trained_millions=millions(heads), maps=maps)
    return result


@torch.no_grad()
def save_picture(path):
    """The embedded teacher's features of one drawing, a line for each noise level."""
    pipe = shipped_teacher()
    schedule = from_diffusers(pipe.scheduler)
    taps = sdxl.FAMILY.taps(pipe.unet)
    latent = Latent((4, PX // 4, PX // 4), PX, PX)
    cond, _ = sdxl.FAMILY.encode(pipe, [CAPTION], latent, "cpu")
    scale = pipe.vae.config.scaling_factor
    x_0 = pipe.vae.encode(draw(CAPTION, 3, 12)[None]).latent_dist.mode() * scale    # [1,4,8,8]
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))

    figure, axes = pyplot().subplots(len(TIMES), 8, figsize=(13, 5))
    names = ["down 1", "down 2", "down 3", "mid", "up 1", "up 2", "up 3"]
    for line, t in zip(axes, TIMES):
        x_t = schedule.add_noise(x_0, eps, t)
        image = (pipe.vae.decode(x_t / scale).sample[0] + 1) / 2                    # [3,32,32]
        shown = {f"x_t, t = {t}": image.clamp(0, 1).permute(1, 2, 0)}
        for name, feature in zip(names, taps(x_t, timestep=schedule.timestep[t], **cond)):
            shown[name] = feature[0].square().mean(0).sqrt()                        # [h,w]
        for ax, (name, panel) in zip(line, shown.items()):
            ax.imshow(panel)
            ax.set(xticks=[], yticks=[], title=name)
    figure.suptitle("what the seven heads of the latent discriminator are given "
                    "(root mean square over channels)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    p = parser_for(__doc__)
    p.add_argument("--out", default="out/taps", help="folder for the picture and result.json")
    p.add_argument("--hidden", type=a_count, default=256,
                   help="channels inside a head (choice; the paper is silent)")
    p.add_argument("--blocks", type=a_count, default=2,
                   help="most stride-2 blocks in a head (choice)")
    args = p.parse_args()
    out = folder_for(args.out)
    result = sizes(args.hidden, args.blocks)
    (out / "result.json").write_text(json.dumps(result, indent=1))
    save_picture(out / "taps.png")
    print(f"\nwrote {out}/taps.png and {out}/result.json")


if __name__ == "__main__":
    run_main(main)
