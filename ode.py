"""Schedules, the pair (x0_hat, eps_hat), and the PF-ODE step: one table and one line of algebra for
every diffusion family.

A diffusion model knows noisy samples x_t = alpha_t x_0 + sigma_t eps (ADM Eq. 1) at the times
t = 0..T. Time 0 is clean (alpha 1, sigma 0), time T the noisiest. What the network says about x_t
is some fixed mixture of the two unknowns, output = c x_0 + d eps:

    prediction      c        d       models
    eps             0        1       SDXL
    v            -sigma    alpha     CogVideoX (zero terminal SNR: alpha_T = 0)
    flow           -1        1       SD3, Wan, Qwen-Image, and the straight line of ADP
    sample          1        0

Two linear equations, two unknowns: every output becomes the *pair* (x0_hat, eps_hat), and one step
of the PF-ODE from t to s puts that pair together again at s: x_s = alpha_s x0_hat + sigma_s
eps_hat. Only an eps network ever divides by alpha (and only a sample network by sigma), so zero
terminal SNR needs no special case.

training/schedules.py reads a diffusers scheduler into such a table. `python -m lesson.ode` draws
the PF-ODE and measures the solvers' order.
"""
import torch


def to_multiply(values, x):
    """One value for all samples [], or one for each [B], shaped to multiply x [B,...]."""
    return values.reshape(values.shape + (1,) * (x.dim() - 1))


class Schedule:
    """The table of a diffusion model, one row for each time t = 0..T.

    alpha, sigma: float64 [T+1]. timestep: what the network is told at t, float [T+1].
    pred: what the network predicts: 'eps', 'v', 'flow' or 'sample'.
    The table lies on the device of the samples it is used with (`to`). A time `t` below is an int
    or a LongTensor [B]. Raises ValueError for another `pred`, and for an eps network at zero
    terminal SNR.
    """

    def __init__(self, alpha, sigma, timestep, pred):
        if pred not in ("eps", "v", "flow", "sample"):
            raise ValueError(f"prediction {pred!r} is none of eps, v, flow, sample")
        if pred == "eps" and alpha[-1] == 0:
            raise ValueError("an eps network says nothing about x_0 at alpha = 0: "
                             "zero terminal SNR needs v or sample")
        self.alpha = alpha.double()
        self.sigma = sigma.double()
        self.timestep = timestep.float()
        self.pred = pred
        self.T = len(alpha) - 1

    @classmethod
    def straight(cls, T=1000, last=None):
        """ADP's rectified-flow line from x_0 to x_T. last: the timestep that the network is told
        at T; None: T - 1, the last one SDXL was trained on, and what diffusers' flow scheduler
        tells its students. SD3 is told T."""
        t = torch.arange(T + 1, dtype=torch.float64)
        told = t.clamp(max=T - 1 if last is None else last)
        return cls(1 - t / T, t / T, told, "flow")

    def to(self, device):
        return Schedule(self.alpha.to(device), self.sigma.to(device), self.timestep.to(device),
                        self.pred)

    def stops(self, n):
        """The n + 1 times t_N > ... > t_0 = 0 at which a sampler of n even steps stops."""
        if not 1 <= n <= self.T:
            raise ValueError(f"{n} steps on a table of {self.T} times: need 1..{self.T}")
        return [round(self.T * (n - k) / n) for k in range(n + 1)]

    def coefficients(self, t, x):
        """(alpha_t, sigma_t) in x's dtype, shaped to multiply x [B,...]."""
        alpha = self.alpha[t].to(x.dtype)
        sigma = self.sigma[t].to(x.dtype)
        return to_multiply(alpha, x), to_multiply(sigma, x)

    def add_noise(self, x_0, eps, t):
        """Eq. 1: x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.coefficients(t, x_0)
        return alpha * x_0 + sigma * eps

    def step(self, x0_hat, eps_hat, s):
        """One first-order step of the PF-ODE to time s, from wherever the pair was predicted: DDIM;
        for a flow model, Euler. At s = 0 it returns x0_hat exactly."""
        return self.add_noise(x0_hat, eps_hat, s)

    def mixture(self, t, x):
        """(c, d) of the network's output = c x_0 + d eps at time t."""
        alpha, sigma = self.coefficients(t, x)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        return {"eps": (zero, one), "v": (-sigma, alpha),
                "flow": (-one, one), "sample": (one, zero)}[self.pred]

    def target(self, x_0, eps, t):
        """What the network should say: the pre-training target (Eq. 2, Eq. 3)."""
        c, d = self.mixture(t, x_0)
        return c * x_0 + d * eps

    def pair(self, x, output, t):
        """The network's output at x = x_t -> (x0_hat, eps_hat), each shaped as x."""
        alpha, sigma = self.coefficients(t, x)
        c, d = self.mixture(t, x)
        determinant = alpha * d - sigma * c         # alpha; alpha^2 + sigma^2; alpha + sigma; sigma
        return (d * x - sigma * output) / determinant, (alpha * output - c * x) / determinant


