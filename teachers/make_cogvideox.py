"""Train the small CogVideoX that ships, from nothing: a complete pipeline (3-D VAE, T5, a
transformer that predicts v at zero terminal SNR) that draws captioned moving shapes.

    python -m teachers.make_cogvideox --out teachers/cogvideox      # 80 minutes on one core

`python -m teachers.moving` marks what comes out.
"""
import time

import torch

from adm import score_loss
from teachers.make_sdxl import decode_all, encode_all, pretrain, train_vae
from teachers.moving import (CAPTIONS, FRAMES, PX, TOKENS, captions_in_turn, drawn_by, marks,
                             videos)
from training.errors import run_main
from training.schedules import from_diffusers
from training.scripts import a_count, folder_for, parser_for, zero_or_more


def tokenizer():
    """T5's, with one piece for each word of the captions, and letters for everything else."""
    from transformers import T5Tokenizer
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    vocabulary += [("▁" + word, -3.0) for word in words]
    vocabulary += [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=226)


def text_encoder(words):
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(
        vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu"))


def small_transformer():
    from diffusers import CogVideoXTransformer3DModel
    return CogVideoXTransformer3DModel(
        num_layers=6, num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4,
        text_embed_dim=64, time_embed_dim=64, max_text_seq_length=TOKENS, sample_width=PX // 4,
        sample_height=PX // 4, sample_frames=FRAMES)


def small_vae():
    """A quarter of each side; of nine frames three, as in the release."""
    from diffusers import AutoencoderKLCogVideoX
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32), norm_num_groups=8, layers_per_block=1, latent_channels=4,
        sample_height=PX, sample_width=PX, down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3)


def build():
    """The untrained pipeline: every class of CogVideoX, in small."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
    words = tokenizer()
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", snr_shift_scale=1.0, rescale_betas_zero_snr=True,
        timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    return CogVideoXPipeline(tokenizer=words, text_encoder=text_encoder(words), vae=small_vae(),
                             transformer=small_transformer(), scheduler=scheduler)


def train(pipe, index, latents, iterations, batch=64):
    """Targets of v for the transformer and, because it is cheap here, for T5. index [n]: the
    caption of each latent [n,4,3,6,6]."""
    schedule = from_diffusers(pipe.scheduler)
    latents = latents.transpose(1, 2).contiguous()                      # [n,3,4,6,6], CogVideoX's
    nets = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder])

    def loss_of():
        pipe.transformer, pipe.text_encoder = nets              # marks_of has put the average there
        pick = torch.randint(len(latents), (batch,))
        captions = [CAPTIONS[i] for i in index[pick].tolist()]
        for i in (torch.rand(batch) < 0.1).nonzero().flatten().tolist():
            captions[i] = ""                                    # the empty prompt
        tokens, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False,
                                       max_sequence_length=TOKENS, device="cpu")
        eps = torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1, schedule.T + 1, (batch,))
        return score_loss(pipe.transformer, schedule, latents[pick], eps, t,
                          dict(encoder_hidden_states=tokens))

    def marks_of(nets):
        pipe.transformer, pipe.text_encoder = nets
        captions = captions_in_turn(144)
        found = marks(drawn_by(pipe, captions), captions)
        return dict(accuracy=found["accuracy"], steady=found["steady"])

    pipe.transformer, pipe.text_encoder = pretrain("teacher", nets, loss_of, marks_of, iterations)


def main():
    p = parser_for(__doc__)
    p.add_argument("--out", default="out/cogvideox-teacher", help="where the pipeline goes")
    p.add_argument("--vae-iterations", type=a_count, default=2500)
    p.add_argument("--iterations", type=a_count, nargs="+", default=[8000, 6000],
                   help="of transformer and T5: one cosine after the other, each from the average "
                   "that the last one left")
    p.add_argument("--videos", type=a_count, default=16384, help="true ones, to learn from")
    p.add_argument("--seed", type=zero_or_more, default=0)
    args = p.parse_args()
    began = time.time()
    out = folder_for(args.out)

    torch.manual_seed(args.seed)
    index, drawn = videos(args.videos, args.seed)
    pipe = build()
    train_vae(pipe.vae, drawn, args.vae_iterations, batch=8)
    latents = encode_all(pipe.vae, drawn)
    some = slice(0, 576)
    found = marks(decode_all(pipe.vae, latents[some]), [CAPTIONS[i] for i in index[some]])
    print("true videos, encoded and decoded: read correctly {accuracy:.3f}, steady {steady:.3f}"
          .format(**found), flush=True)
    for iterations in args.iterations:
        train(pipe, index, latents, iterations)
    pipe.to(torch.bfloat16).save_pretrained(out)
    print(f"saved {out} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
