"""ode.py and training/schedules.py against diffusers' own schedulers, closed forms, finite
differences and a Runge-Kutta solver."""
import math

import pytest
import torch
from diffusers import (CogVideoXDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler,
                       EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       UniPCMultistepScheduler)
from torch.testing import assert_close

from families import sdxl
from lesson.worlds import Mixture
from ode import Schedule, join_batches, predict, sample
from training.schedules import from_diffusers

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
             timestep_spacing="trailing")
N = 20                                                          # steps, where one number will do


def ddim(**config):
    """In float64 from the table on: diffusers keeps alphas_cumprod in float32 and computes each
    step in its dtype."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, **config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def ddim_zero_snr():
    return ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def cogvideox(snr_shift_scale):
    return CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=snr_shift_scale,
                                  rescale_betas_zero_snr=True, prediction_type="v_prediction")


# name -> (scheduler, relative tolerance); Euler and flow schedulers compute in float32
SCHEDULERS = {
    "DDIM eps": (lambda: ddim(prediction_type="epsilon"), 1e-12),
    "DDIM v": (lambda: ddim(prediction_type="v_prediction"), 1e-12),
    "DDIM v, zero terminal SNR": (ddim_zero_snr, 1e-12),
    "DDIM sample": (lambda: ddim(prediction_type="sample"), 1e-12),
    "CogVideoX-2b": (lambda: cogvideox(3.0), 1e-12),
    "CogVideoX-5b": (lambda: cogvideox(1.0), 1e-12),
    "Euler eps": (lambda: EulerDiscreteScheduler(**BETAS), 1e-5),
    "Euler v": (lambda: EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"), 1e-5),
    "flow": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), 1e-5),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth_net(x, timestep, return_dict=False):
    """A fixed random network that depends on every input."""
    told = timestep.to(x.dtype)[:, None] / 1000
    return (torch.tanh(x @ randn(3, 3, seed=1) + told * randn(3, seed=2)),)


def says(output):
    """A network that gives this answer to everything."""
    return lambda x, timestep, return_dict: (output,)


def start(scheduler, n):
    """Ready for n evenly spaced steps from time T."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[k / n for k in range(n, 0, -1)])
    else:
        scheduler.set_timesteps(n)
    return scheduler


def scale(scheduler, schedule, t):
    """What diffusers' coordinates have to be multiplied with: its Euler schedulers work in
    x / alpha."""
    if isinstance(scheduler, EulerDiscreteScheduler):
        return schedule.alpha[t]
    return 1.0


def cosine(T=1000, pred="v"):
    """A variance-preserving table with zero terminal SNR."""
    angle = torch.arange(T + 1, dtype=torch.float64) / T * math.pi / 2
    alpha = angle.cos()
    alpha[-1] = 0
    return Schedule(alpha, angle.sin(), torch.arange(T + 1), pred)


def ring():
    data = Mixture.ring()
    data.means = data.means.double()
    return data


# ------------------------------------------------------------------------------- against diffusers

@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_is_the_schedulers_step(name):
    make, tolerance = SCHEDULERS[name]
    scheduler = start(make(), N)
    schedule = from_diffusers(make())
    stops = schedule.stops(N)
    for k, (t, s) in enumerate(zip(stops, stops[1:])):
        x = randn(4, 3, seed=k)
        output = randn(4, 3, seed=100 + k)
        theirs = scheduler.step(output, scheduler.timesteps[k], x / scale(scheduler, schedule, t))
        theirs = theirs.prev_sample.double() * scale(scheduler, schedule, s)
        ours = schedule.step(*predict(says(output), schedule, x, t, {}), s)
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sample_is_the_pipelines_loop(name):
    make, tolerance = SCHEDULERS[name]
    scheduler = start(make(), N)
    schedule = from_diffusers(make())
    x_T = randn(4, 3)
    x = x_T / scale(scheduler, schedule, schedule.T)
    for t in scheduler.timesteps:
        seen = x
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(smooth_net(seen, t.expand(len(x)))[0], t, x).prev_sample
    ours = sample(smooth_net, schedule, x_T, schedule.stops(N), {})
    assert_close(ours, x.double(), rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", ["DDIM eps", "DDIM v, zero terminal SNR", "CogVideoX-2b",
                                  "CogVideoX-5b"])
