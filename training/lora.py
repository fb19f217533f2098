"""LoRA adapters that share one frozen base: generator, fake score, real score and the
discriminator's backbone are then a single copy of the teacher's weights.

The base keeps `at_work`, a list with the name of the adapter at work, or nothing. All its layers
with adapters share that one list, so to switch the hundreds of them is to change a word.
"""
import warnings
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn as nn

from training.errors import Failure
from training.sharding import device_of


def at_work(base):
    """The name of the adapter of `base` that works, or None."""
    names = getattr(base, "at_work", None)
    return names[0] if names else None


def switch(base, name):
    """Put one adapter of `base` to work, or none (None). Not by peft's set_adapter: that turns
    requires_grad of all other adapters off, and a backward pass then skips them, silently."""
    if hasattr(base, "at_work"):
        base.at_work[:] = [] if name is None else [name]


@contextmanager
def active(base, name):
    """Inside, one adapter of `base` works, or none (None); afterwards, the one that did before."""
    before = at_work(base)
    switch(base, name)
    try:
        yield
    finally:
        switch(base, before)


def rank_flag(name, rank):
    """The flag that asked for an adapter, as messages show it. name: the adapter's."""
    if "fake" in name:
        return f"--lora-rank-fake {rank}"
    return f"--lora-rank {rank}"


def facts_of_loras(args):
    """What a checkpoint must agree in: another alpha would rescale what an adapter has learnt."""
    has_lora = args.lora_rank > 0 or args.lora_rank_fake > 0
    return dict(lora_rank=args.lora_rank, lora_alpha=args.lora_alpha if has_lora else None)


def base_and_adapter(layer, x):
    """W x + bias + scaling B A x of a linear layer of peft, x [...,in], with at most one adapter at
    work. In the place of peft's own forward, which rounds W x before it adds the adapter's part: of
    one that changes the output by a thousandth, bf16 would show little. addmm adds first."""
    base = layer.base_layer
    if not layer.active_adapters:
        return base(x)
    name, = layer.active_adapters
    change = layer.lora_B[name](layer.lora_A[name](x))                          # [...,out]
    rows = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), base.weight.t(),
                       beta=layer.scaling[name])
    out = rows.view(change.shape)
    if base.bias is not None:
        out = out + base.bias.to(out.dtype)
    return out


class Lora(nn.Module):
    """A LoRA on a base that others share. It is called as the base is, and its parameters are the
    adapter's alone. Called directly, the base gives what it gave without adapters.

    name: of the adapter, another for each on one base.
    targets: names of the layers that get an adapter. The update is scaled by alpha / rank.
    Raises Failure if diffusers has no adapters for the base's class.
    """

    def __init__(self, base, name, rank, alpha, targets):
        super().__init__()
        if not hasattr(base, "add_adapter"):
            kind = type(base).__name__.removeprefix("FSDP")
            raise Failure(f"{rank_flag(name, rank)}: {kind} has no adapters in diffusers; give 0")
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
        # several adapters on one base are meant
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        others = [p for p in base.parameters() if p.requires_grad]      # of adapters there already
        base.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                    target_modules=list(targets)), name)
        base.at_work = []
        for layer in base.modules():
            if isinstance(layer, BaseTunerLayer):       # add_adapter gave each a list of its own
                layer._active_adapter = base.at_work
                if isinstance(layer.base_layer, nn.Linear):
                    layer.forward = MethodType(base_and_adapter, layer)
        self.__dict__["base"] = base        # past nn.Module: the base is no part of this module
        self.config = base.config
        self.name = name
        self.rank = rank
        self.alpha = alpha
        self.targets = targets
        for p in self.parameters():
            # float32 also on a bf16 base, and where the network runs, if the base rests on the host
            dtype = torch.promote_types(p.dtype, torch.float32)
            p.data = p.data.to(device_of(base, p), dtype)
        for p in (*others, *self.parameters()):         # add_adapter froze the others
            p.requires_grad_(True)

    def named_parameters(self, *args, **kwargs):
        """The adapter's parameters, under names that do not have the adapter's own in them."""
        own = f".{self.name}."
        for name, p in self.base.named_parameters():
            if ".lora_" in name and own in name:
                yield name.replace(own, "."), p

    def forward(self, *args, **kwargs):
        with active(self.base, self.name):
            return self.base(*args, **kwargs)

    def twin(self, name):
        """Another adapter of the same base, with the same weights."""
        other = Lora(self.base, name, self.rank, self.alpha, self.targets)
        with torch.no_grad():
            torch._foreach_copy_(list(other.parameters()), list(self.parameters()))
        return other

    def save(self, pipe, folder, prefix):
        """Write a file for pipe.load_lora_weights. prefix: the pipeline's component, such as unet.

        alpha / rank is folded into B: a reader without metadata assumes alpha = rank. The names
        stay peft's: in a file that also has lora_A, diffusers passes over its own names (lora.down,
        lora.up) silently.
        """
        state = {}
        for name, p in self.named_parameters():
            state[name] = p.detach()
            if "lora_B" in name:
                state[name] = p.detach() * (self.alpha / self.rank)
        pipe.save_lora_weights(folder, **{f"{prefix}_lora_layers": state})
