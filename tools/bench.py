"""An iteration of ADM, timed beside the least it could cost and beside Algorithm 1 as printed.

    python -m tools.bench                       # small networks of three families, minutes
    python -m tools.bench --full                # on a GPU: all of bench_rows.py, ten minutes
    python -m tools.bench --full --pretend      # the same rows without a GPU, simulated
    python -m tools.bench --pretend             # the same on small networks, to try them
    python -m tools.bench --full --models SDXL --bf16 --grad-checkpointing
                                                # the released sizes, random weights, on a GPU
    python -m tools.bench --full --models SDXL --bf16 --grad-checkpointing --cpu-offload --stage adp

lean: adm.adm, the loop that trains.
literal: adm.algorithm_1, the printed order: guidance in two calls, the features of x_fake computed
for each of their two uses, and the gradients that a plain backward() leaves in f and in D's
backbone. That is 17 passes of the network's size where 14 are needed.
floor: those 14, and the heads', each timed alone, added up.
"""
import json
import multiprocessing
import resource
import statistics
import sys
import time

if "--pretend" in sys.argv:
    import tools.guard  # noqa: F401
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools import bench_rows
from tools.bench_loops import SMALL, RandomTeacher, what_is_timed
from training.errors import run_main
from training.ranks import start
from training.scripts import a_count, folder_for, parser_for, zero_or_more
from training.sharding import fsdp_arguments
from training.terminal import quiet


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


def peak_bytes(function, device):
    """Of the device, or on a CPU of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    function()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def medians(timed, repeat, device):
    """{name of a function: seconds, the median of so many rounds}. One round before them warms
    up."""
    functions = timed.whole | timed.alone
    times = {name: [] for name in functions}
    for number in range(1 + repeat):
        for name, function in functions.items():
            for net in timed.nets:
                net.zero_grad()
            spent = seconds(function, device)
            if number > 0:
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
    waited for the host. Copies to and from the host, which run beside kernels, do not count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        spent = seconds(function, device)
    kernels = [e for e in profile.key_averages() if not e.key.startswith("Memcpy")]
    return sum(e.self_device_time_total for e in kernels) / 1e6 / spent


def copy_rates(device):
    """Bytes a second from pinned memory to the device and back."""
    host = torch.empty(2**30, dtype=torch.uint8).pin_memory()
    there = host.to(device)
    return dict(bytes_up=2**30 / seconds(lambda: there.copy_(host, non_blocking=True), device),
                bytes_down=2**30 / seconds(lambda: host.copy_(there, non_blocking=True), device))


def measure(name, args):
    """One family, in a process of its own -> its figures."""
    quiet()
    device = start(alone=args.cpu_offload)
    fsdp = fsdp_arguments(False, args.cpu_offload, args.bf16, device)
    torch.manual_seed(0)
    timed = what_is_timed(args, RandomTeacher(name, args, device, fsdp))
    lean_iteration = timed.whole["lean"]
    with FlopCounterMode(display=False) as counter:             # also warms up
        lean_iteration()
    peak = peak_bytes(lean_iteration, device)
    result = figures(args, peak, counter.get_total_flops(), medians(timed, args.repeat, device))
    if device.type == "cuda":
        fastest = matmul_flop_per_second(device)
        result.update(copy_rates(device), kernel_share=kernel_share(lean_iteration, device),
                      matmul_flop_per_second=fastest,
                      share_of_matmul=result["flop_per_second"] / fastest,
                      device=torch.cuda.get_device_name())
    if fsdp:
        torch.distributed.destroy_process_group()
    return result


def simulate(name, args):
    """The same on a pretended GPU: nothing is measured. Of two iterations the second is looked at,
    since the first makes the moments."""
    from tools import pretend
    quiet()
    if args.cpu_offload:
        pretend.process_group()
    times = {}
    with pretend.pretended() as watch:
        device = start()
        fsdp = pretend.with_values(fsdp_arguments, False, args.cpu_offload, args.bf16, device)
        timed = what_is_timed(args, RandomTeacher(name, args, device, fsdp))
        timed.whole["lean"]()
        # lean is the last: what is left in the watch is its own
        for name, function in (*timed.alone.items(), *reversed(timed.whole.items())):
            for net in timed.nets:
                net.zero_grad()
            watch.reset()
            function()
            times[name] = max(watch.seconds, watch.host_seconds())
        return figures(args, watch.peak, watch.flop, times) | dict(device="pretended")


def figures(args, peak, flop, times):
    """peak: bytes. flop: of an iteration. times: {name of a function: seconds}, see Timed."""
    lean = times["lean"]
    result = dict(lean=lean, samples_per_second=args.batch_size / lean, peak_bytes=peak, flop=flop,
                  flop_per_second=flop / lean)
    if "literal" in times:
        alone = {name: spent for name, spent in times.items() if name not in ("lean", "literal")}
        floor = sum(alone.values())
        result.update(literal=times["literal"], floor=floor, lean_over_floor=lean / floor,
                      literal_over_lean=times["literal"] / lean, passes=alone)
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
    p = parser_for(__doc__)
    p.add_argument("--models", nargs="+", choices=SMALL,
                   help="(None: SDXL, SD3-Medium and CogVideoX-2b)")
    p.add_argument("--full", action="store_true",
                   help="the released sizes; without --models: every row of bench_rows.py, with "
                   "that row's flags and none of these")
    p.add_argument("--pretend", action="store_true",
                   help="on a pretended GPU, by tools/pretend.py: simulated, nothing is measured; "
                   "without --models: every row of bench_rows.py")
    p.add_argument("--stage", choices=["adm", "adp"], default="adm",
                   help="adp: SDXL only, timed without a comparison")
    p.add_argument("--batch-size", type=a_count, default=4)
    p.add_argument("--repeat", type=a_count, default=5, help="timed rounds; medians are printed")
    p.add_argument("--head-channels", type=a_count, default=64, help="256 in training")
    p.add_argument("--no-comparison", action="store_true",
                   help="time lean alone, where memory has no room for the others")
    p.add_argument("--lora-rank", type=zero_or_more, default=0)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--grad-checkpointing", action="store_true")
    p.add_argument("--cpu-offload", action="store_true")
    p.add_argument("--compile", nargs="?", const="inductor")
    p.add_argument("--threads", type=a_count, default=1, help="of the CPU")
    p.add_argument("--out", default="out/bench")
    args = p.parse_args()
    args.lora_alpha = None
    args.rows = args.models is None and (args.full or args.pretend)
    args.models = args.models or ["SDXL", "SD3-Medium", "CogVideoX-2b"]
    if args.stage == "adp" and args.models != ["SDXL"]:
        p.error("--stage adp: for --models SDXL alone")
    return args


def main():
    args = parse()
    out = folder_for(args.out)
    if args.rows:
        return bench_rows.run(out, args.full, args.pretend)
    print(heading())
    results = {}
    processes = multiprocessing.get_context("spawn")
    for name in args.models:
        if args.pretend:
            from tools.pretend import in_fork   # the guard is loaded in this process alone
            results[name] = in_fork(simulate, name, args)
        else:
            # a process for each, so that their peaks do not add up
            with processes.Pool(1, torch.set_num_threads, (args.threads,)) as pool:
                results[name] = pool.apply(measure, (name, args))
        print(line_of(name, results[name]), flush=True)
    (out / "result.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"wrote {out}/result.json")


if __name__ == "__main__":
    run_main(main)
