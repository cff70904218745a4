"""Mixtures of experts in token order: a region that sorts its rows by expert becomes one that never moves them.

    sorted, order = sort(ids)                    gone
    x_g = x[order // k]                          x, each row k times
    ends = cumsum(histc(sorted, E))              gone
    y_g = grouped_mm(x_g, weight, ends)     ->   y = autosp.expert_mm(ids, x, weight)
    z_g = y_g * w[order]                         z = y * w
    z = z_g[inverse of order]                    gone

Every value of the region is `u[order]` for a value u in token order. An operator on it either gives such a value again,
because it works row by row, or its result does not depend on the order (the inverse, a sum over rows). Where one does
neither the region stays as it is: its product is then refused, or computed whole on every rank.
"""

import operator
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from autosp_aot.export import routing_op  # noqa: F401  (defines torch.ops.autosp.expert_mm)
from autosp_aot.export.expert_ids import arguments, choices, given_dims, says_ends, shares

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
# Products of (rows sorted by expert [T, K], weight [E, K, N], offs: where each expert's rows end [E]).
PRODUCTS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
LOOKUPS = (aten.index.Tensor, aten.index_select.default)
DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode)
PUTS = (aten.index_put.default, aten.index_put_.default)
SUMS = (aten.index_add.default, aten.index_add_.default, aten.scatter_add.default, aten.scatter_add_.default)

