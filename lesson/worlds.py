"""The worlds of the lesson: Gaussian mixtures in one and two dimensions, whose score is known in
closed form, the small networks that learn them, and what is measured there.

A world of your own is a function here that returns a `Mixture`, and a line in WORLDS:

    python -m lesson.ring --data ring

The networks are small, but called as diffusers calls its own. So the loops that train them are the
ones that train SDXL.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from discriminators import Heads

# ------------------------------------------------------------------------------------------ worlds


class Mixture:
    """Gaussians around `means` [K,D] with standard deviation `std`: a distribution whose score is
    known.

    weights: shares of the modes [K], scaled to add up to 1; None: all equal. This is the one place
    they are kept: samples, scores and all metrics below read them here. Raises ValueError unless
    there is a weight for each mode, none is negative and one is above 0.
    """

    def __init__(self, means, std, weights=None):
        self.means = torch.as_tensor(means)
        self.std = std
        if weights is None:
            weights = torch.ones(len(self.means))
        weights = torch.as_tensor(weights, dtype=self.means.dtype)
        if weights.shape != self.means.shape[:1] or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"weights {weights.tolist()}: need {len(self.means)}, one for each "
                             f"mode, none negative and one above 0")
        self.weights = weights / weights.sum()

    @classmethod
    def ring(cls, k=8, radius=2.0, std=0.2, weights=None):
        angle = torch.arange(k) * 2 * math.pi / k
        return cls(radius * torch.stack([angle.cos(), angle.sin()], 1), std, weights)

    @classmethod
    def grid(cls, side=5, gap=1.0, std=0.08, weights=None):
        line = (torch.arange(side) - (side - 1) / 2) * gap
        return cls(torch.cartesian_prod(line, line), std, weights)

    def modes_of(self, u):
        """The mode of each u [B] in [0, 1), LongTensor [B]: a uniform u picks every mode as often
        as its weight says."""
        edges = self.weights.cumsum(0).to(u.dtype)
        return torch.searchsorted(edges, u.contiguous(), right=True).clamp(max=len(self.means) - 1)

    def sample(self, n, generator=None):
        """n points of the distribution, [n,D]."""
        if (self.weights == self.weights[0]).all():
            mode = torch.randint(len(self.means), (n,), generator=generator)
        else:
            mode = self.modes_of(torch.rand(n, generator=generator))
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[mode] + self.std * noise

    def x0_hat(self, x, alpha, sigma):
        """E[x_0 | x] for x = alpha x_0 + sigma eps, x [B,D], alpha and sigma [B,1]."""
        variance = (alpha * self.std) ** 2 + sigma**2                   # of x around alpha * mean
        away = x[:, None] - alpha[..., None] * self.means                       # [B,K,D]
        prior = (self.weights / self.weights.max()).log()                       # [K], 0 if equal
        of_mode = (prior - away.square().sum(-1) / (2 * variance)).softmax(-1)  # p(mode | x) [B,K]
        x0_of_mode = self.means + (alpha * self.std**2 / variance)[..., None] * away    # [B,K,D]
        return (of_mode[..., None] * x0_of_mode).sum(1)

    def network(self, schedule):
        """The perfect network of this distribution in `schedule`'s parameterisation."""
        def net(x, timestep, return_dict=False):
            t = torch.searchsorted(schedule.timestep, timestep.contiguous(), right=True) - 1
            alpha, sigma = schedule.coefficients(t, x)
            x0 = self.x0_hat(x, alpha, sigma)
            eps = (x - alpha * x0) / sigma
            return (schedule.target(x0, eps, t),)
        return net


WORLDS = {
    "ring": Mixture.ring,                       # eight Gaussians on a circle
    "grid": Mixture.grid,                       # twenty-five on a grid
}


# ---------------------------------------------------------------------------------------- networks


class Net(nn.Module):
    """An MLP called as diffusers calls its networks: [B,2] -> [B,2]. `features`: a list that takes
    what each layer makes of x, [B,width]."""

    def __init__(self, width=256, layers=3):
        super().__init__()
        first = nn.Linear(2 + 32, width)
        self.layers = nn.ModuleList([first, *(nn.Linear(width, width) for _ in range(layers - 1))])
        self.output = nn.Linear(width, 2)
        self.register_buffer("waves", torch.pi * 2 ** torch.linspace(-2, 4, 16))

    def forward(self, x, timestep, return_dict=False, features=None):
        angle = timestep[:, None].to(x.dtype) / 1000 * self.waves               # [B,16]
        h = torch.cat([x, angle.sin(), angle.cos()], 1)                         # [B,34]
        for layer in self.layers:
            h = F.gelu(layer(h))                                                # [B,width]
            if features is not None:
                features.append(h)
        return (self.output(h),)


class NetTaps(nn.Module):
    """Taps on a Net, as discriminators.Taps are on real backbones: the features of every layer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, timestep):
        maps = []
        self.net(x, timestep, features=maps)
        return maps


class Fourier(nn.Module):
    """In the place of the vision encoder: fixed random waves of the point itself, [B,2] -> one map
    [B,width]."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("waves", torch.randn(2, width // 2))

    def forward(self, x):
        return [torch.cat([(x @ self.waves).sin(), (x @ self.waves).cos()], 1)]


def mlp_heads(count, width, hidden=64):
    """The heads of a discriminator with `count` taps of [B,width]."""
    heads = []
    for _ in range(count):
        heads.append(nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)))
    return Heads(heads)


def closed_form_teacher(data, schedule, steps, draws):
    """A frozen Net that knows `data`. draws(i): Draws of step i.

    It regresses the minimiser of the usual loss, in closed form. Minutes of averaging noisy targets
    fit into seconds, and what a noisy teacher gets wrong its students cannot inherit.
    """
    teacher = Net()
    exact = data.network(schedule)
    optimizer = torch.optim.AdamW(teacher.parameters(), 2e-3, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        noise = draws(i)
        t = noise.integers(1, schedule.T)
        x_t = schedule.add_noise(data.sample(len(t)), noise.normal(), t)
        timestep = schedule.timestep[t]
        F.mse_loss(teacher(x_t, timestep)[0], exact(x_t, timestep)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return teacher.requires_grad_(False)


# ----------------------------------------------------------------------------------------- metrics


def histogram(x):
    """Shares of the points x [N,2] in 24x24 bins over [-3,3]^2."""
    return np.histogram2d(*x.numpy().T, bins=24, range=[[-3, 3]] * 2)[0] / len(x)


def tv_and_precision(x, data, reference):
    """What is measured of samples x [N,2] beside a `reference` drawn from data:

    tv: total variation between their 24x24 histograms, 0 to 1.
    precision: fraction within 3 standard deviations of a mode.
    modes: how many have more than a tenth of their true share.
    """
    distance, mode = torch.cdist(x, data.means).min(1)                          # [N]
    near = distance < 3 * data.std
    share = torch.bincount(mode[near], minlength=len(data.means)) / len(x)      # [K]
    return dict(tv=float(0.5 * np.abs(histogram(x) - histogram(reference)).sum()),
                precision=near.float().mean().item(),
                modes=int((share > 0.1 * data.weights).sum()))


def shares(x, data):
    """The share of x [N,D] that falls to each mode, the nearest one, [K]."""
    mode = torch.cdist(x, data.means).argmin(1)
    return torch.bincount(mode, minlength=len(data.means)) / len(x)


def share_error(x, data):
    """Half the L1 distance between the modes' shares of x [N,D] and the true ones: 0 to 1."""
    return 0.5 * (shares(x, data) - data.weights).abs().sum().item()
