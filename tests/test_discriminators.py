"""discriminators.py and the families' taps: the right features in the right order, gradients where
they belong, heads that never go silent."""
from typing import Callable, NamedTuple

import pytest
import torch
from diffusers import (CogVideoXTransformer3DModel, QwenImagePipeline, QwenImageTransformer2DModel,
                       SD3Transformer2DModel, WanTransformer3DModel)
from torch import nn
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model, SamVisionConfig, SamVisionModel

from discriminators import HINGE, Head, Heads, hinge_discriminator, hinge_generator
from families import cogvideox, qwen, sd3, sdxl, wan
from families.vision import quarters, vision_taps
from teachers.make_sdxl import build as build_pipeline
from tools.released import released
from training.heads import heads_for, tap_shapes

BATCH = 2


class Backbone(NamedTuple):
    """A small network of a family, and an input for it."""
    taps_of: Callable           # net -> Taps
    net: nn.Module
    x: torch.Tensor
    cond: dict


def make_sdxl(side=8):
    added = dict(text_embeds=torch.randn(BATCH, 32), time_ids=torch.randn(BATCH, 6))
    cond = dict(timestep=torch.full((BATCH,), 500.0), added_cond_kwargs=added,
                encoder_hidden_states=torch.randn(BATCH, 16, 64))
    net = build_pipeline().unet
    return Backbone(sdxl.FAMILY.taps, net, torch.randn(BATCH, 4, side, side), cond)


def make_sd3():
    net = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16,
        caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=16)
    cond = dict(timestep=torch.full((BATCH,), 500.0),
                encoder_hidden_states=torch.randn(BATCH, 5, 16),
                pooled_projections=torch.randn(BATCH, 16))
    return Backbone(sd3.FAMILY.taps, net, torch.randn(BATCH, 4, 8, 12), cond)


def make_cogvideox(patch_size_t=None, frames=3):
    """2b without rotary embeddings, or the 1.5 kind, which also cuts time into patches."""
    is_rotary = patch_size_t is not None
    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, num_layers=6, sample_width=10, sample_height=6,
        sample_frames=9, max_text_seq_length=5, patch_size_t=patch_size_t,
        use_rotary_positional_embeddings=is_rotary)
    rotary = None
    if is_rotary:
        tokens = frames // patch_size_t * 15
        rotary = (torch.randn(tokens, 16), torch.randn(tokens, 16))
    cond = dict(timestep=torch.full((BATCH,), 500.0), image_rotary_emb=rotary,
                encoder_hidden_states=torch.randn(BATCH, 5, 16))
    return Backbone(cogvideox.FAMILY.taps, net, torch.randn(BATCH, frames, 4, 6, 10), cond)


def make_wan():
    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=6, rope_max_seq_len=32)
    cond = dict(timestep=torch.full((BATCH,), 500.0),
                encoder_hidden_states=torch.randn(BATCH, 5, 16))
    return Backbone(wan.FAMILY.taps, net, torch.randn(BATCH, 4, 3, 6, 10), cond)


def make_sam():
    config = SamVisionConfig(
        image_size=24, patch_size=4, hidden_size=32, mlp_dim=64, num_hidden_layers=4,
        num_attention_heads=2, output_channels=16, window_size=0, global_attn_indexes=[0, 1, 2, 3],
        initializer_range=0.02)                 # transformers' own 1e-10 leaves nothing to see
    return Backbone(vision_taps, SamVisionModel(config), torch.randn(BATCH, 3, 24, 24), {})


def make_dinov2():
    config = Dinov2Config(image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=12,
                          num_attention_heads=2)
    return Backbone(vision_taps, Dinov2Model(config), torch.randn(BATCH, 3, 28, 28), {})


def make_qwen():
    """Tokens of 6x8 latents; the last two text tokens of the first sample are padding."""
    net = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    cond = dict(timestep=torch.full((BATCH,), 0.5),
                encoder_hidden_states=torch.randn(BATCH, 5, 16), encoder_hidden_states_mask=mask,
                img_shapes=[[(1, 3, 4)]])
    return Backbone(qwen.FAMILY.taps, net, torch.randn(BATCH, 12, 16), cond)


