"""discriminators.py: the right features in the right order, gradients where they belong, heads that never go silent."""
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, QwenImagePipeline, QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model, SamVisionConfig, SamVisionModel

import shapes
from discriminators import Head, Heads, Taps, heads_for, hinge, quarters, released, tap_shapes

BATCH = 2


def sdxl(side=8):
    kwargs = dict(timestep=torch.full((BATCH,), 500.0), encoder_hidden_states=torch.randn(BATCH, 16, 64),
                  added_cond_kwargs=dict(text_embeds=torch.randn(BATCH, 32), time_ids=torch.randn(BATCH, 6)))
    return shapes.build().unet, torch.randn(BATCH, 4, side, side), kwargs


def sd3():
    net = SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
                                joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=16)
    return net, torch.randn(BATCH, 4, 8, 12), dict(timestep=torch.full((BATCH,), 500.0), encoder_hidden_states=torch.randn(BATCH, 5, 16),
                                                   pooled_projections=torch.randn(BATCH, 16))


def cogvideox(patch_size_t=None, frames=3):
    """2b without rotary embeddings, or the 1.5 kind, which also cuts time into patches."""
    net = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
                                      num_layers=6, sample_width=10, sample_height=6, sample_frames=9, max_text_seq_length=5, patch_size_t=patch_size_t,
                                      use_rotary_positional_embeddings=patch_size_t is not None)
    frames_after = frames // (patch_size_t or 1)
    rotary = (torch.randn(frames_after * 15, 16), torch.randn(frames_after * 15, 16)) if patch_size_t else None
    return net, torch.randn(BATCH, frames, 4, 6, 10), dict(timestep=torch.full((BATCH,), 500.0), encoder_hidden_states=torch.randn(BATCH, 5, 16),
                                                           image_rotary_emb=rotary)


def sam():
    net = SamVisionModel(SamVisionConfig(image_size=24, patch_size=4, hidden_size=32, mlp_dim=64, num_hidden_layers=4, num_attention_heads=2,
                                         output_channels=16, window_size=0, global_attn_indexes=[0, 1, 2, 3],
                                         initializer_range=0.02))              # transformers' own 1e-10 leaves nothing to see
    return net, torch.randn(BATCH, 3, 24, 24), {}


def dinov2():
    net = Dinov2Model(Dinov2Config(image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=12, num_attention_heads=2))
    return net, torch.randn(BATCH, 3, 28, 28), {}


def qwen():
    """Tokens of 6x8 latents; the last two text tokens of the first sample are padding."""
    net = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
                                      axes_dims_rope=(4, 6, 6))
    return net, torch.randn(BATCH, 12, 16), dict(timestep=torch.full((BATCH,), 0.5), encoder_hidden_states=torch.randn(BATCH, 5, 16),
                                                 encoder_hidden_states_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(), img_shapes=[[(1, 3, 4)]])


FAMILIES = dict(sdxl=sdxl, sd3=sd3, cogvideox=cogvideox, qwen=qwen, sam=sam, dinov2=dinov2)
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family):
    torch.manual_seed(0)
    return FAMILIES[family]() if isinstance(family, str) else family()


def assert_alive(named_gradients):
    """Finite and not zero. Not merely rounding noise either, which is what a normalisation over one value has for a gradient."""
    for name, gradient in named_gradients:
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-6, f"{name} has no gradient"


# ------------------------------------------------------------------------------------------------ the released models

@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return released()


@pytest.mark.parametrize("name, millions, maps", [
    ("SDXL", 2567.5, [(320, 128, 128), (640, 64, 64), (1280, 32, 32), (1280, 32, 32), (1280, 32, 32), (640, 64, 64), (320, 128, 128)]),
    ("SD3-Medium", 2028, [(1536, 64, 64)] * 24),
    ("SD3.5-Medium", 2243, [(1536, 64, 64)] * 24),
    ("SD3.5-Large", 8057, [(2432, 64, 64)] * 38),
    ("CogVideoX-2b", 1694, [(1920, 13, 30, 45)] * 10),
    ("CogVideoX-5b", 5570, [(3072, 13, 30, 45)] * 14),
    ("Qwen-Image", 20430, [(3072, 64, 64)] * 20),
    ("SAM ViT-B", 89.67, [(768, 64, 64)] * 4),
    ("DINOv2-B", 86.58, [(768, 37, 37)] * 4)])
