"""A small, complete, random pipeline of every family, to be saved and loaded through diffusers."""
import torch
from tokenizers.pre_tokenizers import ByteLevel

# ------------------------------------------------------------------------------ text and pictures


def clip_tokenizer():
    from transformers import CLIPTokenizer
    alphabet = sorted(ByteLevel.alphabet())
    words = alphabet + [a + "</w>" for a in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {w: i for i, w in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def clip_text(tokenizer, width, projected):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width, max_length):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + [(c, -3.0) for c in letters], extra_ids=0,
                            model_max_length=max_length)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1,
                      num_heads=2, feed_forward_proj="gated-gelu")
    return tokenizer, T5EncoderModel(config).eval()


def sam():
    from transformers import SamVisionConfig, SamVisionModel
    return SamVisionModel(SamVisionConfig(
        image_size=32, patch_size=4, hidden_size=16, mlp_dim=16, num_hidden_layers=4,
        num_attention_heads=2, output_channels=16, window_size=0,
        global_attn_indexes=[0, 1, 2, 3]))


def image_vae(channels, shift):
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        sample_size=32, block_out_channels=(8, 16), norm_num_groups=8, layers_per_block=1,
        latent_channels=channels, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=not shift,
        use_post_quant_conv=not shift, scaling_factor=1.5305 if shift else 0.13025,
        shift_factor=0.0609 if shift else None)


# ------------------------------------------------------------------------------------- of images

def sd15():
    """Stable Diffusion 1.5's, for the worked experiment that adds a family."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    torch.manual_seed(0)
    tok = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=image_vae(4, False).eval(), text_encoder=clip_text(tok, 16, False).eval(),
        tokenizer=tok, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


def sd3(kind="medium", with_t5=True, blocks=None):
    """kind: 'medium', '3.5-medium' (dual attention, normalised queries and keys) or '3.5-large' (38
    blocks). 16x16 latents. blocks: fewer than theirs."""
    from diffusers import (FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    torch.manual_seed(0)
    tok = clip_tokenizer()
    tok3, text3 = t5(32, 77) if with_t5 else (None, None)
    special = {"medium": {},
               "3.5-medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
               "3.5-large": dict(qk_norm="rms_norm")}[kind]
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4,
        num_layers=blocks or (38 if kind == "3.5-large" else 24), attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=32, pos_embed_max_size=16, **special)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(4, True).eval(), tokenizer=tok, tokenizer_2=tok, tokenizer_3=tok3,
        text_encoder=clip_text(tok, 16, True).eval(),
        text_encoder_2=clip_text(tok, 16, True).eval(), text_encoder_3=text3)


def qwen_tokenizer():
    """Byte-level, and every word of the pipeline's template is one token, as in the release: the
    pipeline drops the first 34."""
    from transformers import Qwen2Tokenizer
    words = ("system Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity "
             "Ġtext Ġspatial Ġrelationships Ġof Ġobjects Ġand Ġbackground user assistant").split()
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = ["<|endoftext|>"] + sorted(ByteLevel.alphabet()) + [a + b for a, b in merges]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=131072,
                          additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def qwen(blocks=6):
    """64x96 pixels must be asked for; in_channels are the VAE's 4, in patches of 2x2."""
    from diffusers import (AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler,
                           QwenImagePipeline, QwenImageTransformer2DModel)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    tok = qwen_tokenizer()
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 1, 1])),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16,
            fullatt_block_indexes=[0])))
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=blocks, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4))
    vae = AutoencoderKLQwenImage(
        base_dim=16, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 1.0])
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
        max_image_seq_len=8192, shift_terminal=0.02)
    return QwenImagePipeline(tokenizer=tok, text_encoder=text.eval(), vae=vae.eval(),
                             transformer=transformer.eval(), scheduler=scheduler)


def pixart():
    """PixArt-Sigma's, which is no family here: its network predicts a variance beside the noise.
    sample_size: the smallest that the pipeline knows."""
    from diffusers import (DPMSolverMultistepScheduler, PixArtSigmaPipeline,
                           PixArtTransformer2DModel)
    torch.manual_seed(0)
    tok, text = t5(16, 512)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=16, sample_size=32, caption_channels=16)
    return PixArtSigmaPipeline(
        tokenizer=tok, text_encoder=text, vae=image_vae(4, False).eval(),
        transformer=transformer.eval(), scheduler=DPMSolverMultistepScheduler())


# ------------------------------------------------------------------------------------- of videos

def cogvideox(kind="2b", blocks=None, heads=1, text_tokens=16):
    """kind: '2b' (30 blocks), '5b' (42, rotary embeddings) or '1.5' (42, rotary, pairs of latent
    frames). 32x32 pixels, 9 frames."""
    from diffusers import (AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline,
                           CogVideoXTransformer3DModel)
    torch.manual_seed(0)
    tok, text = t5(16, 226)
    special = {"2b": {},
               "5b": dict(use_rotary_positional_embeddings=True),
               "1.5": dict(use_rotary_positional_embeddings=True, patch_size_t=2,
                           patch_bias=False)}[kind]
    transformer = CogVideoXTransformer3DModel(
        num_layers=blocks or (30 if kind == "2b" else 42), num_attention_heads=heads,
        attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=8,
        max_text_seq_length=text_tokens, sample_width=4, sample_height=4, sample_frames=9,
        **special)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4,
        sample_height=32, sample_width=32, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4)
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", snr_shift_scale=3.0 if kind == "2b" else 1.0,
        rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True,
        clip_sample=False)
    return CogVideoXPipeline(tokenizer=tok, text_encoder=text, vae=vae.eval(),
                             transformer=transformer.eval(), scheduler=scheduler)


def wan(kind="2.1", blocks=6):
    """kind: '2.1' or '2.2' (two transformers and a boundary). 32x32 pixels, 9 frames must be asked
    for."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel
    torch.manual_seed(0)
    tok, _ = t5(16, 512)
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=16,
                                       num_layers=1, num_heads=2)).eval()
    vae = AutoencoderKLWan(
        base_dim=16, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 1.0])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=5.0)
    two = dict(transformer_2=None)
    if kind == "2.2":
        two = dict(transformer_2=wan_transformer(blocks), boundary_ratio=0.875)
    return WanPipeline(tokenizer=tok, text_encoder=text, vae=vae.eval(), scheduler=scheduler,
                       transformer=wan_transformer(blocks), **two)


def wan_transformer(blocks):
    from diffusers import WanTransformer3DModel
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=blocks, rope_max_seq_len=32).eval()
