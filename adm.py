"""DMDX: adversarial distillation pre-training (ADP), then Adversarial Distribution Matching (ADM, Algorithm 1).

    python adm.py --out out/adm     # a 2-D teacher distilled to one step, four ways: picture, table, result.json (about 75 s, in toys.py)

                                           tv  precision  modes
        teacher, 20 steps               0.062       0.98      8
        ADP, 1 step                     0.325       0.91      8
        DMDX (ADP, ADM), 1 step         0.277       0.92      8

From arXiv 2507.18569: `adp` and `adm` are the two stages, each one loop that yields once per generator step and knows
nothing of logging, checkpoints or processes. The letters of the paper:

    F_phi  real_score   frozen teacher              G_theta  generator    the student
    f_psi  fake_score   follows the student         D_tau    taps, heads  frozen teacher, trained heads

Wherever a generator learns, the backward pass is cut in two at its clean prediction: first dL/dx0_hat, through whatever
judges it, then one backward through G. The cut is exact. It keeps gradients out of every judge, leaves no weight
gradient computed in vain, and makes ADM and DMD the same loop with another dL/dx0_hat.
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from discriminators import hinge
from ode import predict, sample


class Draws:
    """All random numbers of one iteration for some samples of the global batch, from (seed, iteration, sample) alone:
    a resumed run, or one on another number of ranks, draws the same.

    seed: a tuple of integers, such as (seed, stage). samples: indices into the global batch. shape: of one latent. block: latents drawn per index (> 1 where one generator
    for each would be slow and nobody shards, as in two dimensions).
    """

    def __init__(self, seed, iteration, samples, shape, device="cpu", block=1):
        stream = lambda *key: torch.Generator().manual_seed(int(np.random.SeedSequence((*seed, iteration, *key)).generate_state(1, np.uint64)[0]) >> 1)
        self.each, self.common = [stream(0, s) for s in samples], stream(1)
        self.shape, self.device, self.block = tuple(shape), device, block

    def normal(self):
        """N(0, I), [B,*shape]."""
        return torch.cat([torch.randn(self.block, *self.shape, generator=g) for g in self.each]).to(self.device, non_blocking=True)

    def uniform(self, low=0.0, high=1.0):
        """U[low, high), [B]."""
        return torch.cat([torch.rand(self.block, generator=g) for g in self.each]).to(self.device, non_blocking=True) * (high - low) + low

    def rows(self, low, high, device=None):
        """Rows of a schedule, uniform over low..high with both ends, LongTensor [B]; on `device`, if the host is to read them without waiting."""
        return torch.cat([torch.randint(low, high + 1, (self.block,), generator=g) for g in self.each]).to(device or self.device, non_blocking=True)

    def index(self, low, high):
        """One integer in low..high, the same on every rank: ranks that share weights must run the same number of passes."""
        return torch.randint(low, high + 1, (), generator=self.common).item()


@contextmanager
def frozen(net):
    """Inside, a graph through `net` is built without its weights: gradients pass to its input, none collect in it."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def score_loss(net, schedule, x0, eps, i, cond):
    """The teacher's pre-training loss: squared error to the noise of an eps network (Eq. 2), to the velocity of a v or flow
    network (Eq. 3). x0, eps [B,...], i LongTensor [B]; no guidance, no prompt dropout."""
    out = net(schedule.noise(x0, eps, i), timestep=schedule.timestep.to(x0.device)[i], **cond, return_dict=False)[0]
    return F.mse_loss(out.to(x0.dtype), schedule.target(x0, eps, i))


def dmd_gradient(x0_hat, x0_fake, x0_real):
    """Reverse-KL gradient of DMD in x0_hat [B,...], normalised per sample (arXiv 2311.18828, Eq. 7, 8)."""
    scale = (x0_hat - x0_real).abs().flatten(1).mean(1).clamp(min=1e-8)           # [B]
    return (x0_fake - x0_real) / scale.view(-1, *[1] * (x0_hat.dim() - 1))