def test_released_models_have_the_published_size_and_the_papers_taps(models, name, millions, maps):
    net, x, kwargs = models[name]
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert tap_shapes(net, x, **kwargs) == maps


# --------------------------------------------------------------------------------------------------------- what is tapped

@pytest.mark.parametrize("name, expected", [
    ("SDXL", ["down_blocks.0.resnets.1", "down_blocks.1.resnets.1", "down_blocks.2.resnets.1", "mid_block.resnets.1",
              "up_blocks.0.resnets.2", "up_blocks.1.resnets.2", "up_blocks.2.resnets.2"]),
    ("SD3.5-Large", [f"transformer_blocks.{k}" for k in range(38)]),
    ("CogVideoX-2b", [f"transformer_blocks.{k}" for k in range(2, 30, 3)]),
    ("Qwen-Image", [f"transformer_blocks.{k}" for k in range(2, 60, 3)]),
    ("SAM ViT-B", [f"vision_encoder.layers.{k}" for k in (2, 5, 8, 11)]),
    ("DINOv2-B", [f"encoder.layer.{k}" for k in (2, 5, 8, 11)])])
def test_the_papers_modules_are_tapped(models, name, expected):
    """The last ResNet of each block, every DiT block, every third one, layers 3, 6, 9 and 12."""
    net = models[name][0]
    names = {module: name for name, module in net.named_modules()}
    assert [names[module] for module in Taps(net).modules_of(net)] == expected


@pytest.mark.parametrize("family, patch", [("sd3", (2, 2)), ("cogvideox", (1, 2, 2)), (lambda: cogvideox(2, 4), (2, 2, 2)), ("qwen", (2, 2)),
                                           ("sam", (4, 4)), ("dinov2", (7, 7))], ids=["sd3", "cogvideox", "cogvideox-1.5", "qwen", "sam", "dinov2"])
def test_each_feature_sits_where_its_patch_is(family, patch):
    """Change one patch of the input: of the first tap's features, those of the same place must change most by far. Every place is tried."""
    net, x, kwargs = build(family)
    video = len(patch) == 3
    if family == "qwen":                                        # packed by the pipeline itself
        x = QwenImagePipeline._unpack_latents(x, 48, 64, 8)[:, :, 0]
    grid = [n // p for n, p in zip([x.shape[1], *x.shape[3:]] if video else x.shape[2:], patch)]
    places = torch.cartesian_prod(*map(torch.arange, grid))                       # [P,2] or [P,3]
    batch = x[:1].repeat(len(places) + 1, *[1] * (x.dim() - 1))                   # the last one stays as it is
    for one, place in zip(batch, places.tolist()):
        *time, rows, columns = [slice(k * p, (k + 1) * p) for k, p in zip(place, patch)]
        one[(*time, slice(None), rows, columns)] += torch.randn_like(one[(*time, slice(None), rows, columns)])
    if family == "qwen":
        batch = QwenImagePipeline._pack_latents(batch, *batch.shape)
    repeat = lambda v: v if isinstance(v, (tuple, list)) else v if v is None else v[:1].repeat(len(batch), *[1] * (v.dim() - 1))
    with torch.no_grad():
        features = Taps(net)(batch, **{k: repeat(v) for k, v in kwargs.items()})[0]
    assert list(features.shape[2:]) == grid
    change = (features[:-1] - features[-1]).norm(dim=1).flatten(1)                # [P,P]
    most = change.topk(2)
    assert_close(most.indices[:, 0], torch.arange(len(places)))
    assert (most.values[:, 0] > 2 * most.values[:, 1]).all()


@pytest.mark.parametrize("family, layers", [("sam", [1, 2, 3, 4]), ("dinov2", [3, 6, 9, 12])])
def test_vision_taps_are_the_models_own_hidden_states(family, layers):
    net, x, _ = build(family)
    taps = Taps(net)
    states = net(taps.see(x), output_hidden_states=True).hidden_states            # [0]: the embeddings, before any layer
    for features, layer in zip(taps(x), layers, strict=True):
        state = states[layer] if family == "sam" else states[layer][:, 1:].unflatten(1, features.shape[2:])
        assert_close(features, state.movedim(-1, 1))


def test_quarters_are_layers_3_6_9_12_of_twelve():
    assert quarters(list(range(1, 13))) == [3, 6, 9, 12]
    assert quarters(list(range(1, 25))) == [6, 12, 18, 24]


def test_vision_encoders_see_their_own_size_and_imagenets_normalisation():
    taps = Taps(build("dinov2")[0])
    white, grey = taps.see(torch.ones(1, 3, 64, 40)), taps.see(torch.zeros(1, 3, 28, 28))
    assert white.shape == (1, 3, 28, 28)
    assert_close(white[0, :, 3, 4], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))
    assert_close(grey[0, :, 3, 4], torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]))


