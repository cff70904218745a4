"""Attention masks as predicates: what a mask says is found without ever making it.

A mask is built from vectors along the query or the key dim. Vectors are computed for real (O(S), repeats stored once);
a comparison of two vectors is kept as a `Select`, and only asked which keys each query sees.

    keys = arange(S)[None, :]            varies along the last dim
    rows = arange(S)[:, None]            varies along the dim before
    mask = keys <= rows                  Select(le, keys, rows, True, False)
    bias = where(mask, 0, -inf)          Select(le, keys, rows, 0, -inf)          both say: causal
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

COMPARES = {
    aten.le.Tensor: operator.le, aten.lt.Tensor: operator.lt, aten.ge.Tensor: operator.ge, aten.gt.Tensor: operator.gt,
}  # fmt: skip
FLIPPED = {operator.le: operator.ge, operator.lt: operator.gt, operator.ge: operator.le, operator.gt: operator.lt}
NEGATED = {operator.le: operator.gt, operator.lt: operator.ge, operator.ge: operator.lt, operator.gt: operator.le}

# Operators that add size-one dims, repeat or copy: a comparison of keys with rows passes through them.
PASS = (
    aten.expand.default, aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default,
)  # fmt: skip
# Elementwise operators that torch does not tag so.
UNTAGGED = (
    aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.__and__.Tensor, aten.__or__.Tensor,
)  # fmt: skip
CONSTANTS = (aten.full.default, aten.new_ones.default, aten.ones.default, aten.zeros.default)


@dataclass(frozen=True)
class Select:
    """`yes` where `compare(keys[k], rows[q])` holds, else `no`, for every query q (dim -2) and key k (dim -1).

    keys and rows are 1-D; yes and no hold one element.
    """

    compare: Callable
    keys: Tensor
    rows: Tensor
    yes: Tensor
    no: Tensor

    def causal(self) -> bool:
        """True when query q sees exactly the keys 0..q: True or 0 there, False or -inf elsewhere."""
        if not _lets_through(self.yes):
            swapped = replace(self, compare=NEGATED[self.compare], yes=self.no, no=self.yes)
            return _lets_through(self.no) and swapped.causal()
        stops = not self.no.item() if self.no.dtype == torch.bool else self.no.item() == float("-inf")
        count = len(self.rows)
        if not stops or self.compare not in (operator.le, operator.lt) or len(self.keys) != count:
            return False
        if not bool((self.keys.diff() >= 0).all()):
            return False
        seen = torch.searchsorted(self.keys, self.rows, right=self.compare is operator.le)
        return bool((seen == torch.arange(1, count + 1)).all())


Known = Select | Tensor | None


def evaluate(node: Node, known: dict[Node, Known]) -> Known:
    """What is known of a node: a Select, a constant with every repeated dim stored once, or None."""
    if node not in known:
        known[node] = _evaluate(node, known)
    return known[node]


def says_causal(said: Known) -> bool:
    """True when the mask is exactly the causal one."""
    return isinstance(said, Select) and said.causal()


def says_all(said: Known) -> bool:
    """True when the mask lets everything through."""
    return isinstance(said, Tensor) and said.numel() == 1 and _lets_through(said)


def _lets_through(said: Tensor) -> bool:
    return bool(said.item()) if said.dtype == torch.bool else said.item() == 0


def _evaluate(node: Node, known: dict[Node, Known]) -> Known:
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    operands = [evaluate(n, known) for n in node.all_input_nodes]
    if any(said is None for said in operands) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    if any(isinstance(said, Select) for said in operands):
        return _map(node, known, operands)
    if node.target in (aten.tril.default, aten.triu.default):
        return _triangle(node, operands[0])
    if node.target in COMPARES and isinstance(node.args[1], Node):
        left, right = operands[0], operands[-1]
        if _varying(left) | _varying(right) == {-1, -2}:
            return _compare(COMPARES[node.target], left, right)
    return _constant(node, known, operands)


def _constant(node: Node, known: dict[Node, Known], operands: list[Tensor]) -> Tensor | None:
    """The constant, computed; None where it would vary along more than one dim."""
    shape = node.meta["val"].shape
    if node.target is aten.expand.default:
        return operands[0].reshape([1] * (len(shape) - operands[0].dim()) + list(operands[0].shape))
    if node.target in CONSTANTS:
        args = [[1] * len(shape) if isinstance(arg, (list, tuple)) else arg for arg in node.args]
        return node.target(*map_arg(tuple(args), known.get), **node.kwargs)
    pointwise = _pointwise(node.target)
    if pointwise and len(set().union(*map(_varying, operands))) > 1:
        return None
    if not pointwise and sum(n > 1 for n in shape[-2:]) > 1 and len(shape) > 2:
        return None
    whole = lambda n: known[n] if pointwise else known[n].expand(n.meta["val"].shape)  # noqa: E731
    return _once(node.target(*map_arg(node.args, whole), **map_arg(node.kwargs, whole)))


def _pointwise(target) -> bool:
    return torch.Tag.pointwise in target.tags or target in UNTAGGED


def _once(tensor: Tensor) -> Tensor:
    """The tensor with every dim along which it only repeats itself narrowed to size one."""
    for dim in range(tensor.dim()):
        first = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
        if tensor.shape[dim] > 1 and bool((tensor == first).all()):
            tensor = first
    return tensor


def _varying(tensor: Tensor) -> set[int]:
    return {dim - tensor.dim() for dim, size in enumerate(tensor.shape) if size > 1}


def _compare(compare: Callable, left: Tensor, right: Tensor) -> Select | None:
    yes, no = torch.tensor(True), torch.tensor(False)
    if _varying(left) == {-1} and _varying(right) == {-2}:
        return Select(compare, left.flatten(), right.flatten(), yes, no)
    if _varying(left) == {-2} and _varying(right) == {-1}:
        return Select(FLIPPED[compare], right.flatten(), left.flatten(), yes, no)
    return None


def _triangle(node: Node, constant: Tensor) -> Select | None:
    """`tril` and `triu` of a constant that is the same everywhere."""
    rows, keys = node.meta["val"].shape[-2:]
    if constant.numel() != 1:
        return None
    diagonal = node.args[1] if len(node.args) > 1 else 0
    compare = operator.le if node.target is aten.tril.default else operator.ge
    kept = constant.flatten()[0]
    return Select(compare, torch.arange(keys), torch.arange(rows) + diagonal, kept, torch.zeros_like(kept))


def _map(node: Node, known: dict[Node, Known], operands: list[Known]) -> Select | None:
    """The operator applied to both answers of the one Select among its operands; all others are the same everywhere."""
    selects = [said for said in operands if isinstance(said, Select)]
    others = [said for said in operands if isinstance(said, Tensor)]
    if len(selects) != 1 or any(said.numel() != 1 for said in others) or node.meta["val"].dim() < 2:
        return None
    if node.target in PASS:
        size = (len(selects[0].rows), len(selects[0].keys))
        return selects[0] if tuple(node.meta["val"].shape[-2:]) == size else None
    if not _pointwise(node.target):
        return None

    def branch(answer: str) -> Tensor:
        value = lambda n: getattr(known[n], answer) if isinstance(known[n], Select) else known[n].flatten()[0]  # noqa: E731
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    return replace(selects[0], yes=branch("yes"), no=branch("no"))
