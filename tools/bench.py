"""An iteration of ADM, timed beside the least it could cost and beside Algorithm 1 as printed.

    python -m tools.bench                       # small networks of each family's structure, minutes
    python -m tools.bench --full                # on a GPU: all of bench_rows.py, ten minutes
    python -m tools.bench --pretend             # the same rows, small, without a GPU, to try them
    python -m tools.bench --full --models SDXL --bf16 --grad-checkpointing
                                                # the released sizes, random weights, on a GPU
    python -m tools.bench --full --models SDXL --bf16 --grad-checkpointing --cpu-offload --stage adp

lean: adm.adm, the loop that trains.
literal: adm.algorithm_1, the printed order: guidance in two calls, the features of x_fake computed
for each of their two uses, and the gradients that a plain backward() leaves in f and in D's
backbone. That is 17 passes of the network's size where 14 are needed.
floor: those 14, and the heads', each timed alone, added up.
"""
import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

if "--pretend" in sys.argv:
    import tools.guard  # noqa: F401
import torch
from torch.utils.flop_counter import FlopCounterMode

from adm import Scores, adm, adp, algorithm_1
from discriminators import Discriminator
from families.family import of_medium
from families.vision import vision_taps
from ode import Schedule
from tools import bench_rows
from tools.dry_run import blank_prompt, passes
from tools.released import released
from training.draws import Draws
from training.errors import run_main, usage
from training.heads import latent_heads, pixel_heads
from training.networks import (
    autocast, decode_in_bf16, one_by_one, place, recompute_activations, trainable)
from training.optimizer import Optimizer
from training.ranks import quiet, start
from training.sharding import fsdp_arguments

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
        self.family = family_of(model.pipeline)

    def uncond(self, n):
        """Conditioning for n samples."""
        cond = blank_prompt(self.family, self.net.config, n, self.device, self.tokens)
        if getattr(self.net.config, "use_rotary_positional_embeddings", False):
            frames, _, height, width = self.shape
            length = frames * height * width // 4
            cond["image_rotary_emb"] = (torch.ones(length, 64, device=self.device),
                                        torch.zeros(length, 64, device=self.device))
        return cond


