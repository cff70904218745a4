"""Which experts rows can be routed to, and whether a tensor says where each expert's rows end once they are sorted.

    values, ids = topk(scores [T, 8], 2)        ids are 0 .. 7
    counts = histc(ids, 8, 0, 7)                how many rows each expert has: tried on every id there can be
    ends = cumsum(counts)                       where they end

Also small facts about calls of a captured graph: the dims they name, what storage they share.
"""

import operator

import torch
from torch.fx import Node

from autosp_aot.export.canonical.constants import CASTS, arguments
from autosp_aot.export.canonical.shapes import PERMUTES, RESHAPES, SAME
from autosp_aot.ir.program import flatten

aten = torch.ops.aten
# What keeps every element.
MOVES = (*SAME, *RESHAPES, *PERMUTES, aten.detach.default)
EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
PARTS = (aten.select.int, aten.slice.Tensor)
CHOOSING = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
JOINS = (aten.cat.default, aten.concat.default, aten.stack.default)


def choices(ids: Node) -> int | None:
    """n where the elements of `ids` are certain to be among 0 .. n - 1; None where they are not.

    They are where they say which of n was chosen, and where something of n is looked up at them: eager fails otherwise.
    """
    passed: list[Node] = []
    root = _source(ids, (*MOVES, *PARTS), passed)
    if written(_source(root, (*MOVES, *PARTS, *CASTS))):
        return None
    if root.target in JOINS:
        found = [choices(part) for part in root.args[0]]
        known = [many for many in found if many is not None]
        return max(known) if len(known) == len(found) else None
    named = [root, *passed]
    named += [user for node in named for user in node.users if user.target in MOVES]
    among = [user for node in named for user in node.users if _looks_up(user, node)]
    if root.target is operator.getitem and root.args[0].target in CHOOSING and root.args[1] == 1:
        among.append(root.args[0])
    elif root.target is aten.argmax.default:
        among.append(root)
    if not among:
        return None
    (dim, *more), (first, *_) = given_dims(among[0]), among[0].args
    return None if more else first.meta["val"].shape[dim]


def _looks_up(call: Node, at: Node) -> bool:
    return call.target is aten.gather.default and call.args[2] is at


def says_ends(ends: Node, equal: dict[Node, Node], ids: Node, experts: int) -> bool:
    """Whether `ends` [experts] is the running total of how many of `ids` are 0, 1, ...; those beyond are not counted.

    `equal` gives, for some nodes, one with the same value that does not depend on the order of the ids.
    """
    chain = [ends]
    total = _source(ends, CASTS, chain)
    if total.target is not aten.cumsum.default:
        return False
    counts = _source(total.args[0], CASTS, chain)
    chain += [total, counts]
    if any(node.meta["val"].dtype not in EXACT or written(node) for node in chain):
        return False
    counts, many = equal.get(counts, counts), choices(ids)
    if many is None or counts.target is not aten.histc.default:
        return False
    casts: list[Node] = []
    root = _source(ids, MOVES)
    if _source(counts.args[0], (*MOVES, *CASTS), casts, root) is not root or any(map(written, casts)):
        return False
    if counts.args[0].meta["val"].numel() != ids.meta["val"].numel():
        return False
    return _counts_each(counts, casts[::-1], many, experts)


def _counts_each(counts: Node, casts: list[Node], many: int, experts: int) -> bool:
    """Whether id i, whatever it is, counts as one of i where there is such an expert, and as nothing beyond."""
    ids = torch.arange(many)
    for cast in casts:
        if cast.target in CASTS:
            ids = cast.target(ids, *cast.args[1:], **cast.kwargs)
    found = [counts.target(one, *counts.args[1:], **counts.kwargs) for one in ids.split(1)]
    return torch.equal(torch.stack(found).double(), torch.eye(many, experts, dtype=torch.float64))


def given_dims(node: Node) -> list[int]:
    """The dims a call names, counted from 0; all where it names none."""
    given, joined = arguments(node), not isinstance(node.args[0], Node)
    count = (node if joined else node.args[0]).meta["val"].dim() + (node.target is aten.unsqueeze.default)
    dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    return [dim % count for dim in dims] if dims and None not in dims else list(range(count))


def shares(node: Node) -> bool:
    """Whether a node may share its storage with what it reads, or with what its neighbour in a tuple does."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in (*MOVES, *CASTS, aten.type_as.default):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def _source(node: Node, through: tuple, passed: list[Node] | None = None, end: Node | None = None) -> Node:
    """Where a chain of such operators begins, or `end` on the way; `passed` gets those in between, the last first."""
    while node is not end and node.op == "call_function" and node.target in through:
        if passed is not None:
            passed.append(node)
        node = node.args[0]
    return node


def written(node: Node) -> bool:
    """Whether the storage of a node may be written to, by any of its names."""
    for user in node.users:
        if user.op != "call_function":
            continue
        is_operator = isinstance(user.target, torch._ops.OpOverload)
        if not is_operator and user.target is not operator.getitem:
            return True
        if is_operator and user.target._schema.is_mutable and node in _targets(user):
            return True
        if shares(user) and written(user):
            return True
    return False


def _targets(node: Node) -> list[Node]:
    """The operands a call writes to."""
    given, named = arguments(node), node.target._schema.arguments
    return list(flatten([given.get(argument.name) for argument in named if argument.alias_info is not None]))
