"""What an instruction makes in memory: its results as meta tensors with true strides, and the storages they share.

    %a: f32[4, 8]  = aten.mm.default(%x, %w)         [4, 8] strides (8, 1), a storage of 128 bytes
    %t: f32[8, 4]  = aten.permute.default(%a, ..)    [8, 4] strides (1, 8), the storage of %a
    %r: f32[32]    = aten.reshape.default(%t, [32])  [32]   strides (1),    a storage of its own: the reshape copies

ATen's operators are run on meta tensors. Each layout is one tensor, so that equal calls are found by identity and a
layer that has been seen before costs a look-up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autosp_aot.ir.operators import DTYPES, FACTORIES, overload
from autosp_aot.ir.program import Dtype, Instr, PerRank, Ref, Value, flatten, map_args
from autosp_aot.ir.structure.record import At
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ir.transfers import storage_bytes
from autosp_aot.ir.verify import illegal
from autosp_aot.ops.record import Demand
from autosp_aot.ops.table import OURS

# What operators raise of arguments that are not theirs, ours of what is no tensor too.
UNCALLABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
    """The layouts of values on one target; asked for the same call twice it answers from memory.

    `box` is the number of a rank's numbers among all, in a body of so many `tiles` that of a tile's. Of a program that
    was not laid out for the target, such as the unsharded one, operands are copied as kernels demand: `copying`.
    """

    def __init__(self, ranks: int, target: str, copying: bool = False):
        self.ranks, self.target, self.copying = ranks, target, copying
        self.known: dict[tuple, Tensor] = {}
        self.calls: dict[tuple, Made] = {}

    def of(self, value: Value, box: int) -> Tensor:
        """The layout of a value that has no gaps."""
        return self.one(torch.empty(self.local(value, box, 1).sizes, dtype=DTYPES[value.dtype], device="meta"))

    def made(
        self, instr: Instr, tensors: Mapping[str, Tensor], values: Mapping[str, Value], box: int, tiles: int = 1
    ) -> Made:
        """What `instr` makes of operands with these layouts; `values` has their placements.

        Raises ArtifactError (`program-illegal`) where it cannot be called so, or makes another shape than it says.
        """
        if instr.into is not None:
            return Made((tensors[instr.refs()[instr.into]],), (instr.into,), 0)

        args, kwargs = _filled(instr.args, tensors, box), _filled(instr.kwargs, tensors, box)
        key: tuple = instr.op, args, kwargs, tuple(out and out.dtype for out in instr.outs)
        if instr.op in STRUCTURE:
            placements = [out.placement for out in instr.values()] + [values[name].placement for name in instr.refs()]
            key += (box, tiles, *placements)
        found = self.calls.get(key)
        if found is None:
            operands = [leaf for leaf in flatten((args, [value for _, value in kwargs])) if isinstance(leaf, Tensor)]
            try:
                results, workspace_bytes = self._results(instr, operands, args, dict(kwargs), values, box, tiles)
            except UNCALLABLE as error:
                raise illegal(f"{instr.op} cannot be called like this", instr, str(error).partition("\n")[0]) from error
            found = self.calls[key] = self._made(instr, operands, results, workspace_bytes)
        for result, out in zip(found.results, instr.outs):
            if out is None or result is None or result.shape == out.shape:
                continue
            if tuple(result.shape) != self.local(out, box, tiles).sizes:
                raise illegal(f"{out.name} is not what {instr.op} makes", instr, f"that is {list(result.shape)}")
        return found

    def unmet(self, instr: Instr, tensors: Mapping[str, Tensor], box: int) -> dict[int, Demand]:
        """What the kernel of a call demands of operands with these layouts that does not hold, by place."""
        if instr.op not in OURS or OURS[instr.op].demands is None:
            return {}
        args, kwargs = _filled(instr.args, tensors, box), _filled(instr.kwargs, tensors, box)
        return OURS[instr.op].unmet(args, dict(kwargs), self.target)

    def _results(
        self, instr: Instr, operands: list[Tensor], args: tuple, kwargs: dict, values: Mapping[str, Value], box: int,
        tiles: int,
    ) -> tuple[list[Tensor], int]:  # fmt: skip
        """The results on meta tensors, and bytes needed beside them."""
        record = STRUCTURE.get(instr.op)
        if record is None:
            results, workspace_bytes = self._run(instr.op, args, kwargs)
            return [_declared(result, out) for result, out in zip(results, instr.outs, strict=True)], workspace_bytes
        assert record.layout is not None, "a walk has dealt with what gives nothing itself"
        sources, targets = [values[name] for name in instr.refs()], instr.values()
        sources, targets = ([self.local(v, box, tiles) for v in group] for group in (sources, targets))
        return record.layout(instr, operands, sources, targets, At(box // tiles, self.ranks, box))

    def local(self, value: Value, box: int, tiles: int) -> Value:
        """The value as a rank has it, or a tile."""
        number = lambda n: n.values[box * len(n.values) // (self.ranks * tiles)] if type(n) is PerRank else n  # noqa: E731
        return replace(value, shape=tuple(map(number, value.shape)))

    def one(self, tensor: Tensor) -> Tensor:
        """The one tensor that stands for all of this layout."""
        key = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), storage_bytes(tensor)
        return self.known.setdefault(key, tensor)

    def _run(self, op: str, args: tuple, kwargs: dict) -> tuple[list[Tensor], int]:
        """The results on meta tensors, and bytes needed beside them."""
        if op.startswith("aten."):
            return _aten(op, args, kwargs), 0
        own = OURS[op]
        operands = own.laid_out(args, kwargs, self.target) if self.copying else list(args)
        for at, demand in own.unmet(operands, kwargs, self.target).items():
            raise ValueError(f"its operand {at} has strides {list(args[at].stride())}: {demand.source}")
        results, workspace_bytes = own.workspace(*operands, target=self.target, **kwargs)
        copies = [made for made, given in zip(operands, args) if made is not given]
        return results, workspace_bytes + sum(map(storage_bytes, copies))

    def _made(self, instr: Instr, operands: list[Tensor], results: list[Tensor], workspace_bytes: int) -> Made:
        storages = [tensor.untyped_storage()._cdata for tensor in (*operands, *results)]
        owners = tuple(storages.index(storage) for storage in storages[len(operands) :])
        unused = {at for at, out in enumerate(instr.outs) if out is None}
        workspace_bytes += sum(storage_bytes(results[at]) for at in unused if owners[at] == len(operands) + at)
        layouts = tuple(None if at in unused else self.one(result) for at, result in enumerate(results))
        return Made(layouts, owners, workspace_bytes)


def _filled(arg, tensors: Mapping[str, Tensor], box: int):
    """An argument with the layouts of what it names, and the numbers of a rank."""
    kind = type(arg)
    if kind is Ref:
        return tensors[arg.name]
    if kind is tuple or kind is list:
        return tuple([_filled(item, tensors, box) for item in arg])
    return arg.values[box] if kind is PerRank else arg


def _declared(result: Tensor, out: Value | None) -> Tensor:
    """The layout in the dtype that the target makes: meta kernels know one (statistics of a norm of half dtypes)."""
    if out is None or result.dtype == DTYPES[out.dtype]:
        return result
    return torch.empty_like(result, dtype=DTYPES[out.dtype])


def _aten(op: str, args: tuple, kwargs: dict) -> list[Tensor]:
    """The results of an operator of ATen on meta tensors."""
    constant = lambda leaf: DTYPES[leaf.name] if isinstance(leaf, Dtype) else leaf  # noqa: E731
    args, kwargs = map_args(args, constant), {name: map_args(value, constant) for name, value in kwargs.items()}
    if op in FACTORIES:
        kwargs["device"] = "meta"
    operator = overload(op)
    assert operator is not None, op
    results = operator(*args, **kwargs)
    results = [results] if isinstance(results, Tensor) else results
    return [torch.empty(0, device="meta") if result is None else result for result in results]