# ------------------------------------------------------------------------------------------------------------------ Taps

@every_family
def test_gradient_reaches_the_input_and_no_weight(family):
    net, x, kwargs = build(family)
    x.requires_grad_()
    features = Taps(net)(x, **kwargs)
    for k, f in enumerate(features):                            # from each map alone
        gradient, = torch.autograd.grad(f.square().mean(), x, retain_graph=True)
        assert_alive([(f"input, from map {k}", gradient)])
    sum(f.square().mean() for f in features).backward()
    assert_alive([("input", x.grad)])
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def hooks(net):
    return sum(len(m._forward_hooks) for m in net.modules())


@every_family
def test_hooks_are_removed(family):
    net, x, kwargs = build(family)
    taps, seen = Taps(net), []
    taps.modules_of(net)[0].forward = during(taps.modules_of(net)[0].forward, lambda: seen.append(hooks(net)))
    maps = taps(x, **kwargs)
    assert seen == [len(maps)]
    assert hooks(net) == 0
    assert len(taps(x, **kwargs)) == len(maps)


def during(forward, event):
    """The same forward, with something happening first."""
    def wrapped(*args, **kwargs):
        event()
        return forward(*args, **kwargs)
    return wrapped


def test_hooks_are_removed_when_the_net_raises():
    net, x, kwargs = build("sdxl")
    taps, forward = Taps(net), net.conv_out.forward

    def fail():
        assert hooks(net) == 7
        raise RuntimeError("out of memory")

    net.conv_out.forward = during(forward, fail)                # after the last tap
    with pytest.raises(RuntimeError, match="out of memory"):
        taps(x, **kwargs)
    assert hooks(net) == 0
    net.conv_out.forward = forward
    assert len(taps(x, **kwargs)) == 7


@pytest.mark.parametrize("family", ["sdxl", "sd3", "cogvideox", "qwen"])
def test_gradient_checkpointing_changes_nothing(family):
    net, x, kwargs = build(family)
    taps, calls = Taps(net), []
    taps.modules_of(net)[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def run():
        leaf = x.clone().requires_grad_()
        features = taps(leaf, **kwargs)
        sum(f.square().mean() for f in features).backward()
        return [f.detach() for f in features], leaf.grad

    plain = run()
    assert len(calls) == 1
    net.enable_gradient_checkpointing()
    recomputed = run()
    assert len(calls) == 3                                      # it did recompute
    assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)


