"""Indices that are known when a step is captured, held against what is looked up at them.

    positions = arange(129)
    wpe(positions)             a table of 128 rows: eager fails, and so would every step
"""

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.canonical.constants import COMPUTED, arguments, constants_of, evaluate
from autosp_aot.export.source import where

aten = torch.ops.aten
# Operators that look up or write along one dim: where its number is among the arguments, None for the first dim, and
# where the index is.
ALONG_DIM = {
    aten.embedding.default: (None, 1), aten.gather.default: (1, 2), aten.index_select.default: (1, 2),
    aten.take_along_dim.default: (2, 1),
    **{getattr(packet, overload): (1, 2)
       for packet in (aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.index_add, aten.index_add_,
                      aten.index_copy, aten.index_copy_, aten.index_fill, aten.index_fill_)
       for overload in packet.overloads() if "out" not in overload and "dimname" not in overload.lower()},
}  # fmt: skip
BY_TENSORS = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def refuse_indices(exported: ExportedProgram) -> None:
    """BuildError naming every lookup at indices that are known not to be there."""
    known, problems = constants_of(exported), []
    for node in exported.graph.nodes:
        for size, index in _lookups(node):
            value = evaluate(index, known, COMPUTED) if isinstance(index, Node) else None
            if isinstance(value, Tensor) and value.numel() and value.dtype not in (torch.bool, torch.uint8):
                low, high = int(value.min()), int(value.max())
                if low < (0 if node.target is aten.embedding.default else -size) or high >= size:
                    problems.append(_problem(node, size, low, high))
    if problems:
        raise BuildError(*dict.fromkeys(problems))


def _lookups(node: Node) -> list[tuple[int, object]]:
    """(size of the dim, index) of each dim that a call looks up."""
    if node.target in ALONG_DIM:
        dim, at = ALONG_DIM[node.target]
        given, names = arguments(node), [argument.name for argument in node.target._schema.arguments]
        looked_up, index = given[names[0]], given[names[at]]
        shape = looked_up.meta["val"].shape
        along = 0 if dim is None else given[names[dim]]
        return [(shape[along], index)] if shape and along is not None else []
    if node.target in BY_TENSORS:
        shape = node.args[0].meta["val"].shape
        return [(shape[dim], index) for dim, index in enumerate(node.args[1]) if index is not None]
    return []


def _problem(node: Node, size: int, low: int, high: int) -> Problem:
    return Problem(
        "index-out-of-range", f"{node.target.overloadpacket} looks up {low} to {high}, and there are {size}",
        where(node).source, "the indices follow from the shapes of the batch alone: every step would fail",
        "shorten the sequence (--seq), or make the table that long",
    )  # fmt: skip
