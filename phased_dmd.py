"""Phased DMD: one expert for each interval of noise, trained by distribution matching inside it.

From arXiv 2510.27684. The times T = t_0 > t_1 > ... > t_K = 0 (as the paper counts; 0 is clean) cut
the noise into K phases. Expert k carries p(x at t_{k-1}) to p(x at t_k). The loop over the phases:

    experts = []
    for stops in cut_into_phases(schedule.stops(4), [500]):     # [1000, 750, 500], [500, 250, 0]
        expert, fake = copies of the teacher
        scores = Scores(fake, teacher, schedule)
        for losses in phased_dmd([*experts, Expert(expert, stops)], scores, ...): log, save, show
        experts.append(Expert(expert, stops))
    x_0 = generate(experts, schedule, z, cond)

In a phase that ends at s = t_k, x_s plays the part of DMD's x_0. It is noised further, to t > s:

    x_t = a x_s + b eps        a = alpha_t / alpha_s        b^2 = sigma_t^2 - a^2 sigma_s^2

**The pair that makes the fake score unbiased** is what is new. The teacher's score is that of x_0's
diffusion, x_t = alpha_t x_0 + sigma_t e, and a flow network's target is e - x_0. Here nobody has
x_0 and e, only x_s and eps, and "eps - x_s" is tempting and wrong. Take in their places

    e  <-  (sigma_t / b) eps            x_0  <-  x_s / alpha_s - (a sigma_s^2 / (alpha_s b)) eps

which have the right mean given x_t (two lines of proof: lesson/README.md, chapter 9). A regression
needs no more than that, and the targets of flow, v and eps networks are all linear in the pair, so
all take theirs from it. At s = 0 the pair is (x_0, e) itself.
"""
from typing import NamedTuple

import torch

from adm import dmd_gradient, guidance_weight, score_loss
from ode import network_output, predict, sample, to_multiply


class Expert(NamedTuple):
    net: torch.nn.Module
    stops: list                 # its times, from the start of its phase to the end


def renoise_coefficients(schedule, s, t, x):
    """(a, b) of x_t = a x_s + b eps, from time s (int) to times t > s (int or LongTensor [B]),
    shaped to multiply x [B,...]. In float64: b^2 is a small difference of large numbers."""
    a = schedule.alpha[t] / schedule.alpha[s]
    b = (schedule.sigma[t] ** 2 - (a * schedule.sigma[s]) ** 2).sqrt()
    return to_multiply(a.to(x.dtype), x), to_multiply(b.to(x.dtype), x)


def renoise(schedule, x_s, eps, s, t):
    """x_s [B,...] at time s, noised further to times t: distributed as x_0 noised to t at once."""
    a, b = renoise_coefficients(schedule, s, t, x_s)
    return a * x_s + b * eps


def scaled_target(schedule, x_s, eps, s, t):
    """b times the unbiased target: schedule.target of the pair in the head of this file. b goes in
    first, so that nothing is divided by it. For a flow network this is b v* of Eq. 13."""
    a, b = renoise_coefficients(schedule, s, t, x_s)
    alpha_s, sigma_s = schedule.coefficients(s, x_s)
    _, sigma_t = schedule.coefficients(t, x_s)
    return schedule.target(b / alpha_s * x_s - a * sigma_s**2 / alpha_s * eps, sigma_t * eps, t)


def subinterval_loss(net, schedule, x_s, eps, s, t, cond, clamp=(0.0, 10.0)):
    """The score loss when only x_s is known, a mean of clamp(1 / b^2) || b net(x_t) - b target ||^2
    (Eq. 13). x_s, eps [B,...]; s an int, t LongTensor [B] with t > s; clamp: range of 1 / b^2.

    The target's variance grows like 1 / b^2 as t -> s. The clamp bounds the loss there and leaves
    its minimiser alone: a weight of t only cannot bias what is learnt at t. At s = 0 nothing grows,
    and this is adm.score_loss itself, unweighted: the teacher's own loss.
    """
    if s == 0:
        return score_loss(net, schedule, x_s, eps, t, cond)
    _, b = renoise_coefficients(schedule, s, t, x_s)
    output = network_output(net, schedule, renoise(schedule, x_s, eps, s, t), t, cond)
    error = b * output - scaled_target(schedule, x_s, eps, s, t)
    return ((1 / b**2).clamp(*clamp) * error.square()).mean()


