"""ode.py against diffusers' own schedulers, closed forms, finite differences and a Runge-Kutta solver."""
import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.testing import assert_close

from ode import Mixture, Schedule, both, predict, sample

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")
N = 20                                                          # steps, where one number will do


def ddim(**config):
    """In float64 from the table on: diffusers keeps alphas_cumprod in float32 and computes each step in its dtype."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, **config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def cogvideox(snr_shift_scale):
    return CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=snr_shift_scale, rescale_betas_zero_snr=True, prediction_type="v_prediction")


# name -> (scheduler, relative tolerance); Euler and flow schedulers compute in float32
SCHEDULERS = {
    "DDIM eps": (lambda: ddim(prediction_type="epsilon"), 1e-12),
    "DDIM v": (lambda: ddim(prediction_type="v_prediction"), 1e-12),
    "DDIM v, zero terminal SNR": (lambda: ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True), 1e-12),
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
    return (torch.tanh(x @ randn(3, 3, seed=1) + timestep.to(x.dtype)[:, None] / 1000 * randn(3, seed=2)),)


def says(out):
    """A network that gives this answer to everything."""
    return lambda x, timestep, return_dict: (out,)


def start(scheduler, n):
    """Ready for n evenly spaced steps from row T."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[k / n for k in range(n, 0, -1)])
    else:
        scheduler.set_timesteps(n)
    return scheduler


def scale(scheduler, schedule, row):
    """What diffusers' coordinates have to be multiplied with: its Euler schedulers work in x / alpha."""
    return schedule.alpha[row] if isinstance(scheduler, EulerDiscreteScheduler) else 1.0


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


# --------------------------------------------------------------------------------------------------- against diffusers

