"""Live bytes, counted where tensors are made: knows storages, and nothing of programs or costs."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def to_meta(tensor: Tensor) -> Tensor:
    """The same strides and place in its storage, without data."""
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    storage = torch.empty(count, dtype=tensor.dtype, device="meta")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Storages(TorchDispatchMode):
    """While it is active, `live_bytes` are those of all storages that operators have made and that are still there.

    A storage counts once, from the operator that returns it until the last tensor that lies in it is gone; those that
    `known` tensors lie in do not count. `peak_bytes` is the most since it was last set.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, nbytes: int) -> None:
        self.live_bytes -= nbytes