def kl_gradient(schedule, x_s, fake_pair, real_pair, s, t, weighting="dmd"):
    """Reverse-KL gradient in x_s [B,...], from both scores' pairs (x0_hat, eps_hat) at
    x_t = renoise(x_s, eps). s int, t LongTensor [B]. Raises ValueError for another weighting.

    'paper': a (score_fake - score_real), the chain rule through d x_t / d x_s = a. A score is
    -eps_hat / sigma, so this is alpha_t a / (alpha_t sigma_t + sigma_t^2) (v_real - v_fake), as the
    paper has it, of the velocities v = eps_hat - x0_hat. At s = 0 it grows like 1 / sigma_t.
    'dmd' *(choice)*: adm.dmd_gradient of x_s, with each score's E[x_s | x_t] = alpha_s x0_hat
    + (a sigma_s^2 / sigma_t) eps_hat; at s = 0 DMD's own. On the ring (lesson/phased_dmd.py, rate
    1e-4, one seed) share_error is 0.018 in two phases, 0.017 in one; of 'paper' 0.032 and 0.31.
    """
    a, _ = renoise_coefficients(schedule, s, t, x_s)
    alpha_s, sigma_s = schedule.coefficients(s, x_s)
    _, sigma_t = schedule.coefficients(t, x_s)
    x0_fake, eps_fake = fake_pair
    x0_real, eps_real = real_pair
    if weighting == "paper":
        return a / sigma_t * (eps_real - eps_fake)
    if weighting == "dmd":
        mean_fake = alpha_s * x0_fake + a * sigma_s**2 / sigma_t * eps_fake
        mean_real = alpha_s * x0_real + a * sigma_s**2 / sigma_t * eps_real
        return dmd_gradient(x_s, mean_fake, mean_real)
    raise ValueError(f"weighting {weighting!r} is neither 'paper' nor 'dmd'")


def cut_into_phases(stops, boundaries):
    """A sampler's stops, cut at inner ones: [4,3,2,1,0] at [2] -> [[4,3,2], [2,1,0]], one list a
    phase. Raises ValueError for a boundary that is none of them."""
    if any(boundary not in stops[1:-1] for boundary in boundaries):
        raise ValueError(f"boundaries {list(boundaries)} are not all inner stops of {list(stops)}")
    cuts = [0, *sorted(stops.index(boundary) for boundary in boundaries), len(stops) - 1]
    return [list(stops[i:j + 1]) for i, j in zip(cuts, cuts[1:])]


def generate(experts, schedule, z, cond):
    """Noise z [B,...] at time T through the experts, noisiest first, each down its own stops, to x
    at the last one: x_0 if that is 0, else x_s. Raises ValueError where an expert does not start
    where the one before it (the first: the noise) ends."""
    x, reached = z, schedule.T
    for net, stops in experts:
        if stops[0] != reached or sorted(set(stops), reverse=True) != list(stops):
            raise ValueError(f"stops {list(stops)}: must fall from {reached}, where the expert "
                             f"before (or the noise) ends")
        x = sample(net, schedule, x, stops, cond)
        reached = stops[-1]
    return x


def phased_dmd(experts, scores, optimizers, guidance, batches, iterations, start=(0, 0), ttur=5,
               weighting="dmd", narrow=False, clamp=(0.0, 10.0)):
    """One phase; yields its losses after each step of the last expert, those of the last
    micro-batch. With a single phase of stops T > ... > 0 this is DMD with stochastic gradient
    truncation (SGTS).

    experts: as in `generate`; the last is trained, those before it only make its input.
    scores: adm.Scores, the fake one a fresh copy of the teacher in every phase.
    optimizers: of the last expert, of the fake score.
    guidance, batches, start, ttur: as in adm.adm. weighting: see kl_gradient.
    narrow: scores only on (s, t_{k-1}] and not on (s, T], which is what the paper found better.
    Yields dict(iteration, global_iter, fake, dmd); `dmd` is 0.5 || gradient ||^2, the loss in x_s.
    """
    generator_opt, fake_opt = optimizers
    *earlier, (generator, stops) = experts
    schedule, s, N = scores.schedule, stops[-1], len(stops) - 1
    noisiest = stops[0] if narrow else schedule.T
    gen_iter, global_iter = start
    while gen_iter < iterations:
        global_iter += 1
        batch = batches(global_iter)

        # fake score: what the experts make, noised from s to t
        for draws, cond, _ in batch:
            with torch.no_grad():
                x_s = generate(experts, schedule, draws.normal(), cond)
            eps, t = draws.normal(), draws.integers(s + 1, noisiest)
            fake_loss = subinterval_loss(scores.fake, schedule, x_s, eps, s, t, cond, clamp)
            (fake_loss / len(batch)).backward()
        fake_opt.step()
        fake_opt.zero_grad()
        if global_iter % ttur != 0:
            continue

        # expert: stop after a random number of its steps and jump to s from there
        # (back-simulation); only the jump has a gradient (SGTS)
        for draws, cond, uncond in batch:
            z, n = draws.normal(), draws.shared_integer(1, N)
            with torch.no_grad():
                x_tn = generate([*earlier, Expert(generator, stops[:N - n + 1])], schedule, z, cond)
            x_s_hat = schedule.step(*predict(generator, schedule, x_tn, stops[N - n], cond), s)
            eps, t = draws.normal(), draws.integers(s + 1, noisiest)
            w = guidance_weight(guidance, draws)
            with torch.no_grad():                               # here the backward pass is cut
                x_s = x_s_hat.detach()
                x_t = renoise(schedule, x_s, eps, s, t)
                fake_pair = predict(scores.fake, schedule, x_t, t, cond)
                real_pair = predict(scores.real, schedule, x_t, t, cond, uncond, w)
                g = kl_gradient(schedule, x_s, fake_pair, real_pair, s, t, weighting)
            x_s_hat.backward(g / g.numel() / len(batch))        # of 0.5 || x_s - sg(x_s - g) ||^2
        generator_opt.step()
        generator_opt.zero_grad()
        gen_iter += 1
        yield dict(iteration=gen_iter, global_iter=global_iter, fake=fake_loss.detach(),
                   dmd=0.5 * g.square().mean())
