"""What a pretended GPU (tools/pretend.py) would have done: bytes that live, operations and seconds,
waits of the host, tensors of two devices in one operation."""
import traceback
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.cards import LAUNCH

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent
PRETENCE = ("pretend.py", "watch.py")           # whose own lines are no place in the code


def where():
    """The last lines of this project on the stack, and the library's line they led to."""
    ours, library = [], ""
    for frame, line in traceback.walk_stack(None):              # the newest first
        path = Path(frame.f_code.co_filename)
        if path.name in PRETENCE:
            continue
        is_library = "site-packages" in path.parts
        if ROOT in path.parents and not is_library:
            ours.append(f"{path.relative_to(ROOT)}:{line}")
        elif is_library and "torch" not in path.parts and not library:
            library = f" [{path.name}:{line}]"
    return " < ".join(ours[:3]) + library


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
