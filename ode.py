"""Schedules, predictions and PF-ODE solvers: one table and one line of algebra for every diffusion family.

    python ode.py --out out/ode     # solver error against steps on a Gaussian mixture: picture, table, result.json (seconds)

        schedule               solver          10        20  ...      200    order
        SD3 (flow)             DDIM/Euler   1.6e-01   8.0e-02     8.2e-03     0.99
        SD3 (flow)             multistep    6.5e-02   2.5e-02     3.1e-04     2.03

A diffusion model gives noisy samples x_i = alpha_i x_0 + sigma_i eps (ADM Eq. 1) for rows i = 0..T of a table; row 0 is
clean (alpha 1, sigma 0), row T the noisiest. The network's output is some fixed mixture out = c x_0 + d eps:

    prediction      c        d       models
    eps             0        1       SDXL
    v            -sigma    alpha     CogVideoX (zero terminal SNR: alpha_T = 0)
    flow           -1        1       SD3, Wan, Qwen-Image, and the straight line of ADP
    sample          1        0

Two linear equations, two unknowns: every output becomes the *pair* (x0_hat, eps_hat), and a step of the PF-ODE is that
pair noised again at another row. Only an eps network ever divides by alpha (and only a sample network by sigma), so zero
terminal SNR needs no special case.
"""
import argparse
import json
import math
from pathlib import Path

import torch


