"""DMDX: adversarial distillation pre-training (ADP), then Adversarial Distribution Matching (ADM).

From arXiv 2507.18569. The letters of the paper:

    F_phi   real score    frozen teacher            G_theta   generator       the student
    f_psi   fake score    follows the student       D_tau     discriminator   frozen teacher, heads

`algorithm_1` is one round of Algorithm 1 as it is printed; read it first. `adm` is the loop that
trains. It makes the same updates (the tests hold one against the other), with these differences:

- G's backward pass is cut in two at x0_hat: first dL/dx0_hat, through whatever judges it, then one
  backward through G. The cut is exact, leaves no weight gradient computed in vain, and makes ADM
  and DMD the same loop with another judge.
- D's features of x_fake serve both updates: the discriminator's takes them detached.
- Guidance runs both its halves in one batch, and micro-batches may add up to one iteration.

`adm`, `adp` and `reflow` train, and yield their losses after each step of G, those of the last
micro-batch. Logging, checkpoints and processes live in their caller's `for` body, random numbers
(`draws`) in training/draws.py.
"""
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from discriminators import HINGE
from ode import Schedule, network_output, predict, sample, to_multiply


class Scores(NamedTuple):
    """The two score estimators. Both speak of the teacher's diffusion and share its schedule."""
    fake: torch.nn.Module       # f_psi
    real: torch.nn.Module       # F_phi
    schedule: Schedule


def algorithm_1(generator, scores, discriminator, optimizers, student_schedule, stops, guidance,
                draws, cond, uncond, global_iter, ttur=1):
    """Lines 5 to 26 of Algorithm 1 (ADM supplement, A), once. Arguments as in `adm`; what a plain
    backward() leaves in networks that are not stepped is dropped by their next zero_grad()."""
    G, D = generator, discriminator
    f_psi, F_phi, schedule = scores.fake, scores.real, scores.schedule
    generator_opt, fake_opt, heads_opt = optimizers
    N, dt = len(stops) - 1, round(schedule.T / 64)

    def value(x, t):
        return D.heads(D.taps(x, timestep=schedule.timestep[t], **cond))              # [B]

    # update fake score estimator f_psi
    z = draws.normal()                                                                # line 8
    with torch.no_grad():
        x_0 = sample(G, student_schedule, z, stops, cond)                             # line 9
    z_f, t_f = draws.normal(), draws.integers(1, schedule.T)                          # line 10
    output = network_output(f_psi, schedule, schedule.add_noise(x_0, z_f, t_f), t_f, cond)
    fake_loss = (output - schedule.target(x_0, z_f, t_f)).square().mean()             # Eq. 2, 3
    fake_opt.zero_grad()
    fake_loss.backward()
    fake_opt.step()                                                                   # line 11
    if global_iter % ttur != 0:                                                       # line 12
        return

    # update generator G_theta
    z, n = draws.normal(), draws.shared_integer(1, N)                                 # line 15
    with torch.no_grad():
        x_tn = sample(G, student_schedule, z, stops[:N - n + 1], cond)                # line 16
    x0_hat, _ = predict(G, student_schedule, x_tn, stops[N - n], cond)                # line 17
    z_g, t = draws.normal(), draws.integers(dt, schedule.T)                           # line 18
    x_t = schedule.add_noise(x0_hat, z_g, t)                                          # line 19
    x_fake = schedule.step(*predict(f_psi, schedule, x_t, t, cond), t - dt)           # line 20
    w = to_multiply(draws.uniform(*guidance), x_t)
    with torch.no_grad():
        output_cond = network_output(F_phi, schedule, x_t, t, cond)
        output_uncond = network_output(F_phi, schedule, x_t, t, uncond)
        guided = output_uncond + w * (output_cond - output_uncond)
        x_real = schedule.step(*schedule.pair(x_t, guided, t), t - dt)                # line 21
    generator_loss = -value(x_fake, t - dt).mean()                                    # Eq. 7
    generator_opt.zero_grad()
    generator_loss.backward()
    generator_opt.step()                                                              # line 22

    # update discriminator D_tau
    d_fake, d_real = value(x_fake.detach(), t - dt), value(x_real, t - dt)
    heads_loss = F.relu(1 + d_fake).mean() + F.relu(1 - d_real).mean()                # Eq. 8
    heads_opt.zero_grad()
    heads_loss.backward()
    heads_opt.step()                                                                  # line 26


