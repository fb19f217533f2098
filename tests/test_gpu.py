"""What was made cheaper for a GPU gives what the plain way gives: each is held against it here, on
the CPU."""
import weakref
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close

import pipelines
import training.checkpoints
import training.ranks
import training.teacher
from cli import Run, succeeded
from families import cogvideox, qwen, sd3, sdxl, wan
from teachers import make_sdxl
from training import context_parallel, networks, threads
from training.checkpoints import save_checkpoint
from training.context_parallel import Group, real_runs, without_padding
from training.folders import write_folder
from training.lora import Lora, active, at_work
from training.optimizer import Optimizer
from training.pairs import OnDisk


# ----------------------------------------------------------------------------------- the optimizer

def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def steps(net, optimizer, n=4):
    """n steps on gradients of very different size."""
    generator = torch.Generator().manual_seed(1)
    for k in range(n):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (k - 3)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.5, 0.9)])
def test_the_optimizer_is_adamw_to_the_last_bit(betas):
    ours, theirs = small_net(), small_net()
    plain = torch.optim.AdamW(theirs.parameters(), 1e-2, betas=betas, weight_decay=0.0, fused=True)
    optimizer = Optimizer("net", ours.parameters(), 1e-2, 0, betas)
    steps(ours, optimizer)
    steps(theirs, plain)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.adam.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"])


def test_without_momentum_half_of_the_state_is_kept():
    net = small_net()
    optimizer = Optimizer("net", net.parameters(), 1e-2, 0)
    steps(net, optimizer)
    for p in net.parameters():
        assert optimizer.adam.state[p].keys() == {"step", "exp_avg_sq"}


TWO_RANKS = """
import torch, training.optimizer as o
from training.ranks import start, world
from training.optimizer import average
import torch.distributed as dist
start()
rank, ranks = world()
o.FLAT = 10
def gradients(rank):
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(s, generator=g) for s in ((3, 2), (4,), (25,), (), (2, 2))]
mine, calls = gradients(rank), []
reduce = dist.all_reduce
dist.all_reduce = lambda t: (calls.append(t.numel()), reduce(t))
average(mine)
for g, a, b in zip(mine, gradients(0), gradients(1)):
    assert torch.equal(g, (a + b) / 2)
assert calls == [10, 25, 5], calls
dist.destroy_process_group()
"""


def test_gradients_of_an_adapter_are_averaged_in_few_calls():
    succeeded(Run("-c", TWO_RANKS, ranks=2).wait())


# ------------------------------------------------------------------------------- what networks do

def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True).eval()


def test_all_layers_of_a_base_share_one_switch():
    base = unet().requires_grad_(False)
    nets = [Lora(base, name, 2, 2, ["to_q", "to_v"]) for name in ("a", "b")]
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    assert len({id(layer._active_adapter) for layer in layers}) == 1 < len(layers)
    with active(base, "a"):
        assert all(layer.active_adapters == ["a"] for layer in layers)
        with active(base, "b"):
            assert at_work(base) == "b"
        assert at_work(base) == "a"
    assert at_work(base) is None and all(layer.active_adapters == [] for layer in layers)
    assert len(nets) == 2


def test_a_network_in_bf16_sees_changes_far_below_the_spacing_of_its_weights():
    """A trained copy computes with the weights of its bf16 source, but for one in ten thousand,
    which lies on the edge. Half the spacing at 0.02 is 6e-5; of a change of less, the mean of the
    rounded weights shows all."""
    torch.manual_seed(0)
    net = nn.Linear(512, 512, bias=False)
    with torch.no_grad():
        net.weight.copy_((0.02 * torch.randn(512, 512)).bfloat16())
        net.weight[0] = 0
        net.weight[1:3] = -2.0**-7                      # where the spacing changes
        before = net.weight.clone()
        networks.spread_between_bf16(net)
        assert (net.weight.bfloat16() != before).float().mean() < 1e-4
        assert (net.weight[0] == 0).all()
        assert (net.weight != before)[1:].float().mean() > 0.99
        for change in (1e-7, 1e-6, -1e-6):
            seen = ((net.weight + change).bfloat16() - before)[3:].mean() / change
            unseen = ((before + change).bfloat16() - before)[3:].mean() / change
            assert seen.item() == pytest.approx(1, abs=0.3) and unseen < 0.1
        for change in (1e-5, -1e-5):
            seen = ((net.weight + change).bfloat16() - before)[1:3].mean() / change
            assert seen.item() == pytest.approx(1, abs=0.3)


def test_tables_of_positions_stay_exact_in_bf16():
    """Wan's: an export computes them anew."""
    args = SimpleNamespace(bf16=True, grad_checkpointing=False, compile=None)
    net = pipelines.wan_transformer(blocks=1)
    exact = net.rope.freqs_cos.clone()
    networks.place(args, net, None, torch.device("cpu"))
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())
    assert torch.equal(net.rope.freqs_cos, exact)
    assert torch.equal(networks.full_copy(net).float().rope.freqs_cos, exact)