def test_add_noise_is_theirs_and_the_v_target_is_get_velocity(name):
    scheduler = SCHEDULERS[name][0]()
    schedule = from_diffusers(scheduler)
    timesteps = torch.arange(1000)
    x0 = randn(1000, 3)
    eps = randn(1000, 3, seed=1)
    assert_close(schedule.add_noise(x0, eps, timesteps + 1),
                 scheduler.add_noise(x0, eps, timesteps), rtol=1e-12, atol=1e-12)
    if schedule.pred == "v":
        assert_close(schedule.target(x0, eps, timesteps + 1),
                     scheduler.get_velocity(x0, eps, timesteps), rtol=1e-12, atol=1e-12)


def published_alpha_squared(name):
    """alpha^2 at timesteps 0 to 999 of a VP table, from its betas."""
    root_betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    alpha_squared = (1 - root_betas**2).cumprod(0)
    if name == "DDIM eps":
        return alpha_squared
    shift = {"CogVideoX-2b": 3.0, "CogVideoX-5b": 1.0}[name]
    root = (alpha_squared / (shift + (1 - shift) * alpha_squared)).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("name", ["DDIM eps", "CogVideoX-2b", "CogVideoX-5b", "flow"])
def test_tables_are_the_published_formulas(name):
    """Computed here from the betas, in float64, without diffusers."""
    if name == "flow":
        u = torch.arange(1001, dtype=torch.float64) / 1000
        sigma = 3 * u / (1 + 2 * u)
        alpha = 1 - sigma
        timestep = 1000 * sigma
    else:
        clean = torch.ones(1, dtype=torch.float64)
        alpha_squared = torch.cat([clean, published_alpha_squared(name)])
        alpha = alpha_squared.sqrt()
        sigma = (1 - alpha_squared).sqrt()
        timestep = torch.tensor([0, *range(1000)])
    schedule = from_diffusers(SCHEDULERS[name][0]())
    atol = 1e-5 if name == "DDIM eps" else 1e-12                # DDIM's own betas are float32
    assert_close(schedule.alpha, alpha, rtol=0, atol=atol)
    assert_close(schedule.sigma, sigma, rtol=0, atol=atol)
    assert_close(schedule.timestep, timestep.float())
    assert (schedule.alpha[0], schedule.sigma[0]) == (1, 0)
    assert schedule.T == 1000


def test_flow_shift_is_read_under_each_of_its_names_or_given():
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                  flow_shift=5.0)
    for steps in (1, 4, 8, 1000):
        wan.set_timesteps(steps)
        schedule = from_diffusers(wan)
        stops = schedule.stops(steps)[:-1]
        assert_close(schedule.sigma[stops], wan.sigmas[:-1].double(), rtol=0, atol=2e-6)
        atol = 0 if steps < 1000 else 1                         # whole ones, cut off in float32
        assert_close(schedule.timestep[stops].long(), wan.timesteps, rtol=0, atol=atol)
    qwen = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    qwen.set_timesteps(sigmas=[k / 1000 for k in range(1000, 0, -1)], mu=0.8)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        from_diffusers(qwen)
    schedule = from_diffusers(qwen, shift=math.exp(0.8))
    assert_close(schedule.sigma[1:].flip(0), qwen.sigmas[:-1].double(), rtol=0, atol=1e-6)
    assert_close(schedule.timestep[1:].flip(0), qwen.timesteps, rtol=0, atol=1e-3)


# ----------------------------------------------------------------------------------------- algebra

TABLES = {
    "SDXL": lambda: from_diffusers(ddim()),
    "CogVideoX-2b": lambda: from_diffusers(cogvideox(3.0)),
    "SD3": lambda: from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "straight": Schedule.straight,
}