BACKBONES = dict(sdxl=make_sdxl, sd3=make_sd3, cogvideox=make_cogvideox, wan=make_wan,
                 qwen=make_qwen, sam=make_sam, dinov2=make_dinov2)
every_family = pytest.mark.parametrize("family", BACKBONES)


def build(family):
    torch.manual_seed(0)
    return BACKBONES[family]()


def assert_alive(named_gradients):
    """Finite and not zero. Not merely rounding noise either, which is what a normalisation over one
    value has for a gradient."""
    for name, gradient in named_gradients:
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-6, f"{name} has no gradient"


# ---------------------------------------------------------------------------- the released models

@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return released()


SDXL_MAPS = [(320, 128, 128), (640, 64, 64), (1280, 32, 32), (1280, 32, 32), (1280, 32, 32),
             (640, 64, 64), (320, 128, 128)]


@pytest.mark.parametrize("name, millions, maps", [
    ("SDXL", 2567.5, SDXL_MAPS),
    ("SD3-Medium", 2028, [(1536, 64, 64)] * 24),
    ("SD3.5-Medium", 2243, [(1536, 64, 64)] * 24),
    ("SD3.5-Large", 8057, [(2432, 64, 64)] * 38),
    ("CogVideoX-2b", 1694, [(1920, 13, 30, 45)] * 10),
    ("CogVideoX-5b", 5570, [(3072, 13, 30, 45)] * 14),
    ("Wan2.1-1.3B", 1420, [(1536, 21, 30, 52)] * 10),
    ("Wan2.1-14B", 14300, [(5120, 21, 30, 52)] * 13),
    ("Qwen-Image", 20430, [(3072, 64, 64)] * 20),
    ("SAM ViT-B", 89.67, [(768, 64, 64)] * 4),
    ("DINOv2-B", 86.58, [(768, 37, 37)] * 4)])
def test_released_models_have_the_published_size_and_the_papers_taps(models, name, millions, maps):
    model = models[name]
    size = sum(p.numel() for p in model.net.parameters())
    assert size / 1e6 == pytest.approx(millions, rel=1e-3)
    assert tap_shapes(model.taps_of, model.net, model.x, **model.cond) == maps


# ---------------------------------------------------------------------------------- what is tapped

SDXL_TAPS = ["down_blocks.0.resnets.1", "down_blocks.1.resnets.1", "down_blocks.2.resnets.1",
             "mid_block.resnets.1", "up_blocks.0.resnets.2", "up_blocks.1.resnets.2",
             "up_blocks.2.resnets.2"]


@pytest.mark.parametrize("name, expected", [
    ("SDXL", SDXL_TAPS),
    ("SD3.5-Large", [f"transformer_blocks.{k}" for k in range(38)]),
    ("CogVideoX-2b", [f"transformer_blocks.{k}" for k in range(2, 30, 3)]),
    ("Wan2.1-1.3B", [f"blocks.{k}" for k in range(2, 30, 3)]),
    ("Qwen-Image", [f"transformer_blocks.{k}" for k in range(2, 60, 3)]),
    ("SAM ViT-B", [f"vision_encoder.layers.{k}" for k in (2, 5, 8, 11)]),
    ("DINOv2-B", [f"encoder.layer.{k}" for k in (2, 5, 8, 11)])])
def test_the_papers_modules_are_tapped(models, name, expected):
    """The last ResNet of each block, every DiT block, every third one, layers 3, 6, 9 and 12."""
    model = models[name]
    names = {module: name for name, module in model.net.named_modules()}
    assert [names[module] for module in model.taps_of(model.net).tapped] == expected


def repeated(value, n):
    """n times the first sample of a tensor; what is no tensor has no batch."""
    if not torch.is_tensor(value):
        return value
    return value[:1].repeat(n, *[1] * (value.dim() - 1))


def patch_of(place, patch, time_axis):
    """Index, into one sample, of the patch at a place."""
    slices = [slice(k * size, (k + 1) * size) for k, size in zip(place, patch)]
    slices.insert({0: 1, 1: 0, None: 0}[time_axis], slice(None))
    return tuple(slices)


