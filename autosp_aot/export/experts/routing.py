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

from autosp_aot.export.canonical.constants import arguments, functional, is_elementwise
from autosp_aot.export.canonical.shapes import RESHAPES, SAME
from autosp_aot.export.experts.expert_ids import choices, given_dims, says_ends, shares, written
from autosp_aot.export.regions import MARKS
from autosp_aot.ops.experts.captured import PRODUCTS

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
PAIRS = SORTS[:2]
LOOKUPS = (aten.index.Tensor, aten.index_select.default)
DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode)
PUTS = (aten.index_put.default, aten.index_put_.default)
SUMS = (aten.index_add.default, aten.index_add_.default, aten.scatter_add.default, aten.scatter_add_.default)
# What these make of all rows is the same in any order.
ORDERLESS = (aten.histc.default, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default)

# Operators that work row by row unless the first dim is among those they name.
ALONG_DIMS = (
    aten.chunk.default, aten.cumsum.default, aten.glu.default, aten.log_softmax.int, aten.mean.dim, aten.select.int,
    aten.slice.Tensor, aten.softmax.int, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.dim,
    aten.sum.dim_IntList, aten.unbind.int, aten.unsqueeze.default,
)  # fmt: skip
# The same with operands that all rows share.
SHARED = (
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.layer_norm.default, aten.rms_norm.default,
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """The row numbers 0, 1, 2 ..., each divided by `every`: the token a row belongs to."""

    every: int = 1


class _Unknown(Exception):
    """The region does something that is not known to be the same in token order."""


def canonical_routing(exported: ExportedProgram) -> None:
    """Rewrite in place every region of the exported graph that is certain; leave the others alone."""
    graph, gone = exported.graph, set()
    for node in list(graph.nodes):
        if node in gone:
            continue
        if node.target in SORTS and node.args[0].meta["val"].dim() == 1:
            gone.update(_Region(graph, node).rewrite())
        elif node.target is aten.bmm.default:
            _unbatch(graph, node)
    graph.eliminate_dead_code()


def _unbatch(graph: Graph, product: Node) -> None:
    """`bmm(weight[ids], x[:, :, None])`, with a copy of the weight for each row, as one product of rows with experts.

    Also the other way round, `bmm(x[:, None], weight[ids])`.
    """
    row_first = product.args[1].target is aten.index.Tensor
    row, copies = product.args if row_first else product.args[::-1]
    if copies.target is not aten.index.Tensor or row.target is not aten.unsqueeze.default:
        return
    (table, at), x = copies.args, row.args[0]
    many = choices(at[0]) if len(at) == 1 and len(_shape(at[0])) == 1 else None
    fits = len(_shape(table)) == 3 and x.meta["val"].dim() == 2 and _shape(row)[1 if row_first else 2] == 1
    alone = not written(table) and not written(copies) and _same_region(graph, (row, copies, product))
    if many is None or not fits or many > _shape(table)[0] or not alone:
        return
    with graph.inserting_before(product):
        weight = table if row_first else graph.call_function(aten.transpose.int, (table, 1, 2))
        rows = graph.call_function(torch.ops.autosp.expert_mm.default, (at[0], x, weight))
        result = graph.call_function(aten.unsqueeze.default, (rows, 1 if row_first else 2))
    for node in (weight, rows, result)[row_first:]:
        node.meta = dict(product.meta)
    product.replace_all_uses_with(result)
    graph.erase_node(product)


class _Region:
    """What follows from one sort of expert ids, put in token order."""

    def __init__(self, graph: Graph, sort: Node):
        self.graph, self.sort, self.rows = graph, sort, sort.args[0].meta["val"].shape[0]
        # v = plain[v][order] for every value v of the region; leaves[v] equals v, and does not depend on the order.
        self.plain: dict[Node, Node | Count | tuple] = {}
        self.leaves: dict[Node, Node] = {}
        self.visited: list[Node] = [sort]
        self.inverses: set[Node] = set()
        self.products = 0

    def rewrite(self) -> list[Node]:
        """Rewrite the region, or leave it; the nodes that are no longer in the graph."""
        nodes = list(self.graph.nodes)
        try:
            self.begin()
            for node in nodes[nodes.index(self.sort) + 1 :]:
                if any(operand in self.plain or operand in self.inverses for operand in node.all_input_nodes):
                    self.visit(node)
                    self.visited.append(node)
        except _Unknown:
            return []
        if not self.products:
            return []
        for node, plain in self.leaves.items():
            node.replace_all_uses_with(plain)
        gone = []
        for node in reversed(self.visited):
            if not node.users:
                self.graph.erase_node(node)
                gone.append(node)
        return gone

    def begin(self) -> None:
        ids = self.sort.args[0]
        if arguments(self.sort)["descending"] or choices(ids) is None:
            raise _Unknown
        self.ids = self.emit(self.sort, aten.clone.default, (ids,))
        self.ids.meta["val"] = ids.meta["val"]
        self.plain[self.sort] = (self.ids, Count()) if self.sort.target in PAIRS else Count()

    def visit(self, node: Node) -> None:
        """Put the node's value in token order into `plain`; into `leaves` if it does not depend on the order."""
        target, first = node.target, next(iter(node.all_input_nodes))
        if target is aten._assert_tensor_metadata.default:
            return
        if target is operator.getitem:
            parts = self.plain[first]
            self.plain[node] = parts[node.args[1]] if isinstance(parts, tuple) else self.same(node)
        elif str(target) in PRODUCTS:
            self.plain[node] = self.product(node)
        elif target in LOOKUPS:
            self.look_up(node)
        elif target in SORTS and target not in PAIRS and self.is_order(first) and not arguments(node)["descending"]:
            self.inverses.add(node)
        elif target in PUTS:
            self.put(node)
        elif target in SUMS:
            self.leaves[node] = self.sum(node)
        elif target in ORDERLESS or target is aten.sum.dim_IntList and 0 in given_dims(node):
            self.leaves[node] = self.same(node)
        elif target in DIVISIONS and isinstance(count := self.plain.get(first), Count):
            self.plain[node] = self.divided(node, count)
        elif self.works_row_by_row(node):
            is_count = isinstance(self.plain.get(first), Count) and target in (*RESHAPES, aten.expand.default)
            self.plain[node] = self.plain[first] if is_count else self.same(node)
        else:
            raise _Unknown

    def product(self, node: Node) -> Node:
        given = arguments(node)
        x, weight = (given[argument.name] for argument in node.target._schema.arguments[:2])
        plain = not given.get("bias") and not given.get("out_dtype")
        fits = len(_shape(x)) == 2 and len(_shape(weight)) == 3 and self.in_order(x) and weight not in self.plain
        if not plain or not fits or not says_ends(given["offs"], self.leaves, self.sort.args[0], _shape(weight)[0]):
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
        """`table[plain[at]]`, without a lookup where that is each row a few times."""
        plain, shape = self.plain[at], table.meta["val"].shape
        table = self.emit(node, aten.clone.default, (table,))
        if plain is self.ids and len(shape) == 2 and shape[0] >= choices(self.sort.args[0]):
            return self.emit(node, aten.embedding.default, (table, self.ids))
        if not isinstance(plain, Count) or shape[0] * plain.every != self.rows:
            return self.emit(node, aten.index.Tensor, (table, [self.token_order(at)]))
        if plain.every == 1:
            return table
        one = self.emit(node, aten.unsqueeze.default, (table, 1))
        each = self.emit(node, aten.expand.default, (one, [shape[0], plain.every, *shape[1:]]))
        return self.emit(node, aten.reshape.default, (each, [self.rows, *shape[1:]]))

    def put(self, node: Node) -> None:
        """`base[order] = v`: the inverse where v counts the rows, the way back where v is in that order."""
        given = arguments(node)
        base, at, values = given["self"], given["indices"], given["values"]
        whole = _type(base) == _type(values) and len(at) == 1 and self.is_order(at[0])
        if given["accumulate"] or not whole or not _own(base, node):
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
        plain, shape, added = self.plain.get(at), _shape(base), _shape(values)
        if not isinstance(plain, Count) or shape[0] * plain.every != self.rows or _shape(at) not in (added, added[:1]):
            raise _Unknown
        alone = self.in_order(values) and base not in self.plain and _own(base, node)
        if given["dim"] or given.get("alpha", 1) != 1 or not alone or added[1:] != shape[1:]:
            raise _Unknown
        split = self.emit(node, aten.reshape.default, (self.token_order(values), [shape[0], plain.every, *shape[1:]]))
        total = self.emit(node, aten.sum.dim_IntList, (split, [1]))
        return self.emit(node, aten.add.Tensor, (base, total))

    def divided(self, node: Node, count: Count) -> Count:
        by = node.args[1]
        if not isinstance(by, int) or by < 1 or node.kwargs.get("rounding_mode", "floor") is None:
            raise _Unknown
        return Count(count.every * by)

    def is_order(self, operand: Node) -> bool:
        return self.plain.get(operand) == Count()

    def in_order(self, operand: Node) -> bool:
        return isinstance(self.plain.get(operand), (Node, Count))

    def works_row_by_row(self, node: Node) -> bool:
        """Whether row r of the result follows from row r of each operand, and from what all rows share."""
        target, operands = node.target, node.all_input_nodes
        ordered = [self.in_order(operand) for operand in operands]
        if not any(ordered) or self.inverses.intersection(operands) or not isinstance(target, torch._ops.OpOverload):
            return False
        shape = operands[0].meta["val"].shape
        if target in ALONG_DIMS:
            return 0 not in given_dims(node)
        if target in (aten.cat.default, aten.stack.default):
            return all(ordered) and 0 not in given_dims(node)
        if target in (*RESHAPES, aten.expand.default):
            result = node.meta["val"].shape
            return result[:1] == (self.rows,) and (target is not aten.expand.default or len(result) == len(shape))
        if target in SHARED:
            used_up = len(arguments(node).get("normalized_shape", [0]))
            shared = all(len(_shape(operand)) <= 2 for operand in operands[1:])
            return ordered[0] and sum(ordered) == 1 and len(shape) > used_up and shared
        made = functional(target)
        if made is None or not (made in (*SAME, aten.detach.default, aten.type_as.default) or is_elementwise(made)):
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
        assert isinstance(plain, Count), "a pair is taken apart before it is read"
        made = self.emit(self.sort, aten.arange.default, (self.rows,), device=val.device)
        if plain.every > 1:
            made = self.emit(self.sort, aten.floor_divide.default, (made, plain.every))
        if val.dim() > 1:
            made = self.emit(self.sort, aten.reshape.default, (made, [self.rows, *[1] * (val.dim() - 1)]))
        return self.emit(self.sort, aten.expand.default, (made, list(val.shape)))

    def same(self, node: Node) -> Node:
        """The operator on the operands in token order; one that writes in place as the one that does not."""
        target = functional(node.target) or node.target
        change = lambda operand: self.token_order(operand) if operand in self.plain else operand  # noqa: E731
        return self.emit(node, target, map_arg(node.args, change), **map_arg(node.kwargs, change))

    def emit(self, node: Node, target, args: tuple, **kwargs) -> Node:
        """A call before `node`, with its source."""
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = dict(node.meta)
        return made


def _same_region(graph: Graph, calls: tuple[Node, ...]) -> bool:
    """Whether no_grad and autocast neither begin nor end between these calls."""
    nodes = list(graph.nodes)
    places = [nodes.index(call) for call in calls]
    return not any(node.target in MARKS for node in nodes[min(places) : max(places)])


def _own(operand: Node, node: Node) -> bool:
    """Whether `node` writes nothing, or to an operand that nobody else sees."""
    if not node.target._schema.is_mutable:
        return True
    others = {user.target for user in operand.users if user is not node}
    return others <= {aten._assert_tensor_metadata.default} and not shares(operand)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _type(node: Node) -> tuple:
    return _shape(node), node.meta["val"].dtype