# Operators that work row by row unless the first dim is among those they name.
ALONG_DIMS = (
    aten.chunk.default, aten.cumsum.default, aten.glu.default, aten.log_softmax.int, aten.mean.dim, aten.select.int,
    aten.slice.Tensor, aten.softmax.int, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.dim,
    aten.sum.dim_IntList, aten.unbind.int, aten.unsqueeze.default,
)  # fmt: skip
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.expand.default,
)  # fmt: skip
# The same with operands that all rows share.
SHARED = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
# Elementwise operators that torch does not tag so.
UNTAGGED = (
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default, aten.detach.default,
    aten.alias.default, aten.contiguous.default, aten.type_as.default, aten.zeros_like.default, aten.ones_like.default,
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """The row numbers 0, 1, 2 ..., each divided by `every`: the token a row belongs to."""

    every: int = 1


class _Unknown(Exception):
    """The region does something that is not known to be the same in token order."""


def canonical_routing(exported: ExportedProgram) -> None:
    """Rewrite in place every region of the exported graph that is certain; leave the others alone."""
    for node in list(exported.graph.nodes):
        if node.target in SORTS and node.args[0].meta["val"].dim() == 1:
            _Region(exported.graph, node).rewrite()
    exported.graph.eliminate_dead_code()


class _Region:
    """What follows from one sort of expert ids, put in token order."""

    def __init__(self, graph: Graph, sort: Node):
        self.graph, self.sort, self.rows = graph, sort, sort.args[0].meta["val"].shape[0]
        # v = plain[v][order] for every value v of the region; leaves[v] equals v.
        self.plain: dict[Node, Node | Count | tuple] = {}
        self.leaves: dict[Node, Node] = {}
        self.gone: list[Node] = [sort]
        self.inverses: set[Node] = set()
        self.products = 0

    def rewrite(self) -> None:
        nodes = list(self.graph.nodes)
        try:
            self.begin()
            for node in nodes[nodes.index(self.sort) + 1 :]:
                if any(operand in self.plain or operand in self.inverses for operand in node.all_input_nodes):
                    self.visit(node)
                    self.gone.append(node)
        except _Unknown:
            return
        if self.products:
            for node, plain in self.leaves.items():
                node.replace_all_uses_with(plain)
            for node in reversed(self.gone):
                if not node.users:
                    self.graph.erase_node(node)

    def begin(self) -> None:
        ids = self.sort.args[0]
        if arguments(self.sort)["descending"] or choices(ids) is None:
            raise _Unknown
        self.ids = self.emit(self.sort, aten.clone.default, (ids,))
        self.ids.meta["val"] = ids.meta["val"]
        alone = isinstance(self.sort.meta["val"], torch.Tensor)
        self.plain[self.sort] = Count() if alone else (self.ids, Count())

    def visit(self, node: Node) -> None:
        """Put the node's value in token order into `plain`; into `leaves` if it does not depend on the order."""
        target, first = node.target, node.args[0] if node.args else None
        if target is aten._assert_tensor_metadata.default or target is aten.empty_like.default:
            return
        if target is operator.getitem:
            parts = self.plain[first]
            self.plain[node] = parts[node.args[1]] if isinstance(parts, tuple) else self.same(node)
        elif str(target) in PRODUCTS:
            self.plain[node] = self.product(node)
        elif target in LOOKUPS:
            self.look_up(node)
        elif target in SORTS and self.plain.get(first) == Count() and not arguments(node)["descending"]:
            if not isinstance(node.meta["val"], torch.Tensor):
                raise _Unknown
            self.inverses.add(node)
        elif target in PUTS:
            self.put(node)
        elif target in SUMS:
            self.leaves[node] = self.sum(node)
        elif target is aten.histc.default or target is aten.sum.dim_IntList and 0 in given_dims(node):
            self.leaves[node] = self.same(node)
        elif target in DIVISIONS and isinstance(self.plain.get(first), Count):
            self.plain[node] = self.divided(node)
        elif self.works_row_by_row(node):
            is_count = isinstance(self.plain.get(first), Count) and target in (*RESHAPES, aten.unsqueeze.default)
            self.plain[node] = self.plain[first] if is_count else self.same(node)
        else:
            raise _Unknown

    def product(self, node: Node) -> Node:
        given = arguments(node)
        x, weight, ends = node.args[0], node.args[1], given["offs"]
        experts = weight.meta["val"].shape[0]
        if given.get("bias") or given.get("out_dtype") or not self.in_order(x) or weight in self.plain:
            raise _Unknown
        if not says_ends(ends, self.leaves, self.sort.args[0], experts):
            raise _Unknown
        self.products += 1
        return self.emit(node, torch.ops.autosp.expert_mm.default, (self.ids, self.token_order(x), weight))

    def look_up(self, node: Node) -> None:
        """Rows taken by the order, by something in that order, or (the way back) by its inverse."""
        given = arguments(node)
        table, at = given["self"], given["indices" if node.target is aten.index.Tensor else "index"]
        at = at[0] if isinstance(at, (list, tuple)) and len(at) == 1 else at
        if not isinstance(at, Node) or at.meta["val"].dim() != 1 or given.get("dim"):
            raise _Unknown
        if at in self.inverses and self.in_order(table):
            self.leaves[node] = self.emit(node, aten.clone.default, (self.token_order(table),))
        elif at in self.plain and table not in self.plain:
            self.plain[node] = self.taken(node, table, at)
        else:
            raise _Unknown

    def taken(self, node: Node, table: Node, at: Node) -> Node:
        plain, shape = self.plain[at], table.meta["val"].shape
        if not isinstance(plain, Count) or shape[0] * plain.every != self.rows:
            return self.emit(node, aten.index.Tensor, (table, [self.token_order(at)]))
        if plain.every == 1:
            return self.emit(node, aten.clone.default, (table,))
        one = self.emit(node, aten.unsqueeze.default, (table, 1))
        all_ = self.emit(node, aten.expand.default, (one, [shape[0], plain.every, *shape[1:]]))
        return self.emit(node, aten.reshape.default, (all_, [self.rows, *shape[1:]]))

    def put(self, node: Node) -> None:
        """`base[order] = v`: the inverse where v counts the rows, the way back where v is in that order."""
        given = arguments(node)
        base, at, values = given["self"], given["indices"], given["values"]
        whole = base.meta["val"].shape == values.meta["val"].shape and base.meta["val"].dtype == values.meta["val"].dtype
        if given["accumulate"] or len(at) != 1 or self.plain.get(at[0]) != Count() or not whole or not _own(base, node):
            raise _Unknown
        if self.in_order(values):
            self.leaves[node] = self.emit(node, aten.clone.default, (self.token_order(values),))
        elif values.target is aten.arange.default and len(values.args) == 1:
            self.inverses.add(node)
        else:
            raise _Unknown

    def sum(self, node: Node) -> Node:
        """`base[order // every] += v`: a sum over the rows of each token."""
        given = arguments(node)
        base, at, values = given["self"], given["index"], given.get("source", given.get("src"))
        at, shape = self.plain.get(at), base.meta["val"].shape
        rows_of_token = isinstance(at, Count) and shape[0] * at.every == self.rows
        if given["dim"] or given.get("alpha", 1) != 1 or not rows_of_token or not self.in_order(values):
            raise _Unknown
        if values.meta["val"].shape[1:] != shape[1:] or not _own(base, node):
            raise _Unknown
        split = self.emit(node, aten.reshape.default, (self.token_order(values), [shape[0], at.every, *shape[1:]]))
        total = self.emit(node, aten.sum.dim_IntList, (split, [1]))
        return self.emit(node, aten.add.Tensor, (base, total))

    def divided(self, node: Node) -> Count:
        by = node.args[1]
        if not isinstance(by, int) or by < 1 or node.kwargs.get("rounding_mode", "floor") is None:
            raise _Unknown
        return Count(self.plain[node.args[0]].every * by)

    def in_order(self, operand) -> bool:
        return isinstance(operand, Node) and isinstance(self.plain.get(operand), (Node, Count))

    def works_row_by_row(self, node: Node) -> bool:
        """Whether row r of the result follows from row r of each operand in this order, and from what all rows share."""
        target, operands = node.target, node.all_input_nodes
        ordered = [self.in_order(operand) for operand in operands]
        if not any(ordered) or self.inverses.intersection(operands) or not isinstance(target, torch._ops.OpOverload):
            return False
        shape = operands[0].meta["val"].shape
        if target in ALONG_DIMS:
            return 0 not in given_dims(node)
        if target in (aten.cat.default, aten.stack.default):
            return all(ordered) and 0 not in given_dims(node)
        if target in RESHAPES:
            result = node.meta["val"].shape
            return result[0] == self.rows and (target is not aten.expand.default or len(result) == len(shape))
        if target in SHARED:
            used_up = len(arguments(node).get("normalized_shape", [0]))
            return ordered[0] and sum(ordered) == 1 and len(shape) > used_up
        if target not in UNTAGGED and torch.Tag.pointwise not in target.tags:
            return False
        return _own(node.args[0], node) and all(self.fits(operand, node) for operand in operands)

    def fits(self, operand: Node, node: Node) -> bool:
        """Whether broadcasting pairs the operand's rows with the result's, or gives all rows the same."""
        shape, dims = operand.meta["val"].shape, node.meta["val"].dim()
        if self.in_order(operand):
            return len(shape) == dims
        return len(shape) < dims or shape[0] == 1

    def token_order(self, operand: Node) -> Node:
        """The value in token order as a node; row numbers are made here."""
        plain, val = self.plain[operand], operand.meta["val"]
        if isinstance(plain, Node):
            return plain
        made = self.emit(self.sort, aten.arange.default, (self.rows,), device=val.device)
        if plain.every > 1:
            made = self.emit(self.sort, aten.floor_divide.default, (made, plain.every))
        if val.dim() > 1:
            made = self.emit(self.sort, aten.reshape.default, (made, [self.rows, *[1] * (val.dim() - 1)]))
        return self.emit(self.sort, aten.expand.default, (made, list(val.shape)))

    def same(self, node: Node) -> Node:
        """The operator on the operands in token order; one that writes in place as the one that does not."""
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            target = getattr(getattr(aten, target._schema.name.split("::")[1].rstrip("_")), target._overloadname)
        change = lambda operand: self.token_order(operand) if operand in self.plain else operand  # noqa: E731
        return self.emit(node, target, map_arg(node.args, change), **map_arg(node.kwargs, change))

    def emit(self, node: Node, target, args: tuple, **kwargs) -> Node:
        """A call before `node`, with its source."""
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = dict(node.meta)
        return made


def _own(operand: Node, node: Node) -> bool:
    """Whether `node` writes nothing, or to an operand that nobody else sees."""
    if not node.target._schema.is_mutable:
        return True
    others = [user for user in operand.users if user is not node and user.target is not aten._assert_tensor_metadata.default]
    return not others and not shares(operand)
