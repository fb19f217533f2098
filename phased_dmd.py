"""Phased DMD: one expert per interval of noise, each trained by distribution matching inside its own interval.

    python phased_dmd.py --out out/phased_dmd     # the paper's 1-D toy, then Phased DMD beside DMD: picture, table, result.json (in toys.py)

        mean squared error of the velocity on (0.5, 1]: full interval 0.0007, unbiased subinterval 0.0012, biased 0.085

From arXiv 2510.27684. The rows T = t_0 > t_1 > ... > t_K = 0 (row 0 clean, counted down as in the paper) cut the noise
into K phases. Expert k carries p(x at row t_{k-1}) to p(x at row s = t_k); `phased_dmd` trains one of them, below frozen
earlier ones, and `generate` runs them one after the other. For phase k, x_s plays the part that x_0 plays in DMD:

    DMD                      inside a phase                                        with
    x_0                      x_s
    x_t = alpha x_0 + ...    x_t = a x_s + b eps                                   a = alpha_t/alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2
    (x_0, eps)               (x_s/alpha_s - alpha_t sigma_s^2/(alpha_s^2 b) eps,
                              (sigma_t/b) eps)                                     the pair that makes the fake score unbiased

The last line is the method. The scores are those of x_0's diffusion, and that is what the teacher knows; a fake score
taught (x_s, eps) would learn another one. The pair has the same mean given x_t as the true (x_0, eps), and it satisfies
alpha_t x_0 + sigma_t eps = x_t exactly, so flow, v and eps networks all take their targets from it. At s = 0 it is (x_0, eps).
"""
import torch

from adm import dmd_gradient, score_loss
from ode import predict, sample


def interpolant(schedule, s, t, x):
    """(a, b) of x_t = a x_s + b eps, from row s (int) to rows t > s (int or LongTensor [B]), shaped to multiply x [B,...].
    Taken in float64: where t is next to s, b^2 is a small difference of large numbers."""
    t = torch.as_tensor(t, device=schedule.alpha.device)
    a = schedule.alpha[t] / schedule.alpha[s]
    b = (schedule.sigma[t] ** 2 - (a * schedule.sigma[s]) ** 2).sqrt()
    shape = t.shape + (1,) * (x.dim() - 1) if t.dim() else ()
    return tuple(c.to(x.device, x.dtype).reshape(shape) for c in (a, b))


def bridge(schedule, x_s, eps, s, t):
    """x_s [B,...] at row s, noised further to rows t: distributed as x_0 noised to t at once. At s = 0 it is schedule.noise."""
    a, b = interpolant(schedule, s, t, x_s)
    return a * x_s + b * eps


def scaled_target(schedule, x_s, eps, s, t):
    """b times the unbiased regression target at x_t = bridge(x_s, eps): schedule.target of the pair in the head of this file,
    which is linear in the pair, so b goes in first and nothing is divided by it. For a flow network this is b v* of Eq. 13."""
    a, b = interpolant(schedule, s, t, x_s)
    (alpha_s, sigma_s), (_, sigma_t) = schedule.at(s, x_s), schedule.at(t, x_s)
    return schedule.target(b / alpha_s * x_s - a * sigma_s**2 / alpha_s * eps, sigma_t * eps, t)


def subinterval_loss(net, schedule, x_s, eps, s, t, cond, clamp=(0.0, 10.0)):
    """The score loss when only x_s is known: clamp(1/b^2) || b net(x_t) - b target ||^2 (Eq. 13), a mean.

    x_s, eps [B,...]; s an int, t LongTensor [B] with t > s; cond: the network's keyword arguments; clamp: range of 1/b^2.
    The target's variance grows like 1/b^2 as t -> s. Clamping the weight bounds the loss there and leaves its minimiser
    alone, since a weight of t only cannot bias what is learnt at t. At s = 0 nothing grows, and this is adm.score_loss
    itself, unweighted: the teacher's own loss.
    """
    if s == 0:
        return score_loss(net, schedule, x_s, eps, t, cond)
    _, b = interpolant(schedule, s, t, x_s)
    out = net(bridge(schedule, x_s, eps, s, t), timestep=schedule.timestep.to(x_s.device)[t], **cond, return_dict=False)[0]
    error = b * out.to(x_s.dtype) - scaled_target(schedule, x_s, eps, s, t)
    return ((1 / b**2).clamp(*clamp) * error.square()).mean()


def kl_gradient(schedule, x_s, fake, real, s, t, weighting="dmd"):
    """Reverse-KL gradient in x_s [B,...], from both scores' pairs (x0_hat, eps_hat) at x_t = bridge(x_s, eps), s int, t [B].

    weighting 'paper': a (score_fake - score_real), the chain rule through d x_t / d x_s = a and no more. Since a score is
    -eps_hat/sigma this equals alpha_t a / (alpha_t sigma_t + sigma_t^2) (T - F) of the paper, T and F the real and the fake
    velocity eps_hat - x0_hat, and asks an eps network for no division by alpha.
    weighting 'dmd': dmd_gradient with x_s as the data, so of both means E[x_s | x_t] = alpha_s x0_hat + (a sigma_s^2/sigma_t)
    eps_hat. Every scalar weight, a included, is replaced by one over the mean distance per sample. At s = 0 it is DMD's own.
    Both stay finite as t -> s > 0. At s = 0 'paper' grows like 1/sigma_t, and in the demo's two dimensions it is the worse one
    (lr 1e-4, one seed, share_error: two phases 0.032 against 0.018, one phase 0.31 against 0.017), hence the default.
    Raises ValueError for another weighting.
    """
    a, _ = interpolant(schedule, s, t, x_s)
    (alpha_s, sigma_s), (_, sigma_t) = schedule.at(s, x_s), schedule.at(t, x_s)
    if weighting == "paper":
        return a / sigma_t * (real[1] - fake[1])
    if weighting == "dmd":
        mean = lambda x0, eps: alpha_s * x0 + a * sigma_s**2 / sigma_t * eps
        return dmd_gradient(x_s, mean(*fake), mean(*real))
    raise ValueError(f"weighting {weighting!r} is neither 'paper' nor 'dmd'")