def adp(generator, taps, heads, pixel_taps, pixel_heads, decode, optimizers, schedule, line, batches, iterations, start=0,
        weights=(0.85, 0.15)):
    """Adversarial distillation pre-training on the teacher's ODE pairs, a generator of losses.

    taps, heads: the latent discriminator D_1. pixel_taps, pixel_heads: D_2, which sees decode(x0). weights: (lambda_1,
    lambda_2). optimizers: of generator, heads, pixel_heads. schedule: the teacher's. line: the straight schedule whose
    velocity the generator learns. batches(iteration): list of micro-batches (draws, x_0, x_T, cond) whose gradients add up.
    Yields dict(iteration, generator, discriminator, pixel_discriminator) of detached scalars.
    """
    generator_opt, heads_opt, pixel_opt = optimizers
    for iteration in range(start + 1, iterations + 1):
        batch = batches(iteration)
        for draws, x_0, x_T, cond in batch:
            # generator: one jump from a point of the line, mostly near pure noise, t = [1 - u^3] T
            t = ((1 - draws.uniform() ** 3) * line.T).ceil().long().clamp(min=1)  # [B]
            x0_tilde, _ = predict(generator, line, line.noise(x_0, x_T, t), t, cond)
            x0 = x0_tilde.detach().requires_grad_()

            # D_1 looks at latents noised again to t' ~ U(0, T), D_2 at images: the features serve both updates
            noise, t1 = draws.normal(), draws.rows(1, schedule.T)
            look = lambda x: taps(schedule.noise(x, noise, t1), timestep=schedule.timestep.to(x.device)[t1], **cond)
            fake, fake_pixel = look(x0), pixel_taps(decode(x0))
            with torch.no_grad():
                real, real_pixel = look(x_0), pixel_taps(decode(x_0))

            generator_loss = -(weights[0] * heads(fake).mean() + weights[1] * pixel_heads(fake_pixel).mean())
            gradient, = torch.autograd.grad(generator_loss, x0)
            x0_tilde.backward(gradient / len(batch))

            # both discriminators: hinge on detached features
            latent_loss = hinge(heads([f.detach() for f in fake]), heads(real))
            pixel_loss = hinge(pixel_heads([f.detach() for f in fake_pixel]), pixel_heads(real_pixel))
            ((weights[0] * latent_loss + weights[1] * pixel_loss) / len(batch)).backward()
        for opt in (generator_opt, heads_opt, pixel_opt):
            opt.step(), opt.zero_grad()
        yield dict(iteration=iteration, generator=generator_loss.detach(), discriminator=latent_loss.detach(),
                   pixel_discriminator=pixel_loss.detach())


def reflow(generator, optimizer, line, batches, iterations, start=0):
    """Ablation A1, one round of rectified flow: the pairs of ADP, its times, and a squared error in place of adversaries."""
    for iteration in range(start + 1, iterations + 1):
        batch = batches(iteration)
        for draws, x_0, x_T, cond in batch:
            t = ((1 - draws.uniform() ** 3) * line.T).ceil().long().clamp(min=1)
            loss = score_loss(generator, line, x_0, x_T, t, cond)
            (loss / len(batch)).backward()
        optimizer.step(), optimizer.zero_grad()
        yield dict(iteration=iteration, generator=loss.detach())


