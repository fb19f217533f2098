"""The optimizer of every trained network, and the moving average of the generator's weights."""
import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from training.errors import NotFinite
from training.lora import Lora
from training.networks import full_copy
from training.ranks import world
from training.sharding import whole


FLAT = 2**26                    # values that are averaged over the ranks at once


class Optimizer:
    """AdamW without weight decay (B.5). `step` first averages the gradients over the ranks, clips
    their norm, and refuses gradients that are not finite.

    name: of what is trained; messages and checkpoint files have it.
    lr: learning rate. It is read from the attribute `rate` at every step, so a schedule of rates
    sets that.
    clip: the largest norm of all gradients together; 0 for none.
    betas: beta_1 = 0, which is no momentum, "to capture the changes in distribution more
    up-to-date" (B.5): the fake score and the discriminator chase a moving target, and momentum
    would point at where it was. The first moment then is the gradient, and none is kept.
    """

    def __init__(self, name, params, lr, clip, betas=(0.0, 0.99)):
        self.name = name
        self.params = list(params)
        self.rate = lr
        self.clip = clip
        self.has_momentum = betas[0] != 0
        self.adam = torch.optim.AdamW(self.params, lr, betas=betas, weight_decay=0.0, fused=True)

    def step(self):
        """Average, clip, check and step. Raises NotFinite, on every rank alike, before these
        parameters are stepped."""
        if all(p.grad is None for p in self.params):
            raise RuntimeError(f"no gradient has reached the {self.name}")
        for p in self.params:
            if p.grad is None:          # of one of two networks, to which no sample went
                p.grad = torch.zeros_like(p)
        if world()[1] > 1:
            # the backward pass has averaged the gradients of sharded parameters already
            average([p.grad for p in self.params if not isinstance(p, DTensor)])
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params, self.clip or math.inf))
        if not torch.isfinite(norm):
            raise NotFinite(f"the gradient of the {self.name} is not finite: nothing of this "
                            f"iteration was saved")
        self.adam.param_groups[0]["lr"] = self.rate
        if not self.has_momentum:
            self.lend_gradients()
        self.adam.step()
        if not self.has_momentum:
            for p in self.params:
                del self.adam.state[p]["exp_avg"]

    def lend_gradients(self):
        """Give AdamW the gradients themselves as its first moments, which at beta_1 = 0 they are:
        it computes m = 0 m + 1 g, in the very memory of g."""
        for p in self.params:
            state = self.adam.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["exp_avg"] = p.grad

    def zero_grad(self):
        self.adam.zero_grad(set_to_none=True)


def average(gradients):
    """Replace gradients by their mean over the ranks. Many are sent as one tensor: an adapter has
    more than a thousand, and each all_reduce costs the host as much as a large one."""
    flat, size = [], 0
    for number, gradient in enumerate(gradients):
        flat.append(gradient)
        size += gradient.numel()
        is_last = number == len(gradients) - 1
        if is_last or size + gradients[number + 1].numel() > FLAT:
            together = torch.cat([g.flatten() for g in flat])
            dist.all_reduce(together)
            together /= dist.get_world_size()
            parts = together.split([g.numel() for g in flat])
            torch._foreach_copy_(flat, [part.view_as(g) for part, g in zip(parts, flat)])
            flat, size = [], 0


class EMA:
    """Exponential moving average of a generator's weights.

    source: the generator.
    decay: 0 for no average.
    prepare: what a copy of a network needs before it runs.
    net: the network to sample from, with the average's weights. Without an average, the generator.
    """

    def __init__(self, source, decay, prepare):
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

    @torch.no_grad()
    def update(self):
        """After every step of the generator."""
        if self.decay:
            averaged, trained = list(self.net.parameters()), list(self.source.parameters())
            torch._foreach_lerp_(averaged, trained, 1 - self.decay)

    @torch.no_grad()
    def restart(self):
        """Let the generator go on from its average."""
        for averaged, trained in zip(self.net.parameters(), self.source.parameters()):
            trained.copy_(averaged)
