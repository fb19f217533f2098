"""What a simulation assumes of a card, those that --dry-run-card knows, and what it needs of torch.
"""
from importlib.util import find_spec
from typing import NamedTuple


class Card(NamedTuple):
    """Each per second."""
    flop: float             # 60 % of its dense bf16 peak
    bytes: float            # 80 % of its memory's bandwidth
    copied: float           # bytes of pinned memory, to the host or back


CARDS = dict(h100=Card(0.6 * 989e12, 0.8 * 3.35e12, 50e9),          # PCIe 5
             a100=Card(0.6 * 312e12, 0.8 * 2.04e12, 25e9))          # of 80 GB; PCIe 4
LAUNCH = 6e-6               # seconds of the host for an operation
# collectives of fake tensors, for sharded runs: torch 2.13 has them, 2.10 not
CAN_SHARD = find_spec("torch.distributed._meta_registrations") is not None