def adm(generator, fake_score, real_score, taps, heads, optimizers, schedule, student_schedule, rows, guidance, batches, iterations,
        start=(0, 0), ttur=1, dt=None, loss="adm", student_w=None):
    """Algorithm 1 (numbers on the right are its lines), a generator of losses: one yield per generator step.

    optimizers: of generator, fake_score, heads. schedule: the scores'; student_schedule: the generator's, which differs after
    ADP. rows: the generator's t_N > ... > t_0 = 0. guidance: range of the real score's CFG weight, drawn per sample.
    batches(global_iter): list of micro-batches (draws, cond, uncond) whose gradients add up. dt: T/64 unless given, in rows.
    start: (genIter, globalIter) to go on from. loss: 'adm', or 'dmd' for the baseline, which has no discriminator. student_w: the
    generator's own CFG weight, if it is to be sampled with guidance too ("ADM w/ CFG" in the paper's video tables).
    Yields dict(iteration, global_iter, fake, generator, discriminator, dmd); `dmd` is the DMD loss, in ADM only recorded.
    """
    generator_opt, fake_opt, heads_opt = optimizers
    N, dt = len(rows) - 1, dt or round(schedule.T / 64)
    gen_iter, global_iter = start
    while gen_iter < iterations:                                                                              # 4
        global_iter += 1                                                                                      # 5
        batch = batches(global_iter)

        # update fake score estimator f_psi                                                                     7
        for draws, cond, uncond in batch:
            z = draws.normal()                                                                                # 8
            with torch.no_grad():
                x_0 = sample(generator, student_schedule, z, rows, cond, uncond, student_w)                   # 9
            z_f, t_f = draws.normal(), draws.rows(1, schedule.T)                                              # 10
            fake_loss = score_loss(fake_score, schedule, x_0, z_f, t_f, cond)                                 # 11
            (fake_loss / len(batch)).backward()
        fake_opt.step(), fake_opt.zero_grad()
        if global_iter % ttur:                                                                                # 12
            continue

        for draws, cond, uncond in batch:
            # update generator G_theta                                                                          14
            z, n = draws.normal(), draws.index(1, N)                                                          # 15
            with torch.no_grad():
                x_tn = sample(generator, student_schedule, z, rows[:N - n + 1], cond, uncond, student_w)      # 16
            x0_hat, _ = predict(generator, student_schedule, x_tn, rows[N - n], cond, uncond, student_w)      # 17
            z_g, t = draws.normal(), draws.rows(dt, schedule.T)                                               # 18
            x0 = x0_hat.detach().requires_grad_()                               # here the backward pass is cut
            x_t = schedule.noise(x0, z_g, t)                                                                  # 19
            with frozen(fake_score):                            # to the end of the backward: checkpointing runs f_psi again there
                with torch.set_grad_enabled(loss == "adm"):
                    x0_fake, eps_fake = predict(fake_score, schedule, x_t, t, cond)
                    x_fake = schedule.noise(x0_fake, eps_fake, t - dt)                                        # 20
                with torch.no_grad():
                    w = draws.uniform(*guidance)
                    x0_real, eps_real = predict(real_score, schedule, x_t, t, cond, uncond, w)
                    x_real = schedule.noise(x0_real, eps_real, t - dt)                                        # 21
                    gradient = dmd_gradient(x0, x0_fake, x0_real)
                losses = dict(fake=fake_loss.detach(), dmd=0.5 * gradient.square().mean())
                if loss == "adm":
                    look = lambda x: taps(x, timestep=schedule.timestep.to(x.device)[t - dt], **cond)
                    fake = look(x_fake)
                    generator_loss = -heads(fake).mean()                                                      # Eq. 7
                    gradient, = torch.autograd.grad(generator_loss, x0)
                    losses["generator"] = generator_loss.detach()
                else:
                    gradient = gradient / gradient.numel()      # of 0.5 || x0_hat - sg(x0_hat - g) ||^2, a mean
            x0_hat.backward(gradient / len(batch))                                                            # 22

            # update discriminator D_tau                                                                        25
            if loss == "adm":
                with torch.no_grad():
                    real = look(x_real)
                heads_loss = hinge(heads([f.detach() for f in fake]), heads(real))                            # Eq. 8
                (heads_loss / len(batch)).backward()                                                          # 26
                losses["discriminator"] = heads_loss.detach()
        generator_opt.step(), generator_opt.zero_grad()                                                       # 22
        gen_iter += 1                                                                                         # 23
        if loss == "adm":
            heads_opt.step(), heads_opt.zero_grad()                                                           # 26
        yield dict(iteration=gen_iter, global_iter=global_iter, **losses)


if __name__ == "__main__":
    import toys                                                 # two dimensions
    toys.adm_demo(__doc__)
