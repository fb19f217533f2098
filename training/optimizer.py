"""The optimizer of every trained network, and the moving average of the generator's weights."""
import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from training.errors import NotFinite
from training.lora import Lora
from training.networks import full_copy
from training.sharding import whole


def unchanged(net):
    return net


class Optimizer:
    """AdamW without weight decay (B.5). `step` first averages the gradients over the ranks, clips
    their norm, and refuses gradients that are not finite.

    name: of what is trained; messages and checkpoint files have it.
    lr: learning rate. It is read from the attribute `rate` at every step, so a schedule of rates
    sets that.
    clip: the largest norm of all gradients together; 0 for none.
    betas: beta_1 = 0, which is no momentum, "to capture the changes in distribution more
    up-to-date" (B.5): the fake score and the discriminator chase a moving target, and momentum
    would point at where it was.
    """

    def __init__(self, name, params, lr, clip, betas=(0.0, 0.99)):
        self.name = name
        self.params = [p for p in params if p.requires_grad]
        self.rate = lr
        self.clip = clip
        self.adam = torch.optim.AdamW(self.params, lr, betas=betas, weight_decay=0.0, fused=True)

    def step(self):
        """Average, clip, check and step. Raises NotFinite, on every rank alike, before anything is
        stepped."""
        for p in self.params:
            if p.grad is None:          # of one of two networks, to which no sample went
                p.grad = torch.zeros_like(p)
            # the backward pass has averaged the gradients of sharded parameters already
            if dist.is_initialized() and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params, self.clip or math.inf))
        if not torch.isfinite(norm):
            raise NotFinite(f"the gradient of the {self.name} is not finite: nothing was stepped "
                            f"or saved; resume from the last checkpoint with a lower learning rate")
        self.adam.param_groups[0]["lr"] = self.rate
        self.adam.step()

    def zero_grad(self):
        self.adam.zero_grad(set_to_none=True)


class EMA:
    """Exponential moving average of a generator's trained weights.

    source: the generator.
    decay: 0 for no average.
    prepare: what a copy of a network needs before it runs.
    net: the network to sample from, with the average's weights. Without an average, the generator.
    """

    def __init__(self, source, decay, prepare=unchanged):
        self.source = source
        self.decay = decay
        if decay == 0:
            self.net = source
        elif isinstance(source, Lora):
            self.net = source.twin(f"{source.name}_average")
        else:
            self.net = prepare(full_copy(source))

    def networks(self):
        """{name: network}, what a checkpoint holds of the generator."""
        if self.decay:
            return dict(generator=self.source, average=self.net)
        return dict(generator=self.source)

    def _trained_pairs(self):
        """[(the average's parameter, the generator's), ...] of those that are trained."""
        pairs = zip(self.net.parameters(), self.source.parameters())
        return [(averaged, trained) for averaged, trained in pairs if trained.requires_grad]

    @torch.no_grad()
    def update(self):
        """After every step of the generator."""
        if self.decay:
            averaged, trained = zip(*self._trained_pairs())
            torch._foreach_lerp_(averaged, trained, 1 - self.decay)

    @torch.no_grad()
    def restart(self):
        """Let the generator go on from its average."""
        for averaged, trained in self._trained_pairs():
            trained.copy_(averaged)
