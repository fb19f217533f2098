"""What tools.bench times: an iteration of ADM or of ADP on a network of a released structure, with
random weights, and its passes one by one."""
from typing import NamedTuple

import torch

from adm import Scores, adm, adp, algorithm_1
from discriminators import Discriminator
from families.vision import vision_taps
from ode import Schedule
from tools.passes import blank_prompt, passes
from tools.released import released
from training.draws import Draws
from training.heads import latent_heads, pixel_heads
from training.networks import (
    autocast, decode_in_bf16, one_by_one, place, recompute_activations, trainable)
from training.optimizer import Optimizer

GUIDANCE = (6.0, 8.0)
ENDLESS = 10**9                                                 # iterations of a timed loop
TEXT_TOKENS = 16                                                # of the small networks


class Small(NamedTuple):
    """A released model made small: what changes in its configuration, and its latent's shape."""
    config: dict
    shape: tuple


SMALL_COGVIDEOX = Small(
    dict(num_layers=6, num_attention_heads=4, text_embed_dim=128, max_text_seq_length=TEXT_TOKENS,
         sample_frames=9, sample_height=16, sample_width=16), (3, 16, 16, 16))
SMALL = {
    "SDXL": Small(
        dict(block_out_channels=(64, 128, 256), attention_head_dim=(1, 2, 4),
             transformer_layers_per_block=(1, 1, 2), cross_attention_dim=128,
             projection_class_embeddings_input_dim=6 * 256 + 64), (4, 32, 32)),
    "SD3-Medium": Small(
        dict(num_layers=6, num_attention_heads=4, joint_attention_dim=128,
             caption_projection_dim=256, pooled_projection_dim=64), (16, 32, 32)),
    "SD3.5-Large": Small(
        dict(num_layers=8, num_attention_heads=4, joint_attention_dim=128,
             caption_projection_dim=256, pooled_projection_dim=64), (16, 32, 32)),
    "CogVideoX-2b": SMALL_COGVIDEOX,
    "CogVideoX-5b": SMALL_COGVIDEOX,
}


# ---------------------------------------------------------------------------------- the networks

class RandomTeacher:
    """A network of a released structure with random weights, as far a training.teacher.Teacher as
    an iteration asks for one. fsdp: fully_shard's arguments, or None."""

    def __init__(self, name, args, device, fsdp):
        model = released()[name]
        config = {key: value for key, value in model.net.config.items() if key[0] != "_"}
        self.shape = tuple(model.x.shape[1:])
        self.tokens = None
        if not args.full:
            config |= SMALL[name].config
            self.shape = SMALL[name].shape
            self.tokens = TEXT_TOKENS
        torch.manual_seed(0)
        with torch.device("cpu" if fsdp and not args.pretend else device):
            net = type(model.net).from_config(config)
        net.to(torch.bfloat16 if args.bf16 else torch.float32).requires_grad_(False).eval()
        place(args, net, fsdp, device)
        self.net = net
        self.units = [net]
        self.backbone = net
        self.device = device
        self.fsdp = fsdp
        self.family = model.family

    def uncond(self, n):
        """Conditioning for n samples."""
        cond = blank_prompt(self.family, self.net.config, n, self.device, self.tokens)
        if getattr(self.net.config, "use_rotary_positional_embeddings", False):
            frames, _, height, width = self.shape
            length = frames * height * width // 4
            cond["image_rotary_emb"] = (torch.ones(length, 64, device=self.device),
                                        torch.zeros(length, 64, device=self.device))
        return cond


def random_vae(full):
    """SDXL's, or one of its structure."""
    from diffusers import AutoencoderKL
    width = (128, 256, 512, 512) if full else (16, 16, 32, 32)
    return AutoencoderKL(
        block_out_channels=width, norm_num_groups=min(32, width[0]), layers_per_block=2,
        sample_size=1024, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)


def random_sam(full):
    from transformers import SamVisionConfig, SamVisionModel
    if full:
        return SamVisionModel(SamVisionConfig())
    return SamVisionModel(SamVisionConfig(
        image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        mlp_dim=64, global_attn_indexes=[1, 3], window_size=4))


# -------------------------------------------------------------------------------- what is timed