@pytest.mark.parametrize("pred", ["eps", "v", "flow", "sample"])
@pytest.mark.parametrize("table", TABLES)
def test_target_and_pair_are_inverse_at_every_time(table, pred):
    """Where the pair is determined at all: an eps network says nothing of x_0 at alpha = 0, a
    sample network nothing of eps at sigma = 0."""
    schedule = TABLES[table]()
    if pred == "eps" and schedule.alpha[-1] == 0:               # keep all times but the last
        schedule = Schedule(schedule.alpha[:-1], schedule.sigma[:-1], schedule.timestep[:-1], pred)
    schedule.pred = pred
    t = torch.arange(1 if pred == "sample" else 0, schedule.T + 1)
    x0 = randn(len(t), 2, 3)
    eps = randn(len(t), 2, 3, seed=1)
    x_t = schedule.add_noise(x0, eps, t)
    x0_hat, eps_hat = schedule.pair(x_t, schedule.target(x0, eps, t), t)
    assert_close(x0_hat, x0, rtol=0, atol=1e-10)
    assert_close(eps_hat, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("table", ["CogVideoX-2b", "SD3", "straight"])
def test_the_pair_is_exact_at_zero_terminal_snr(table):
    schedule = TABLES[table]()
    assert schedule.alpha[-1] == 0 and schedule.sigma[-1] == 1
    x = randn(4, 3)
    x0 = randn(4, 3, seed=1)
    x0_hat, eps_hat = schedule.pair(x, schedule.target(x0, x, schedule.T), schedule.T)
    assert_close(x0_hat, x0, rtol=0, atol=1e-15)
    assert_close(eps_hat, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", TABLES)
def test_time_0_gives_back_x0_bit_for_bit(table, dtype):
    x0 = randn(4, 3).to(dtype)
    eps = 100 * randn(4, 3, seed=1).to(dtype)
    schedule = TABLES[table]()
    for t in (0, torch.zeros(4, dtype=torch.long)):
        for reach in (schedule.add_noise, schedule.step):
            assert torch.equal(reach(x0, eps, t), x0)
            assert reach(x0, eps, t).dtype == dtype


def test_times_may_differ_within_a_batch():
    schedule = TABLES["CogVideoX-2b"]()
    t = torch.tensor([1, 300, 999, 1000])
    x = randn(4, 2, 3, 5)
    output = randn(4, 2, 3, 5, seed=1)
    asked = []

    def net(x, timestep, return_dict):
        asked.append(timestep)
        return (output,)

    x0, eps = predict(net, schedule, x, t, {})
    assert_close(asked[0], torch.tensor([0.0, 299, 998, 999]))
    for k, time in enumerate(t.tolist()):
        one = slice(k, k + 1)
        x0_k, eps_k = predict(says(output[one]), schedule, x[one], time, {})
        assert_close((x0[one], eps[one]), (x0_k, eps_k))
        assert_close(schedule.add_noise(x0, eps, t // 2)[one],
                     schedule.add_noise(x0_k, eps_k, time // 2))
        assert_close(schedule.step(x0, eps, t // 2)[one], schedule.step(x0_k, eps_k, time // 2))


def test_stops_run_evenly_from_T_to_0():
    schedule = Schedule.straight(37)
    for n in range(1, 38):
        stops = schedule.stops(n)
        steps = [a - b for a, b in zip(stops, stops[1:])]
        assert len(stops) == n + 1 and stops[0] == 37 and stops[-1] == 0
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert Schedule.straight().stops(4) == [1000, 750, 500, 250, 0]


@pytest.mark.parametrize("n", [-1, 0, 38])
def test_impossible_numbers_of_steps_are_refused(n):
    with pytest.raises(ValueError, match=f"{n} steps on a table of 37 times"):
        Schedule.straight(37).stops(n)


def test_eps_network_at_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        cosine(pred="eps")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        from_diffusers(ddim(prediction_type="epsilon", rescale_betas_zero_snr=True))


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'velocity' is none of"):
        cosine(pred="velocity")
    with pytest.raises(ValueError, match="is none of"):
        from_diffusers(ddim(prediction_type="x"))


# ---------------------------------------------------------------------------------------- guidance

def prompted_net(x, timestep, prompt, added, return_dict=False):
    """Reads a nested dict of conditions, as SDXL does; not linear in them."""
    prompted = torch.tanh(x + prompt) * added["size"] + torch.sin(added["pooled"] * prompt)
    return (prompted + timestep.to(x.dtype)[:, None] / 1000,)


def conditions(seed):
    added = dict(size=randn(4, 1, seed=seed + 1), pooled=randn(4, 3, seed=seed + 2))
    return dict(prompt=randn(4, 3, seed=seed), added=added)


def test_batches_are_joined_through_nested_dicts_and_what_is_no_tensor_stays():
    a = dict(conditions(1), sizes=[[(1, 2, 3)]])
    b = dict(conditions(5), sizes=[[(1, 2, 3)]])
    joined = join_batches(a, b)
    assert_close(joined["prompt"], torch.cat([a["prompt"], b["prompt"]]))
    for name in ("size", "pooled"):
        assert_close(joined["added"][name], torch.cat([a["added"][name], b["added"][name]]))
    assert joined["sizes"] == [[(1, 2, 3)]]


@pytest.mark.parametrize("w", [7.0, torch.tensor([0.0, 1.0, 6.5, -2.0], dtype=torch.float64)])
def test_guidance_is_two_separate_calls_combined(w):
    schedule = TABLES["CogVideoX-2b"]()
    x, cond, uncond = randn(4, 3), conditions(1), conditions(5)
    told = torch.full((4,), 599.0)
    output = prompted_net(x, told, **cond)[0]
    output_uncond = prompted_net(x, told, **uncond)[0]
    weight = w[:, None] if torch.is_tensor(w) else w
    expected = schedule.pair(x, (1 - weight) * output_uncond + weight * output, 600)
    found = predict(prompted_net, schedule, x, 600, cond, uncond, w)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_weight_one_is_the_prompt_alone_and_zero_no_prompt():
    schedule = TABLES["SDXL"]()
    x, cond, uncond = randn(4, 3), conditions(1), conditions(5)
    for w, alone in ((1.0, cond), (0.0, uncond)):
        guided = predict(prompted_net, schedule, x, 600, cond, uncond, w)
        assert_close(guided, predict(prompted_net, schedule, x, 600, alone), rtol=1e-12,
                     atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_every_step_costs_one_call_of_the_network_with_guidance_too(order):
    schedule = TABLES["SD3"]()
    stops = schedule.stops(5)
    calls = []

    def net(x, **kwargs):
        calls.append(len(x))
        return prompted_net(x, **kwargs)

    sample(net, schedule, randn(4, 3), stops, conditions(1), order=order)
    sample(net, schedule, randn(4, 3), stops, conditions(1), conditions(5), 7.0, order)
    assert calls == [4] * 5 + [8] * 5


# ----------------------------------------------------------------------- solvers, and the mixture

def measured_order(net, schedule, x, truth, order, stops_of=Schedule.stops):
    """Slope of log error against log steps."""
    steps = [50, 100, 200]
    errors = []
    for n in steps:
        found = sample(net, schedule, x, stops_of(schedule, n), {}, order=order)
        errors.append((found - truth).norm(dim=1).median().item())
    assert errors[-1] < 0.02
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


@pytest.mark.parametrize("order", [1, 2])
def test_solver_order_on_the_ring(order):
    """Truth: a fourth-order Runge-Kutta solution of dx/du = E[eps - x_0 | x] along
    x = (1 - u) x_0 + u eps."""
    data, x_T = ring(), randn(64, 2)

    def velocity(x, u):
        x0 = data.x0_hat(x, x.new_tensor([[1 - u]]), x.new_tensor([[u]]))
        return (x - (1 - u) * x0) / max(u, 1e-4) - x0   # at u = 0 the first term is 0 / 0, limit 0

    x, h = x_T, 1 / 400
    for k in range(400, 0, -1):
        a = velocity(x, k * h)
        b = velocity(x - h / 2 * a, (k - 0.5) * h)
        c = velocity(x - h / 2 * b, (k - 0.5) * h)
        d = velocity(x - h * c, (k - 1) * h)
        x = x - h / 6 * (a + 2 * b + 2 * c + d)
    schedule = Schedule.straight()
    found = measured_order(data.network(schedule), schedule, x_T, x, order)
    assert found == pytest.approx(order, abs=0.1)


def gaussian(schedule, stop=0):
    """(network, schedule, x_T, exact x at time `stop`) of one Gaussian: x_t - alpha_t mean grows as
    sqrt(alpha_t^2 std^2 + sigma_t^2)."""
    mean, std, x_T = torch.tensor([[1.5, -0.7]], dtype=torch.float64), 0.5, randn(64, 2)
    width = ((schedule.alpha * std) ** 2 + schedule.sigma**2).sqrt()
    around = width[stop] / width[-1] * (x_T - schedule.alpha[-1] * mean)
    return Mixture(mean, std).network(schedule), schedule, x_T, schedule.alpha[stop] * mean + around


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name, stop", [
    ("SDXL", 500), ("CogVideoX-2b", 500), ("SD3", 500), ("SD3", 0), ("straight", 500),
    ("straight", 0), ("cosine", 500), ("cosine", 0)])
def test_solver_order_on_a_gaussian_in_closed_form(name, stop, order):
    """SDXL's and CogVideoX's stop half way: their even stops end with a jump in sigma so long that
    it would set the order."""
    schedule = {**TABLES, "cosine": cosine}[name]()

    def down_to_stop(schedule, n):
        return [t for t in schedule.stops(n) if t >= stop]

    found = measured_order(*gaussian(schedule, stop), order, down_to_stop)
    assert found == pytest.approx(order, abs=0.1)


def test_second_order_survives_uneven_stops():
    def uneven(schedule, n):
        """Steps of 1, 3, 1, 3, ..."""
        return [t for k, t in enumerate(schedule.stops(2 * n)) if k % 4 < 2]

    assert measured_order(*gaussian(cosine()), 2, uneven) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_one_step_and_the_last_step_return_the_networks_x0(order):
    schedule, calls = TABLES["CogVideoX-2b"](), []

    def net(x, timestep, return_dict):
        calls.append((x, smooth_net(x, timestep)[0]))
        return calls[-1][1:]

    for n in (1, 5):
        stops = schedule.stops(n)
        x_0 = sample(net, schedule, randn(4, 3), stops, {}, order=order)
        x0_hat, _ = schedule.pair(*calls[-1], stops[-2])
        assert torch.equal(x_0, x0_hat)
        assert x_0.isfinite().all()


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.3), (0.8, 0.6), (0.3, 0.7), (0.05, 1.0)])
def test_mixture_x0_hat_is_tweedies_formula(alpha, sigma):
    """E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha, the gradient by central differences of
    torch's own density."""
    data, x, h = ring(), 1.5 * randn(32, 2), 1e-5
    normals = torch.distributions.Normal(alpha * data.means, math.hypot(alpha * data.std, sigma))
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(8, dtype=torch.float64)),
        torch.distributions.Independent(normals, 1))
    slopes = []
    for nudge in h * torch.eye(2, dtype=torch.float64):
        slopes.append((density.log_prob(x + nudge) - density.log_prob(x - nudge)) / (2 * h))
    one = torch.ones(32, 1, dtype=torch.float64)
    x0_hat = data.x0_hat(x, alpha * one, sigma * one)
    assert_close(x0_hat, (x + sigma**2 * torch.stack(slopes, 1)) / alpha, rtol=0, atol=1e-7)


def test_mixture_network_gives_the_same_pair_in_every_parameterisation():
    table, data, t = TABLES["SDXL"](), ring(), torch.tensor([1, 2, 30, 400, 900, 1000])
    x = randn(6, 2)
    alpha = table.alpha[t, None]
    sigma = table.sigma[t, None]
    x0 = data.x0_hat(x, alpha, sigma)
    for pred in ("eps", "v", "flow", "sample"):
        schedule = Schedule(table.alpha, table.sigma, table.timestep, pred)
        x0_hat, eps_hat = predict(data.network(schedule), schedule, x, t, {})
        assert_close(x0_hat, x0, rtol=0, atol=1e-12)
        assert_close(alpha * x0_hat + sigma * eps_hat, x, rtol=0, atol=1e-12)


def test_mixture_samples_have_its_mean_and_spread():
    data = Mixture.grid(side=3, gap=2.0, std=0.1)
    x = data.sample(4000, torch.Generator().manual_seed(0))
    distance, mode = torch.cdist(x, data.means).min(1)
    assert_close(distance.square().mean().sqrt().item(), 0.1 * 2**0.5, rtol=0.03, atol=0)
    assert torch.bincount(mode, minlength=9).min() > 350        # 444 each, give or take 20


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 12])
def test_students_of_any_number_of_steps_have_a_stock_scheduler(steps):
    """First-order DPM-Solver from the last timestep down, which train_sdxl.py exports, visits this
    table's stops and takes its steps."""
    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                   beta_schedule="scaled_linear", timestep_spacing="leading")
    schedule = from_diffusers(euler)
    stops = schedule.stops(steps)
    stock, call = sdxl.FAMILY.student_scheduler(euler, False, stops)
    assert isinstance(stock, DPMSolverMultistepScheduler) and call["num_inference_steps"] == steps
    stock.set_timesteps(steps)
    assert [t - 1 for t in stops[:-1]] == stock.timesteps.tolist()

    def net(x, timestep, return_dict=False):
        return (torch.tanh(1.3 * x + timestep.view(-1, 1) / 700) + 0.2 * x,)

    x = torch.randn(4, 8)
    mine = sample(net, schedule, x, stops, {})
    for t in stock.timesteps:
        x = stock.step(net(x, t.expand(4).float())[0], t, x).prev_sample
    assert_close(x, mine, rtol=1e-5, atol=1e-5)
