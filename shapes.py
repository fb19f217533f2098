"""The embedded teacher: a small, complete, trained SDXL pipeline that draws captioned shapes, and the exact reader that
marks any student's homework. It exists so that the main job needs no download and no learned metric.

    python shapes.py                        # mark the shipped teacher: accuracy, coverage, a picture (a minute)
        teacher, 25 steps: caption accuracy 0.986   coverage TV between halves 0.167
    python shapes.py --train --out teacher  # train it again from nothing (about an hour on two cores)
    python shapes.py --mark out/x/export    # mark a student, or any other pipeline that draws these captions, as its model card samples it

A caption such as "a small red circle on blue" fixes shape, size, colour and background; it leaves the *place* open. So
caption accuracy (is what was asked for there?) plays the part CLIP score plays in the paper, and the total variation
between the places drawn by student and teacher plays the part of diversity.
"""
import argparse
import itertools
import json
import math
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F

from adm import score_loss
from discriminators import Taps
from ode import Schedule

PX = 32                                                         # images are [B,3,32,32] in [-1,1]
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (0.95, 0.85, 0.1)}
SIZES = {"small": 9, "large": 15}                               # pixels
SHAPES = ("circle", "square", "triangle")
CAPTIONS = [f"a {size} {colour} {shape} on {ground}" for size, colour, shape, ground
            in itertools.product(SIZES, COLOURS, SHAPES, COLOURS) if colour != ground]        # 72 of them
PALETTE = torch.tensor(list(COLOURS.values()))                  # [4,3] in [0,1]
CELLS = 4                                                       # places are counted in a 4x4 grid


def stencil(shape, side):
    """The shape as a 0/1 mask [side,side]."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side * 2 - 1] * 2, indexing="ij")
    inside = {"circle": x**2 + y**2 <= 1, "square": torch.ones_like(x, dtype=torch.bool), "triangle": x.abs() <= (y + 1) / 2}
    return inside[shape].float()


STENCILS = [(shape, size, stencil(shape, side)) for shape in SHAPES for size, side in SIZES.items()]


def draw(caption, top, left):
    """One true drawing, [3,32,32] in [-1,1], with the shape's bounding box at (top, left)."""
    _, size, colour, shape, _, ground = caption.split()
    mask = torch.zeros(PX, PX)
    side = SIZES[size]
    mask[top:top + side, left:left + side] = stencil(shape, side)
    paint = lambda name: torch.tensor(COLOURS[name])[:, None, None]
    return (paint(colour) * mask + paint(ground) * (1 - mask)) * 2 - 1


def every_drawing():
    """All true drawings: captions [n] as indices and images [n,3,32,32]; n = 32,400, every caption at every place."""
    index, images = [], []
    for i, caption in enumerate(CAPTIONS):
        free = PX - SIZES[caption.split()[1]] + 1
        for top, left in itertools.product(range(free), repeat=2):
            index.append(i)
            images.append(draw(caption, top, left))
    return torch.tensor(index), torch.stack(images)


