"""lesson/worlds.py: mixtures of unequal weights. (Of equal ones, and the solvers on them:
test_ode.py.)"""
import pytest
import torch
from torch.testing import assert_close

from lesson.worlds import WORLDS, Mixture, share_error, shares, tv_and_precision
from ode import Schedule, predict

WEIGHTS = [4.0, 1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 0.5]      # of the ring's eight modes; 10 in all
SHARES = torch.tensor(WEIGHTS) / 10


def unequal_ring(std=0.2):
    return Mixture.ring(std=std, weights=WEIGHTS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_weights_are_scaled_to_shares():
    assert_close(unequal_ring().weights, SHARES)
    assert_close(Mixture.grid(side=2).weights, torch.full((4,), 0.25))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="one for each mode, none negative and one above 0"):
        Mixture.ring(k=3, weights=weights)


def test_samples_fall_to_the_modes_as_the_weights_say():
    data = unequal_ring()
    x = data.sample(20_000, seeded())
    found = shares(x, data)
    assert_close(found, SHARES, rtol=0, atol=0.012)             # 0.0035 is a standard deviation
    assert found[2] == 0                                        # its weight is 0
    mode = torch.cdist(x, data.means).argmin(1)
    for k in (0, 3, 7):                                         # each around its own mean
        here = x[mode == k]
        assert_close(here.mean(0), data.means[k], rtol=0, atol=0.03)
        assert_close(here.std(0), torch.full((2,), 0.2), rtol=0.1, atol=0)


def test_modes_of_uniform_numbers():
    data = Mixture([[-1.0], [0.0], [1.0]], 0.1, weights=[1.0, 0.0, 3.0])
    u = torch.tensor([0.0, 0.24, 0.25, 0.26, 0.999999])
    assert data.modes_of(u).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.3), (0.8, 0.6), (0.3, 0.95), (0.0, 1.0)])
def test_x0_hat_is_the_posterior_mean_by_quadrature(alpha, sigma):
    """E[x_0 | x] in one dimension: sums over a fine grid of x_0, with the density written out."""
    means, weights, std = [-1.0, 0.3, 2.0], [5.0, 1.0, 2.0], 0.4
    data = Mixture(torch.tensor(means, dtype=torch.float64)[:, None], std, weights)
    x_0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    prior = sum(w * (-(x_0 - m) ** 2 / (2 * std**2)).exp() for m, w in zip(means, weights))
    x = torch.tensor([-1.5, 0.0, 0.7, 1.4])
    expected = []
    for value in x.tolist():
        density = prior * (-(value - alpha * x_0) ** 2 / (2 * sigma**2)).exp()
        expected.append((density * x_0).sum() / density.sum())
    one = torch.ones(4, 1, dtype=torch.float64)
    found = data.x0_hat(x.double()[:, None], alpha * one, sigma * one)[:, 0]
    assert_close(found, torch.stack(expected), rtol=0, atol=1e-8)


def test_a_mode_of_weight_0_draws_nothing():
    data = Mixture([[-1.0], [1.0]], 0.1, weights=[1.0, 0.0])
    one = torch.ones(1, 1)
    assert_close(data.x0_hat(0.9 * one, one, 0.3 * one), Mixture([[-1.0]], 0.1).x0_hat(
        0.9 * one, one, 0.3 * one))


def test_the_network_says_what_x0_hat_says():
    data, schedule = unequal_ring(), Schedule.straight()
    x = torch.randn(6, 2, generator=seeded())
    t = torch.tensor([10, 200, 500, 700, 900, 1000])
    x0_hat, _ = predict(data.network(schedule), schedule, x, t, {})
    alpha, sigma = schedule.coefficients(t, x)
    assert_close(x0_hat, data.x0_hat(x, alpha, sigma), rtol=0, atol=1e-5)
    equal = Mixture.ring().x0_hat(x, alpha, sigma)
    assert (x0_hat - equal).abs().max() > 0.1, "the weights make no difference here"


def test_share_error_is_zero_for_the_mixtures_own_samples_and_not_for_equal_shares():
    data, equal = unequal_ring(), Mixture.ring()
    own = data.sample(20_000, seeded())
    others = equal.sample(20_000, seeded())
    expected = 0.5 * (SHARES - 1 / 8).abs().sum().item()        # 0.375
    assert share_error(own, data) < 0.015
    assert share_error(others, data) == pytest.approx(expected, abs=0.015)
    assert share_error(own, equal) == pytest.approx(expected, abs=0.015)
    assert share_error(others, equal) < 0.015
    assert share_error(data.means[SHARES.bool()], data) > 0.1   # each mode once


def test_a_mode_counts_when_it_has_a_tenth_of_its_own_share():
    """A mode of a small weight is found by few samples; one of weight 0 is never looked for."""
    data = unequal_ring(std=0.05)
    own = data.sample(20_000, seeded())
    found = tv_and_precision(own, data, data.sample(20_000, seeded(1)))
    assert found["modes"] == 7
    assert found["precision"] > 0.98 and found["tv"] < 0.03
    few = torch.cat([data.means[[0]].repeat(994, 1), data.means[[7]].repeat(6, 1)])
    assert tv_and_precision(few, data, own)["modes"] == 2       # 0.006 of 0.05 is over a tenth
    fewer = torch.cat([data.means[[0]].repeat(996, 1), data.means[[7]].repeat(4, 1)])
    assert tv_and_precision(fewer, data, own)["modes"] == 1
    equal = Mixture.ring(std=0.05)
    shifted = tv_and_precision(equal.sample(20_000, seeded()), data, own)
    assert shifted["tv"] > 0.3 and shifted["precision"] > 0.98


def test_all_worlds_take_weights():
    for world in WORLDS.values():
        count = len(world().means)
        weights = [2.0] + [1.0] * (count - 1)
        assert_close(world(weights=weights).weights[0].item(), 2 / (count + 1), rtol=1e-5, atol=0)
