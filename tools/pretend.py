"""A pretended GPU: tensors with a shape, a type and the device "cuda", and no values.

The code of a run is run on them as it is, at the released size, in seconds. That tells what a GPU
would refuse (tensors of two devices in one operation), how often the host would wait for it, the
most bytes that live at once, and, at stated rates, about how long it would compute. No figure from
here is a measurement, and whoever prints one says "simulated".

torch's FakeTensorMode works out shapes and devices, tools/guard.py makes torch believe in the
device, and tools/watch.py counts. A process that pretends does nothing else.
"""
import gc
import json
import os
import tempfile
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import tools.guard  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from tools.cards import CAN_SHARD, CARDS
from tools.watch import Watch, where

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)


def replace_parameters(module, function, recurse=True):
    """nn.Module._apply, by new parameters: fake ones cannot be given other data."""
    if recurse:
        for child in module.children():
            replace_parameters(child, function)
    for name, p in module._parameters.items():
        if p is not None:
            with torch.no_grad():
                moved = function(p)
            if moved is not p:
                module._parameters[name] = torch.nn.Parameter(moved, p.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """scaled_dot_product_attention by the kernel that CUDA would choose: flash for half precision
    without a mask, else the memory-efficient one, which wants the mask as a bias of full size."""
    parts = query, key, value
    if torch.is_autocast_enabled("cuda"):
        parts = [x.to(torch.bfloat16) for x in parts]
    q, k, v = parts
    if attn_mask is None and q.dtype == torch.bfloat16:
        more = -q.shape[-1] % 8
        q, k, v = (F.pad(x, [0, more]) for x in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False,
                                                       scale=scale)[0]
        return out[..., :out.shape[-1] - more]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def to_list(tensor):
    """FakeTensor.tolist: rising numbers, as those of tables are; ones for integers."""
    if tensor.dim() == 0:
        return 1.0 if tensor.is_floating_point() else 1
    if tensor.device.type == "cuda" and Watch.active:
        Watch.active[-1].waits["tolist " + where()] += 1
    if tensor.is_floating_point():
        return [i / len(tensor) for i in range(len(tensor))]
    return [1] * len(tensor)


def in_fork(function, *args, tries=8):
    """function(*args), whose result JSON can hold, in a fork of this process, which must not have
    run a backward pass yet. Anew if the fork crashes: the cache of torch 2.13's fake tensors does,
    now and then. Raises OSError if it does each time, or if the function raises."""
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    gc.disable()                    # collecting fake tensors is part of the crash
                    answer.write_text(json.dumps(function(*args)), encoding="utf-8")
                    code = 0
                except BaseException as error:
                    traceback.print_exc()
                    answer.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                finally:
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == 0:
                return json.loads(answer.read_text(encoding="utf-8"))
            if status > 0:
                reason = answer.read_text(encoding="utf-8").splitlines()[0]
                raise OSError(f"the simulation failed: {reason}")
    raise OSError(f"the simulation crashed {tries} times, by signal {-status}")


class Pretended:
    """torch.cuda's Stream and Event: everything is done at once, in the order of the calls. To
    synchronise is to wait."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Pretended()

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def is_capturing(self):
        return False

    def synchronize(self):
        Watch.active[-1].waits["synchronize " + where()] += 1


def process_group(ranks=1):
    """Make this process rank 0 of so many, of which there are no others. Raises OSError for a torch
    that cannot pretend what they would send each other."""
    if not CAN_SHARD:
        raise OSError(f"torch {torch.__version__} has no collectives of fake tensors, which --fsdp "
                      f"and --cpu-offload need; torch 2.13 has")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def resize_storage(storage, size):
    """UntypedStorage.resize_, by which FSDP2 frees gathered weights whose tensors it keeps."""
    torch._C.StorageBase.resize_(storage, size)
    if Watch.active:
        Watch.active[-1].resized(storage)
    return storage


def with_values(function, *args):
    """function(*args), on tensors that have values, inside of `pretended`: a mesh of ranks reads
    from one which rank this is."""
    with fake_tensor.unset_fake_temporarily():
        return function(*args)


@contextmanager
def pretended(card="h100"):
    """Inside, tensors are fake and torch says that there is a GPU. Yields the Watch.
    card: one of CARDS."""
    def pin_memory(tensor, *args):
        if not isinstance(tensor, FakeTensor):
            return tensor
        pinned = tensor.clone()
        pinned.is_pretended_pinned = True
        return pinned

    answers = dict(is_available=True, is_initialized=True, current_device=0, set_device=None,
                   device_count=1, is_bf16_supported=True, synchronize=None,
                   get_device_capability=(9, 0), get_device_name="pretended", empty_cache=None,
                   is_current_stream_capturing=False,
                   manual_seed=None, manual_seed_all=None, _is_in_bad_fork=False,
                   reset_peak_memory_stats=None, max_memory_allocated=0,
                   current_stream=Pretended(), default_stream=Pretended(), stream=nullcontext())
    patches = [mock.patch.object(torch.cuda, name, lambda *a, value=value, **k: value)
               for name, value in answers.items()]
    patches += [
        mock.patch.object(torch.cuda, "Stream", Pretended),
        mock.patch.object(torch.cuda, "Event", Pretended),
        mock.patch.object(torch, "Event", Pretended),
        mock.patch.object(torch.accelerator, "current_stream", Pretended),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
        mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda mode: True)),
        # that of torch 2.10, in a build with CUDA, makes a tensor on the device
        mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None),
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_storage),
        mock.patch.object(torch.nn.Module, "_apply", replace_parameters),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(FakeTensor, "tolist", to_list),
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory)]
    watch = Watch(CARDS[card])
    for patch in patches:
        patch.start()
    Watch.active.append(watch)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), watch:
            yield watch
    finally:
        Watch.active.pop()
        for patch in reversed(patches):
            patch.stop()
