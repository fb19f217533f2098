"""Stable Diffusion XL: an eps UNet, one step after ADP, and the paper's defaults as they are."""
import torch

from discriminators import Taps
from families.family import (ATTENTION, Family, decode_image, first_order_unipc, image_latent)


def encode(pipe, prompts, latent, device, empty=True, **text):
    """The UNet is told the picture's size beside the prompt."""
    tokens, no_tokens, pooled, no_pooled = pipe.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=empty)
    size = torch.tensor([[latent.height, latent.width, 0, 0, latent.height, latent.width]],
                        dtype=torch.float32, device=device).expand(len(prompts), -1)
    cond = dict(encoder_hidden_states=tokens,
                added_cond_kwargs=dict(text_embeds=pooled, time_ids=size))
    if not empty:
        return cond, None
    uncond = dict(encoder_hidden_states=no_tokens,
                  added_cond_kwargs=dict(text_embeds=no_pooled, time_ids=size))
    return cond, uncond


def student_scheduler(scheduler, straight, stops):
    """DPM-Solver at first order is DDIM. diffusers' own DDIM steps to times that it then does not
    visit, unless the number of steps divides T."""
    from diffusers import DPMSolverMultistepScheduler
    if straight:
        return first_order_unipc(scheduler, 1, 1.0), dict(num_inference_steps=1)
    stock = DPMSolverMultistepScheduler.from_config(
        scheduler.config, solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero")
    return stock, dict(num_inference_steps=len(stops) - 1)


def taps(net):
    """The last ResNet of each block (B.1): 3 down, mid, 3 up."""
    blocks = [*net.down_blocks, net.mid_block, *net.up_blocks]
    return Taps(net, [block.resnets[-1] for block in blocks], lambda x, output, cond: output)


def prompt_shapes(config, tokens):
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return dict(encoder_hidden_states=(77, config.cross_attention_dim),
                added_cond_kwargs=dict(text_embeds=(pooled,), time_ids=(6,)))


def problems(args):
    if args.text_tokens is not None:
        return [f"--text-tokens {args.text_tokens}: SDXL has no T5; leave the flag out"]
    return []


FAMILY = Family(
    pipeline="StableDiffusionXLPipeline",
    medium="image",
    network="unet",
    encode=encode,
    latent=image_latent,
    decode=decode_image,
    student_scheduler=student_scheduler,
    taps=taps,
    prompt_shapes=prompt_shapes,
    lora_layers=(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    last_timestep=999,
    problems=problems,
)