@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_is_the_schedulers_step(name):
    make, tolerance = SCHEDULERS[name]
    scheduler = start(make(), N)
    schedule = Schedule.from_diffusers(make())
    rows = schedule.rows(N)
    for k, (s, t) in enumerate(zip(rows, rows[1:])):
        x, out = randn(4, 3, seed=k), randn(4, 3, seed=100 + k)
        theirs = scheduler.step(out, scheduler.timesteps[k], x / scale(scheduler, schedule, s)).prev_sample.double()
        ours = schedule.noise(*predict(says(out), schedule, x, s, {}), t)
        assert_close(ours, theirs * scale(scheduler, schedule, t), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sample_is_the_pipelines_loop(name):
    make, tolerance = SCHEDULERS[name]
    scheduler = start(make(), N)
    schedule = Schedule.from_diffusers(make())
    x_T = randn(4, 3)
    x = x_T / scale(scheduler, schedule, schedule.T)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(smooth_net(seen, t.expand(len(x)))[0], t, x).prev_sample
    assert_close(sample(smooth_net, schedule, x_T, schedule.rows(N), {}), x.double(), rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", ["DDIM eps", "DDIM v, zero terminal SNR", "CogVideoX-2b", "CogVideoX-5b"])
def test_noise_is_add_noise_and_the_v_target_is_get_velocity(name):
    scheduler = SCHEDULERS[name][0]()
    schedule = Schedule.from_diffusers(scheduler)
    timesteps = torch.arange(1000)
    x0, eps = randn(1000, 3), randn(1000, 3, seed=1)
    assert_close(schedule.noise(x0, eps, timesteps + 1), scheduler.add_noise(x0, eps, timesteps), rtol=1e-12, atol=1e-12)
    if schedule.pred == "v":
        assert_close(schedule.target(x0, eps, timesteps + 1), scheduler.get_velocity(x0, eps, timesteps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["DDIM eps", "CogVideoX-2b", "CogVideoX-5b", "flow"])
def test_tables_are_the_published_formulas(name):
    """Computed here from the betas, in float64, without diffusers."""
    u = torch.arange(1001, dtype=torch.float64) / 1000
    if name == "flow":
        sigma = 3 * u / (1 + 2 * u)
        alpha, timestep = 1 - sigma, 1000 * sigma
    else:
        ac = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
        if name != "DDIM eps":
            shift = {"CogVideoX-2b": 3.0, "CogVideoX-5b": 1.0}[name]
            root = (ac / (shift + (1 - shift) * ac)).sqrt()
            ac = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        ac = torch.cat([torch.ones(1, dtype=torch.float64), ac])
        alpha, sigma, timestep = ac.sqrt(), (1 - ac).sqrt(), torch.tensor([0, *range(1000)])
    schedule = Schedule.from_diffusers(SCHEDULERS[name][0]())
    tolerance = dict(rtol=0, atol=1e-5 if name == "DDIM eps" else 1e-12)          # DDIM's own betas are float32
    assert_close(schedule.alpha, alpha, **tolerance)
    assert_close(schedule.sigma, sigma, **tolerance)
    assert_close(schedule.timestep, timestep.float())
    assert (schedule.alpha[0], schedule.sigma[0]) == (1, 0)
    assert schedule.T == 1000


def test_flow_shift_is_read_under_each_of_its_names_or_given():
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    for steps in (1, 4, 8, 1000):
        wan.set_timesteps(steps)
        schedule = Schedule.from_diffusers(wan)
        rows = schedule.rows(steps)[:-1]
        assert_close(schedule.sigma[rows], wan.sigmas[:-1].double(), rtol=0, atol=2e-6)
        assert_close(schedule.timestep[rows].long(), wan.timesteps, rtol=0, atol=0 if steps < 1000 else 1)   # whole ones, cut off in float32
    qwen = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    qwen.set_timesteps(sigmas=[k / 1000 for k in range(1000, 0, -1)], mu=0.8)
    schedule = Schedule.from_diffusers(qwen, shift=math.exp(0.8))
    assert_close(schedule.sigma[1:].flip(0), qwen.sigmas[:-1].double(), rtol=0, atol=1e-6)
    assert_close(schedule.timestep[1:].flip(0), qwen.timesteps, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- algebra

TABLES = {"SDXL": lambda: Schedule.from_diffusers(ddim()), "CogVideoX-2b": lambda: Schedule.from_diffusers(cogvideox(3.0)),
          "SD3": lambda: Schedule.from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0)), "straight": Schedule.straight}


@pytest.mark.parametrize("pred", ["eps", "v", "flow", "sample"])
@pytest.mark.parametrize("table", TABLES)
def test_target_and_split_are_inverse_on_every_row(table, pred):
    """Where the pair is determined at all: an eps network says nothing of x_0 at alpha = 0, a sample network nothing of eps at sigma = 0."""
    schedule = TABLES[table]()
    zero_snr = schedule.alpha[-1] == 0
    if pred == "eps" and zero_snr:                              # keep all but the last row
        schedule = Schedule(schedule.alpha[:-1], schedule.sigma[:-1], schedule.timestep[:-1], pred)
    schedule.pred = pred
    i = torch.arange(1 if pred == "sample" else 0, schedule.T + 1)
    x0, eps = randn(len(i), 2, 3), randn(len(i), 2, 3, seed=1)
    x0_hat, eps_hat = schedule.split(schedule.noise(x0, eps, i), schedule.target(x0, eps, i), i)
    assert_close(x0_hat, x0, rtol=0, atol=1e-10)
    assert_close(eps_hat, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("table", ["CogVideoX-2b", "SD3", "straight"])
def test_split_is_exact_at_zero_terminal_snr(table):
    schedule = TABLES[table]()
    assert schedule.alpha[-1] == 0 and schedule.sigma[-1] == 1
    x, x0 = randn(4, 3), randn(4, 3, seed=1)
    x0_hat, eps_hat = schedule.split(x, schedule.target(x0, x, schedule.T), schedule.T)
    assert_close(x0_hat, x0, rtol=0, atol=1e-15)
    assert_close(eps_hat, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", TABLES)
def test_row_0_gives_back_x0_bit_for_bit(table, dtype):
    x0, eps = randn(4, 3).to(dtype), 100 * randn(4, 3, seed=1).to(dtype)
    schedule = TABLES[table]()
    for row in (0, torch.zeros(4, dtype=torch.long)):
        assert torch.equal(schedule.noise(x0, eps, row), x0)
        assert schedule.noise(x0, eps, row).dtype == dtype


def test_rows_may_differ_within_a_batch():
    schedule = TABLES["CogVideoX-2b"]()
    i = torch.tensor([1, 300, 999, 1000])
    x, out, asked = randn(4, 2, 3, 5), randn(4, 2, 3, 5, seed=1), []

    def net(x, timestep, return_dict):
        asked.append(timestep)
        return (out,)

    x0, eps = predict(net, schedule, x, i, {})
    assert_close(asked[0], torch.tensor([0.0, 299, 998, 999]))
    for k, row in enumerate(i.tolist()):
        x0_k, eps_k = predict(says(out[k:k + 1]), schedule, x[k:k + 1], row, {})
        assert_close((x0[k:k + 1], eps[k:k + 1]), (x0_k, eps_k))
        assert_close(schedule.noise(x0, eps, i // 2)[k:k + 1], schedule.noise(x0_k, eps_k, row // 2))


def test_rows_run_evenly_from_T_to_0():
    schedule = Schedule.straight(37)
    for n in range(1, 38):
        rows = schedule.rows(n)
        steps = [a - b for a, b in zip(rows, rows[1:])]
        assert len(rows) == n + 1 and rows[0] == 37 and rows[-1] == 0
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert Schedule.straight().rows(4) == [1000, 750, 500, 250, 0]


@pytest.mark.parametrize("n", [-1, 0, 38])
def test_impossible_numbers_of_steps_are_refused(n):
    with pytest.raises(ValueError, match=f"{n} steps on a table of 37 rows"):
        Schedule.straight(37).rows(n)


def test_eps_network_at_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        cosine(pred="eps")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Schedule.from_diffusers(ddim(prediction_type="epsilon", rescale_betas_zero_snr=True))


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'velocity' is none of"):
        cosine(pred="velocity")
    with pytest.raises(ValueError, match="is none of"):
        Schedule.from_diffusers(ddim(prediction_type="x"))


# ------------------------------------------------------------------------------------------------------------ guidance

def prompted_net(x, timestep, prompt, added, return_dict=False):
    """Reads a nested dict of conditions, as SDXL does; not linear in them."""
    return (torch.tanh(x + prompt) * added["size"] + torch.sin(added["pooled"] * prompt) + timestep.to(x.dtype)[:, None] / 1000,)


def conditions(seed):
    return dict(prompt=randn(4, 3, seed=seed), added=dict(size=randn(4, 1, seed=seed + 1), pooled=randn(4, 3, seed=seed + 2)))


def test_both_concatenates_nested_dicts_along_the_batch():
    a, b = conditions(1), conditions(5)
    joined = both(a, b)
    assert_close(joined["prompt"], torch.cat([a["prompt"], b["prompt"]]))
    assert_close(joined["added"]["size"], torch.cat([a["added"]["size"], b["added"]["size"]]))


@pytest.mark.parametrize("w", [7.0, torch.tensor([0.0, 1.0, 6.5, -2.0], dtype=torch.float64)])
def test_guidance_is_two_separate_calls_combined(w):
    schedule, x, cond, uncond = TABLES["CogVideoX-2b"](), randn(4, 3), conditions(1), conditions(5)
    t = torch.full((4,), 599.0)
    out, out_uncond = prompted_net(x, t, **cond)[0], prompted_net(x, t, **uncond)[0]
    weight = w[:, None] if torch.is_tensor(w) else w
    expected = schedule.split(x, (1 - weight) * out_uncond + weight * out, 600)
    assert_close(predict(prompted_net, schedule, x, 600, cond, uncond, w), expected, rtol=1e-12, atol=1e-12)


def test_weight_one_is_the_prompt_alone_and_zero_no_prompt():
    schedule, x, cond, uncond = TABLES["SDXL"](), randn(4, 3), conditions(1), conditions(5)
    for w, alone in ((1.0, cond), (0.0, uncond)):
        assert_close(predict(prompted_net, schedule, x, 600, cond, uncond, w), predict(prompted_net, schedule, x, 600, alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_every_step_costs_one_call_of_the_network_with_guidance_too(order):
    schedule, calls = TABLES["SD3"](), []

    def net(x, **kwargs):
        calls.append(len(x))
        return prompted_net(x, **kwargs)

    sample(net, schedule, randn(4, 3), schedule.rows(5), conditions(1), order=order)
    sample(net, schedule, randn(4, 3), schedule.rows(5), conditions(1), conditions(5), 7.0, order)
    assert calls == [4] * 5 + [8] * 5


# ------------------------------------------------------------------------------------------- solvers, and the mixture

def measured_order(net, schedule, x, truth, order, rows=Schedule.rows):
    """Slope of log error against log steps."""
    steps = [50, 100, 200]
    error = [(sample(net, schedule, x, rows(schedule, n), {}, order=order) - truth).norm(dim=1).median().item() for n in steps]
    assert error[-1] < 0.02
    return math.log(error[0] / error[-1]) / math.log(steps[-1] / steps[0])


@pytest.mark.parametrize("order", [1, 2])
def test_solver_order_on_the_ring(order):
    """Truth: a fourth-order Runge-Kutta solution of dx/du = E[eps - x_0 | x] along x = (1 - u) x_0 + u eps."""
    data, x_T = ring(), randn(64, 2)

    def velocity(x, u):
        x0 = data.x0_hat(x, x.new_tensor([[1 - u]]), x.new_tensor([[u]]))
        return (x - (1 - u) * x0) / max(u, 1e-4) - x0           # at u = 0 the first term is 0 / 0, with limit 0

    x, h = x_T, 1 / 400
    for k in range(400, 0, -1):
        a = velocity(x, k * h)
        b = velocity(x - h / 2 * a, (k - 0.5) * h)
        c = velocity(x - h / 2 * b, (k - 0.5) * h)
        d = velocity(x - h * c, (k - 1) * h)
        x = x - h / 6 * (a + 2 * b + 2 * c + d)
    schedule = Schedule.straight()
    assert measured_order(data.network(schedule), schedule, x_T, x, order) == pytest.approx(order, abs=0.1)


def gaussian(schedule, stop=0):
    """(network, schedule, x_T, exact x at row `stop`) of one Gaussian: x_t - alpha_t mean grows as sqrt(alpha_t^2 std^2 + sigma_t^2)."""
    mean, std, x_T = torch.tensor([[1.5, -0.7]], dtype=torch.float64), 0.5, randn(64, 2)
    width = ((schedule.alpha * std) ** 2 + schedule.sigma**2).sqrt()
    exact = schedule.alpha[stop] * mean + width[stop] / width[-1] * (x_T - schedule.alpha[-1] * mean)
    return Mixture(mean, std).network(schedule), schedule, x_T, exact


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name, stop", [("SDXL", 500), ("CogVideoX-2b", 500), ("SD3", 500), ("SD3", 0), ("straight", 500), ("straight", 0),
                                        ("cosine", 500), ("cosine", 0)])
def test_solver_order_on_a_gaussian_in_closed_form(name, stop, order):
    """SDXL's and CogVideoX's stop half way: their even rows end with a jump in sigma so long that it would set the order."""
    schedule = {**TABLES, "cosine": cosine}[name]()
    down_to_stop = lambda schedule, n: [row for row in schedule.rows(n) if row >= stop]
    assert measured_order(*gaussian(schedule, stop), order, down_to_stop) == pytest.approx(order, abs=0.1)


def test_second_order_survives_uneven_rows():
    uneven = lambda schedule, n: [row for k, row in enumerate(schedule.rows(2 * n)) if k % 4 < 2]         # steps of 1, 3, 1, 3, ...
    assert measured_order(*gaussian(cosine()), 2, uneven) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_one_step_and_the_last_step_return_the_networks_x0(order):
    schedule, calls = TABLES["CogVideoX-2b"](), []

    def net(x, timestep, return_dict):
        calls.append((x, smooth_net(x, timestep)[0]))
        return calls[-1][1:]

    for n in (1, 5):
        rows = schedule.rows(n)
        x_0 = sample(net, schedule, randn(4, 3), rows, {}, order=order)
        assert torch.equal(x_0, schedule.split(*calls[-1], rows[-2])[0])
        assert x_0.isfinite().all()


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.3), (0.8, 0.6), (0.3, 0.7), (0.05, 1.0)])
def test_mixture_x0_hat_is_tweedies_formula(alpha, sigma):
    """E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha, the gradient by central differences of torch's own density."""
    data, x, h = ring(), 1.5 * randn(32, 2), 1e-5
    parts = torch.distributions.Independent(torch.distributions.Normal(alpha * data.means, math.hypot(alpha * data.std, sigma)), 1)
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(8, dtype=torch.float64)), parts)
    nudge = h * torch.eye(2, dtype=torch.float64)
    gradient = torch.stack([(density.log_prob(x + e) - density.log_prob(x - e)) / (2 * h) for e in nudge], 1)
    x0_hat = data.x0_hat(x, torch.full((32, 1), alpha, dtype=torch.float64), torch.full((32, 1), sigma, dtype=torch.float64))
    assert_close(x0_hat, (x + sigma**2 * gradient) / alpha, rtol=0, atol=1e-7)


def test_mixture_network_gives_the_same_pair_in_every_parameterisation():
    table, data, i = TABLES["SDXL"](), ring(), torch.tensor([1, 2, 30, 400, 900, 1000])
    x = randn(6, 2)
    alpha, sigma = table.alpha[i, None], table.sigma[i, None]
    x0 = data.x0_hat(x, alpha, sigma)
    for pred in ("eps", "v", "flow", "sample"):
        schedule = Schedule(table.alpha, table.sigma, table.timestep, pred)
        x0_hat, eps_hat = predict(data.network(schedule), schedule, x, i, {})
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
    """First-order DPM-Solver from the last row down, which train_sdxl.py exports, visits this table's rows and takes its steps."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    stock = DPMSolverMultistepScheduler.from_config(euler.config, solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero")
    stock.set_timesteps(steps)
    schedule = Schedule.from_diffusers(euler)
    rows = schedule.rows(steps)
    assert [row - 1 for row in rows[:-1]] == stock.timesteps.tolist()
    net = lambda x, timestep, return_dict=False: (torch.tanh(1.3 * x + timestep.view(-1, 1) / 700) + 0.2 * x,)
    x = torch.randn(4, 8)
    mine = sample(net, schedule, x, rows, {})
    for t in stock.timesteps:
        x = stock.step(net(x, t.expand(4).float())[0], t, x).prev_sample
    assert_close(x, mine, rtol=1e-5, atol=1e-5)
