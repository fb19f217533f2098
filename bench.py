"""Why this file exists: it times an iteration of ADM beside the least it could cost and beside Algorithm 1 as it is printed, in one run.

    python bench.py                                                          # small networks of each family's structure (two minutes)
    python bench.py --full --models SDXL --bf16 --grad-checkpointing         # the released sizes, random weights, on a GPU
    python bench.py --full --models SDXL --bf16 --grad-checkpointing --cpu-offload --stage adp

lean: adm.adm. literal: the printed order, guidance in two calls, features of x_fake computed for each of their two uses, and the gradients that a plain
backward() leaves in f and in D's backbone: 17 passes of the network's size where 14 are needed. floor: those 14, and the heads', each timed alone, added up.
"""
import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_cogvideox
import train_sdxl
from adm import Draws, adm, adp
from discriminators import Taps, hinge, released
from dry_run import passes, prompt
from ode import Schedule
from plumbing import Adam, autocast, checkpointing, quiet, run, sharding, start, usage

ROWS = {**train_sdxl.PIPELINES, **train_cogvideox.PIPELINES}
# released name -> (its pipeline, the small one's configuration, latent, prompt tokens)
SMALL = {
    "SDXL": ("StableDiffusionXLPipeline", dict(block_out_channels=(64, 128, 256), attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 1, 2),
                                               cross_attention_dim=128, projection_class_embeddings_input_dim=6 * 256 + 64), (4, 32, 32)),
    "SD3-Medium": ("StableDiffusion3Pipeline", dict(num_layers=6, num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=256,
                                                    pooled_projection_dim=64), (16, 32, 32)),
    "SD3.5-Large": ("StableDiffusion3Pipeline", dict(num_layers=8, num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=256,
                                                     pooled_projection_dim=64), (16, 32, 32)),
    "CogVideoX-2b": ("CogVideoXPipeline", dict(num_layers=6, num_attention_heads=4, text_embed_dim=128, max_text_seq_length=16, sample_frames=9, sample_height=16, sample_width=16), (3, 16, 16, 16)),
    "CogVideoX-5b": ("CogVideoXPipeline", dict(num_layers=6, num_attention_heads=4, text_embed_dim=128, max_text_seq_length=16, sample_frames=9, sample_height=16, sample_width=16), (3, 16, 16, 16))}


def literal(generator, fake_score, real_score, heads, optimizers, schedule, rows, guidance, draws, cond, uncond):
    """Algorithm 1, line by line, each update with a backward() of its own. The networks' outputs are made pairs by the schedule."""
    generator_opt, fake_opt, heads_opt = optimizers
    look = lambda net, x, i, c: schedule.split(x, net(x, timestep=schedule.timestep[i], **c, return_dict=False)[0].to(x.dtype), i)
    z, i = draws.normal(), torch.full((len(draws.each),), rows[0], device=draws.device)
    x_0 = look(generator, z, i, cond)[0].detach()                                                             # 8, 9
    z_f, t_f = draws.normal(), draws.rows(1, schedule.T)
    out = fake_score(schedule.noise(x_0, z_f, t_f), timestep=schedule.timestep[t_f], **cond, return_dict=False)[0]
    fake_loss = (out - schedule.target(x_0, z_f, t_f)).square().mean()
    fake_opt.zero_grad(), fake_loss.backward(), fake_opt.step()                                               # 11
    x0_hat = look(generator, draws.normal(), i, cond)[0]                                                      # 15, 17
    z_g, dt = draws.normal(), round(schedule.T / 64)
    t = draws.rows(dt, schedule.T)                                                                            # 18
    x_t = schedule.noise(x0_hat, z_g, t)                                                                      # 19
    x_fake = schedule.noise(*look(fake_score, x_t, t, cond), t - dt)                                          # 20
    with torch.no_grad():
        w = draws.uniform(*guidance).view(-1, *[1] * (x_t.dim() - 1))
        out_cond, out_uncond = (real_score(x_t, timestep=schedule.timestep[t], **c, return_dict=False)[0] for c in (cond, uncond))
        x_real = schedule.noise(*schedule.split(x_t, (out_uncond + w * (out_cond - out_uncond)).to(x_t.dtype), t), t - dt)   # 21
    taps = Taps(real_score)
    D = lambda x: heads(taps(x, timestep=schedule.timestep[t - dt], **cond))
    real_score.requires_grad_(True)                             # D's backbone: line 22 leaves gradients in it, as in f, that nobody uses
    generator_loss = -D(x_fake).mean()
    generator_opt.zero_grad(), generator_loss.backward(), generator_opt.step()                                # 22
    real_score.zero_grad(), real_score.requires_grad_(False)
    heads_loss = hinge(D(x_fake.detach()), D(x_real))
    heads_opt.zero_grad(), heads_loss.backward(), heads_opt.step()                                            # 26
    fake_opt.zero_grad(), heads_opt.zero_grad(), generator_opt.zero_grad()


