"""Stable Diffusion 3 and 3.5: a flow transformer, four steps. SD3-Medium by LoRA, SD3.5-Large fully
(B.5); SD3.5-Medium, which is not in the paper, as SD3-Medium *(choice)*."""
from discriminators import Taps, to_grid
from families.family import ATTENTION, Family, decode_image, image_latent, unshifted_sigmas
from training.errors import Failure


def encode(pipe, prompts, latent, device, empty=True, **text):
    """Without its third text encoder the pipeline itself puts zeros in T5's place."""
    tokens, no_tokens, pooled, no_pooled = pipe.encode_prompt(
        prompts, None, None, device=device, do_classifier_free_guidance=empty, **text)
    cond = dict(encoder_hidden_states=tokens, pooled_projections=pooled)
    if not empty:
        return cond, None
    uncond = dict(encoder_hidden_states=no_tokens, pooled_projections=no_pooled)
    return cond, uncond


def latent(pipe, net, args):
    """Raises Failure for an image larger than the network has places for."""
    found = image_latent(pipe, net, args)
    most = net.config.pos_embed_max_size * net.config.patch_size * pipe.vae_scale_factor
    for flag, size in (("--height", found.height), ("--width", found.width)):
        if size > most:
            raise Failure(f"{flag} {size}: {args.model} has places for {most} pixels at most")
    return found


def student_scheduler(scheduler, straight, stops):
    changed = dict(shift=1.0) if straight else {}
    return type(scheduler).from_config(scheduler.config, **changed), unshifted_sigmas(stops)


def taps(net):
    """Every block (B.1), which returns (text, image)."""
    patch = net.config.patch_size

    def to_map(x, output, cond):
        return to_grid(output[1], x.shape[2] // patch, x.shape[3] // patch)
    return Taps(net, net.transformer_blocks, to_map)


def prompt_shapes(config, tokens):
    """CLIP's 77 tokens, and T5's."""
    return dict(encoder_hidden_states=(77 + (tokens or 256), config.joint_attention_dim),
                pooled_projections=(config.pooled_projection_dim,))


def defaults(config):
    if config.get("num_layers") == 38:                      # SD3.5-Large
        return dict(steps=4, lr_generator=1e-8, guidance=[3.0, 4.0], pair_guidance=3.5)
    return dict(steps=4, lr_generator=1e-6, lora_rank=64)


FAMILY = Family(
    pipeline="StableDiffusion3Pipeline",
    medium="image",
    network="transformer",
    encode=encode,
    latent=latent,
    decode=decode_image,
    student_scheduler=student_scheduler,
    taps=taps,
    prompt_shapes=prompt_shapes,
    lora_layers=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                 "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    last_timestep=1000,
    most_tokens=256,
    defaults=defaults,
)
