"""Random numbers that depend only on (seed, iteration, sample), not on what ran before."""
import numpy as np
import torch


def stream(*key):
    """A torch.Generator seeded by a key of integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)       # a seed of torch has 63 bits


def to_device(values, device):
    """A tensor of the host, on a device, without a wait. A GPU fetches from pinned memory by
    itself; from other memory the host has to hand over, once all that was queued is done."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Draws:
    """All random numbers of one iteration for some samples of the global batch. Each sample has a
    stream of its own, so a resumed run, or one on another number of ranks, draws the same numbers.

    seed: a tuple of integers, such as (seed, stage).
    samples: indices into the global batch, one for each sample.
    shape: of one latent.
    block: latents drawn for each index, so that B = block * len(samples). More than 1 where one
    generator for each latent would be slow and nothing is split over ranks, as in two dimensions.
    """

    def __init__(self, seed, iteration, samples, shape, device="cpu", block=1):
        self.each = [stream(*seed, iteration, 0, sample) for sample in samples]
        self.common = stream(*seed, iteration, 1)
        self.shape = tuple(shape)
        self.device = device
        self.block = block

    def normal(self):
        """N(0, I), [B,*shape]."""
        parts = [torch.randn(self.block, *self.shape, generator=g) for g in self.each]
        return to_device(torch.cat(parts), self.device)

    def uniform(self, low=0.0, high=1.0):
        """U[low, high), [B]."""
        parts = [torch.rand(self.block, generator=g) for g in self.each]
        return to_device(torch.cat(parts), self.device) * (high - low) + low

    def integers(self, low, high, device=None):
        """Uniform integers from low to high, both included, LongTensor [B].

        device: another than the run's. Give "cpu" where the host reads them at once: it would wait
        for a GPU.
        """
        parts = [torch.randint(low, high + 1, (self.block,), generator=g) for g in self.each]
        return to_device(torch.cat(parts), device or self.device)

    def shared_integer(self, low, high):
        """One integer from low to high, both included, the same on every rank and in every
        micro-batch of an iteration: ranks that share weights must run the same number of passes,
        and micro-batches stand for more ranks."""
        return torch.randint(low, high + 1, (), generator=self.common).item()