def read(images):
    """What is drawn? images [B,3,32,32] in [-1,1] -> (captions: list of B strings, or None where nothing is legible;
    places: LongTensor [B], the cell of the 4x4 grid of possible places, -1 where illegible).

    Every pixel is named by its nearest colour; the commonest name is the ground, the next the shape's colour; the
    stencil and place with the fewest misnamed pixels win. More misnamed pixels than a quarter of the stencil: illegible.
    """
    rgb = (images.float().cpu().clamp(-1, 1) + 1) / 2
    names = (rgb[:, None] - PALETTE[None, :, :, None, None]).square().sum(2).argmin(1)               # [B,32,32]
    count = F.one_hot(names.flatten(1), len(COLOURS)).sum(1)                                         # [B,4]
    ground = count.argmax(1)
    colour = count.scatter(1, ground[:, None], -1).argmax(1)
    off_ground = (names != ground[:, None, None]).float()[:, None]                                   # [B,1,32,32]
    is_colour = (names == colour[:, None, None]).float()[:, None]
    best = torch.full((len(rgb),), float("inf"))
    which, cell = torch.zeros(len(rgb), dtype=torch.long), torch.zeros(len(rgb), dtype=torch.long)
    for k, (_, _, mask) in enumerate(STENCILS):
        wrong = off_ground.sum((1, 2, 3))[:, None, None] + mask.sum() \
            - F.conv2d(off_ground, mask[None, None])[:, 0] - F.conv2d(is_colour, mask[None, None])[:, 0]
        free = wrong.shape[-1]                                   # places per axis
        least, at = (wrong / mask.sum()).flatten(1).min(1)
        row, col = (at // free) * CELLS // free, (at % free) * CELLS // free
        better = least < best
        best, which, cell = best.where(~better, least), which.masked_fill(better, k), cell.where(~better, row * CELLS + col)
    colours = list(COLOURS)
    captions = [f"a {STENCILS[k][1]} {colours[c]} {STENCILS[k][0]} on {colours[g]}" if bad <= 0.25 else None
                for k, c, g, bad in zip(which.tolist(), colour.tolist(), ground.tolist(), best.tolist())]
    return captions, cell.masked_fill(best > 0.25, -1)


def accuracy(images, captions):
    """Fraction of images that show exactly what their caption says."""
    return sum(r == c for r, c in zip(read(images)[0], captions)) / len(captions)


def coverage_tv(images, reference):
    """Total variation, in [0,1], between the places of two sets of images (illegible ones form a cell of their own)."""
    return places_tv(read(images)[1], read(reference)[1])


def places_tv(cells, reference):
    """The same of places that were read, LongTensors [B] and [B']."""
    share = lambda cells: torch.bincount(cells + 1, minlength=CELLS**2 + 1) / len(cells)
    return 0.5 * (share(cells) - share(reference)).abs().sum().item()


def marks(images, captions, reference):
    """The whole report on images [B,3,32,32] drawn for these captions, beside those of a reference -> dict of fractions: accuracy; coverage_tv; precision, of
    images that are legible, whatever they say; diversity, how often two legible ones of one caption differ in their cell (LPIPS' part in the paper's Tab. 6)."""
    said, cells = read(images)
    legible = [(caption, cell) for caption, cell in zip(captions, cells.tolist()) if cell >= 0]
    pairs = [a[1] != b[1] for a, b in itertools.combinations(sorted(legible), 2) if a[0] == b[0]]
    return dict(accuracy=sum(r == c for r, c in zip(said, captions)) / len(captions), coverage_tv=places_tv(cells, read(reference)[1]),
                precision=len(legible) / len(captions), diversity=sum(pairs) / max(len(pairs), 1))


# ---------------------------------------------------------------------------------------------------- making the teacher

def tokenizer():
    """CLIP's byte-pair tokenizer with one token for each word of the captions, and bytes for everything else."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer
    alphabet = sorted(ByteLevel.alphabet())
    vocab, merges = alphabet + [a + "</w>" for a in alphabet], []
    for word in sorted({w for c in CAPTIONS for w in c.split()}):
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                vocab.append(parts[0] + parts[1])
            parts[:2] = [parts[0] + parts[1]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(vocab)}, merges=merges, model_max_length=16)


def build():
    """The untrained pipeline: every class of Stable Diffusion XL, in small."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tok = tokenizer()
    text = CLIPTextConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                          max_position_embeddings=16, projection_dim=32, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
                          pad_token_id=tok.pad_token_id)
    unet = UNet2DConditionModel(
        sample_size=PX // 4, layers_per_block=1, block_out_channels=(32, 64, 64), norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=1, use_linear_projection=True, cross_attention_dim=64,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
    vae = AutoencoderKL(sample_size=PX, block_out_channels=(16, 32, 32), norm_num_groups=16, layers_per_block=1, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                                       steps_offset=1, prediction_type="epsilon")
    return StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tok, tokenizer_2=tok,
                                     text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
                                     force_zeros_for_empty_prompt=True, add_watermarker=False)


def train_vae(vae, images, iterations, lr=2e-3, batch=32):
    """Squared error and a whisper of KL; then the scaling factor that gives the latents unit variance."""
    opt = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=iterations, pct_start=0.05)
    for i in range(iterations):
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-5 * posterior.kl().mean() / x[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step(), opt.zero_grad(), schedule.step()
        if i % 100 == 0:
            print(f"vae {i:5d}  loss {loss.item():.5f}", flush=True)
    vae.eval()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(images[::61]).latent_dist.mode().std().item())


def pretrain(name, nets, loss_of, accuracy_of, iterations, lr=1e-3, ema=0.999):
    """Ordinary pre-training of `nets`, a ModuleList: warm-up, cosine, clipping -> its moving average. loss_of() draws a batch; accuracy_of(nets)
    marks what they draw by now."""
    average = deepcopy(nets).eval()
    opt = torch.optim.AdamW(nets.train().parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i + 1) / 200) * 0.5 * (1 + math.cos(math.pi * i / iterations)))
    for i in range(iterations):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        opt.step(), opt.zero_grad(), warm.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - min(ema, (i + 1) / (i + 10)))
        if i % 500 == 499 or i == iterations - 1:
            print(f"{name} {i + 1:5d}  loss {loss.item():.4f}  accuracy {accuracy_of(average):.3f}", flush=True)
    return average