def join_batches(a, b):
    """Two (nested) dicts of conditioning -> one, its tensors joined along the batch. What is no
    tensor is the same in both."""
    joined = {}
    for name in a:
        if isinstance(a[name], dict):
            joined[name] = join_batches(a[name], b[name])
        elif torch.is_tensor(a[name]):
            joined[name] = torch.cat([a[name], b[name]])
        else:
            joined[name] = a[name]
    return joined


def network_output(net, schedule, x, t, cond):
    """What the network itself says at x [B,...] and times t LongTensor [B], in x's dtype: the one
    place where a teacher, a score or a student is asked. cond: its other keyword arguments, batch
    first."""
    output = net(x, timestep=schedule.timestep[t], **cond, return_dict=False)[0]
    return output.to(x.dtype)


def predict(net, schedule, x, t, cond, uncond=None, w=None):
    """The pair (x0_hat, eps_hat) at x [B,...], times t (int or LongTensor [B]).

    cond, uncond: the network's conditioning for the prompts, and for no prompt. With w, a float or
    [B], classifier-free guidance: output = uncond + w (cond - uncond), both halves in one batch.
    """
    if not torch.is_tensor(t):          # filled on the device: for a copy the host would wait
        t = torch.full((len(x),), t, device=x.device)                           # [B]
    if w is None:
        return schedule.pair(x, network_output(net, schedule, x, t, cond), t)
    twice = torch.cat([x, x])                                                   # [2B,...]
    output = network_output(net, schedule, twice, torch.cat([t, t]), join_batches(uncond, cond))
    output_uncond, output_cond = output.chunk(2)                                # [B,...]
    if torch.is_tensor(w):
        w = to_multiply(w.to(output), x)
    return schedule.pair(x, output_uncond + w * (output_cond - output_uncond), t)


def sample(net, schedule, x, stops, cond, uncond=None, w=None, order=1):
    """Solve the PF-ODE from x [B,...] at stops[0] down to stops[-1], one network evaluation a step.

    order 1: DDIM; Euler for a flow model.
    order 2: dx = x0_hat d(alpha) + eps_hat d(sigma), with the pair extrapolated to the middle of
    the step from the last two evaluations (Adams-Bashforth). The clock is the angle atan2(sigma,
    alpha): unlike log-SNR it is finite when clean and at zero terminal SNR. The first step has no
    past and the last has to return x0_hat itself; both are first order. That costs no order where
    the table's last steps are small (SD3); SDXL's and CogVideoX's are long, and set the order.
    """
    if order == 2:
        angle = torch.atan2(schedule.sigma, schedule.alpha).tolist()    # 0 clean, pi/2 at zero SNR
    past = None
    for t, s in zip(stops, stops[1:]):
        x0, eps = predict(net, schedule, x, t, cond, uncond, w)
        if order == 1 or past is None or s == 0:
            x = schedule.step(x0, eps, s)
        else:
            t_before, x0_before, eps_before = past
            half = 0.5 * (angle[s] - angle[t]) / (angle[t] - angle[t_before])
            alpha_t, sigma_t = schedule.coefficients(t, x)
            alpha_s, sigma_s = schedule.coefficients(s, x)
            x = (x + (alpha_s - alpha_t) * (x0 + half * (x0 - x0_before))
                 + (sigma_s - sigma_t) * (eps + half * (eps - eps_before)))
        past = t, x0, eps
    return x
