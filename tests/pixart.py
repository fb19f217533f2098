"""PixArt-Sigma, as somebody who adds a family would write it: one file, which test_new_family.py
copies into families/. Its network predicts a variance beside the noise, which is cut off."""
from types import MethodType

from discriminators import Taps, to_grid
from families.family import ATTENTION, Family, decode_image, image_latent


def join(pipe):
    """The transformer, with an output that is the noise alone."""
    net = pipe.transformer

    def noise_alone(self, *args, **kwargs):
        output, = type(self).forward(self, *args, **kwargs)
        return (output.chunk(2, 1)[0],)
    net.forward = MethodType(noise_alone, net)
    return net


def encode(pipe, prompts, latent, device, empty=True, max_sequence_length=300):
    """clean_caption: as the pipeline does when it is called."""
    tokens, mask, no_tokens, no_mask = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=empty, device=device, clean_caption=True,
        max_sequence_length=max_sequence_length)
    cond = dict(encoder_hidden_states=tokens, encoder_attention_mask=mask)
    if not empty:
        return cond, None
    return cond, dict(encoder_hidden_states=no_tokens, encoder_attention_mask=no_mask)


def student_scheduler(scheduler, straight, stops):
    """DPM-Solver at first order is DDIM."""
    stock = type(scheduler).from_config(
        scheduler.config, solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero")
    return stock, dict(num_inference_steps=len(stops) - 1)


def taps(net):
    """Every third block."""
    patch = net.config.patch_size

    def to_map(x, output, cond):
        return to_grid(output, x.shape[2] // patch, x.shape[3] // patch)
    return Taps(net, net.transformer_blocks[2::3], to_map)


def prompt_shapes(config, tokens):
    return dict(encoder_hidden_states=(tokens or 300, config.caption_channels),
                encoder_attention_mask=(tokens or 300,))


def defaults(config):
    return dict(steps=4, guidance=[4.0, 5.0], pair_guidance=4.5, pair_steps=20)


FAMILY = Family(
    pipeline="PixArtSigmaPipeline",
    medium="image",
    network="transformer",
    join=join,
    encode=encode,
    latent=image_latent,
    decode=decode_image,
    student_scheduler=student_scheduler,
    taps=taps,
    prompt_shapes=prompt_shapes,
    lora_layers=ATTENTION,
    most_tokens=300,
    defaults=defaults,
    always=dict(lora_rank=0, lora_rank_fake=0),         # in diffusers it has no adapters
)