def split(rows, boundaries):
    """A sampler's rows T > ... > 0, cut at some of its inner rows: [4,3,2,1,0] at [2] -> [[4,3,2], [2,1,0]], one list a phase."""
    if any(b not in rows[1:-1] for b in boundaries):
        raise ValueError(f"boundaries {list(boundaries)} are not all inner rows of {list(rows)}")
    cuts = [0, *sorted(rows.index(b) for b in boundaries), len(rows) - 1]
    return [list(rows[i:j + 1]) for i, j in zip(cuts, cuts[1:])]


def generate(experts, schedule, z, cond):
    """Noise z [B,...] at row T through the experts, each down its own rows.

    experts: [(net, rows), ...], noisiest first, rows[0] of each being rows[-1] of the one before. Returns x at the last row
    of the last: x_0 if that is 0, else x_s. Raises ValueError where the rows leave a gap or do not start at T.
    """
    reached, x = schedule.T, z
    for net, rows in experts:
        if rows[0] != reached or sorted(set(rows), reverse=True) != list(rows):
            raise ValueError(f"rows {list(rows)}: must fall from {reached}, where the expert before (or the noise) stops")
        x, reached = sample(net, schedule, x, rows, cond), rows[-1]
    return x


def phased_dmd(experts, fake_score, real_score, optimizers, schedule, guidance, batches, iterations, start=(0, 0), ttur=5,
               weighting="dmd", narrow=False, clamp=(0.0, 10.0)):
    """One phase, a generator of losses: one yield per generator step. Call it once per phase, noisiest first.

    experts: [(net, rows), ...] as in `generate`; the last is trained, those before it only produce its input and are neither
    changed nor asked for gradients. rows: t_{k-1} > ... > s = t_k. fake_score: a fresh copy of the teacher for every phase.
    optimizers: of the last expert, of fake_score. guidance: range of the real score's CFG weight, drawn per sample.
    batches(global_iter): list of micro-batches (draws, cond, uncond) whose gradients add up. start: (genIter, globalIter) to
    go on from. ttur: fake updates per generator update. weighting: see kl_gradient; clamp: see subinterval_loss.
    narrow: scores only on (s, t_{k-1}] and not on (s, T], which is what the paper found better.
    With one phase, rows T > ... > 0, this is DMD with stochastic gradient truncation (SGTS).
    Yields dict(iteration, global_iter, fake, dmd); `dmd` is 0.5 || gradient ||^2, which stands in for the loss in x_s.
    """
    generator_opt, fake_opt = optimizers
    *earlier, (generator, rows) = experts
    s, N, top = rows[-1], len(rows) - 1, rows[0] if narrow else schedule.T
    gen_iter, global_iter = start
    while gen_iter < iterations:
        global_iter += 1
        batch = batches(global_iter)

        # fake score: what the experts make, noised from s to t and never from x_0, which nobody has
        for draws, cond, _ in batch:
            with torch.no_grad():
                x_s = generate(experts, schedule, draws.normal(), cond)
            eps, t = draws.normal(), draws.rows(s + 1, top)
            fake_loss = subinterval_loss(fake_score, schedule, x_s, eps, s, t, cond, clamp)
            (fake_loss / len(batch)).backward()
        fake_opt.step(), fake_opt.zero_grad()
        if global_iter % ttur:
            continue

        # expert: stop after a random number of its steps and jump to s from there; only the jump has a gradient (SGTS)
        for draws, cond, uncond in batch:
            z, n = draws.normal(), draws.index(1, N)
            with torch.no_grad():
                x_tn = generate([*earlier, (generator, rows[:N - n + 1])], schedule, z, cond)
            x_s_hat = schedule.noise(*predict(generator, schedule, x_tn, rows[N - n], cond), s)
            eps, t = draws.normal(), draws.rows(s + 1, top)
            with torch.no_grad():
                x_s = x_s_hat.detach()                                          # here the backward pass is cut
                x_t = bridge(schedule, x_s, eps, s, t)
                fake = predict(fake_score, schedule, x_t, t, cond)
                real = predict(real_score, schedule, x_t, t, cond, uncond, draws.uniform(*guidance))
                gradient = kl_gradient(schedule, x_s, fake, real, s, t, weighting)
            losses = dict(fake=fake_loss.detach(), dmd=0.5 * gradient.square().mean())
            x_s_hat.backward(gradient / gradient[0].numel() / len(gradient) / len(batch))   # of 0.5 || x_s - sg(x_s - g) ||^2, a mean
        generator_opt.step(), generator_opt.zero_grad()
        gen_iter += 1
        yield dict(iteration=gen_iter, global_iter=global_iter, **losses)


if __name__ == "__main__":
    import toys                                                 # one and two dimensions
    toys.phased_demo(__doc__)