def family_of(pipeline):
    return (of_medium("image") | of_medium("video"))[pipeline]


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

    return adp(generator=generator, latent=latent, pixel=pixel, decode=decode,
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
    fake = trainable(args, teacher, "fake", args.lora_rank)     # ADP has none, and leaves it alone
    heads = latent_heads(args, teacher)
    discriminator = Discriminator(teacher.family.taps(teacher.net), heads)
    generator_opt = Optimizer("generator", generator.parameters(), 1e-6, 1.0)
    fake_opt = Optimizer("fake score", fake.parameters(), 1e-6, 1.0)
    heads_opt = Optimizer("heads", heads.parameters(), 1e-6, 1.0)
    cond, uncond = teacher.uncond(n), teacher.uncond(n)
    scores = Scores(fake, teacher.net, schedule)
    optimizers = generator_opt, fake_opt, heads_opt

    def draws_of(iteration):
        return Draws((0,), iteration, range(n), teacher.shape, device)

    def batches(iteration):
        return [(draws_of(iteration), cond, uncond)]

    if args.stage == "adp":
        loop = adp_loop(args, teacher, generator, discriminator, (generator_opt, heads_opt),
                        schedule)
    else:
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
    if args.stage == "adp" or args.cpu_offload or args.lora_rank or args.no_comparison:
        return Timed({"lean": lean_iteration}, {}, nets)
    alone = passes(
        generator=generator, fake_score=fake, real_score=teacher.net, discriminator=discriminator,
        x=torch.randn(n, *teacher.shape, device=device), t=torch.full((n,), 500.0, device=device),
        cond=cond, uncond=uncond)
    return Timed({"lean": lean_iteration, "literal": literal_iteration}, alone, nets)


# ------------------------------------------------------------------------------------ the timing

def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    wait_for(device)
    began = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - began


def peak_bytes(function, device, watch=None):
    """Of the device, or on a CPU of the process so far. watch: the pretended device's."""
    if watch is not None:
        watch.reset()
        function()
        return watch.peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    function()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def medians(timed, repeat, device, warm_up=1):
    """{name of a function: seconds, the median of so many rounds}. The rounds before them warm
    up."""
    functions = timed.whole | timed.alone
    times = {name: [] for name in functions}
    for number in range(warm_up + repeat):
        for name, function in functions.items():
            for net in timed.nets:
                net.zero_grad()
            spent = seconds(function, device)
            if number >= warm_up:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_flop_per_second(device):
    """Of large bf16 matrices, the third time."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def products():
        for _ in range(20):
            a @ a

    for _ in range(3):
        spent = seconds(products, device)
    return 20 * 2 * 8192**3 / spent


def kernel_share(function, device):
    """Seconds in which kernels ran, over the seconds that an iteration took: below 1, the card
    waited for the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        spent = seconds(function, device)
    return sum(e.self_device_time_total for e in profile.key_averages()) / 1e6 / spent


def copy_rates(device):
    """Bytes a second from pinned memory to the device and back."""
    host = torch.empty(2**30, dtype=torch.uint8).pin_memory()
    there = host.to(device)
    return dict(bytes_up=2**30 / seconds(lambda: there.copy_(host, non_blocking=True), device),
                bytes_down=2**30 / seconds(lambda: host.copy_(there, non_blocking=True), device))


def measure(name, args):
    """One family, in a process of its own -> its figures. --pretend: nothing is timed that means
    anything, but all of it is run."""
    if not args.pretend:
        return measure_on_device(name, args)
    from tools import pretend
    if args.cpu_offload:
        pretend.process_group()
    with pretend.pretended() as watch:
        return measure_on_device(name, args, watch)


def measure_on_device(name, args, watch=None):
    quiet()
    device = start(alone=args.cpu_offload)
    fsdp = fsdp_arguments(False, args.cpu_offload, args.bf16, device)
    torch.manual_seed(0)
    timed = what_is_timed(args, RandomTeacher(name, args, device, fsdp))
    lean_iteration = timed.whole["lean"]
    counter = nullcontext()
    if watch is None:
        counter = FlopCounterMode(display=False)
    with counter:                                               # also warms up
        lean_iteration()
    peak = peak_bytes(lean_iteration, device, watch)
    flop = watch.flop if watch else counter.get_total_flops()
    middle = medians(timed, args.repeat, device, warm_up=0 if watch else 1)
    lean = middle["lean"]
    result = dict(lean=lean, samples_per_second=args.batch_size / lean, peak_bytes=peak, flop=flop,
                  flop_per_second=flop / lean)
    if timed.alone:
        alone = {name: middle[name] for name in timed.alone}
        floor = sum(alone.values())
        result.update(literal=middle["literal"], floor=floor, lean_over_floor=lean / floor,
                      literal_over_lean=middle["literal"] / lean, passes=alone)
    if device.type == "cuda":
        fastest = matmul_flop_per_second(device)
        if watch is None:
            result.update(copy_rates(device), kernel_share=kernel_share(lean_iteration, device))
        result.update(matmul_flop_per_second=fastest,
                      share_of_matmul=result["flop_per_second"] / fastest,
                      device=torch.cuda.get_device_name())
    if fsdp:
        torch.distributed.destroy_process_group()
    return result


# ------------------------------------------------------------------------------------- the table

# (title, key of the result, width, decimals, what it is divided by)
COLUMNS = [
    ("lean", "lean", 9, 3, 1), ("floor", "floor", 9, 3, 1), ("literal", "literal", 9, 3, 1),
    ("lean/floor", "lean_over_floor", 12, 3, 1), ("literal/lean", "literal_over_lean", 14, 3, 1),
    ("samples/s", "samples_per_second", 11, 2, 1), ("peak GiB", "peak_bytes", 10, 2, 2**30),
    ("TFLOP/s", "flop_per_second", 9, 2, 1e12), ("of matmul", "share_of_matmul", 11, 2, 1),
]


def heading():
    line = f"{'seconds an iteration':22s}"
    for title, _, width, _, _ in COLUMNS:
        line += f"{title:>{width}s}"
    return line


def line_of(name, result):
    line = f"{name:22s}"
    for _, key, width, decimals, unit in COLUMNS:
        if key in result:
            line += f"{result[key] / unit:{width}.{decimals}f}"
        else:
            line += f"{'-':>{width}s}"
    return line


def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=SMALL,
                   help="(None: SDXL, SD3-Medium and CogVideoX-2b)")
    p.add_argument("--full", action="store_true",
                   help="the released sizes; without --models: every row of bench_rows.py")
    p.add_argument("--pretend", action="store_true",
                   help="on a pretended GPU; without --models: every row of bench_rows.py")
    p.add_argument("--stage", choices=["adm", "adp"], default="adm",
                   help="adp: SDXL only, timed without a comparison")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--repeat", type=int, default=5, help="timed rounds; medians are printed")
    p.add_argument("--head-channels", type=int, default=64, help="256 in training")
    p.add_argument("--no-comparison", action="store_true",
                   help="time lean alone, where memory has no room for the others")
    p.add_argument("--lora-rank", type=int, default=0)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--grad-checkpointing", action="store_true")
    p.add_argument("--cpu-offload", action="store_true")
    p.add_argument("--compile", nargs="?", const="inductor")
    p.add_argument("--threads", type=int, default=1, help="of the CPU")
    p.add_argument("--out", default="out/bench")
    args = p.parse_args()
    args.lora_alpha = None
    args.rows = args.models is None and (args.full or args.pretend)
    args.models = args.models or ["SDXL", "SD3-Medium", "CogVideoX-2b"]
    not_sdxl = args.stage == "adp" and args.models != ["SDXL"]
    if args.repeat < 1 or args.batch_size < 1 or not_sdxl:
        usage(["--repeat and --batch-size must be above 0, and --stage adp is for --models SDXL "
               "alone"])
    return args


def main():
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.rows:
        return bench_rows.run(out, args.pretend)
    print(heading())
    results = {}
    if args.pretend:
        results = {name: measure(name, args) for name in args.models}
        args.models = []
    processes = multiprocessing.get_context("spawn")
    for name in args.models:
        # a process for each, so that their peaks do not add up
        with processes.Pool(1, torch.set_num_threads, (args.threads,)) as pool:
            results[name] = pool.apply(measure, (name, args))
        print(line_of(name, results[name]), flush=True)
    (out / "result.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"wrote {out}/result.json")


if __name__ == "__main__":
    run_main(main)
