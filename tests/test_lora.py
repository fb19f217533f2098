"""What several LoRAs on one base must not get wrong: each is held against a model of its own, in
float64."""
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from adm import Scores, adm
from discriminators import Discriminator
from families import sdxl
from families.wan import ByNoise
from ode import Schedule
from tiny import Float64Draws
from training.heads import heads_for
from training.lora import Lora, active
from training.networks import full_copy, recompute_activations
from training.optimizer import EMA

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"]


def unet():
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, use_linear_projection=True)
    return net.double().requires_grad_(False).eval()


def lora(base, name, seed):
    """With weights that do something from the start: peft's own B is zero."""
    net = Lora(base, name, 2, 3.0, TARGETS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net


def inputs(*timesteps):
    """(x, the UNet's other arguments), a sample for each timestep."""
    n = len(timesteps)
    x = torch.randn(n, 4, 8, 8, dtype=torch.float64)
    return x, dict(timestep=torch.tensor(timesteps),
                   encoder_hidden_states=torch.randn(n, 3, 8, dtype=torch.float64))


def output(net, x, cond):
    return net(x, **cond, return_dict=False)[0]


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def three_iterations(generator, fake, teacher):
    """ADM's weights afterwards: [generator's, fake score's]."""
    schedule, x = Schedule.straight(), torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    tokens = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cond = dict(encoder_hidden_states=tokens)
    torch.manual_seed(1)
    heads = heads_for(sdxl.FAMILY.taps, teacher, x, 8, timestep=torch.zeros(1),
                      encoder_hidden_states=tokens[:1]).double()
    optimizers = [torch.optim.SGD(trained(net), 0.1) for net in (generator, fake, heads)]
    for _ in adm(generator, Scores(fake, teacher, schedule),
                 Discriminator(sdxl.FAMILY.taps(teacher), heads), optimizers=optimizers,
                 student_schedule=schedule, stops=schedule.stops(2), guidance=(1.0, 3.0),
                 batches=lambda i: [(Float64Draws((0,), i, range(2), (4, 8, 8)), cond, cond)],
                 iterations=3):
        pass
    return [[p.detach() for p in trained(net)] for net in (generator, fake)]


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_of_one_base_train_as_separate_models(recompute):
    shared, alone = unet(), unet()
    together = [lora(shared, "generator", 1), lora(shared, "fake", 2)]
    apart = [lora(unet(), "generator", 1), lora(unet(), "fake", 2)]
    before = [p.clone() for net in apart for p in net.parameters()]
    if recompute:
        recompute_activations(shared)
    expected, found = three_iterations(*apart, alone), three_iterations(*together, shared)
    moved = [(a - b).abs().max().item() for a, b in zip(sum(expected, []), before, strict=True)]
    assert min(moved) > 0, "some weights never moved: nothing was compared"
    for name, weights_apart, weights_together in zip(("generator", "fake"), expected, found):
        assert len(weights_apart) == len(weights_together) > 0
        for a, b in zip(weights_apart, weights_together):
            assert_close(b, a, rtol=1e-12, atol=1e-14, msg=lambda m: f"{name}: {m}")


def test_the_base_is_what_it_was():
    plain, base = unet(), unet()
    x, cond = inputs(3.0, 700.0)
    nets = [lora(base, "a", 1), lora(base, "b", 2)]
    of_plain = output(plain, x, cond)
    of_a, of_b = output(nets[0], x, cond), output(nets[1], x, cond)
    assert_close(output(base, x, cond), of_plain, rtol=0, atol=0)
    assert (of_a - of_b).abs().max() > 1e-4
    assert (of_a - of_plain).abs().max() > 1e-4
    assert_close(output(full_copy(base), x, cond), of_plain, rtol=0, atol=0)
    assert not any("lora" in name for name in full_copy(base).state_dict())
    with active(base, "a"):
        assert_close(output(base, x, cond), of_a, rtol=0, atol=0)
    assert_close(output(base, x, cond), of_plain, rtol=0, atol=0)


def test_a_fresh_adapter_changes_nothing_and_all_stay_trainable():
    base = unet()
    nets = [Lora(base, name, 2, 2, TARGETS) for name in ("a", "b", "c")]
    sdxl.FAMILY.taps(base)
    x, cond = inputs(3.0)
    for net in nets:
        assert_close(output(net, x, cond), output(base, x, cond), rtol=0, atol=1e-12)
        assert all(p.requires_grad for p in net.parameters())
        assert len(list(net.parameters())) > 0
    own = [id(p) for net in nets for p in net.parameters()]
    assert len(own) == len(set(own))
    assert {id(p) for p in base.parameters() if p.requires_grad} == set(own)


def test_the_average_of_an_adapter():
    net = lora(unet(), "a", 1)
    average, start = EMA(net, 0.9, None), [p.clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    average.update()
    for p, at_start in zip(average.net.parameters(), start, strict=True):
        assert_close(p, at_start + 0.1, rtol=0, atol=1e-12)
    average.restart()
    for p, at_start in zip(net.parameters(), start, strict=True):
        assert_close(p, at_start + 0.1, rtol=0, atol=1e-12)


def test_a_copy_of_a_plain_network_is_its_own():
    net = unet()
    twin = full_copy(net)
    next(twin.parameters()).data.add_(1)
    assert (next(twin.parameters()) - next(net.parameters())).abs().min() > 0.5
    assert deepcopy(net).state_dict().keys() == twin.state_dict().keys()


def test_a_copy_of_two_networks_has_no_adapters():
    """Wan 2.2's: the fake score of Phased DMD is a copy of both, of which the generator adapts one.
    """
    both = ByNoise(unet(), unet(), boundary=500)
    names = both.state_dict().keys()
    Lora(both.high, "phase1", 2, 2, TARGETS)
    assert any("lora" in name for name in both.state_dict())
    assert full_copy(both).state_dict().keys() == names

@torch.no_grad()
def test_a_network_in_bf16_sees_a_small_adapter():
    """One that changes a layer's output by less than a thousandth: peft's own sum shows a fifth of
    it at most."""
    base = unet().float()
    Lora(base, "a", 2, 2.0, TARGETS)
    layer = base.down_blocks[1].attentions[0].transformer_blocks[0].ff.net[2]
    torch.nn.init.constant_(layer.lora_B["a"].weight, 2e-5)
    layer.base_layer.bfloat16()
    x = torch.randn(4096, 64)
    exact = layer.lora_B["a"](layer.lora_A["a"](x))
    with torch.autocast("cpu", torch.bfloat16), active(base, "a"):
        without = layer.base_layer(x).float()
        shown = ((layer(x) - without) * exact).sum() / exact.square().sum()
        by_peft = ((type(layer).forward(layer, x) - without) * exact).sum() / exact.square().sum()
    assert exact.std() < 1e-3 * without.std()
    assert shown.item() == pytest.approx(1, abs=0.3) and by_peft < 0.2
