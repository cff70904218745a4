"""What an instruction makes in memory: its results as meta tensors with true strides, and the storages they share.

    %a: f32[4, 8]  = aten.mm.default(%x, %w)         [4, 8] strides (8, 1), a storage of 128 bytes
    %t: f32[8, 4]  = aten.permute.default(%a, ..)    [8, 4] strides (1, 8), the storage of %a
    %r: f32[32]    = aten.reshape.default(%t, [32])  [32]   strides (1),    a storage of its own: the reshape copies

ATen's operators are run on meta tensors. Each layout is one tensor, so that equal calls are found by identity and a
layer that has been seen before costs a look-up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from autosp_aot.operators import DTYPES, FACTORIES, overload
from autosp_aot.program import Dtype, Instr, PerRank, Ref, Value, flatten, map_args


@dataclass(frozen=True, slots=True)
class Made:
    """The layout of each result (None where nobody uses it), and whose storage it lies in: a place among operands and,
    after them, results.

    `workspace_bytes` is what is needed beside the results while the instruction runs.
    """

    results: tuple[Tensor | None, ...]
    owners: tuple[int, ...]
    workspace_bytes: int


class Layouts:
    """The layouts of one rank's values on one target; asked for the same call twice it answers from memory."""

    def __init__(self, rank: int):
        self.rank = rank
        self.known: dict[tuple, Tensor] = {}
        self.calls: dict[tuple, Made] = {}

    def of(self, value: Value) -> Tensor:
        """The layout of a value that has no gaps."""
        return self.one(torch.empty(self.shape(value), dtype=DTYPES[value.dtype], device="meta"))

    def made(self, instr: Instr, tensors: dict[str, Tensor]) -> Made:
        """What `instr` makes of operands with these layouts."""
        rank = self.rank

        def filled(arg):
            kind = type(arg)
            if kind is Ref:
                return tensors[arg.name]
            if kind is tuple or kind is list:
                return tuple(map(filled, arg))
            return arg.values[rank] if kind is PerRank else arg

        args, kwargs = filled(instr.args), tuple((name, filled(value)) for name, value in instr.kwargs)
        outs = tuple(out and (out.dtype, out.shape, out.placement) for out in instr.outs)
        key = instr.op, args, kwargs, outs
        found = self.calls.get(key)
        if found is None:
            found = self.calls[key] = self._make(instr, args, dict(kwargs))
        return found

    def one(self, tensor: Tensor) -> Tensor:
        """The one tensor that stands for all of this layout."""
        storage = tensor.untyped_storage().nbytes()
        key = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), storage
        return self.known.setdefault(key, tensor)

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(n.values[self.rank] if type(n) is PerRank else n for n in value.shape)

    def _make(self, instr: Instr, args: tuple, kwargs: dict) -> Made:
        operands = [leaf for leaf in flatten((args, tuple(kwargs.values()))) if isinstance(leaf, Tensor)]
        if instr.op.startswith("aten."):
            results = _run(instr.op, args, kwargs)
        else:
            results = [self.of(out) for out in instr.values()]
        storages = [tensor.untyped_storage()._cdata for tensor in (*operands, *results)]
        owners = tuple(storages.index(storage) for storage in storages[len(operands) :])
        return Made(tuple(out and self.one(result) for out, result in zip(instr.outs, results)), owners, 0)


def _run(op: str, args: tuple, kwargs: dict) -> list[Tensor]:
    """The results of an operator of ATen on meta tensors."""
    constant = lambda leaf: DTYPES[leaf.name] if isinstance(leaf, Dtype) else leaf  # noqa: E731
    args, kwargs = map_args(args, constant), {name: map_args(value, constant) for name, value in kwargs.items()}
    if op in FACTORIES:
        kwargs["device"] = "meta"
    results = overload(op)(*args, **kwargs)
    return [results] if isinstance(results, Tensor) else list(results)
