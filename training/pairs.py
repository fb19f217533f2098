"""The teacher's ODE pairs (x_T, x_0, prompt), which ADP and A1 learn from: pairs/ of a run."""
import math

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from training.batches import STREAMS, sample_ranks
from training.draws import Draws
from training.errors import Failure, first_not_finite
from training.folders import open_tensors, write_folder
from training.ranks import broadcast, is_rank_0, world
from training.teacher import PER_FILE


def pair_facts(args, teacher):
    return dict(teacher.facts, steps=args.pair_steps, guidance=args.pair_guidance, seed=args.seed)


def paths_of(args, out):
    return [out.path / "pairs" / f"{k:05d}" for k in range(math.ceil(args.pairs / PER_FILE))]


def rows_of(args, number):
    """How many pairs file `number` is to hold: the last may hold fewer than the others."""
    return min(PER_FILE, args.pairs - number * PER_FILE)


def rows_there(path):
    """How many pairs a file holds; 0 where there is none. A damaged one is taken for full:
    load_pairs names it."""
    if not path.exists():
        return 0
    try:
        with safe_open(path / "pairs.safetensors", "pt") as file:
            return file.get_slice("prompt").get_shape()[0]
    except (OSError, SafetensorError):
        return PER_FILE


def collect_pairs(args, out, teacher, stop):
    """Stage `pairs` -> False if it was stopped early. A file is a function of seed and number, so
    a killed stage goes on where it was. Each rank makes one file of a round. A file that is
    short, since the stage was stopped in it or fewer pairs were asked for then, is gone on with."""
    ranks = sample_ranks(args)[1]
    paths = paths_of(args, out)
    sampler = teacher.sampler(teacher.schedule.stops(args.pair_steps), args.pair_guidance, order=2)
    rounds = range(0, len(paths), ranks)
    for first in tqdm(rounds, desc="pairs", unit="round", disable=not is_rank_0()):
        numbers = range(first, min(first + ranks, len(paths)))
        there = None
        if is_rank_0():             # a file that others looked for in vain may stay away for them
            there = [rows_there(paths[k]) for k in numbers]
        there = broadcast(there)
        short = {k: rows for k, rows in zip(numbers, there) if rows < rows_of(args, k)}
        if short and not collect_round(args, paths, teacher, sampler, first, short, stop):
            return False
        if stop.asked_of_any_rank():
            return False
    return True


def collect_round(args, paths, teacher, sampler, first, short, stop):
    """The files of one round that are short, {number: rows it holds} -> False if it was stopped
    early. What was drawn until then is kept. The batches lie as in a run that is not stopped, so
    the bytes are the same."""
    number = first + sample_ranks(args)[0]
    is_mine = number in short
    size = 2 * args.batch_size
    begin = min(short.values()) // size * size
    drawn = None
    if is_mine and short[number] > 0:
        file = open_tensors(paths[number], pair_facts(args, teacher), "pairs.safetensors")
        drawn = {name: file.get_tensor(name)[:begin] for name in file.keys()}
    is_stopped = False
    for start in range(begin, rows_of(args, first), size):
        rows = range(start, min(start + size, rows_of(args, first)))
        if is_mine or teacher.ranks_draw_together:
            drawn = joined(drawn, draw_pairs(args, teacher, sampler, number, rows))
        is_stopped = stop.asked_of_any_rank()
        if is_stopped:
            break
    if is_mine and world()[0] % args.context_parallel == 0:
        rest = rows_of(args, number)                            # the last file has no more
        tensors = {name: tensor[:rest] for name, tensor in drawn.items()}
        wrong = first_not_finite(tensors)
        if wrong:
            raise Failure(f"{paths[number]}: the teacher's {wrong} is not finite, so no pairs were "
                          f"written; look at --model, --prompts and --pair-guidance")
        write_folder(paths[number], {"pairs.safetensors": tensors}, pair_facts(args, teacher))
    return not is_stopped


def joined(drawn, more):
    if drawn is None:
        return more
    return {name: torch.cat([drawn[name], more[name]]) for name in more}


def draw_pairs(args, teacher, sampler, number, rows):
    """Pairs of a file, {name: tensor} on the host. rows: a range of numbers in the file."""
    samples = range(number * PER_FILE + rows.start, number * PER_FILE + rows.stop)
    draws = Draws((args.seed, STREAMS["pairs"]), 0, samples, teacher.shape)
    x_T = draws.normal()
    prompt = draws.integers(0, len(teacher.prompts) - 1)
    x_0 = teacher.draw(sampler, x_T, prompt, 2 * args.batch_size)
    return dict(x_T=x_T, x_0=x_0, prompt=prompt)


class OnDisk:
    """One tensor of all files, [pairs,...], read from the disk as it is needed: all pairs are
    gigabytes, and every rank would hold them.

    files: open, each with PER_FILE pairs but the last.
    """

    def __init__(self, files, name, count):
        self.files = files
        self.name = name
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        """index: LongTensor [n] of pairs, or a slice of them -> [n,...] on the host."""
        if isinstance(index, slice):
            index = torch.arange(self.count)[index]
        rows = []
        for i in index.tolist():
            file, place = self.files[i // PER_FILE], i % PER_FILE
            rows.append(file.get_slice(self.name)[place:place + 1])
        return torch.cat(rows)


def load_pairs(args, out, teacher):
    """All files -> (x_T, x_0, prompt), the first two OnDisk, the prompts' numbers a LongTensor.
    Raises Failure naming a file that is missing, damaged, or of another teacher or setting."""
    paths = paths_of(args, out)
    for number, path in enumerate(paths):
        if not path.exists():
            raise Failure(f"{path}: missing; collect the pairs with --stage pairs --resume auto")
        if rows_there(path) < rows_of(args, number):
            raise Failure(f"{path}: holds {rows_there(path)} of {rows_of(args, number)} pairs; "
                          f"collect the others with --stage pairs --resume auto")
    files = [open_tensors(path, pair_facts(args, teacher), "pairs.safetensors") for path in paths]
    prompt = torch.cat([file.get_tensor("prompt") for file in files])[:args.pairs]
    return OnDisk(files, "x_T", args.pairs), OnDisk(files, "x_0", args.pairs), prompt