def test_only_repeated_blocks_are_compiled():
    net = unet()
    networks.compile_blocks(net, "eager")
    compiled = {type(m).__name__ for m in net.modules() if "forward" in m.__dict__}
    assert compiled == {"BasicTransformerBlock"}


def test_one_by_one_is_all_at_once():
    """Values and gradients, of a function with one result and of one with several."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    sizes = []

    def several(x):
        sizes.append(len(x))
        y = conv(x).tanh()
        return [y, F.avg_pool2d(y, 2)]

    def single(x):
        return several(x)[1]

    x = torch.randn(3, 3, 8, 8, dtype=torch.double)
    for function in (several, single):
        found = []
        for f in (function, networks.one_by_one(function)):
            start = x.clone().requires_grad_()
            maps = f(start)
            maps = maps if isinstance(maps, list) else [maps]
            gradient, = torch.autograd.grad(sum(m.square().sum() for m in maps), start)
            found.append([*maps, gradient])
        for plain, alone in zip(*found):
            assert_close(alone, plain, rtol=0, atol=1e-12)
    assert sizes == 2 * [3, *[1] * 6]           # forward and once more, backward


def test_a_vae_decodes_in_bf16_throughout():
    vae = pipelines.image_vae(4, False).eval()
    x = torch.randn(1, 4, 8, 8)
    plain = vae.decode(x, return_dict=False)[0]
    types_seen = set()
    for module in vae.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda m, args, out: types_seen.add(out.dtype))
    networks.decode_in_bf16(vae)
    found = vae.decode(x, return_dict=False)[0]
    assert types_seen == {torch.bfloat16}
    assert_close(found.float(), plain, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------ context parallelism

@pytest.mark.parametrize("size, video_length, text_length",
                         [(4, 35, 6), (2, 9, 7), (4, 3, 2), (2, 8, 4), (4, 17550, 226)])
def test_keys_left_out_are_those_that_were_masked(monkeypatch, size, video_length, text_length):
    monkeypatch.setattr(Group, "size", size)
    monkeypatch.setattr(Group, "lengths", (video_length, text_length))
    text, video = -(-text_length // size), -(-video_length // size)
    real = []
    for rank in range(size):
        real += [rank * text + i < text_length for i in range(text)]
        real += [rank * video + i < video_length for i in range(video)]
    runs = real_runs(text, video)
    kept = [i for start, end in runs for i in range(start, end)]
    assert kept == [i for i, is_real in enumerate(real) if is_real]
    assert all(end < start for (_, end), (start, _) in zip(runs, runs[1:]))
    if len(real) > 100:
        assert len(runs) == 2
        return
    torch.manual_seed(0)
    found = []
    q, k, v = torch.randn(3, 1, 2, len(real), 4, dtype=torch.double)
    for without in (False, True):
        parts = [x.clone().requires_grad_() for x in (q, k, v)]
        mask = torch.tensor(real)[None, None, None]
        if without:
            mask = None
            out = F.scaled_dot_product_attention(
                parts[0], *(without_padding(x, runs) for x in parts[1:]))
        else:
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        found.append([out, *torch.autograd.grad(out.square().sum(), parts)])
    for masked, left_out in zip(*found):
        assert_close(left_out, masked, rtol=0, atol=1e-12)
    assert not hasattr(context_parallel, "is_real")


# --------------------------------------------------------------------------------- what is read

TEXTS = {
    "sdxl": (make_sdxl.build, sdxl, {}), "sd3": (lambda: pipelines.sd3(blocks=1), sd3, {}),
    "cogvideox": (lambda: pipelines.cogvideox(blocks=1), cogvideox, dict(max_sequence_length=16)),
    "wan": (lambda: pipelines.wan(blocks=1), wan, dict(max_sequence_length=16)),
    "qwen": (lambda: pipelines.qwen(blocks=1), qwen, dict(max_sequence_length=16))}


@pytest.mark.parametrize("name", TEXTS)
def test_the_empty_prompt_is_encoded_only_if_it_is_wanted(monkeypatch, name):
    build, family, more = TEXTS[name]
    pipe = build()
    if name == "sdxl":                                          # or its empty prompt is zeros
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    latent = SimpleNamespace(height=64, width=64)
    passes = []
    encoder = pipe.text_encoder
    encoder.register_forward_hook(lambda *args: passes.append(1))
    encode = family.FAMILY.encode
    with torch.no_grad():
        both, uncond = encode(pipe, ["a dog", "two cats"], latent, "cpu", **more)
        of_both = len(passes)
        alone, none = encode(pipe, ["a dog", "two cats"], latent, "cpu", empty=False, **more)
    assert uncond is not None and none is None
    both, alone = (training.teacher.flat(cond) for cond in (both, alone))
    assert both.keys() == alone.keys()
    for key in both:
        assert torch.equal(both[key], alone[key]), key
    assert len(passes) - of_both < of_both


def test_pairs_are_read_as_they_are_needed(tmp_path):
    torch.manual_seed(0)
    shards = [torch.randn(training.teacher.PER_FILE, 2), torch.randn(7, 2)]
    files = []
    for k, shard in enumerate(shards):
        write_folder(tmp_path / str(k), {"pairs.safetensors": dict(x_T=shard)}, {})
        files.append(training.folders.open_tensors(tmp_path / str(k), {}, "pairs.safetensors"))
    whole, count = torch.cat(shards), training.teacher.PER_FILE + 5
    found = OnDisk(files, "x_T", count)
    index = torch.tensor([260, 0, 255, 256, 260])
    assert len(found) == count and torch.equal(found[index], whole[index])
    assert torch.equal(found[250:], whole[250:count])


def test_a_checkpoint_is_gathered_file_by_file(tmp_path, monkeypatch):
    """When a file is gathered, those before it are gone from the host."""
    alive, most = [], []
    real = training.checkpoints.on_rank_0

    def gather(tensors):
        copies = {name: tensor.clone() for name, tensor in real(tensors).items()}
        most.append(sum(ref() is not None for ref in alive))
        alive.extend(weakref.ref(tensor) for tensor in copies.values())
        return copies

    monkeypatch.setattr(training.checkpoints, "on_rank_0", gather)
    save_checkpoint(tmp_path / "checkpoints", dict(stage="adm", global_iter=1),
                    dict(a=small_net(), b=small_net(), c=small_net()), [])
    assert most == [0, 0, 0]


def teacher_of(pipe, tmp_path, monkeypatch, **more):
    args = dict(bf16=False, grad_checkpointing=False, compile=None, fsdp=False, cpu_offload=False,
                context_parallel=1, text_tokens=7, no_t5=False, height=None, width=None,
                frames=None, model="here", steps=1, pair_steps=1, dt=None)
    monkeypatch.setattr(training.teacher, "load_pipeline", lambda *a, **k: pipe)
    return training.teacher.Teacher(
        SimpleNamespace(**dict(args, **more)), SimpleNamespace(path=tmp_path), ["a dog", "a cat"],
        [], torch.device("cpu"), {"StableDiffusion3Pipeline": sd3.FAMILY})


def test_text_encoders_are_gone_before_the_network_moves(tmp_path, monkeypatch):
    pipe = pipelines.sd3(blocks=1).to(torch.float32)
    encoders = [weakref.ref(part) for name, part in pipe.components.items()
                if name.startswith("text_encoder")]
    left = []
    real = training.teacher.place

    def place(*args):
        left.append(sum(ref() is not None for ref in encoders))
        return real(*args)

    monkeypatch.setattr(training.teacher, "place", place)
    teacher = teacher_of(pipe, tmp_path, monkeypatch)
    assert len(encoders) == 3 and left == [0]
    decoded = []
    teacher.decode = lambda x: decoded.append(len(x)) or x
    teacher.images(torch.zeros(17, *teacher.shape))
    teacher.latent = teacher.latent._replace(height=1024, width=1024)
    teacher.images(torch.zeros(2, *teacher.shape))
    assert decoded == [8, 8, 1, 1, 1]           # small pictures together, large ones alone


def test_under_bf16_prompts_are_encoded_in_it_and_read_in_float32(tmp_path, monkeypatch):
    plain = teacher_of(pipelines.sd3(blocks=1), tmp_path / "a", monkeypatch)
    pipe = pipelines.sd3(blocks=1).to(torch.bfloat16)
    teacher = teacher_of(pipe, tmp_path / "b", monkeypatch, bf16=True)
    kept = next(iter(teacher.files.values())).get_tensor("encoder_hidden_states")
    assert kept.dtype == torch.bfloat16
    index = torch.tensor([1, 0])
    cond, expected = teacher.cond(index), plain.cond(index)
    for name in expected:
        assert cond[name].dtype == torch.float32
        assert_close(cond[name], expected[name], rtol=0.1, atol=0.05)


def test_ranks_wait_for_hours(monkeypatch):
    told = {}
    monkeypatch.setattr(training.ranks.dist, "init_process_group",
                        lambda backend, **more: told.update(more))
    monkeypatch.setattr(training.ranks, "barrier", lambda: None)
    training.ranks.meet("gloo")
    assert told["timeout"] >= timedelta(hours=3)


# -------------------------------------------------------------------------------------- threads

def test_threads_are_the_idle_cores(monkeypatch):
    for cores, load, expected in ((2, 0.1, 2), (2, 1.1, 1), (2, 3.0, 1), (16, 8.4, 8), (1, 0, 1)):
        assert threads.idle(cores, load) == expected, (cores, load)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    threads.choose(torch.device("cpu"))
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.choose(torch.device("cuda"))
    assert set_to == []
    threads.choose(torch.device("cpu"))
    assert len(set_to) == 1 and set_to[0] >= 1
