"""Why this file exists: it builds a small, complete, random pipeline of every family, to be saved and loaded through diffusers."""
import torch
from tokenizers.pre_tokenizers import ByteLevel


def clip_tokenizer():
    from transformers import CLIPTokenizer
    alphabet = sorted(ByteLevel.alphabet())
    words = alphabet + [a + "</w>" for a in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def clip_text(tokenizer, width, projected):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=77, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width, max_length):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + letters, extra_ids=0, model_max_length=max_length)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return tokenizer, T5EncoderModel(config).eval()


def image_vae(channels, shift):
    from diffusers import AutoencoderKL
    return AutoencoderKL(sample_size=32, block_out_channels=(8, 16), norm_num_groups=8, layers_per_block=1, latent_channels=channels,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=not shift,
                         use_post_quant_conv=not shift, scaling_factor=1.5305 if shift else 0.13025, shift_factor=0.0609 if shift else None)


def sd3(kind="medium", with_t5=True):
    """kind: 'medium', '3.5-medium' (dual attention, normalised queries and keys) or '3.5-large' (38 blocks). 16x16 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    torch.manual_seed(0)
    tok = clip_tokenizer()
    tok3, text3 = t5(32, 77) if with_t5 else (None, None)
    special = {"medium": {}, "3.5-medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)), "3.5-large": dict(qk_norm="rms_norm")}[kind]
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=38 if kind == "3.5-large" else 24, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16, **special)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=image_vae(4, True).eval(), tokenizer=tok, tokenizer_2=tok,
        tokenizer_3=tok3, text_encoder=clip_text(tok, 16, True).eval(), text_encoder_2=clip_text(tok, 16, True).eval(), text_encoder_3=text3)
