"""What several LoRAs on one base must not get wrong: each is held against a model of its own, in float64."""
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from adm import Draws, adm
from discriminators import Taps, heads_for
from ode import Schedule
from plumbing import Average, Lora, active, checkpointing, full_copy

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"]


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, use_linear_projection=True).double().requires_grad_(False).eval()


def lora(base, name, seed):
    """With weights that do something from the start: peft's own B is zero."""
    net = Lora(base, name, 2, 3.0, TARGETS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net


def three_iterations(generator, fake, teacher):
    """ADM's weights afterwards: [generator's, fake score's]."""
    schedule, x = Schedule.straight(), torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    cond = dict(encoder_hidden_states=torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(1)
    heads = heads_for(teacher, x, 8, timestep=torch.zeros(1), encoder_hidden_states=cond["encoder_hidden_states"][:1]).double()
    opts = [torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1) for net in (generator, fake, heads)]

    class Double(Draws):
        normal, uniform = (lambda self: Draws.normal(self).double()), (lambda self, *a: Draws.uniform(self, *a).double())

    for _ in adm(generator, fake, teacher, Taps(teacher), heads, opts, schedule, schedule, schedule.rows(2), (1.0, 3.0),
                 lambda i: [(Double((0,), i, range(2), (4, 8, 8)), cond, cond)], 3):
        pass
    return [[p.detach() for p in net.parameters() if p.requires_grad] for net in (generator, fake)]


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_of_one_base_train_as_separate_models(recompute):
    shared, alone = unet(), unet()
    together = [lora(shared, "generator", 1), lora(shared, "fake", 2)]
    apart = [lora(unet(), "generator", 1), lora(unet(), "fake", 2)]
    before = [p.clone() for net in apart for p in net.parameters()]
    if recompute:
        checkpointing(shared)
    expected, found = three_iterations(*apart, alone), three_iterations(*together, shared)
    moved = [(a - b).abs().max().item() for a, b in zip(sum(expected, []), before)]
    assert min(moved) > 0, "some weights never moved: nothing was compared"
    for name, es, fs in zip(("generator", "fake"), expected, found):
        assert len(es) == len(fs) > 0
        for e, f in zip(es, fs):
            assert_close(f, e, rtol=1e-12, atol=1e-14, msg=lambda m: f"{name}: {m}")


def test_the_base_is_what_it_was():
    plain, base = unet(), unet()
    x, kwargs = torch.randn(2, 4, 8, 8, dtype=torch.float64), dict(timestep=torch.tensor([3.0, 700.0]), encoder_hidden_states=torch.randn(2, 3, 8, dtype=torch.float64))
    nets = [lora(base, "a", 1), lora(base, "b", 2)]
    look = lambda net: net(x, **kwargs, return_dict=False)[0]
    assert_close(look(base), look(plain), rtol=0, atol=0)
    assert (look(nets[0]) - look(nets[1])).abs().max() > 1e-4 and (look(nets[0]) - look(plain)).abs().max() > 1e-4
    assert_close(look(full_copy(base)), look(plain), rtol=0, atol=0)
    assert not any("lora" in k for k in full_copy(base).state_dict())
    with active(base, "a"):
        assert_close(look(base), look(nets[0]), rtol=0, atol=0)
    assert_close(look(base), look(plain), rtol=0, atol=0)


def test_a_fresh_adapter_changes_nothing_and_all_stay_trainable():
    base = unet()
    nets = [Lora(base, name, 2, 2, TARGETS) for name in ("a", "b", "c")]
    Taps(base)
    x, kwargs = torch.randn(1, 4, 8, 8, dtype=torch.float64), dict(timestep=torch.tensor([3.0]), encoder_hidden_states=torch.randn(1, 3, 8, dtype=torch.float64))
    for net in nets:
        assert_close(net(x, **kwargs, return_dict=False)[0], base(x, **kwargs, return_dict=False)[0], rtol=0, atol=0)
        assert all(p.requires_grad for p in net.parameters()) and len(list(net.parameters())) > 0
    own = [id(p) for net in nets for p in net.parameters()]
    assert len(own) == len(set(own))
    assert {id(p) for p in base.parameters() if p.requires_grad} == set(own)


def test_the_average_of_an_adapter():
    base = unet()
    net = lora(base, "a", 1)
    average, start = Average(net, 0.9), [p.clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    average.update()
    for p, s in zip(average.net.parameters(), start, strict=True):
        assert_close(p, s + 0.1, rtol=0, atol=1e-12)
    average.restart()
    for p, s in zip(net.parameters(), start, strict=True):
        assert_close(p, s + 0.1, rtol=0, atol=1e-12)


def test_a_copy_of_a_plain_network_is_its_own():
    net = unet()
    twin = full_copy(net)
    next(twin.parameters()).data.add_(1)
    assert (next(twin.parameters()) - next(net.parameters())).abs().min() > 0.5 and deepcopy(net).state_dict().keys() == twin.state_dict().keys()
