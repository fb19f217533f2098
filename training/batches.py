"""What the loops are fed: each iteration's micro-batches of random numbers, prompts and pairs."""
import torch

from training.draws import Draws, to_device
from training.ranks import world

# of random numbers; phase k of Phased DMD has stream 10 + k
STREAMS = dict(pairs=0, adp=1, reflow=1, adm=2, report=3, pictures=4)


def stream_of(stage):
    return STREAMS[stage] if stage in STREAMS else 10 + int(stage.removeprefix("phase"))


def sample_ranks(args):
    """(rank, ranks) among those that draw different samples: ranks that share each sample's tokens
    are one."""
    rank, ranks = world()
    return rank // args.context_parallel, ranks // args.context_parallel


def draws_of(args, teacher, stage, iteration):
    """Yields the Draws of each of this rank's micro-batches. A sample's place in the global batch
    makes its random numbers, whichever rank it is on."""
    teacher.at = f"{stage}, iteration {iteration}"
    teacher.asked = []
    rank, ranks = sample_ranks(args)
    for m in range(args.accumulate):
        first = (m * ranks + rank) * args.batch_size
        yield Draws((args.seed, stream_of(stage)), iteration,
                    range(first, first + args.batch_size), teacher.shape, teacher.device)


def prompt_batches(args, teacher, stage):
    """-> batches(iteration) for ADM, DMD and Phased DMD: [(draws, cond, uncond), ...]."""
    def batches(iteration):
        micro_batches = []
        for draws in draws_of(args, teacher, stage, iteration):
            index = draws.integers(0, len(teacher.prompts) - 1, "cpu")
            uncond = teacher.uncond(args.batch_size)
            micro_batches.append((draws, teacher.cond(index), uncond))
        return micro_batches
    return batches


def pair_batches(args, teacher, stage, pairs):
    """-> batches(iteration) for ADP and A1: [(draws, x0_teacher, x_T, cond), ...]. pairs: see
    training.pairs.load_pairs."""
    x_T, x_0, prompt = pairs

    def batches(iteration):
        micro_batches = []
        for draws in draws_of(args, teacher, stage, iteration):
            pick = draws.integers(0, len(prompt) - 1, "cpu")
            micro_batches.append((draws, to_device(x_0[pick], teacher.device),
                                  to_device(x_T[pick], teacher.device), teacher.cond(prompt[pick])))
        return micro_batches
    return batches


def fixed_noise(args, teacher, purpose, count):
    """The noise that pictures and reports start from, [count,*shape] on the host: the same in every
    run of this seed."""
    draws = Draws((args.seed, STREAMS[purpose]), 0, range(count), teacher.shape)
    return draws.normal() if count else torch.empty(0, *teacher.shape)