def literal(generator, scores, discriminator, optimizers, schedule, draws, cond, uncond):
    """adm.algorithm_1, and the gradients that its line 22 leaves in D's backbone, the teacher, if
    nobody thought of freezing it. They are dropped, as all others."""
    teacher = scores.real

    def taps(x, **cond):
        # line 26 reads the features of samples without gradient: nothing passes the backbone there
        teacher.requires_grad_(x.requires_grad)
        return discriminator.taps(x, **cond)

    algorithm_1(generator=generator, scores=scores,
                discriminator=Discriminator(taps, discriminator.heads), optimizers=optimizers,
                student_schedule=schedule, stops=schedule.stops(1), guidance=GUIDANCE,
                draws=draws, cond=cond, uncond=uncond, global_iter=1)
    teacher.zero_grad()
    for optimizer in optimizers:
        optimizer.zero_grad()


def adp_loop(args, teacher, generator, latent, optimizers, schedule):
    """ADP's loop over SDXL's own VAE and SAM, random weights. optimizers: of generator and latent
    heads."""
    device = teacher.device
    with device:
        vae = random_vae(args.full)
        vision = random_sam(args.full)
    vae.requires_grad_(False)
    if args.bf16:
        decode_in_bf16(vae)
    autocast(vision, device, args.bf16)
    pixel = Discriminator(vision_taps(vision), pixel_heads(args, teacher, vision_taps, vision))
    pixel_opt = Optimizer("pixel heads", pixel.heads.parameters(), 1e-6, 1.0)
    n = args.batch_size
    x0_teacher = torch.randn(n, *teacher.shape, device=device)
    x_T = torch.randn(n, *teacher.shape, device=device)
    cond = teacher.uncond(n)

    def decode(x):
        return vae.decode(x / vae.config.scaling_factor, return_dict=False)[0].float()

    if args.grad_checkpointing:
        recompute_activations(vae)
        decode = one_by_one(decode)
        pixel = Discriminator(one_by_one(pixel.taps), pixel.heads)

    def batches(iteration):
        draws = Draws((0, 1), iteration, range(n), teacher.shape, device)
        return [(draws, x0_teacher, x_T, cond)]

    return adp(generator=generator, D_1=latent, D_2=pixel, decode=decode,
               optimizers=(*optimizers, pixel_opt), schedule=schedule,
               line=Schedule.straight().to(device), batches=batches, iterations=ENDLESS)


class Timed(NamedTuple):
    whole: dict             # {"lean" or "literal": function of one iteration}
    alone: dict             # {pass of the floor: function}, or none
    nets: list              # networks that collect gradients


def what_is_timed(args, teacher):
    device, n = teacher.device, args.batch_size
    schedule = Schedule.straight().to(device)
    generator = trainable(args, teacher, "generator", args.lora_rank)
    heads = latent_heads(args, teacher)
    discriminator = Discriminator(teacher.family.taps(teacher.net), heads)
    generator_opt = Optimizer("generator", generator.parameters(), 1e-6, 1.0)
    heads_opt = Optimizer("heads", heads.parameters(), 1e-6, 1.0)
    if args.stage == "adp":
        loop = adp_loop(args, teacher, generator, discriminator, (generator_opt, heads_opt),
                        schedule)
        return Timed({"lean": lambda: next(loop)}, {}, [generator, heads])
    fake = trainable(args, teacher, "fake", args.lora_rank)
    fake_opt = Optimizer("fake score", fake.parameters(), 1e-6, 1.0)
    cond, uncond = teacher.uncond(n), teacher.uncond(n)
    scores = Scores(fake, teacher.net, schedule)
    optimizers = generator_opt, fake_opt, heads_opt

    def draws_of(iteration):
        return Draws((0,), iteration, range(n), teacher.shape, device)

    def batches(iteration):
        return [(draws_of(iteration), cond, uncond)]

    loop = adm(generator=generator, scores=scores, discriminator=discriminator,
               optimizers=optimizers, student_schedule=schedule, stops=schedule.stops(1),
               guidance=GUIDANCE, batches=batches, iterations=ENDLESS)

    def lean_iteration():
        next(loop)

    def literal_iteration():
        literal(generator=generator, scores=scores, discriminator=discriminator,
                optimizers=optimizers, schedule=schedule, draws=draws_of(0), cond=cond,
                uncond=uncond)

    nets = [generator, fake, heads]
    if args.cpu_offload or args.lora_rank or args.no_comparison:
        return Timed({"lean": lean_iteration}, {}, nets)
    alone = passes(
        generator=generator, fake_score=fake, real_score=teacher.net, discriminator=discriminator,
        x=torch.randn(n, *teacher.shape, device=device), t=torch.full((n,), 500.0, device=device),
        cond=cond, uncond=uncond)
    return Timed({"lean": lean_iteration, "literal": literal_iteration}, alone, nets)