@contextmanager
def frozen(net):
    """Inside, gradients pass through `net` to its input, and none collect in its weights."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def score_loss(net, schedule, x_0, eps, t, cond):
    """The teacher's pre-training loss: squared error to the noise for an eps network (Eq. 2), to
    the velocity for a v or flow one (Eq. 3). x_0, eps [B,...], t LongTensor [B]. No guidance and no
    prompt dropout (B.5): they would make it the score of what the student does not draw."""
    output = network_output(net, schedule, schedule.add_noise(x_0, eps, t), t, cond)
    return F.mse_loss(output, schedule.target(x_0, eps, t))


def dmd_gradient(x0_hat, x0_fake, x0_real):
    """Reverse-KL gradient of DMD in x0_hat [B,...], per sample (arXiv 2311.18828, Eq. 7, 8):
    (x0_fake - x0_real) / mean|x0_hat - x0_real|. The normaliser makes steps alike at all t. It is a
    weight and takes no gradient, or the student could lower its loss by leaving the teacher."""
    scale = (x0_hat - x0_real).abs().flatten(1).mean(1).clamp(min=1e-8)         # [B]
    return (x0_fake - x0_real) / to_multiply(scale, x0_hat)


def dmd_judge(scores, x0_hat, z_g, t, w, cond, uncond):
    """DMD's judgement of samples x0_hat [B,...] -> (dL/dx0_hat, losses). L is a mean of
    0.5 || x0_hat - sg(x0_hat - g) ||^2 with g = dmd_gradient and sg a stop-gradient."""
    schedule = scores.schedule
    with torch.no_grad():
        x_t = schedule.add_noise(x0_hat, z_g, t)
        x0_fake, _ = predict(scores.fake, schedule, x_t, t, cond)
        x0_real, _ = predict(scores.real, schedule, x_t, t, cond, uncond, w)
        g = dmd_gradient(x0_hat, x0_fake, x0_real)
    return g / g.numel(), dict(dmd=0.5 * g.square().mean())


def adversarial_judge(scores, D, x0_hat, z_g, t, dt, w, cond, uncond, loss=HINGE):
    """ADM's judgement, lines 19 to 22 -> (dL/dx0_hat, losses). losses["discriminator"] still has a
    graph, for line 26; losses["dmd"] is recorded and nobody minimises it (the paper's Fig. 3).

    x_fake and x_real start from the same x_t and go the same step, so all that D can tell apart is
    what the two scores say about x_t: two steps with the same noise in them, not two images."""
    schedule = scores.schedule
    x0_hat = x0_hat.detach().requires_grad_()
    x_t = schedule.add_noise(x0_hat, z_g, t)                                          # line 19
    told = dict(cond, timestep=schedule.timestep[t - dt])
    with frozen(scores.fake):       # for its backward too: checkpointing runs f_psi again there
        x0_fake, eps_fake = predict(scores.fake, schedule, x_t, t, cond)
        x_fake = schedule.step(x0_fake, eps_fake, t - dt)                             # line 20
        with torch.no_grad():
            x0_real, eps_real = predict(scores.real, schedule, x_t, t, cond, uncond, w)
            x_real = schedule.step(x0_real, eps_real, t - dt)                         # line 21
            features_real = D.taps(x_real, **told)
            dmd = 0.5 * dmd_gradient(x0_hat, x0_fake, x0_real).square().mean()
        features_fake = D.taps(x_fake, **told)
        d_real = D.heads(features_real)
        generator_loss = loss.generator(D.heads(features_fake), d_real.detach())      # Eq. 7
        grad_x0, = torch.autograd.grad(generator_loss, x0_hat)                        # line 22
    d_fake = D.heads([feature.detach() for feature in features_fake])
    return grad_x0, dict(dmd=dmd, generator=generator_loss.detach(),
                         discriminator=loss.discriminator(d_fake, d_real))            # Eq. 8


def guidance_weight(guidance, draws):
    """The real score's CFG weights [B]; None where all are 1, which saves its unprompted half."""
    if set(guidance) == {1}:
        return None
    return draws.uniform(*guidance)


def step_length(dt, T, draws):
    """None: T/64 as in the paper. Of several, one is drawn."""
    if dt is None:
        return round(T / 64)
    return dt[draws.shared_integer(0, len(dt) - 1)]


def adm(generator, scores, discriminator, optimizers, student_schedule, stops, guidance, batches,
        iterations, start=(0, 0), ttur=1, dt=None, loss=HINGE, student_w=None):
    """Algorithm 1: yields its losses after each step of G.

    discriminator: Discriminator on the teacher; None for DMD, the baseline, which has none.
    optimizers: of generator, fake score, heads (None with DMD).
    student_schedule: the generator's own, which after ADP is not the scores'.
    stops: the generator's t_N > ... > t_0 = 0. start: (genIter, globalIter) to go on from.
    guidance: range of the real score's CFG weight, drawn per sample (B.5); (1, 1): none.
    batches(global_iter): list of micro-batches (draws, cond, uncond) whose gradients add up.
    ttur: fake-score updates per generator update.
    dt: list of how far below t the discriminator looks, in times; one is drawn an iteration.
    x_fake and x_real differ by dt times the difference of the scores. Short steps keep D to just
    that (the paper: T/64), and take D many samples to learn from. For DMD dt is the smallest t.
    student_w: CFG weight of the generator itself ("ADM w/ CFG", Tab. 8).
    Yields dict(iteration, global_iter, fake, dmd) and, with a discriminator, its and G's loss.
    """
    generator_opt, fake_opt, heads_opt = optimizers
    schedule, N = scores.schedule, len(stops) - 1
    gen_iter, global_iter = start
    while gen_iter < iterations:                                                      # line 4
        global_iter += 1                                                              # line 5
        batch = batches(global_iter)

        # update fake score estimator f_psi                                             line 7
        for draws, cond, uncond in batch:
            z = draws.normal()                                                        # line 8
            with torch.no_grad():                                                     # line 9
                x_0 = sample(generator, student_schedule, z, stops, cond, uncond, student_w)
            z_f, t_f = draws.normal(), draws.integers(1, schedule.T)                  # line 10
            fake_loss = score_loss(scores.fake, schedule, x_0, z_f, t_f, cond)
            (fake_loss / len(batch)).backward()
        fake_opt.step()                                                               # line 11
        fake_opt.zero_grad()
        if global_iter % ttur != 0:                                                   # line 12
            continue

        for draws, cond, uncond in batch:
            # update generator G_theta                                                  line 14
            z, n = draws.normal(), draws.shared_integer(1, N)                         # line 15
            above, t_n = stops[:N - n + 1], stops[N - n]
            with torch.no_grad():                                                     # line 16
                x_tn = sample(generator, student_schedule, z, above, cond, uncond, student_w)
            # one jump with a gradient: the memory of one pass of G, however many steps      line 17
            x0_hat, _ = predict(generator, student_schedule, x_tn, t_n, cond, uncond, student_w)
            length = step_length(dt, schedule.T, draws)
            z_g, t = draws.normal(), draws.integers(length, schedule.T)               # line 18
            w = guidance_weight(guidance, draws)
            if discriminator is None:
                grad_x0, losses = dmd_judge(scores, x0_hat.detach(), z_g, t, w, cond, uncond)
            else:
                grad_x0, losses = adversarial_judge(scores, discriminator, x0_hat, z_g, t, length,
                                                    w, cond, uncond, loss)            # line 19 on
            x0_hat.backward(grad_x0 / len(batch))                                     # line 22

            # update discriminator D_tau                                                line 25
            if discriminator is not None:
                (losses["discriminator"] / len(batch)).backward()                     # line 26
        generator_opt.step()                                                          # line 22
        generator_opt.zero_grad()
        gen_iter += 1                                                                 # line 23
        if discriminator is not None:
            heads_opt.step()                                                          # line 26
            heads_opt.zero_grad()
        detached = {name: value.detach() for name, value in losses.items()}
        yield dict(iteration=gen_iter, global_iter=global_iter, fake=fake_loss.detach(), **detached)


def adp_times(draws, T):
    """The generator's times [1 - u^3] T, u ~ U(0, 1): mostly near pure noise, where a one-step
    student works. On the ring of lesson/ring.py uniform ones cost a third to a half more error."""
    return ((1 - draws.uniform() ** 3) * T).ceil().long().clamp(min=1)          # [B]


def adp(generator, D_1, D_2, decode, optimizers, schedule, line, batches, iterations, start=0,
        lambdas=(0.85, 0.15), loss=HINGE):
    """Adversarial distillation pre-training; yields its losses after each step of G. G learns the
    straight line between the ends of the teacher's ODE pairs, as rectified flow does, but two
    discriminators hold it there, and no squared error, which would blur.

    D_1: Discriminator on the teacher. D_2: on a vision encoder, which sees decode(x0).
    lambdas: weights of D_1 and D_2. optimizers: of generator, latent heads, pixel heads.
    schedule: the teacher's. line: the straight one, whose velocity x_T - x_0 G predicts.
    batches(iteration): list of micro-batches (draws, x0_teacher, x_T, cond) whose gradients add up.
    Yields dict(iteration, generator, discriminator, pixel_discriminator) of detached scalars.
    """
    lambda_1, lambda_2 = lambdas
    for iteration in range(start + 1, iterations + 1):
        batch = batches(iteration)
        for draws, x0_teacher, x_T, cond in batch:
            # generator: one jump from a point of the line to its clean end
            t = adp_times(draws, line.T)
            x_t = line.add_noise(x0_teacher, x_T, t)
            x0_tilde, _ = predict(generator, line, x_t, t, cond)
            x0_student = x0_tilde.detach().requires_grad_()     # here the backward pass is cut

            # D_1 sees latents noised again to t' ~ U(0, T), both by the same noise; D_2 sees images
            noise, t_prime = draws.normal(), draws.integers(1, schedule.T)
            told = dict(cond, timestep=schedule.timestep[t_prime])
            latent_fake = D_1.taps(schedule.add_noise(x0_student, noise, t_prime), **told)
            pixel_fake = D_2.taps(decode(x0_student))
            with torch.no_grad():
                latent_real = D_1.taps(schedule.add_noise(x0_teacher, noise, t_prime), **told)
                pixel_real = D_2.taps(decode(x0_teacher))
            d1_real, d2_real = D_1.heads(latent_real), D_2.heads(pixel_real)
            loss_1 = loss.generator(D_1.heads(latent_fake), d1_real.detach())
            loss_2 = loss.generator(D_2.heads(pixel_fake), d2_real.detach())
            generator_loss = lambda_1 * loss_1 + lambda_2 * loss_2
            grad_x0, = torch.autograd.grad(generator_loss, x0_student)
            x0_tilde.backward(grad_x0 / len(batch))

            # both discriminators, on the same features, detached
            d1_fake = D_1.heads([feature.detach() for feature in latent_fake])
            d2_fake = D_2.heads([feature.detach() for feature in pixel_fake])
            latent_loss = loss.discriminator(d1_fake, d1_real)
            pixel_loss = loss.discriminator(d2_fake, d2_real)
            ((lambda_1 * latent_loss + lambda_2 * pixel_loss) / len(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield dict(iteration=iteration, generator=generator_loss.detach(),
                   discriminator=latent_loss.detach(), pixel_discriminator=pixel_loss.detach())


def reflow(generator, optimizer, line, batches, iterations, start=0):
    """Ablation A1, rectified flow: as `adp`, with a squared error instead of discriminators."""
    for iteration in range(start + 1, iterations + 1):
        batch = batches(iteration)
        for draws, x0_teacher, x_T, cond in batch:
            t = adp_times(draws, line.T)
            loss = score_loss(generator, line, x0_teacher, x_T, t, cond)
            (loss / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield dict(iteration=iteration, generator=loss.detach())
