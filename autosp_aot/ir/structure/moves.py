"""Moves: a value goes from one placement to another, by ranks that keep a part, exchange parts or add partial sums."""

import json
from collections.abc import Generator, Mapping, Sequence
from operator import eq

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ir.placement import PARTIAL, REPLICATE, Placement, inside
from autosp_aot.ir.program import Instr
from autosp_aot.ir.structure.record import Action, Answer, At, Exchange, HostMemory, LaidOut, Structural, Sum, Values
from autosp_aot.ir.transfers import Move, Shard, join_into, storage_bytes


def _keeps(source: Placement, target: Placement) -> bool:
    return not source.partial and not target.partial and inside(source, target)


def _from_cut_to_cut(source: Placement, target: Placement) -> bool:
    return None not in (source.cut, target.cut) and not source.partial and not target.partial


def _to_whole(source: Placement, target: Placement) -> bool:
    return source.cut is not None and not source.partial and target == REPLICATE


def _summed_in_parts(source: Placement, target: Placement) -> bool:
    return source.partial and not target.partial and (source, target) != (PARTIAL, REPLICATE)


def _summed(source: Placement, target: Placement) -> bool:
    return source == PARTIAL and target == REPLICATE


# --- what a rank has, kept in part ------------------------------------------------------------------------------------


def _shard(instr: Instr, sources: Values, targets: Values, at: At, _: HostMemory) -> Action:
    (source,), (target,) = sources, targets
    shard = Shard(source, target, at.rank, at.box)
    return lambda values: values.update({target.name: shard(values[source.name])})


def _shard_layout(_: Instr, operands: Sequence[Tensor], sources: Values, targets: Values, at: At) -> LaidOut:
    return [Shard(sources[0], targets[0], at.rank, at.box)(operands[0])], 0


# --- what ranks send each other ---------------------------------------------------------------------------------------


def _exchange(instr: Instr, sources: Values, targets: Values, at: At, _: HostMemory) -> Action:
    (source,), (target,) = sources, targets
    move = Move(source, target, at.rank, at.ranks)

    def step(values: dict[str, Tensor]) -> Generator[Exchange, Answer, None]:
        answer = yield Exchange(move.pack(values[source.name]), move.send_sizes, move.receive_sizes)
        assert answer is not None
        values[target.name] = move.unpack(answer.pop())

    return step


def _exchange_layout(_: Instr, operands: Sequence[Tensor], sources: Values, targets: Values, at: At) -> LaidOut:
    """The buffer that is sent goes when another has been received, that one when the result is made of it."""
    (operand,), move = operands, Move(sources[0], targets[0], at.rank, at.ranks)
    sent = 0 if move.packed_in_place(operand) else sum(move.send_sizes) * operand.itemsize
    received = operand.new_empty(sum(move.receive_sizes))
    result = move.unpack(received)
    if move.in_place:
        return [result], sent
    dtype = wide(result.dtype)
    added_up = result.numel() * dtype.itemsize if move.summing and dtype != result.dtype else 0
    return [result], max(sent + storage_bytes(received) - storage_bytes(result), storage_bytes(received) + added_up)


def _exchanged(instr: Instr, sources: Values, targets: Values, at: At) -> Mapping[str, object]:
    """Who takes part, and what each rank sends and receives."""
    move = Move(sources[0], targets[0], at.rank, at.ranks)
    return {
        **_group(instr, sources, targets, at), "rank": at.rank, "send_sizes": tuple(move.send_sizes),
        "receive_sizes": tuple(move.receive_sizes), "shape": targets[0].shape, "sends": json.dumps(move.sends),
        "fills": json.dumps(move.fills), "sum": int(move.summing),
    }  # fmt: skip


# --- partial sums, added up in one buffer -----------------------------------------------------------------------------


def _all_reduce(instr: Instr, sources: Values, targets: Values, at: At, _: HostMemory) -> Action:
    def step(values: dict[str, Tensor]) -> Generator[Sum, Answer, None]:
        tensors = [values[source.name] for source in sources]
        answer = yield Sum(_joined(tensors))
        assert answer is not None
        parts = answer.pop().split([t.numel() for t in tensors])
        for target, part, tensor in zip(targets, parts, tensors):
            values[target.name] = part.to(tensor.dtype).view(tensor.shape)

    return step


def _joined(tensors: list[Tensor]) -> Tensor:
    """A copy of all, one after the other, in the dtype they are added up in."""
    buffer = tensors[0].new_empty(sum(t.numel() for t in tensors), dtype=wide(tensors[0].dtype))
    join_into(buffer, tensors)
    return buffer


def _all_reduce_layout(_: Instr, operands: Sequence[Tensor], *__: object) -> LaidOut:
    """All lie in one buffer; in a narrower dtype than that of the sum they are copied out of it."""
    dtype = operands[0].dtype
    total = torch.empty(sum(t.numel() for t in operands), dtype=wide(dtype), device=operands[0].device)
    parts = total.split([t.numel() for t in operands])
    results = [part.to(dtype).view(t.shape) for part, t in zip(parts, operands)]
    return results, 0 if wide(dtype) == dtype else storage_bytes(total)


def _group(instr: Instr, sources: Values, targets: Values, at: At) -> Mapping[str, object]:
    return {"group": tuple(range(at.ranks))}


# --- the same in other memory -----------------------------------------------------------------------------------------


def _relayout(instr: Instr, sources: Values, targets: Values, at: At, _: HostMemory) -> Action:
    (source,), (target,), order = sources, targets, instr.args[1]
    return lambda values: values.update({target.name: in_order(values[source.name], order)})


def _relayout_layout(instr: Instr, operands: Sequence[Tensor], *_: object) -> LaidOut:
    return [in_order(operands[0], instr.args[1])], 0


def in_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy whose dims lie in memory in this order, outermost first, without gaps."""
    if sorted(order) != list(range(tensor.dim())):
        raise ValueError(f"{list(order)} is no order of {tensor.dim()} dims")
    copied = tensor.permute(order).clone(memory_format=torch.contiguous_format)
    return copied.permute([order.index(dim) for dim in range(tensor.dim())])


def _order(instr: Instr, *_: object) -> Mapping[str, object]:
    return {"order": instr.args[1]}


# A copy of a value for a kernel that reads its memory in another order of dims than it was made in.
RELAYOUT = Structural("relayout", eq, _relayout_layout, _relayout, _order, operands=1, in_tiles=True)

# In this order: the first that fits is what a value is moved by.
MOVES = (
    Structural("all_to_all", _from_cut_to_cut, _exchange_layout, _exchange, _exchanged, operands=1, meets=True),
    Structural("all_gather", _to_whole, _exchange_layout, _exchange, _exchanged, operands=1, meets=True),
    Structural("reduce_scatter", _summed_in_parts, _exchange_layout, _exchange, _exchanged, operands=1, meets=True),
    Structural("all_reduce", _summed, _all_reduce_layout, _all_reduce, _group, meets=True),
    Structural("shard", _keeps, _shard_layout, _shard, operands=1, in_tiles=True),
)


def move_between(source: Placement, target: Placement) -> str:
    """The name of the move from one placement to another."""
    return next(move.name for move in MOVES if move.fits is not None and move.fits(source, target))