class Schedule:
    """A table of T + 1 rows. `alpha`, `sigma`: float64 [T+1]; `timestep`: what the network is told, float [T+1];
    `pred`: 'eps', 'v', 'flow' or 'sample'. Rows `i` below are an int or a LongTensor [B]."""

    def __init__(self, alpha, sigma, timestep, pred):
        if pred not in ("eps", "v", "flow", "sample"):
            raise ValueError(f"prediction {pred!r} is none of eps, v, flow, sample")
        if pred == "eps" and alpha[-1] == 0:
            raise ValueError("an eps network says nothing about x_0 at alpha = 0: zero terminal SNR needs v or sample")
        self.alpha, self.sigma, self.timestep, self.pred = alpha.double(), sigma.double(), timestep.float(), pred
        self.T = len(alpha) - 1

    @classmethod
    def from_diffusers(cls, scheduler, shift=None):
        """The table of a diffusers scheduler, from its own config. `shift` replaces a flow scheduler's (for models whose
        shift depends on the resolution, give exp(mu)). Row i is the scheduler's i-th training timestep, counted from 1."""
        config = scheduler.config
        T = config.num_train_timesteps
        pred = {"epsilon": "eps", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}.get(
            config.get("prediction_type", "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else None))
        if pred == "flow":
            u = torch.arange(T + 1, dtype=torch.float64) / T                      # uniform, *unshifted* time
            multistep = config.get("use_flow_sigmas")           # Wan's UniPC: its times end at 1/T, and networks are told whole ones
            if multistep:
                u[1:] = u[1:] * (1 - 1 / T) + 1 / T
            shift = shift or config.get("shift") or config.get("flow_shift") or 1.0
            sigma = shift * u / (1 + (shift - 1) * u)
            return cls(1 - sigma, sigma, (T * sigma).floor().clamp(max=T - 1) if multistep else T * sigma, pred)
        ac = torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod.double().cpu()])
        return cls(ac.sqrt(), (1 - ac).sqrt(), torch.arange(-1, T).clamp(min=0), pred)

    @classmethod
    def straight(cls, T=1000, last=None):
        """ADP's rectified-flow line from x_0 to x_T. `last` is what the network is told at row T: T - 1 unless given, as far as an
        SDXL teacher ever looked, and what diffusers' scheduler of its students tells it at sigma = 1. SD3 is told T."""
        i = torch.arange(T + 1, dtype=torch.float64)
        return cls(1 - i / T, i / T, i.clamp(max=T - 1 if last is None else last), "flow")

    def to(self, device):
        self.alpha, self.sigma, self.timestep = (x.to(device) for x in (self.alpha, self.sigma, self.timestep))
        return self

    def rows(self, n):
        """n + 1 rows from T down to 0, evenly spaced: an n-step sampler's stops."""
        if not 1 <= n <= self.T:
            raise ValueError(f"{n} steps on a table of {self.T} rows: need 1..{self.T}")
        return [round(self.T * (n - k) / n) for k in range(n + 1)]

    def at(self, i, x):
        """(alpha_i, sigma_i) in x's dtype, shaped to multiply x [B,...]."""
        i = torch.as_tensor(i, device=self.alpha.device)
        shape = i.shape + (1,) * (x.dim() - 1) if i.dim() else ()
        return tuple(table[i].to(x.device, x.dtype).reshape(shape) for table in (self.alpha, self.sigma))

    def noise(self, x0, eps, i):
        """Eq. 1. With a predicted pair instead of true x_0 and noise this *is* the first-order PF-ODE step (DDIM; Euler
        for a flow model) to row i, and at i = 0 it returns x0_hat exactly."""
        alpha, sigma = self.at(i, x0)
        return alpha * x0 + sigma * eps

    def mixture(self, i, x):
        """(c, d) of the network output out = c x_0 + d eps at row i."""
        alpha, sigma = self.at(i, x)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        return {"eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one), "sample": (one, zero)}[self.pred]

    def target(self, x0, eps, i):
        """What the network should have said: the regression target of the pre-training loss (Eq. 2, Eq. 3)."""
        c, d = self.mixture(i, x0)
        return c * x0 + d * eps

    def split(self, x, out, i):
        """Network output at (x, row i) -> the pair (x0_hat, eps_hat), each shaped as x."""
        (alpha, sigma), (c, d) = self.at(i, x), self.mixture(i, x)
        det = alpha * d - sigma * c                             # eps: alpha; v: alpha^2 + sigma^2; flow: alpha + sigma
        return (d * x - sigma * out) / det, (alpha * out - c * x) / det


def both(a, b):
    """Two (nested) dicts of conditioning tensors -> one, concatenated along the batch. What is no tensor has no batch."""
    return {k: both(a[k], b[k]) if isinstance(a[k], dict) else torch.cat([a[k], b[k]]) if torch.is_tensor(a[k]) else a[k] for k in a}


def predict(net, schedule, x, i, cond, uncond=None, w=None):
    """One look at x [B,...] at row i -> the pair (x0_hat, eps_hat).

    cond, uncond: keyword arguments of the network, batch first. With `w` (float, or [B] for a weight per sample),
    classifier-free guidance out = uncond + w (cond - uncond), both halves in one batch.
    """
    i = torch.as_tensor(i, device=x.device).expand(len(x))                        # [B]
    t = schedule.timestep.to(x.device)[i]
    if w is None:
        out = net(x, timestep=t, **cond, return_dict=False)[0]
    else:
        out = net(torch.cat([x, x]), timestep=torch.cat([t, t]), **both(uncond, cond), return_dict=False)[0]  # [2B,...]
        out_uncond, out_cond = out.chunk(2)
        w = torch.as_tensor(w, dtype=out.dtype, device=x.device)
        out = out_uncond + w.reshape(-1, *[1] * (x.dim() - 1)) * (out_cond - out_uncond)
    return schedule.split(x, out.to(x.dtype), i)


def sample(net, schedule, x, rows, cond, uncond=None, w=None, order=1):
    """Solve the PF-ODE from x [B,...] at rows[0] down the given rows, one network evaluation a step.

    order 1: DDIM, which for a flow model is Euler. order 2: since dx = x0_hat d(alpha) + eps_hat d(sigma), extrapolate
    the pair to the middle of the step from the last two evaluations (Adams-Bashforth, in the angle atan2(sigma, alpha)).
    Unlike log-SNR the angle is finite on the clean row and at zero terminal SNR, so no step is a special case but the
    first, which has no past, and the last, which has to return x0_hat itself; one first-order step costs no order.
    """
    angle = torch.atan2(schedule.sigma, schedule.alpha).tolist()                  # 0 when clean, pi/2 at zero SNR
    past = None
    for s, t in zip(rows, rows[1:]):
        x0, eps = predict(net, schedule, x, s, cond, uncond, w)
        if order == 2 and past is not None and t > 0:
            before, x0_before, eps_before = past
            half = 0.5 * (angle[t] - angle[s]) / (angle[s] - angle[before])
            (alpha, sigma), (alpha_t, sigma_t) = schedule.at(s, x), schedule.at(t, x)
            x = x + (alpha_t - alpha) * (x0 + half * (x0 - x0_before)) + (sigma_t - sigma) * (eps + half * (eps - eps_before))
        else:
            x = schedule.noise(x0, eps, t)
        past = (s, x0, eps)
    return x


# ------------------------------------------------------------------------------------------- a teacher in closed form

class Mixture:
    """Gaussians of equal weight around `means` [K,D] with standard deviation `std`: a distribution whose score is known."""

    def __init__(self, means, std):
        self.means, self.std = torch.as_tensor(means), std

    @classmethod
    def ring(cls, k=8, radius=2.0, std=0.2):
        angle = torch.arange(k) * 2 * math.pi / k
        return cls(radius * torch.stack([angle.cos(), angle.sin()], 1), std)

    @classmethod
    def grid(cls, side=5, gap=1.0, std=0.08):
        line = (torch.arange(side) - (side - 1) / 2) * gap
        return cls(torch.cartesian_prod(line, line), std)

    def sample(self, n, generator=None):
        mode = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[mode] + self.std * torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)

    def x0_hat(self, x, alpha, sigma):
        """E[x_0 | x] for x = alpha x_0 + sigma eps, x [B,D], alpha and sigma [B,1]."""
        var = (alpha * self.std) ** 2 + sigma**2                                  # of x around each alpha * mean
        away = x[:, None] - alpha[..., None] * self.means                         # [B,K,D]
        weight = (-away.square().sum(-1) / (2 * var)).softmax(-1)                 # [B,K]
        each = self.means + (alpha * self.std**2 / var)[..., None] * away         # [B,K,D]
        return (weight[..., None] * each).sum(1)

    def network(self, schedule):
        """The perfect network of this distribution in `schedule`'s parameterisation, called as diffusers calls its own."""
        def net(x, timestep, return_dict=False):
            i = torch.searchsorted(schedule.timestep, timestep.contiguous(), right=True) - 1
            alpha, sigma = schedule.at(i, x)
            x0 = self.x0_hat(x, alpha, sigma)
            return (schedule.target(x0, (x - alpha * x0) / sigma, i),)
        return net


