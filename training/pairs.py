"""The teacher's ODE pairs (x_T, x_0, prompt), which ADP and A1 learn from: pairs/ of a run."""
import math

import torch
from tqdm import tqdm

from training.batches import STREAMS, sample_ranks
from training.draws import Draws
from training.errors import Failure
from training.folders import open_tensors, write_folder
from training.ranks import broadcast, world
from training.teacher import SHARD


def pair_facts(args, teacher):
    return dict(teacher.facts, steps=args.pair_steps, guidance=args.pair_guidance, seed=args.seed)


def paths_of(args, out):
    return [out.path / "pairs" / f"{k:05d}" for k in range(math.ceil(args.pairs / SHARD))]


def collect_pairs(args, out, teacher, stop):
    """Stage `pairs` -> False if it was stopped early. A shard is a function of seed and number, so
    a killed stage goes on where it was. Each rank makes one shard of a round."""
    rank, ranks = sample_ranks(args)
    paths = paths_of(args, out)
    all_ranks_draw = bool(teacher.fsdp) or args.context_parallel > 1    # each pass needs them all
    sampler = teacher.sampler(teacher.schedule.stops(args.pair_steps), args.pair_guidance, order=2)
    rounds = range(0, len(paths), ranks)
    for first in tqdm(rounds, desc="pairs", unit="round", disable=world()[0] > 0):
        missing = broadcast([not path.exists() for path in paths[first:first + ranks]])
        is_mine_missing = rank < len(missing) and missing[rank]
        if is_mine_missing or (all_ranks_draw and any(missing)):
            number, n = first + rank, min(SHARD, args.pairs - first * SHARD)
            shard = draw_shard(args, teacher, sampler, number, n)
            if is_mine_missing and world()[0] % args.context_parallel == 0:
                rest = args.pairs - number * SHARD              # the last shard has no more
                tensors = {name: tensor[:rest] for name, tensor in shard.items()}
                write_folder(paths[number], {"pairs.safetensors": tensors},
                             pair_facts(args, teacher))
        if stop:                                                # asked of all ranks together
            return False
    return True


def draw_shard(args, teacher, sampler, number, n):
    """The n pairs of a shard, {name: tensor} on the host."""
    samples = range(number * SHARD, number * SHARD + n)
    draws = Draws((args.seed, STREAMS["pairs"]), 0, samples, teacher.shape)
    x_T = draws.normal()
    prompt = draws.integers(0, len(teacher.prompts) - 1)
    x_0 = teacher.draw(sampler, x_T, prompt, 2 * args.batch_size)
    return dict(x_T=x_T, x_0=x_0, prompt=prompt)


def load_pairs(args, out, teacher):
    """All shards -> (x_T, x_0, prompt) on the host. Raises Failure naming a shard that is missing,
    damaged, or of another teacher or setting."""
    paths = paths_of(args, out)
    for path in paths:
        if not path.exists():
            raise Failure(f"{path}: missing; collect the pairs with --stage pairs --resume auto")
    files = [open_tensors(path, pair_facts(args, teacher), "pairs.safetensors") for path in paths]
    tensors = []
    for name in ("x_T", "x_0", "prompt"):
        tensors.append(torch.cat([file.get_tensor(name) for file in files])[:args.pairs])
    return tuple(tensors)
