"""A family is one new file: PixArt-Sigma, whose network gives more than the prediction, in a copy
of the code with tests/pixart.py in its families/."""
import shutil
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import pipelines
import pixart
from cli import ROOT, Run, failed, stock_difference, succeeded, two_at_a_time
from lesson.runs import FOLDERS
from training.flags import PHASED, parse
from training.networks import autocast, full_copy, recompute_activations

PROMPTS = ["a small red circle on green", "two dogs", "wet " * 160]
QUICK = ("--pair-steps 2 --iterations 3 --batch-size 2 --save-every 100 --sample-every 100 "
         "--head-channels 8 --height 32 --width 32 --stage adm --steps 2 --lr-generator 1e-3 "
         "--lr-fake 1e-3 --lr-discriminator 1e-3").split()
VARIANTS = {"plain": ["--ema", "0.9", "--grad-checkpointing"],
            "bf16": ["--bf16", "--grad-checkpointing"]}


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The copy, with a random pipeline and prompts beside it."""
    folder = tmp_path_factory.mktemp("code")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(pixart.__file__, folder / "families")
    pipelines.pixart().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def train(code, out, *flags):
    return Run(code / "train_sdxl.py", "--model", code / "model", "--prompts", code / "prompts.txt",
               "--out", out, *QUICK, *flags).wait()


@pytest.fixture(scope="module")
def runs(code):
    """name -> a future of (the run's folder, what it said)."""
    def whole(name):
        return code / name, succeeded(train(code, code / name, *VARIANTS[name]))

    with two_at_a_time({name: (whole, name) for name in VARIANTS}) as futures:
        yield futures


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_diffusers_draws_what_the_trainer_drew(runs, name):
    out, _ = runs[name].result()
    most = 0.1 if name == "bf16" else 1e-4                      # bf16 trainer, float32 export
    assert stock_difference(out, PROMPTS) < most


def test_a_prompt_beyond_the_familys_limit_is_told(runs):
    """The tokenizer itself would read 512."""
    _, done = runs["plain"].result()
    assert "warning: 1 of 3 prompts are longer than 300 tokens" in done.stderr


def test_phased_dmd_is_refused_where_the_call_swallows_the_callback(code, tmp_path):
    """Before a model is loaded, and whatever the method says of LoRAs."""
    done = train(code, tmp_path / "out", "--stage", "all", "--method", "phased_dmd")
    failed(done, 1, "--method phased_dmd", "PixArtSigmaPipeline", "callback_on_step_end")
    assert not (tmp_path / "out").exists()


def test_a_lora_where_diffusers_has_none_is_refused(code, tmp_path):
    failed(train(code, tmp_path / "out", "--lora-rank", "2"), 1, "--lora-rank 2",
           "PixArtTransformer2DModel has no adapters in diffusers", "give 0")


def test_who_has_the_last_word_on_a_flag(code, monkeypatch):
    """The family's defaults, then the method's, then what the family always wants, then the user's
    own."""
    def parsed(*flags):
        words = ["--model", str(code / "model"), "--prompts", "x", "--method", "phased_dmd"]
        monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *words, *flags])
        return parse("", {"PixArtSigmaPipeline": family}, ())[0]

    family = replace(pixart.FAMILY, defaults=lambda config: dict(
        lr_fake=0.1, lora_rank=5, guidance=[4.0, 5.0]))
    args = parsed()
    assert (args.guidance, args.lr_fake) == ([4.0, 5.0], PHASED["lr_fake"])
    assert args.lora_rank == args.lora_rank_fake == 0
    assert parsed("--lora-rank", "3", "--lr-fake", "0.2").lora_rank == 3
    family = replace(family, always=None)
    assert parsed().lora_rank == PHASED["lora_rank"]


def test_a_network_that_is_cut_stays_so():
    """In a copy, in bf16, recomputed and with other weights: half of the channels, and of the copy
    its own."""
    net = pixart.join(pipelines.pixart()).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = dict(timestep=torch.tensor([3.0, 700.0]), encoder_hidden_states=torch.ones(2, 5, 16),
                encoder_attention_mask=torch.ones(2, 5, dtype=torch.long))

    def output(net):
        return net(x, **cond, return_dict=False)[0]

    both = type(net).forward(net, x, **cond, return_dict=False)[0]
    assert both.shape[1] == 8
    assert_close(output(net), both[:, :4], rtol=0, atol=0)
    for twin in (deepcopy(net), full_copy(net)):
        assert twin.state_dict().keys() == net.state_dict().keys()
        twin.requires_grad_(True)
        recompute_activations(twin)
        assert_close(output(twin), output(net), rtol=0, atol=0)
        output(twin).sum().backward()
        gradient = twin.proj_out.weight.grad.unflatten(0, (-1, 8))              # [4,8,C]
        assert gradient[:, :4].abs().min() > 0 and gradient[:, 4:].abs().max() == 0
        with torch.no_grad():
            twin.proj_out.bias.add_(1.0)
        assert_close(output(twin), output(net) + 1, rtol=0, atol=1e-5)
        other = pixart.join(pipelines.pixart())
        other.load_state_dict(twin.state_dict())
        assert_close(output(other), output(twin), rtol=0, atol=0)
        autocast(twin, torch.device("cpu"), True)
        assert output(twin).shape == x.shape
        assert 0 < (output(twin).float() - output(other)).abs().max() < 0.1