def train_teacher(pipe, index, latents, iterations, batch=64):
    """Epsilon targets (Eq. 2) for the UNet and, because it is cheap here, for both text encoders."""
    schedule = Schedule.from_diffusers(pipe.scheduler)
    size = torch.tensor([[PX, PX, 0, 0, PX, PX]]).repeat(batch, 1)
    nets = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])

    def use(nets):
        pipe.unet, pipe.text_encoder, pipe.text_encoder_2 = nets

    def loss_of():
        use(nets)
        pick = torch.randint(len(latents), (batch,))
        tokens, _, pooled, _ = pipe.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
        keep = (torch.rand(batch) > 0.1).float()[:, None]        # the empty prompt is zeros, as in SDXL
        cond = dict(encoder_hidden_states=tokens[index[pick]] * keep[:, None],
                    added_cond_kwargs=dict(text_embeds=pooled[index[pick]] * keep, time_ids=size))
        eps, t = torch.randn(batch, *latents.shape[1:]), torch.randint(1, schedule.T + 1, (batch,))
        return score_loss(pipe.unet, schedule, latents[pick], eps, t, cond)

    def accuracy_of(nets):
        use(nets)
        return mark(pipe, 144)[0]
    use(pretrain("teacher", nets, loss_of, accuracy_of, iterations))