def test_unknown_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match="no taps are known for a Linear"):
        Taps(nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------------------------------- heads

@every_family
def test_tap_shapes_are_those_of_a_real_run(family):
    net, x, kwargs = build(family)
    foretold = tap_shapes(net, x, **kwargs)
    assert all(p.device.type == "cpu" and p.requires_grad for p in net.parameters())          # the net itself is untouched
    with torch.no_grad():
        assert [tuple(f.shape[1:]) for f in Taps(net)(x, **kwargs)] == foretold


@every_family
def test_heads_fit_every_family_and_learn_from_detached_features(family):
    """SDXL's innermost maps here are 2x2."""
    net, x, kwargs = build(family)
    heads = heads_for(net, x, hidden=64, **kwargs)
    value = heads([f.detach() for f in Taps(net)(x, **kwargs)])
    assert value.shape == (BATCH,)
    value[0].backward()
    assert_alive((n, p.grad) for n, p in heads.named_parameters())


@every_family
def test_generators_gradient_runs_through_heads_and_backbone_to_the_input(family):
    net, x, kwargs = build(family)
    heads = heads_for(net, x, hidden=64, **kwargs).requires_grad_(False)
    x.requires_grad_()
    heads(Taps(net)(x, **kwargs)).mean().backward()
    assert_alive([("input", x.grad)])


@pytest.mark.parametrize("shape", [(64, 2, 2), (1280, 2, 2), (48, 2, 7), (48, 3, 3), (40, 7, 5), (32, 16, 16), (64, 1, 2, 2), (32, 3, 5, 7), (48, 5, 3, 2),
                                   (32, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("hidden", [64, 256])
def test_no_head_is_silent(shape, hidden):
    """Small maps are where a normalisation over too few values kills the gradient without a word."""
    torch.manual_seed(0)
    head, x = Head(shape, hidden).double(), torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    logits = head(x)
    assert logits.shape[:2] == (3, 1) and logits.shape[2:-2] == shape[1:-2]       # frames are kept
    logits[0].mean().backward()
    assert_alive([*((n, p.grad) for n, p in head.named_parameters()), ("input", x.grad[0])])
    assert (x.grad[1:] == 0).all()                              # samples do not mix


@pytest.mark.parametrize("shape, blocks, expected", [((32, 2, 2), 2, 1), ((32, 3, 9), 2, 1), ((32, 4, 4), 2, 2), ((32, 4, 4), 3, 2), ((32, 32, 32), 9, 5),
                                                     ((32, 64, 64), 2, 2), ((32, 3, 2, 9), 2, 1), ((32, 2, 8, 8), 3, 3), ((32, 2, 8, 8), 1, 1)], ids=str)
def test_depth_is_capped_by_the_map(shape, blocks, expected):
    head = Head(shape, hidden=16, blocks=blocks)
    assert sum(isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.stride[-1] == 2 for m in head.modules()) == expected
    assert head(torch.randn(1, *shape)).isfinite().all()


@pytest.mark.parametrize("shape", [(32, 1, 1), (32, 1, 8), (32, 5, 1, 1)], ids=str)
def test_a_map_under_2x2_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2x2") as error:
        Head(shape)
    assert str(shape) in str(error.value)


def test_an_image_too_small_for_its_backbone_is_refused_before_training():
    net, x, kwargs = sdxl(side=4)
    with pytest.raises(ValueError, match=r"at least 2x2.*\(64, 1, 1\)"):
        heads_for(net, x, **kwargs)


def test_value_is_the_mean_over_heads_of_the_mean_over_maps():
    torch.manual_seed(0)
    shapes_ = [(32, 16, 16), (48, 4, 4), (32, 3, 4, 6)]         # logit maps of 16, 1 and 3 x 1 x 2
    parts, features = [Head(s, hidden=32) for s in shapes_], [torch.randn(BATCH, *s) for s in shapes_]
    values = [torch.stack([head(f)[b].mean() for b in range(BATCH)]) for head, f in zip(parts, features)]
    assert_close(Heads(parts)(features), (values[0] + values[1] + values[2]) / 3)
    assert_close(Heads(parts * 2)(features * 2), Heads(parts)(features))


def test_value_is_never_a_bf16_mean():
    torch.manual_seed(0)
    head, features = Head((32, 64, 64), hidden=32).bfloat16(), torch.randn(BATCH, 32, 64, 64).bfloat16()
    value = Heads([head])([features])
    assert value.dtype == torch.float32
    assert_close(value, head(features).float().flatten(1).mean(1), rtol=1e-6, atol=1e-6)
    assert Heads([head.double()])([features.double()]).dtype == torch.float64


def test_heads_and_features_must_match_in_number():
    heads = Heads([Head((32, 4, 4), hidden=16)] * 2)
    with pytest.raises(ValueError):
        heads([torch.randn(1, 32, 4, 4)])


def test_hinge_is_2_when_blind_and_0_with_a_margin():
    assert hinge(torch.zeros(3), torch.zeros(5)) == 2
    assert hinge(torch.tensor([-1.0, -1.5]), torch.tensor([1.0, 7.0])) == 0
    assert_close(hinge(torch.tensor([0.5, -3.0]), torch.tensor([-1.0, 2.0, 0.0, 1.0])), torch.tensor(1.5 / 2 + (2 + 1) / 4))


def test_hinge_pushes_fake_down_and_real_up_within_the_margin_only():
    fake, real = torch.tensor([0.0, 0.5, -2.0, -0.9], requires_grad=True), torch.tensor([0.0, -0.5, 2.0, 0.9], requires_grad=True)
    hinge(fake, real).backward()
    assert_close(fake.grad, torch.tensor([0.25, 0.25, 0, 0.25]))
    assert_close(real.grad, -torch.tensor([0.25, 0.25, 0, 0.25]))