def seconds(function, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def networks(name, args, device, how):
    """Random weights in the released structure -> what train_sdxl.py calls a teacher."""
    kind, small, shape = SMALL[name]
    with torch.device("meta"):
        meta, x, _ = released()[name]
    config = {k: v for k, v in meta.config.items() if k[0] != "_"} | ({} if args.full else small)
    torch.manual_seed(0)
    with torch.device("cpu" if how else device):
        net = type(meta).from_config(config).to(torch.bfloat16 if args.bf16 else torch.float32).requires_grad_(False).eval()
    shape, family = tuple(x.shape[1:]) if args.full else shape, ROWS[kind]
    rotary = {}
    if getattr(net.config, "use_rotary_positional_embeddings", False):
        length = shape[0] * shape[2] * shape[3] // 4
        rotary = dict(image_rotary_emb=(torch.ones(length, 64, device=device), torch.zeros(length, 64, device=device)))
    train_sdxl.place(args, net, how, device)
    return SimpleNamespace(net=net, units=[net], backbone=net, device=device, how=how, shape=shape, family=family,
                           uncond=lambda n: prompt(net, n, device, tokens=None if args.full else 16) | rotary)


def adversarial_pretraining(teacher, args, generator, heads, optimizers, schedule):
    """ADP's loop over SDXL's own VAE and SAM, random weights; a generator as adm is."""
    from diffusers import AutoencoderKL
    from transformers import SamVisionConfig, SamVisionModel
    device, width = teacher.device, (128, 256, 512, 512) if args.full else (16, 16, 32, 32)
    with device:
        vae = AutoencoderKL(block_out_channels=width, norm_num_groups=min(32, width[0]), layers_per_block=2, sample_size=1024,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        vision = SamVisionModel(SamVisionConfig(**{} if args.full else dict(image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_dim=64,
                                                                            global_attn_indexes=[1, 3], window_size=4)))
    vae.requires_grad_(False).to(torch.bfloat16 if args.bf16 else torch.float32)
    if args.grad_checkpointing:
        checkpointing(vae)
    autocast(vae, device, args.bf16, "decode"), autocast(vision, device, args.bf16)
    pixel_heads = train_sdxl.pixel_heads(args, teacher, vision)
    pairs = [torch.randn(args.batch_size, *teacher.shape, device=device) for _ in range(2)]
    cond = teacher.uncond(args.batch_size)
    decode = lambda x: vae.decode(x / vae.config.scaling_factor, return_dict=False)[0].float()
    return adp(generator, Taps(teacher.net), heads, Taps(vision), pixel_heads, decode, (*optimizers, Adam("pixel heads", pixel_heads.parameters(), 1e-6, 1.0)),
               schedule, Schedule.straight().to(device), lambda i: [(Draws((0, 1), i, range(args.batch_size), teacher.shape, device), *pairs, cond)], 10**9)


def measure(name, args):
    """One family, in a process of its own -> its figures."""
    quiet()
    device = start(alone=args.cpu_offload)
    how = sharding(False, args.cpu_offload, args.bf16, device)
    torch.manual_seed(0)
    teacher = networks(name, args, device, how)
    n, schedule = args.batch_size, Schedule.straight().to(device)
    generator, fake = (train_sdxl.trainable(args, teacher, who, args.lora_rank) for who in (("generator", "fake") if args.stage == "adm" else ("generator",) * 2))
    heads = train_sdxl.latent_heads(args, teacher)
    optimizers = [Adam(who, net.parameters(), 1e-6, 1.0) for who, net in (("generator", generator), ("fake score", fake), ("heads", heads))]
    draws = lambda i: Draws((0,), i, range(n), teacher.shape, device)
    cond, uncond = teacher.uncond(n), teacher.uncond(n)
    if args.stage == "adm":
        steps = adm(generator, fake, teacher.net, Taps(teacher.net), heads, optimizers, schedule, schedule, schedule.rows(1), (6.0, 8.0),
                    lambda i: [(draws(i), cond, uncond)], 10**9)
    else:
        steps = adversarial_pretraining(teacher, args, generator, heads, (optimizers[0], optimizers[2]), schedule)
    timed = {"lean": lambda: next(steps)}
    alone = {}
    if args.stage == "adm" and not (args.cpu_offload or args.lora_rank or args.no_comparison):
        timed["literal"] = lambda: literal(generator, fake, teacher.net, heads, optimizers, schedule, schedule.rows(1), (6.0, 8.0), draws(0), cond, uncond)
        x, t = torch.randn(n, *teacher.shape, device=device), torch.full((n,), 500.0, device=device)
        alone = passes(generator, fake, teacher.net, teacher.net, heads, x, t, cond, uncond)
    with FlopCounterMode(display=False) as flop:                # also warms up
        next(steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    next(steps)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = {what: [] for what in (*timed, *alone)}
    for repeat in range(args.repeat + 1):
        for what, function in (timed | alone).items():
            for net in (generator, fake, heads):
                net.zero_grad()
            spent = seconds(function, device)
            if repeat:                                          # the first round warms up
                times[what].append(spent)
    middle = {what: statistics.median(values) for what, values in times.items()}
    result = dict(lean=middle["lean"], samples_per_second=n / middle["lean"], peak_bytes=peak, flop=flop.get_total_flops(),
                  flop_per_second=flop.get_total_flops() / middle["lean"])
    if alone:
        floor = sum(middle[what] for what in alone)
        result |= dict(literal=middle["literal"], floor=floor, lean_over_floor=middle["lean"] / floor, literal_over_lean=middle["literal"] / middle["lean"],
                       passes={what: middle[what] for what in alone})
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        for _ in range(3):
            fastest = seconds(lambda: [a @ a for _ in range(20)], device)
        result |= dict(matmul_flop_per_second=20 * 2 * 8192**3 / fastest, share_of_matmul=result["flop_per_second"] * fastest / (20 * 2 * 8192**3),
                       device=torch.cuda.get_device_name())
    if how:
        torch.distributed.destroy_process_group()
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=SMALL, default=["SDXL", "SD3-Medium", "CogVideoX-2b"])
    p.add_argument("--full", action="store_true", help="the released sizes")
    p.add_argument("--stage", choices=["adm", "adp"], default="adm", help="adp: SDXL only, timed without a comparison")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--repeat", type=int, default=5, help="timed rounds; medians are printed")
    p.add_argument("--head-channels", type=int, default=64, help="256 in training")
    p.add_argument("--no-comparison", action="store_true", help="time lean alone, where memory has no room for the others")
    p.add_argument("--lora-rank", type=int, default=0)
    for flag in ("bf16", "grad-checkpointing", "cpu-offload"):
        p.add_argument(f"--{flag}", action="store_true")
    p.add_argument("--compile", nargs="?", const="inductor")
    p.add_argument("--threads", type=int, default=1, help="of the CPU")
    p.add_argument("--out", default="out/bench")
    args = p.parse_args()
    args.lora_alpha = None
    if args.repeat < 1 or args.batch_size < 1 or args.stage == "adp" and args.models != ["SDXL"]:
        usage(["--repeat and --batch-size must be above 0, and --stage adp is for --models SDXL alone"])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'seconds an iteration':22s}{'lean':>9s}{'floor':>9s}{'literal':>9s}{'lean/floor':>12s}{'literal/lean':>14s}{'samples/s':>11s}{'peak GiB':>10s}{'TFLOP/s':>9s}{'of matmul':>11s}")
    results = {}
    for name in args.models:
        with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (args.threads,)) as pool:    # a process each: peaks do not add up
            r = results[name] = pool.apply(measure, (name, args))
        show = lambda key, form: format(r[key], form) if key in r else format("-", ">" + form.split(".")[0])
        print(f"{name:22s}{show('lean', '9.3f')}{show('floor', '9.3f')}{show('literal', '9.3f')}{show('lean_over_floor', '12.3f')}{show('literal_over_lean', '14.3f')}"
              f"{show('samples_per_second', '11.2f')}{r['peak_bytes'] / 2**30:10.2f}{r['flop_per_second'] / 1e12:9.2f}{show('share_of_matmul', '11.2f')}", flush=True)
    (out / "result.json").write_text(json.dumps(results, indent=1))
    print(f"wrote {out}/result.json")


if __name__ == "__main__":
    run(main)
