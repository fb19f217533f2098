"""Train the embedded teacher from nothing: a small, complete SDXL pipeline that draws captioned
shapes over a line of glyphs, and the vision encoder that the pixel discriminator looks through.

    python -m teachers.make_sdxl --out out/teacher          # all of it
    python -m teachers.make_sdxl --out teachers/sdxl --encoders teachers/sdxl       # what ships: an
                                                            # hour and a quarter on one core

The VAE and the text encoders that ship were trained with an earlier UNet, of smaller shapes; these
captions and flat colours are theirs, too. `python -m teachers.shapes` marks what comes out.
"""
import math
import time
from copy import deepcopy

import torch
import torch.nn.functional as F

from adm import score_loss
from families.vision import vision_taps
from teachers.alphabet import SHARES
from teachers.shapes import (CAPTIONS, CELLS, PX, drawings, legibility, mark, marks, read,
                             read_line, teacher_at)
from training.errors import run_main
from training.schedules import from_diffusers
from training.scripts import a_count, folder_for, parser_for, zero_or_more

# --------------------------------------------------------------------------- the untrained pipeline


def merges_of(word):
    """The byte-pair merges, left to right, that make one token of a word: [(left, right), ...]."""
    parts = [*word[:-1], word[-1] + "</w>"]
    merges = []
    while len(parts) > 1:
        merges.append((parts[0], parts[1]))
        parts[:2] = [parts[0] + parts[1]]
    return merges


def tokenizer():
    """CLIP's byte-pair tokenizer with one token for each word of the captions, and bytes for
    everything else."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    merges = []
    for word in words:
        for left, right in merges_of(word):
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=16)


def small_unet():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=PX // 4, layers_per_block=1, block_out_channels=(32, 64, 64),
        norm_num_groups=16, attention_head_dim=(2, 4, 4), cross_attention_dim=64,
        transformer_layers_per_block=1, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32)


def small_vae():
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        sample_size=PX, block_out_channels=(16, 32, 32), norm_num_groups=16, layers_per_block=1,
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3)


def build():
    """The untrained pipeline: every class of Stable Diffusion XL, in small."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=32,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id)
    unet = small_unet()
    vae = small_vae()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="leading", steps_offset=1, prediction_type="epsilon")
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=words, tokenizer_2=words,
        text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        force_zeros_for_empty_prompt=True, add_watermarker=False)


# ---------------------------------------------------------------------------------------- training


def keep_encoders(pipe, folder):
    """Put the VAE and the text encoders of another small pipeline, of the same captions, into this
    one. They are not trained any more."""
    trained = teacher_at(folder)
    pipe.register_modules(vae=trained.vae, text_encoder=trained.text_encoder,
                          text_encoder_2=trained.text_encoder_2)
    for net in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        net.requires_grad_(False)


