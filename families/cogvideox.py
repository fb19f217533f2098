"""CogVideoX 2b, 5b and 1.5: a v transformer at zero terminal SNR, eight steps. Latents are
[T,C,h,w]."""
from discriminators import Taps, to_grid
from families.family import ATTENTION, Family, Latent, video_problems
from training.context_parallel import context_parallel
from training.errors import Failure


def encode(pipe, prompts, latent, device, empty=True, **text):
    tokens, no_tokens = pipe.encode_prompt(prompts, do_classifier_free_guidance=empty,
                                           device=device, **text)
    if not empty:
        return dict(encoder_hidden_states=tokens), None
    return dict(encoder_hidden_states=tokens), dict(encoder_hidden_states=no_tokens)


def latent(pipe, net, args):
    """1.5 looks at pairs of latent frames: to an odd number its pipeline adds one in front, which
    is not decoded. Raises Failure for --text-tokens that the network has no places for."""
    config, space = net.config, pipe.vae_scale_factor_spatial
    places = config.max_text_seq_length
    if not config.use_rotary_positional_embeddings and args.text_tokens not in (None, places):
        raise Failure(f"--text-tokens {args.text_tokens}: {args.model} has places for {places} "
                      f"tokens, no more and no fewer; leave it out")
    height = args.height or config.sample_height * space
    width = args.width or config.sample_width * space
    frames = ((args.frames or config.sample_frames) - 1) // pipe.vae_scale_factor_temporal + 1
    drop = -frames % (config.patch_size_t or 1)
    shape = (frames + drop, config.in_channels, height // space, width // space)
    return Latent(shape, height, width, drop)


def decode(vae, x0, latent):
    """Latents [B,T,C,h,w] -> videos [B,3,F,H,W] in [-1,1]."""
    x0 = x0[:, latent.drop:].transpose(1, 2)                                    # [B,C,T,h,w]
    return vae.decode(x0 / vae.config.scaling_factor, return_dict=False)[0].float()


def constant(pipe, latent):
    """5b and 1.5 are told where each token is, the same for every sample."""
    if not pipe.transformer.config.use_rotary_positional_embeddings:
        return {}
    rotary = pipe._prepare_rotary_positional_embeddings(latent.height, latent.width,
                                                        latent.shape[0], "cpu")
    return dict(image_rotary_emb=rotary)


def student_scheduler(scheduler, straight, stops):
    from diffusers import CogVideoXDDIMScheduler
    stock = CogVideoXDDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    return stock, dict(num_inference_steps=len(stops) - 1)


def taps(net):
    """Every third block (B.2), which returns (video, text)."""
    patch, patch_t = net.config.patch_size, net.config.patch_size_t or 1

    def to_map(x, output, cond):
        tokens = output[0]
        if hasattr(net, "gather_tokens"):                   # ranks share them: context_parallel
            tokens = net.gather_tokens(tokens)
        _, frames, _, height, width = x.shape
        return to_grid(tokens, frames // patch_t, height // patch, width // patch)
    return Taps(net, net.transformer_blocks[2::3], to_map)


def prompt_shapes(config, tokens):
    return dict(encoder_hidden_states=(tokens or config.max_text_seq_length, config.text_embed_dim))


def defaults(config):
    values = dict(steps=8, guidance=[5.0, 7.0], pair_guidance=6.0, pair_steps=50)
    if config.get("sample_height") == 300:      # 1.5's: how far its positions reach, no size
        values.update(height=768, width=1360)
    return values


FAMILY = Family(
    pipeline="CogVideoXPipeline",
    medium="video",
    network="transformer",
    encode=encode,
    latent=latent,
    decode=decode,
    student_scheduler=student_scheduler,
    constant=constant,
    taps=taps,
    prompt_shapes=prompt_shapes,
    lora_layers=(*ATTENTION, "ff.net.0.proj", "ff.net.2"),
    defaults=defaults,
    problems=video_problems,
    context_parallel=context_parallel,
)