def train_sd3(index, images, iterations, batch=64):
    """A small SD3 on the same captions, to see a flow model distilled: the shipped VAE and text encoder, a new transformer, velocity
    targets (Eq. 3) at SD3's shifted noise levels, no T5 (one empty token in its place). Returns the pipeline, which samples unshifted:
    the shift is for large images, and of eight by eight latents it would leave the last of four steps half of the way."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionXLPipeline

    from train_sdxl import encode_sd3
    old = StableDiffusionXLPipeline.from_pretrained(str(Path(__file__).parent / "teacher"), add_watermarker=False).to(torch.float32)
    old.vae.register_to_config(shift_factor=0.0)
    net = SD3Transformer2DModel(sample_size=PX // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=32, num_attention_heads=4,
                                joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=PX // 8)
    pipe = StableDiffusion3Pipeline(transformer=net, vae=old.vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), tokenizer=old.tokenizer_2,
                                    text_encoder=old.text_encoder_2, tokenizer_2=old.tokenizer_2, text_encoder_2=old.text_encoder_2,
                                    tokenizer_3=None, text_encoder_3=None)
    schedule = Schedule.from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0))
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(x).latent_dist.mode() for x in images.split(512)]) * pipe.vae.config.scaling_factor
        conds, empty = encode_sd3(pipe, CAPTIONS, PX, PX, "cpu", max_sequence_length=1)
        conds = {k: torch.cat([v, empty[k][:1]]) for k, v in conds.items()}       # the last row is the empty prompt

    def loss_of():
        pick = torch.randint(len(latents), (batch,))
        prompt = index[pick].where(torch.rand(batch) > 0.1, len(CAPTIONS))
        eps, t = torch.randn(batch, *latents.shape[1:]), torch.randint(1, schedule.T + 1, (batch,))
        return score_loss(net, schedule, latents[pick], eps, t, {k: v[prompt] for k, v in conds.items()})

    def accuracy_of(nets):
        pipe.transformer, = nets
        return mark(pipe, 144, max_sequence_length=1)[0]
    pipe.transformer, = pretrain("sd3", torch.nn.ModuleList([net]), loss_of, accuracy_of, iterations)
    return pipe


SD3_CARD = """```python
pipe = StableDiffusion3Pipeline.from_pretrained(".", text_encoder_3=None, tokenizer_3=None)
sample = pipe("a small red circle on blue", num_inference_steps=25, guidance_scale=3.0, max_sequence_length=1).images[0]
```
"""


def train_vision_encoder(index, images, iterations, lr=1e-3, batch=64, kind="sam"):
    """A small SAM vision encoder that names captions and places: what the pixel discriminator looks through, as the paper's looks
    through the SAM of the wide world. kind: 'dinov2' for one of that family (ablation A2)."""
    from transformers import Dinov2Config, Dinov2Model, SamVisionConfig, SamVisionModel
    small = dict(image_size=PX, patch_size=4, hidden_size=48, num_hidden_layers=4, num_attention_heads=4)
    net = Dinov2Model(Dinov2Config(**small, mlp_ratio=2)) if kind == "dinov2" else \
        SamVisionModel(SamVisionConfig(**small, mlp_dim=96, output_channels=48, window_size=0, global_attn_indexes=[0, 1, 2, 3]))
    name, place = torch.nn.Linear(48, len(CAPTIONS)), torch.nn.Linear(48, CELLS**2)
    taps, cells = Taps(net), torch.cat([read(x)[1] for x in images.split(1024)])
    params = [*net.requires_grad_(True).parameters(), *name.parameters(), *place.parameters()]
    opt = torch.optim.AdamW(params, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=iterations, pct_start=0.1)
    for i in range(iterations):
        pick = torch.randint(len(images), (batch,))
        x = images[pick] + 0.2 * torch.rand(batch, 1, 1, 1) * torch.randn(batch, 3, PX, PX)
        seen = net(taps.see(x)).last_hidden_state                                 # SAM [B,48,8,8], DINOv2 [B,65,48]
        seen = seen.mean((2, 3) if seen.dim() == 4 else 1)                        # [B,48]
        loss = F.cross_entropy(name(seen), index[pick]) + F.cross_entropy(place(seen), cells[pick])
        loss.backward()
        opt.step(), opt.zero_grad(), schedule.step()
        if i % 100 == 99:
            print(f"vision encoder {i + 1:5d}  loss {loss.item():.3f}  captions named {(name(seen).argmax(1) == index[pick]).float().mean():.2f}", flush=True)
    return net


@torch.no_grad()
def mark(pipe, n=576, seed=0, **call):
    """Draw n captions in turn, as the teacher samples or as `call` says: (accuracy, images [n,3,32,32] in [-1,1])."""
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(n)]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(captions, **dict(num_inference_steps=25, guidance_scale=3.0) | call, generator=torch.Generator().manual_seed(seed),
                  output_type="pt").images * 2 - 1
    return accuracy(images, captions), images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the teacher and save it under --out")
    parser.add_argument("--out", default="out/shapes", help="where the picture, or the trained pipeline, goes")
    parser.add_argument("--mark", metavar="FOLDER", help="an exported student")
    parser.add_argument("--samples", type=int, default=576, help="drawn for --mark")
    parser.add_argument("--sd3", action="store_true", help="train a small SD3 on the same captions and save it under --out")
    parser.add_argument("--vae-iterations", type=int, default=3000)
    parser.add_argument("--vision-iterations", type=int, default=1500)
    parser.add_argument("--iterations", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start, out = time.time(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.train:
        index, images = every_drawing()
        pipe = build()
        train_vae(pipe.vae, images, args.vae_iterations)
        with torch.no_grad():
            scale = pipe.vae.config.scaling_factor
            latents = torch.cat([pipe.vae.encode(x).latent_dist.mode() for x in images.split(512)]) * scale
            decoded = torch.cat([pipe.vae.decode(z / scale).sample for z in latents[::29].split(512)])
        print(f"true drawings, encoded and decoded: read correctly {accuracy(decoded, [CAPTIONS[i] for i in index[::29]]):.3f}")
        train_teacher(pipe, index, latents, args.iterations)
        pipe.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
        train_vision_encoder(index, images, args.vision_iterations).to(torch.bfloat16).save_pretrained(out / "vision_encoder")
        print(f"saved {out} after {time.time() - start:.0f} s")
        return

    if args.sd3:
        train_sd3(*every_drawing(), args.iterations).save_pretrained(out)
        (out / "README.md").write_text(SD3_CARD)                # for --mark
        (out / "captions.txt").write_text("\n".join(CAPTIONS))
        print(f"saved {out} after {time.time() - start:.0f} s")
        return

    if args.mark:
        from sample import load_student
        pipe, call = load_student(args.mark)
        right, images = mark(pipe, args.samples, seed=args.seed, **call)
        result = dict(accuracy=right, samples=args.samples)
        (out / "result.json").write_text(json.dumps(result))
        return print(f"{args.mark}: caption accuracy {right:.3f} on {args.samples} images")

    from diffusers import StableDiffusionXLPipeline

    from plumbing import grid
    pipe = StableDiffusionXLPipeline.from_pretrained(str(Path(__file__).parent / "teacher"), add_watermarker=False).to(torch.float32)
    rows, result = {}, {}
    for steps in (25, 8, 4, 1):
        right, images = mark(pipe, 288, num_inference_steps=steps)
        result[str(steps)] = dict(accuracy=right, coverage_tv=coverage_tv(images[144:], images[:144]))
        print(f"teacher, {steps:2d} steps: caption accuracy {right:.3f}   coverage TV between halves {result[str(steps)]['coverage_tv']:.3f}")
        rows[f"{steps} steps"] = images[:72:9]
    grid(out / "shapes.png", rows, CAPTIONS[::9])
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"wrote {out}/shapes.png and {out}/result.json in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
