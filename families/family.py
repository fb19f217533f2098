"""The record of a family, and what several families have in common.

A family is one file of this folder with one FAMILY in it. To add one, read another, write its file,
and import nothing from a sibling: `of_medium` finds it.
"""
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from training.schedules import from_diffusers


class Latent(NamedTuple):
    """What a run draws."""
    shape: tuple            # of one latent, without the batch
    height: int             # in pixels
    width: int
    drop: int = 0           # leading latent frames that are not decoded


def nothing_wrong(args):
    return []


def no_defaults(config):
    return {}


def no_constant(pipe, latent):
    return {}


def schedule_of_pipeline(pipe, latent):
    return from_diffusers(pipe.scheduler)


@dataclass(frozen=True, kw_only=True)
class Family:
    pipeline: str           # class of the diffusers pipeline, as its model_index.json has it
    medium: str             # "image" (train_sdxl.py) or "video" (train_cogvideox.py)
    network: str            # the pipeline's component that is distilled: "unet", "transformer"

    # (pipe, prompts, latent, device, **text) -> (cond, uncond): the network's keyword arguments for
    # these prompts and for the empty one: tensors or dicts of them, batch first, one length for all
    # prompts. text: max_sequence_length, if asked for; empty=False: None may stand for the second,
    # since it costs as much as the first
    encode: Callable
    # (pipe, net, args) -> Latent, from --height, --width, --frames or what the model was made for
    latent: Callable
    # (vae, x0, latent) -> images [B,3,H,W] or videos [B,3,F,H,W] in [-1,1], with gradient. x0: as
    # the pipeline carries it from step to step
    decode: Callable
    # (scheduler, straight, stops) -> (the stock scheduler that does to a student what the trainer
    # did, the arguments its pipeline is called with). straight: it is a student of ADP's line
    student_scheduler: Callable
    # net -> discriminators.Taps
    taps: Callable
    # (config of the network, T5's tokens or None) -> {argument: shape without the batch}, for
    # --dry-run
    prompt_shapes: Callable
    # names of the layers that get a LoRA
    lora_layers: tuple

    # the pipeline's component for a second expert, which it switches to below a boundary
    second_network: str = None
    # tokens of a prompt that the pipeline reads at most, where its tokenizer does not say it
    most_tokens: int = 512
    # what the network is told at the noisy end of ADP's line, T - 1 or T in timesteps; None: no ADP
    # for this family
    last_timestep: int = None
    # config of the network -> {flag: value}, the paper's values where they are not SDXL's
    defaults: Callable = no_defaults
    # {flag: value} that hold for this family whatever the method
    always: dict = None
    # args -> [sentence, ...], what is wrong with these flags
    problems: Callable = nothing_wrong
    # (pipe, latent) -> the conditioning that is the same for every sample. Guidance joins tensors
    # along their first dimension: one that has no batch goes into a tuple or a list
    constant: Callable = no_constant
    # (pipe, latent) -> Schedule
    schedule: Callable = schedule_of_pipeline
    # pipe -> the network to distil, where it is not pipe.<network> alone (Wan 2.2 has two; a
    # network whose output holds more than the prediction is wrapped here)
    join: Callable = None
    # (net, ranks): make the network share each sample's tokens among so many ranks
    context_parallel: Callable = None
    # arguments that the exported pipeline is called with in the place of guidance_scale=0
    unguided: dict = None

    def net_of(self, pipe):
        """The network to distil."""
        if self.join is not None:
            return self.join(pipe)
        return getattr(pipe, self.network)


def of_medium(medium):
    """{class of the pipeline: Family} of every file in this folder that is of this medium."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"families.{file.stem}")
        family = getattr(module, "FAMILY", None)
        if family is not None and family.medium == medium:
            found[family.pipeline] = family
    return found


# ----------------------------------------------------------------------------- for several families

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def image_latent(pipe, net, args):
    """Images of [C,h,w] latents: the flags' size, or what the model was made for."""
    space = pipe.vae_scale_factor
    height = args.height or net.config.sample_size * space
    width = args.width or net.config.sample_size * space
    return Latent((net.config.in_channels, height // space, width // space), height, width)


def decode_image(vae, x0, latent):
    """Latents [B,C,h,w] -> images [B,3,H,W] in [-1,1]."""
    shift = vae.config.get("shift_factor") or 0
    return vae.decode(x0 / vae.config.scaling_factor + shift, return_dict=False)[0].float()


def decode_normalised_video(vae, x0):
    """Latents [B,C,T,h,w] of a VAE with a mean and deviation for each channel (Wan's and
    Qwen-Image's) -> videos [B,3,F,H,W] in [-1,1]."""
    mean = torch.tensor(vae.config.latents_mean, device=x0.device, dtype=x0.dtype)
    deviation = torch.tensor(vae.config.latents_std, device=x0.device, dtype=x0.dtype)
    x0 = x0 * deviation.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
    return vae.decode(x0, return_dict=False)[0].float()


def first_order_unipc(scheduler, steps, shift):
    """UniPC at first order and without its corrector: the plain step of a flow model."""
    from diffusers import UniPCMultistepScheduler
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1,
        disable_corrector=list(range(steps)),
        num_train_timesteps=scheduler.config.num_train_timesteps)


def unshifted_sigmas(stops):
    """FlowMatchEuler wants its stops as unshifted sigmas; by their number alone it would choose
    others."""
    return dict(num_inference_steps=len(stops) - 1, sigmas=[t / stops[0] for t in stops[:-1]])


def video_problems(args):
    """What is wrong with these flags for any video family."""
    wrong = []
    if args.steps < 1 or 1000 % args.steps > 0:
        wrong.append(f"--steps {args.steps}: must divide 1000, or the stock scheduler would take "
                     f"other steps")
    if args.frames is not None and (args.frames < 1 or args.frames % 4 != 1):
        wrong.append(f"--frames {args.frames}: must be 1 more than a multiple of 4")
    return wrong