def train_vae(vae, images, iterations, lr=2e-3, batch=32):
    """Squared error and a whisper of KL; then the scaling factor that gives the latents unit
    variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations,
                                                pct_start=0.05)
    for i in range(iterations):
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded, x) + 1e-5 * posterior.kl().mean() / x[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if i % 100 == 0:
            print(f"vae {i:5d}  loss {loss.item():.5f}", flush=True)
    vae.eval()
    with torch.no_grad():
        deviation = vae.encode(images[::61]).latent_dist.mode().std().item()
        vae.register_to_config(scaling_factor=1 / deviation)


@torch.no_grad()
def encode_all(vae, images):
    """Images [n,3,32,32] -> scaled latents [n,4,8,8]; or videos [n,3,F,H,W]."""
    latents = [vae.encode(part).latent_dist.mode() for part in images.split(512)]
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def decode_all(vae, latents):
    scale = vae.config.scaling_factor
    return torch.cat([vae.decode(part / scale).sample for part in latents.split(512)])


def pretrain(name, nets, loss_of, marks_of, iterations, lr=1e-3, ema=0.999):
    """Ordinary pre-training of `nets`, a ModuleList: warm-up, cosine, clipping -> its EMA.

    loss_of(): draws a batch and returns its loss. marks_of(nets): {name: value} of what they draw
    by now.
    """
    average = deepcopy(nets).eval()
    optimizer = torch.optim.AdamW(nets.train().parameters(), lr, betas=(0.9, 0.99),
                                  weight_decay=0.0)

    def rate(i):
        return min(1, (i + 1) / 200) * 0.5 * (1 + math.cos(math.pi * i / iterations))

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for i in range(iterations):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        with torch.no_grad():
            step = 1 - min(ema, (i + 1) / (i + 10))             # a short memory at first
            torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), step)
        if i % 500 == 499 or i == iterations - 1:
            found = "  ".join(f"{mark} {value:.3f}" for mark, value in marks_of(average).items())
            print(f"{name} {i + 1:5d}  loss {loss.item():.4f}  {found}", flush=True)
    return average


def train_teacher(pipe, index, latents, iterations, batch=64):
    """Epsilon targets (Eq. 2) for the UNet and, because it is cheap here, for both text
    encoders. index [n]: the caption of each latent."""
    schedule = from_diffusers(pipe.scheduler)
    time_ids = torch.tensor([[PX, PX, 0, 0, PX, PX]]).repeat(batch, 1)
    nets = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])

    def use(nets):
        pipe.unet, pipe.text_encoder, pipe.text_encoder_2 = nets

    def loss_of():
        use(nets)                                       # marks_of has put the average there
        pick = torch.randint(len(latents), (batch,))
        tokens, _, pooled, _ = pipe.encode_prompt(CAPTIONS, device="cpu",
                                                  do_classifier_free_guidance=False)
        keep = (torch.rand(batch) > 0.1).float()[:, None]       # the empty prompt is zeros: SDXL
        caption = index[pick]
        cond = dict(encoder_hidden_states=tokens[caption] * keep[:, None],
                    added_cond_kwargs=dict(text_embeds=pooled[caption] * keep, time_ids=time_ids))
        eps = torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1, schedule.T + 1, (batch,))
        return score_loss(pipe.unet, schedule, latents[pick], eps, t, cond)

    def marks_of(nets):
        use(nets)
        right, images = mark(pipe, 144)
        return dict(accuracy=right, legible=legibility(images))

    use(pretrain("teacher", nets, loss_of, marks_of, iterations))


def small_vision_encoder():
    """An untrained SAM."""
    from transformers import SamVisionConfig, SamVisionModel
    return SamVisionModel(SamVisionConfig(
        image_size=PX, patch_size=4, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        mlp_dim=96, output_channels=48, window_size=0, global_attn_indexes=[0, 1, 2, 3]))


class Questions(torch.nn.Module):
    """What the vision encoder is asked while it is trained: the caption, the place, the glyphs."""

    def __init__(self, width=48):
        super().__init__()
        self.caption = torch.nn.Linear(width, len(CAPTIONS))
        self.cell = torch.nn.Linear(width, CELLS**2)
        self.glyph = torch.nn.Linear(width, len(SHARES))

    def forward(self, features):
        """features [B,48,8,8] -> logits [B,72], [B,16], [B,8,4]."""
        mean = features.mean((2, 3))                                            # [B,48]
        line = F.avg_pool2d(features, 2)[:, :, -1].movedim(1, 2)                # [B,4,48]
        return self.caption(mean), self.cell(mean), self.glyph(line).movedim(1, 2)


def train_vision_encoder(index, images, iterations, lr=1e-3, batch=64):
    """A small vision encoder that names captions, places and glyphs: what the pixel discriminator
    looks through, as the paper's looks through the SAM of the wide world."""
    net = small_vision_encoder()
    questions = Questions()
    prepare = vision_taps(net).prepare
    net.requires_grad_(True)                            # taps freeze what they read
    cells = torch.cat([read(part)[1] for part in images.split(1024)])
    glyphs = torch.cat([read_line(part)[0] for part in images.split(1024)])     # [n,4]
    parameters = [*net.parameters(), *questions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations,
                                                pct_start=0.1)
    for i in range(iterations):
        pick = torch.randint(len(images), (batch,))
        noise_level = 0.2 * torch.rand(batch, 1, 1, 1)
        x = images[pick] + noise_level * torch.randn(batch, 3, PX, PX)
        features = net(prepare(x)).last_hidden_state                            # [B,48,8,8]
        to_caption, to_cell, to_glyph = questions(features)
        loss = (F.cross_entropy(to_caption, index[pick]) + F.cross_entropy(to_cell, cells[pick])
                + F.cross_entropy(to_glyph, glyphs[pick]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if i % 100 == 99:
            right = (to_caption.argmax(1) == index[pick]).float().mean()
            written = (to_glyph.argmax(1) == glyphs[pick]).float().mean()
            print(f"vision encoder {i + 1:5d}  loss {loss.item():.3f}  "
                  f"captions named {right:.2f}  glyphs {written:.2f}", flush=True)
    return net


def main():
    p = parser_for(__doc__)
    p.add_argument("--out", default="out/teacher", help="where the pipeline goes")
    p.add_argument("--encoders", metavar="FOLDER",
                   help="a pipeline whose VAE and text encoders are taken as they are (default: "
                        "train them)")
    p.add_argument("--vae-iterations", type=a_count, default=3000)
    p.add_argument("--iterations", type=a_count, default=12000, help="of UNet and text encoders")
    p.add_argument("--vision-iterations", type=a_count, default=1500)
    p.add_argument("--drawings", type=a_count, default=65536, help="true ones, to learn from")
    p.add_argument("--seed", type=zero_or_more, default=0)
    args = p.parse_args()
    began = time.time()
    out = folder_for(args.out)

    torch.manual_seed(args.seed)
    index, images = drawings(args.drawings, args.seed)
    pipe = build()
    if args.encoders:
        keep_encoders(pipe, args.encoders)
    else:
        train_vae(pipe.vae, images, args.vae_iterations)
    latents = encode_all(pipe.vae, images)
    some = slice(0, 2048)
    found = marks(decode_all(pipe.vae, latents[some]), [CAPTIONS[i] for i in index[some]],
                  images[some])
    print("true drawings, encoded and decoded: read correctly {accuracy:.3f}, "
          "legible glyphs {legible:.3f}".format(**found), flush=True)
    train_teacher(pipe, index, latents, args.iterations)
    pipe.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    vision = train_vision_encoder(index, images, args.vision_iterations)
    vision.to(torch.bfloat16).save_pretrained(out / "vision_encoder")
    print(f"saved {out} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