@pytest.mark.parametrize("make, patch, time_axis", [
    (make_sd3, (2, 2), None), (make_cogvideox, (1, 2, 2), 0),
    (lambda: make_cogvideox(2, 4), (2, 2, 2), 0), (make_wan, (1, 2, 2), 1),
    (make_qwen, (2, 2), None), (make_sam, (4, 4), None), (make_dinov2, (7, 7), None),
], ids=["sd3", "cogvideox", "cogvideox-1.5", "wan", "qwen", "sam", "dinov2"])
def test_each_feature_sits_where_its_patch_is(make, patch, time_axis):
    """Change one patch of the input: of the first tap's features, those of the same place must
    change most by far. Every place is tried. time_axis: of one sample, where it is a video."""
    torch.manual_seed(0)
    taps_of, net, x, cond = make()
    if make is make_qwen:                                       # packed by the pipeline itself
        x = QwenImagePipeline._unpack_latents(x, 48, 64, 8)[:, :, 0]
    sizes = list(x.shape[-2:])
    if time_axis is not None:
        sizes.insert(0, x.shape[1 + time_axis])
    grid = [size // p for size, p in zip(sizes, patch)]
    places = torch.cartesian_prod(*map(torch.arange, grid))                     # [P,2] or [P,3]
    batch = repeated(x, len(places) + 1)                        # the last one stays as it is
    for one, place in zip(batch, places.tolist()):
        here = patch_of(place, patch, time_axis)
        one[here] += torch.randn_like(one[here])
    if make is make_qwen:
        batch = QwenImagePipeline._pack_latents(batch, *batch.shape)
    cond = {name: repeated(value, len(batch)) for name, value in cond.items()}
    with torch.no_grad():
        features = taps_of(net)(batch, **cond)[0]
    assert list(features.shape[2:]) == grid
    change = (features[:-1] - features[-1]).norm(dim=1).flatten(1)              # [P,P]
    most = change.topk(2)
    assert_close(most.indices[:, 0], torch.arange(len(places)))
    assert (most.values[:, 0] > 2 * most.values[:, 1]).all()


@pytest.mark.parametrize("family, layers", [("sam", [1, 2, 3, 4]), ("dinov2", [3, 6, 9, 12])])
def test_vision_taps_are_the_models_own_hidden_states(family, layers):
    taps_of, net, x, _ = build(family)
    taps = taps_of(net)
    # [0]: the embeddings, before any layer
    states = net(taps.prepare(x), output_hidden_states=True).hidden_states
    for features, layer in zip(taps(x), layers, strict=True):
        state = states[layer]
        if family == "dinov2":
            state = state[:, 1:].unflatten(1, features.shape[2:])
        assert_close(features, state.movedim(-1, 1))


def test_quarters_are_layers_3_6_9_12_of_twelve():
    assert quarters(list(range(1, 13))) == [3, 6, 9, 12]
    assert quarters(list(range(1, 25))) == [6, 12, 18, 24]


def test_vision_encoders_see_their_own_size_and_imagenets_normalisation():
    prepare = vision_taps(build("dinov2").net).prepare
    white, grey = prepare(torch.ones(1, 3, 64, 40)), prepare(torch.zeros(1, 3, 28, 28))
    assert white.shape == (1, 3, 28, 28)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert_close(white[0, :, 3, 4], (1 - mean) / deviation)
    assert_close(grey[0, :, 3, 4], (0.5 - mean) / deviation)


# -------------------------------------------------------------------------------------------- Taps

@every_family
def test_gradient_reaches_the_input_and_no_weight(family):
    taps_of, net, x, cond = build(family)
    x.requires_grad_()
    features = taps_of(net)(x, **cond)
    for k, feature in enumerate(features):                      # from each map alone
        gradient, = torch.autograd.grad(feature.square().mean(), x, retain_graph=True)
        assert_alive([(f"input, from map {k}", gradient)])
    sum(feature.square().mean() for feature in features).backward()
    assert_alive([("input", x.grad)])
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def hooks(net):
    return sum(len(module._forward_hooks) for module in net.modules())


def during(forward, event):
    """The same forward, with something happening first."""
    def wrapped(*args, **kwargs):
        event()
        return forward(*args, **kwargs)
    return wrapped


@every_family
def test_hooks_are_removed(family):
    taps_of, net, x, cond = build(family)
    taps, seen = taps_of(net), []
    first = taps.tapped[0]
    first.forward = during(first.forward, lambda: seen.append(hooks(net)))
    maps = taps(x, **cond)
    assert seen == [len(maps)]
    assert hooks(net) == 0
    assert len(taps(x, **cond)) == len(maps)


def test_hooks_are_removed_when_the_net_raises():
    taps_of, net, x, cond = build("sdxl")
    taps, forward = taps_of(net), net.conv_out.forward

    def fail():
        assert hooks(net) == 7
        raise RuntimeError("out of memory")

    net.conv_out.forward = during(forward, fail)                # after the last tap
    with pytest.raises(RuntimeError, match="out of memory"):
        taps(x, **cond)
    assert hooks(net) == 0
    net.conv_out.forward = forward
    assert len(taps(x, **cond)) == 7


@pytest.mark.parametrize("family", ["sdxl", "sd3", "cogvideox", "wan", "qwen"])
def test_gradient_checkpointing_changes_nothing(family):
    taps_of, net, x, cond = build(family)
    taps, calls = taps_of(net), []
    taps.tapped[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def run():
        leaf = x.clone().requires_grad_()
        features = taps(leaf, **cond)
        sum(feature.square().mean() for feature in features).backward()
        return [feature.detach() for feature in features], leaf.grad

    plain = run()
    assert len(calls) == 1
    net.enable_gradient_checkpointing()
    recomputed = run()
    assert len(calls) == 3                                      # it did recompute
    assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)


def test_unknown_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match="no taps are known for a Linear"):
        vision_taps(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- heads

@every_family
def test_tap_shapes_are_those_of_a_real_run(family):
    taps_of, net, x, cond = build(family)
    foretold = tap_shapes(taps_of, net, x, **cond)
    # the net itself is untouched
    assert all(p.device.type == "cpu" and p.requires_grad for p in net.parameters())
    with torch.no_grad():
        maps = taps_of(net)(x, **cond)
    assert [tuple(feature.shape[1:]) for feature in maps] == foretold


@every_family
def test_heads_fit_every_family_and_learn_from_detached_features(family):
    """SDXL's innermost maps here are 2x2."""
    taps_of, net, x, cond = build(family)
    heads = heads_for(taps_of, net, x, hidden=64, **cond)
    value = heads([feature.detach() for feature in taps_of(net)(x, **cond)])
    assert value.shape == (BATCH,)
    value[0].backward()
    assert_alive((name, p.grad) for name, p in heads.named_parameters())


@every_family
def test_generators_gradient_runs_through_heads_and_backbone_to_the_input(family):
    taps_of, net, x, cond = build(family)
    heads = heads_for(taps_of, net, x, hidden=64, **cond).requires_grad_(False)
    x.requires_grad_()
    heads(taps_of(net)(x, **cond)).mean().backward()
    assert_alive([("input", x.grad)])


@pytest.mark.parametrize("shape", [
    (64, 2, 2), (1280, 2, 2), (48, 2, 7), (48, 3, 3), (40, 7, 5), (32, 16, 16), (64, 1, 2, 2),
    (32, 3, 5, 7), (48, 5, 3, 2), (32, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("hidden", [64, 256])
def test_no_head_is_silent(shape, hidden):
    """Small maps are where a normalisation over too few values kills the gradient without a
    word."""
    torch.manual_seed(0)
    head = Head(shape, hidden).double()
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    logits = head(x)
    assert logits.shape[:2] == (3, 1)
    assert logits.shape[2:-2] == shape[1:-2]                    # frames are kept
    logits[0].mean().backward()
    assert_alive((name, p.grad) for name, p in head.named_parameters())
    assert_alive([("input", x.grad[0])])
    assert (x.grad[1:] == 0).all()                              # samples do not mix


@pytest.mark.parametrize("shape, blocks, expected", [
    ((32, 2, 2), 2, 1), ((32, 3, 9), 2, 1), ((32, 4, 4), 2, 2), ((32, 4, 4), 3, 2),
    ((32, 32, 32), 9, 5), ((32, 64, 64), 2, 2), ((32, 3, 2, 9), 2, 1), ((32, 2, 8, 8), 3, 3),
    ((32, 2, 8, 8), 1, 1)], ids=str)
def test_depth_is_capped_by_the_map(shape, blocks, expected):
    head = Head(shape, hidden=16, blocks=blocks)
    convolutions = [m for m in head.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    assert sum(convolution.stride[-1] == 2 for convolution in convolutions) == expected
    assert head(torch.randn(1, *shape)).isfinite().all()


@pytest.mark.parametrize("shape", [(32, 1, 1), (32, 1, 8), (32, 5, 1, 1)], ids=str)
def test_a_map_under_2x2_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2x2") as error:
        Head(shape)
    assert str(shape) in str(error.value)


def test_an_image_too_small_for_its_backbone_is_refused_before_training():
    taps_of, net, x, cond = make_sdxl(side=4)
    with pytest.raises(ValueError, match=r"at least 2x2.*\(64, 1, 1\)"):
        heads_for(taps_of, net, x, **cond)


def test_value_is_the_mean_over_heads_of_the_mean_over_maps():
    torch.manual_seed(0)
    shapes = [(32, 16, 16), (48, 4, 4), (32, 3, 4, 6)]          # logit maps of 16, 1, 3 x 1 x 2
    parts = [Head(shape, hidden=32) for shape in shapes]
    features = [torch.randn(BATCH, *shape) for shape in shapes]
    values = []
    for head, feature in zip(parts, features):
        values.append(torch.stack([head(feature)[b].mean() for b in range(BATCH)]))
    assert_close(Heads(parts)(features), (values[0] + values[1] + values[2]) / 3)
    assert_close(Heads(parts * 2)(features * 2), Heads(parts)(features))


def test_value_is_never_a_bf16_mean():
    torch.manual_seed(0)
    head = Head((32, 64, 64), hidden=32).bfloat16()
    features = torch.randn(BATCH, 32, 64, 64).bfloat16()
    value = Heads([head])([features])
    assert value.dtype == torch.float32
    assert_close(value, head(features).float().flatten(1).mean(1), rtol=1e-6, atol=1e-6)
    assert Heads([head.double()])([features.double()]).dtype == torch.float64


def test_heads_and_features_must_match_in_number():
    heads = Heads([Head((32, 4, 4), hidden=16)] * 2)
    with pytest.raises(ValueError):
        heads([torch.randn(1, 32, 4, 4)])


# --------------------------------------------------------------------------------------- the hinge

def test_hinge_is_2_when_blind_and_0_with_a_margin():
    assert hinge_discriminator(torch.zeros(3), torch.zeros(5)) == 2
    assert hinge_discriminator(torch.tensor([-1.0, -1.5]), torch.tensor([1.0, 7.0])) == 0
    value = hinge_discriminator(torch.tensor([0.5, -3.0]), torch.tensor([-1.0, 2.0, 0.0, 1.0]))
    assert_close(value, torch.tensor(1.5 / 2 + (2 + 1) / 4))


def test_hinge_pushes_fake_down_and_real_up_within_the_margin_only():
    d_fake = torch.tensor([0.0, 0.5, -2.0, -0.9], requires_grad=True)
    d_real = torch.tensor([0.0, -0.5, 2.0, 0.9], requires_grad=True)
    hinge_discriminator(d_fake, d_real).backward()
    assert_close(d_fake.grad, torch.tensor([0.25, 0.25, 0, 0.25]))
    assert_close(d_real.grad, -torch.tensor([0.25, 0.25, 0, 0.25]))


def test_the_generator_minimises_minus_d_of_its_own_samples():
    d_fake = torch.tensor([0.5, -3.0], requires_grad=True)
    loss = hinge_generator(d_fake, torch.tensor([7.0, 7.0]))
    assert_close(loss, torch.tensor(1.25))
    loss.backward()
    assert_close(d_fake.grad, torch.tensor([-0.5, -0.5]))
    assert (HINGE.generator, HINGE.discriminator) == (hinge_generator, hinge_discriminator)
