"""A pretended GPU: tensors with a shape, a type and the device "cuda", and no values.

The code of a run is run on them as it is, at the released size, in seconds. That tells what a GPU
would refuse (tensors of two devices in one operation), how often the host would wait for it, the
most bytes that live at once, and, at stated rates, about how long it would compute. No figure from
here is a measurement, and whoever prints one says "simulated".

torch's FakeTensorMode works out shapes and devices, and tools/guard.py makes torch believe in the
device. A process that pretends does nothing else.
"""
import gc
import json
import os
import tempfile
import traceback
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tools.guard  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.cards import CAN_SHARD, CARDS, LAUNCH

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------- the device itself

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


# ----------------------------------------------------------------------------------- what is seen

def where():
    """The last lines of this project on the stack, and the library's line they led to."""
    ours, library = [], ""
    for frame in traceback.extract_stack():
        path = Path(frame.filename)
        if path.name == "pretend.py":
            continue
        if ROOT in path.parents and "site-packages" not in frame.filename:
            ours.append(f"{path.relative_to(ROOT)}:{frame.lineno}")
        elif "site-packages" in frame.filename and "/torch/" not in frame.filename:
            library = f" [{path.name}:{frame.lineno}]"
    return " < ".join(reversed(ours[-3:])) + library


VIEWS = {}                      # operation -> whether it only makes another view, or memory


def is_view(func):
    if func not in VIEWS:
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        VIEWS[func] = (alias is not None and not alias.is_write) or func in (
            aten.detach.default, aten.empty.memory_format, aten.empty_like.default,
            aten.empty_strided.default, aten._local_scalar_dense.default)
    return VIEWS[func]


@dataclass
class Held:
    """A storage that lives."""
    is_host: bool
    size: int = 0           # bytes
    tensors: int = 0        # that are on it


class Watch(TorchDispatchMode):
    """Counts what a device of these rates (tools/cards.py) would do, from `reset` on.

    waits: {operation and place in the code: times} that the host waits for the device.
    mixed: the same, of operations on tensors of two devices, which a GPU refuses.
    live, peak: bytes on the device now, and at most. host, host_peak: of the host.
    operations: kernels. flop: of matrix products and convolutions. copied: bytes between host and
    device. seconds: of the device, each operation at the slower of its arithmetic and its traffic;
    what is copied delays it, as it does on one GPU, where nothing is fetched in advance.
    """
    active = []

    def __init__(self, card):
        super().__init__()
        self.card = card
        self.sizes = {}         # storage -> Held
        self.live = 0
        self.host = 0
        self.reset()

    def reset(self):
        self.waits = Counter()
        self.mixed = Counter()
        self.peak = self.live
        self.host_peak = self.host
        self.operations = 0
        self.flop = 0
        self.copied = 0
        self.seconds = 0.0

    def host_seconds(self):
        return self.operations * LAUNCH

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented                               # what it does with its part is seen
        if func.namespace == "prim":                            # questions, not operations
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self.read(args[0])
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            self.waits["nonzero " + where()] += 1
            return torch.zeros(1, args[0].dim(), dtype=torch.long, device=args[0].device)
        if "index" in func._schema.name and isinstance(args[1], (list, tuple)):
            self.look_at_index(args)
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            self.look_at_copy(func, args, kwargs, out)
        self.count(func, args, kwargs, out)
        return out

    def read(self, tensor):
        """A value of a tensor that has none: 1."""
        if tensor.device.type == "cuda":
            self.waits["item " + where()] += 1
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 1

    def look_at_index(self, args):
        for index in args[1]:
            if index is not None and index.device != args[0].device:
                place = f"{args[0].device} by {index.device} {where()}"
                if args[0].device.type == "cpu":
                    self.mixed["index " + place] += 1
                else:
                    self.waits["index " + place] += 1

    def look_at_copy(self, func, args, kwargs, out):
        """A copy between devices is waited for, unless it was asked not to be and, from the host,
        starts in pinned memory."""
        if func is aten.copy_.default:
            source, target = args[1], args[0]
            asked = len(args) > 2 and args[2]
        else:
            source, target = args[0], out
            asked = kwargs.get("non_blocking", False)
        if source.device.type == target.device.type:
            return
        size = source.numel() * source.element_size()
        self.copied += size
        self.seconds += size / self.card.copied
        is_pinned = getattr(source, "is_pretended_pinned", False)
        if not asked or (source.device.type == "cpu" and not is_pinned):
            self.waits[f"{source.device.type} to {target.device.type} {where()}"] += 1

    def count(self, func, args, kwargs, out):
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in made:
            if isinstance(tensor, FakeTensor):
                self.hold(tensor)
        if is_view(func):
            return
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = [t for t in read + made if t.device.type == "cuda"]
        if not on_device:
            return
        flop = 0
        if func._overloadpacket in flop_registry:
            flop = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        size = sum(t.numel() * t.element_size() for t in on_device)
        self.operations += 1
        self.flop += flop
        self.seconds += max(flop / self.card.flop, size / self.card.bytes)

    def hold(self, tensor):
        """Count a tensor's storage until the last tensor on it is gone."""
        if tensor.is_meta:                      # of the skeletons of sharded networks
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        weakref.finalize(tensor, self.let_go, key)
        if key not in self.sizes:
            self.sizes[key] = Held(tensor.device.type == "cpu")
            self.resized(storage)
        self.sizes[key].tensors += 1

    def resized(self, storage):
        """Count a storage as what it is now."""
        held = self.sizes.get(storage._cdata)
        if held is None:
            return
        size = -(-storage.nbytes() // 512) * 512                # CUDA's blocks
        grown = size - held.size
        held.size = size
        if held.is_host:
            self.host += grown
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.live += grown
            self.peak = max(self.peak, self.live)

    def let_go(self, key):
        held = self.sizes[key]
        held.tensors -= 1
        if held.tensors > 0:
            return
        del self.sizes[key]
        if held.is_host:
            self.host -= held.size
        else:
            self.live -= held.size
