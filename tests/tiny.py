"""Small networks in float64, and what the loops of adm.py and phased_dmd.py need to train them, for
the tests that share them."""
from copy import deepcopy

import torch
from torch import nn

from adm import Scores
from discriminators import Discriminator
from lesson.worlds import Net, NetTaps, mlp_heads
from training.draws import Draws

SHAPE = (2,)
BATCH = 6


class Float64Draws(Draws):
    """The same numbers in float64."""

    def normal(self):
        return super().normal().double()

    def uniform(self, low=0.0, high=1.0):
        return super().uniform(low, high).double()


def draws_of(iteration, seed=7):
    return Float64Draws((seed,), iteration, range(BATCH), SHAPE)


class Cond(nn.Module):
    """A Net that also reads a prompt, so that guidance has something to guide."""

    def __init__(self, width=8):
        super().__init__()
        self.net = Net(width, 2)
        self.prompt = nn.Linear(3, 2)

    def forward(self, x, timestep, prompt, return_dict=False, features=None):
        return (self.net(x, timestep, features=features)[0] + self.prompt(prompt).to(x.dtype),)


class CondTaps(NetTaps):
    def forward(self, x, timestep, prompt):
        maps = []
        self.net(x, timestep, prompt, features=maps)
        return maps


def apart(nets):
    """Move the weights a little, each on its own way: or x_fake = x_real."""
    with torch.no_grad():
        for net in nets:
            for p in net.parameters():
                p += 0.05 * torch.randn_like(p)
    return nets


def unconditional(schedule, width=8):
    """(generator, Scores, Discriminator) that read no prompt."""
    torch.manual_seed(0)
    teacher = Net(width, 2).double().requires_grad_(False)
    generator, fake = apart([deepcopy(teacher).requires_grad_(True) for _ in range(2)])
    heads = mlp_heads(2, width, 8).double()
    return generator, Scores(fake, teacher, schedule), Discriminator(NetTaps(teacher), heads)


def conditional(schedule):
    """(generator, Scores, Discriminator) that read a prompt."""
    torch.manual_seed(1)
    teacher = Cond().double().requires_grad_(False)
    generator, fake = apart([deepcopy(teacher).requires_grad_(True) for _ in range(2)])
    heads = mlp_heads(2, 8, 8).double()
    return generator, Scores(fake, teacher, schedule), Discriminator(CondTaps(teacher), heads)


def sgd(*nets, lr):
    return [torch.optim.SGD(net.parameters(), lr) for net in nets]


class Spy(torch.optim.SGD):
    """SGD that keeps the gradients of each step, in `gradients`: a list of lists."""

    def __init__(self, net, lr=0.0):
        super().__init__(net.parameters(), lr)
        self.trained = list(net.parameters())
        self.gradients = []

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.trained])
        super().step()


def weights_of(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