# --------------------------------------------------------------------------------------------------------------- demo

def families():
    """The three families' schedules, from scheduler configs as released."""
    from diffusers import CogVideoXDDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
    scaled = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return {"SDXL (eps)": Schedule.from_diffusers(EulerDiscreteScheduler(**scaled)),
            "CogVideoX-2b (v)": Schedule.from_diffusers(CogVideoXDDIMScheduler(
                **scaled, snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction")),
            "SD3 (flow)": Schedule.from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0)),
            "straight line (flow)": Schedule.straight()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/ode", help="folder for the picture and result.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = Mixture.ring(std=0.5)
    data.means = data.means.double()
    x_T = torch.randn(512, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(args.seed))
    steps = [10, 20, 25, 40, 50, 100, 125, 200]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    result = {}
    print("median error of x_0 against 1000 second-order steps, and the measured order (slope over the last four)\n")
    print(f"{'schedule':22s} solver  " + "".join(f"{n:>10d}" for n in steps) + "    order")
    for (name, schedule), colour in zip(families().items(), "rgbk"):
        net = data.network(schedule)
        exact = sample(net, schedule, x_T, schedule.rows(schedule.T), {}, order=2)
        for order in (1, 2):
            error = [(sample(net, schedule, x_T, schedule.rows(n), {}, order=order) - exact).norm(dim=1).median().item() for n in steps]
            slope = -torch.linalg.lstsq(torch.tensor([[math.log(n), 1] for n in steps[-4:]]),
                                        torch.tensor(error[-4:]).log()[:, None]).solution[0].item()
            result[f"{name}, order {order}"] = dict(zip(map(str, steps), error), order=slope)
            right.loglog(steps, error, colour + ("o--" if order == 1 else "o-"), label=f"{name}, order {order}: measured {slope:.2f}")
            print(f"{name:22s} {'DDIM/Euler' if order == 1 else 'multistep':10s}" + "".join(f"{e:10.1e}" for e in error) + f"{slope:9.2f}")
    print("\nEvenly spaced rows of a VP table leave its last jump long in sigma (sigma grows like the square root of the row):\n"
          "that one first-order jump, not the solver, sets SDXL's and CogVideoX's order. The straight lines show the solvers' own.")
    paths = [x_T[:40]]                                          # on the straight line, the last family of the loop above
    for s, t in zip(schedule.rows(100), schedule.rows(100)[1:]):
        paths.append(sample(net, schedule, paths[-1], [s, t], {}))
    paths = torch.stack(paths)                                                    # [101,40,2]
    left.plot(paths[..., 0], paths[..., 1], "0.6", lw=0.7)
    left.plot(*x_T[:40].T, "k.", ms=4, label="x_T")
    left.plot(*exact[:40].T, "r.", ms=6, label="x_0")
    left.set(title="the PF-ODE carries noise to data", aspect="equal")
    right.set(title="solver error", xlabel="network evaluations", ylabel="median error of x_0")
    left.legend(), right.legend(fontsize=7), figure.tight_layout()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "ode.png", dpi=110)
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\nwrote {out}/ode.png and {out}/result.json")


if __name__ == "__main__":
    main()
