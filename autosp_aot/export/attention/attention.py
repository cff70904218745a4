"""Attention in canonical form: every attention of the exported graph becomes `autosp.attention`.

mask = keys <= rows                 [1, 1, S, S]        gone: causal
k2 = repeat every k head 4 times    [B, 4 * Nkv, S, D]  gone: the operator reads k itself
out = scaled_dot_product_attention(q, k2, v2, attn_mask=mask)
  ->
out, lse = autosp.attention(q, k, v, [], causal)

p = softmax(tanh(q @ k.T / 50) * 50 + mask);  out = p @ v
  ->
out, lse = autosp.attention(q, k, v, [], score of s)
"""

import json
import math
import operator
import string
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

import autosp_aot.ops.attention.captured  # noqa: F401  (defines torch.ops.autosp)
from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.attention.products import Product, before_repetition, made, regroup, transposed
from autosp_aot.export.attention.scores import Scores
from autosp_aot.export.attention.softmaxes import scores_product, weighted_sum, without_sink
from autosp_aot.export.canonical.constants import arguments, constants_of, written
from autosp_aot.export.regions import without_gradients
from autosp_aot.export.source import where
from autosp_aot.ir.bands import band_of
from autosp_aot.ir.operators import wide
from autosp_aot.ir.program import Arg

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
# What attention that is not recognised may take for its weights.
SCORES_BYTES = 2**32
SCALES = {"aten.mul.Tensor": 1, "aten.mul.Scalar": 1, "aten.div.Tensor": -1, "aten.div.Scalar": -1}
CAUSAL = ("aten.where.ScalarOther", ("aten.le.Tensor", "k", "q"), "s", -math.inf)


def canonical_attention(exported: ExportedProgram) -> None:
    """Rewrite every attention of the exported graph in place. Raises BuildError naming all that cannot be."""
    rewrite = _Rewrite(exported)
    problems = []
    for node in list(exported.graph.nodes):
        if node.target is SDPA:
            problems.append(rewrite.fused(node))
        elif node.target in SOFTMAX:
            problems.append(rewrite.spelled(node))
    exported.graph.eliminate_dead_code(_has_effects)
    problems += [_scores_problem(node) for node in exported.graph.nodes if _is_large(node)]
    found = [problem for problem in problems if problem]
    if found:
        raise BuildError(*dict.fromkeys(found))


def _is_large(node: Node) -> bool:
    """True for a softmax of more than SCORES_BYTES over products of queries and keys, whatever is done with it."""
    if node.target not in SOFTMAX or node.meta["val"].nbytes <= SCORES_BYTES:
        return False
    product, _ = scores_product(node.args[0], node.meta["val"].shape)
    return product is not None and bool(product.lead) and set(product.lead) <= set(product.words[1])


def _scores_problem(node: Node) -> Problem:
    return Problem(
        "attention-not-recognised",
        f"the weights of an attention would need {node.meta['val'].nbytes / 2**30:.1f} GiB as a tensor",
        where(node).source,
        "they are used for more than a sum of values, or made in a way that is not known",
        "use scaled_dot_product_attention, or weights = softmax(scores) and weights @ values alone, or a shorter --seq",
    )


def _has_effects(node: Node) -> bool:
    """True for what may not be dropped though nobody reads it; a draw may, each has its own site."""
    return node.is_impure(impure_random=False)


@dataclass(frozen=True)
class _Softmax:
    """What makes weights of products: times `scale`, `score`, softmax (rows of nothing are zeros if `safe`), `dropout`.

    `sink` is a node [batch or 1, heads or 1, rows or 1, 1]: one more score a row, whose weight goes nowhere.
    """

    score: Arg
    scale: float
    safe: bool
    dropout: float
    sink: Node | None = None


class _Rewrite:
    def __init__(self, exported: ExportedProgram):
        self.graph: Graph = exported.graph
        self.written = written(exported.graph)
        self.known = constants_of(exported)
        self.frozen = without_gradients(exported.graph)
        self.sites = 0

    def fused(self, node: Node) -> Problem | None:
        """Rewrite a call of scaled_dot_product_attention, or say why that cannot be."""
        given = arguments(node)
        q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
        place, shape = where(node).source, q.meta["val"].shape
        if given["enable_gqa"] and (len(shape) != 4 or k.meta["val"].shape[1] != v.meta["val"].shape[1]):
            return _groups_problem([list(t.meta["val"].shape) for t in (q, k, v)], place)
        scores = self.scores(node.meta["val"].shape[:-2], shape[-2], k.meta["val"].shape[-2], None)
        score: Arg = "s"
        is_bool = mask is not None and mask.meta["val"].dtype is torch.bool
        if mask is not None:
            dims = max(mask.meta["val"].dim() - 2, 0)
            said = scores.whole(mask, scores.slots[len(scores.lead) - dims :], node)
            score = (*CAUSAL[:1], said, *CAUSAL[2:]) if is_bool else ("aten.add.Tensor", "s", said)
        elif given["is_causal"]:
            score = CAUSAL
        scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(shape[-1])
        large = scores.largest()
        if large is not None:
            return _mask_problem("scaled_dot_product_attention", large, place)
        letters = string.ascii_lowercase[: node.meta["val"].dim() - 2]
        last = Product(node, q, v, (letters + "xz", letters + "zy", letters + "xy"), letters, ("x", "y", "z"))
        softmax = _Softmax(score, float(scale), True, given["dropout_p"])
        self.replace(last, q, k, v, scores, softmax, given["enable_gqa"])
        return None

    def spelled(self, softmax: Node) -> Problem | None:
        """Rewrite attention spelled out around a softmax; where it is something else the graph stays as it is."""
        if softmax.meta["val"].dim() < 3 or softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1):
            return None
        made_of, sink, weights = without_sink(softmax)
        last, dropout = weighted_sum(weights)
        if last is None:
            return None
        shape = weights.meta["val"].shape
        product, lead = scores_product(made_of, shape)
        if product is None or len({node in self.frozen for node in (softmax, product.node, last.node)}) > 1:
            return None
        scores = self.scores(lead, shape[-2], shape[-1], product.node)
        try:
            joined = [at for at, size in enumerate(scores.lead) if size > 1]
            slots = regroup(joined, dict(enumerate(scores.lead)), shape[:-2]) or ()
            score = scores.of(made_of, tuple(map(tuple, slots)), softmax)
        except ValueError:
            return None
        large = scores.largest()
        if large is not None:
            return _mask_problem("attention", large, where(softmax).source)
        with self.graph.inserting_before(last.node):
            q, right = product.operands(self.graph)
            _, v = last.operands(self.graph)
            rest = _Softmax(score, 1.0, sink is not None, dropout, sink)
            self.replace(last, q, transposed(self.graph, right), v, scores, rest, False)
        return None

    def scores(self, lead: tuple[int, ...], rows: int, keys: int, product: Node | None) -> Scores:
        lead = (1,) * (2 - len(lead)) + tuple(lead)
        return Scores(lead, rows, keys, self.known, self.written, self.frozen, product)

    def replace(self, last: Product, q: Node, k: Node, v: Node, scores: Scores, softmax: _Softmax, gqa: bool) -> None:
        """Put the canonical operator in the place of `last`, the product of weights and values."""
        node = last.node
        with self.graph.inserting_before(node):
            q, k, v = self.dims(q, scores.lead, True), self.dims(k, scores.lead), self.dims(v, scores.lead)
            if k.meta["val"].shape[1] != v.meta["val"].shape[1]:
                k, v = self.dims(k, scores.lead, True), self.dims(v, scores.lead, True)
            if not gqa:
                k, v = self.without_repetition(k, v)
            dtype = max((t.meta["val"].dtype for t in (q, k, v)), key=lambda dtype: dtype.itemsize)
            q, k, v = (self.cast(t, dtype) for t in (q, k, v))
            vectors, text = self.scoring(scores, softmax, q.meta["val"].shape[1])
            pair = self.graph.call_function(torch.ops.autosp.attention.default, (q, k, v, vectors, text))
            pair.meta = {key: value for key, value in node.meta.items() if key != "val"}
            shape = (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
            out = made(self.graph, operator.getitem, (pair, 0), q.meta["val"].new_empty(shape), node)
            if softmax.sink is not None:
                out = self.sunk(pair, out, softmax.sink, scores.lead)
            sizes = dict(zip(last.words[2], node.meta["val"].shape))
            size = [sizes[letter] for letter in (*last.lead, *last.letters[:2])]
            out = self.cast(last.result(self.graph, self.reshaped(out, size)), node.meta["val"].dtype)
            out = self.laid_out(out, node.meta["val"].stride())
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def scoring(self, scores: Scores, softmax: _Softmax, heads: int) -> tuple[list[Node], str]:
        """The vectors that scores are made with, and how, as JSON: what the operator does unless told is left out."""
        score, scale = _scaled(_unrounded(softmax.score), softmax.scale)
        dtypes = [vector.meta["val"].dtype for vector, *_ in scores.vectors]
        band = band_of(score, scores.rows, scores.keys, dtypes, softmax.safe)
        if not band.plain and _unrounded(softmax.score) != softmax.score:
            score, scale = softmax.score, softmax.scale
        said = {"scale": scale, "causal": band.causal, "window": band.window, "score": score, "safe": softmax.safe}
        vectors = [] if band.plain else scores.emit(self.graph)
        if band.plain or score == "s":
            said |= {"score": None, "safe": True}
        if softmax.dropout:
            said |= {"dropout": softmax.dropout, "site": self.sites, "heads": heads}
            self.sites += 1
        silent = {"causal": False, "window": None, "score": None, "safe": True}
        return vectors, json.dumps({k: value for k, value in said.items() if k not in silent or value != silent[k]})

    def sunk(self, pair: Node, out: Node, sink: Node, lead: tuple[int, ...]) -> Node:
        """The output where a part of the weights goes to a sink: out * sigmoid(lse - sink)."""
        like, shape = out, out.meta["val"].shape
        q = pair.args[0].meta["val"]
        dtype = wide(q.dtype)
        lse = made(self.graph, operator.getitem, (pair, 1), q.new_empty(shape[:3], dtype=dtype), like)
        lse = made(self.graph, aten.unsqueeze.default, (lse, -1), lse.meta["val"].unsqueeze(-1), like)
        sink = self.cast(self.dims(sink, lead), dtype)
        more = made(self.graph, aten.sub.Tensor, (lse, sink), lse.meta["val"] - sink.meta["val"], like)
        share = made(self.graph, aten.sigmoid.default, (more,), more.meta["val"].sigmoid(), like)
        kept = made(self.graph, aten.mul.Tensor, (out, share), out.meta["val"] * share.meta["val"], like)
        return self.cast(kept, q.dtype)

    def dims(self, node: Node, lead: tuple[int, ...], whole: bool = False) -> Node:
        """The node as [batch, heads, ...]: all heads if `whole`, else of those that are alike only one."""
        shape = node.meta["val"].shape
        tail, heads = shape[-2:], list(lead[1:])
        if math.prod(shape[:-2]) != math.prod(lead):
            node = self.reshaped(node, [1] * (len(lead) + 2 - len(shape)) + list(shape))
            given = list(node.meta["val"].shape[1:-2])
            differ = 1 + max((at for at, size in enumerate(given) if size > 1), default=-1)
            if not whole and (len(given) == 1 or given[:differ] == heads[:differ]):
                heads = given
            wide = [lead[0], *heads, *tail]
            if wide != list(node.meta["val"].shape):
                node = made(self.graph, aten.expand.default, (node, wide), node.meta["val"].expand(wide), node)
        return self.reshaped(node, [lead[0], math.prod(heads), *tail])

    def reshaped(self, node: Node, shape: list[int]) -> Node:
        value = node.meta["val"]
        if list(value.shape) == shape:
            return node
        return made(self.graph, aten.reshape.default, (node, shape), value.reshape(shape), node)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        value = node.meta["val"]
        return node if value.dtype == dtype else made(self.graph, aten.to.dtype, (node, dtype), value.to(dtype), node)

    def laid_out(self, node: Node, strides: tuple[int, ...]) -> Node:
        """The node with dims in the order of `strides`, as views after it were traced; no program keeps such a copy."""
        value = node.meta["val"]
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        if order == sorted(order):
            return node
        back = [order.index(dim) for dim in range(len(order))]
        moved = made(self.graph, aten.permute.default, (node, order), value.permute(order), node)
        moved = made(self.graph, aten.contiguous.default, (moved,), moved.meta["val"].contiguous(), node)
        return made(self.graph, aten.permute.default, (moved, back), moved.meta["val"].permute(back), node)

    def without_repetition(self, k: Node, v: Node) -> tuple[Node, Node]:
        """Keys and values before their heads were repeated, where both were alike."""
        (few_k, times_k), (few_v, times_v) = before_repetition(k, self.written), before_repetition(v, self.written)
        return (few_k, few_v) if times_k == times_v else (k, v)


def _unrounded(score: Arg) -> Arg:
    """The expression over products as they are computed, in fp32 or wider."""
    if isinstance(score, tuple) and score[0] == "cast" and score[2] == "s":
        return "s"
    return tuple(map(_unrounded, score)) if isinstance(score, tuple) else score


def _scaled(score: Arg, scale: float) -> tuple[Arg, float]:
    """The expression with "s" in the place of "s" times a number, and that number in the scale."""
    found: set[Arg] = set()

    def visit(part: Arg, parent: Arg) -> None:
        if part == "s":
            found.add(parent if parent is not None and parent[0] in SCALES and parent[1] == "s" else None)
        if isinstance(part, tuple):
            for operand in part[1:]:
                visit(operand, part)

    visit(score, None)
    whole = found.pop() if len(found) == 1 else None
    if whole is None or not isinstance(whole[2], (int, float)):
        return score, scale

    def swapped(part: Arg) -> Arg:
        if part == whole:
            return "s"
        return tuple(map(swapped, part)) if isinstance(part, tuple) else part

    return swapped(score), scale * float(whole[2]) ** SCALES[whole[0]]


def _groups_problem(shapes: list[list[int]], place: str) -> Problem:
    q, k, v = shapes
    return Problem(
        "attention-shape",
        f"grouped attention over q {q}, k {k}, v {v} is not supported",
        place,
        "with enable_gqa the operator is [batch, heads, sequence, head dim], with as many heads in k as in v",
        "join the leading dims, or repeat the heads of k and v without enable_gqa",
    )


def _mask_problem(what: str, large: Node, place: str) -> Problem:
    made_at, value = where(large).source, large.meta["val"]
    return Problem(
        "mask-not-recognised",
        f"an attention mask or bias would need {value.nbytes / 2**30:.1f} GiB as a tensor of every query and key",
        f"{what} ({place})" + (f"; it is made at {made_at}" if made_at else ""),
        f"{large.target} makes it, and does not work element by element on vectors along queries and keys",
        "make it of comparisons and sums of such vectors (causal, windows, segments, prefixes, padding, ALiBi), "
        "or shorten --seq until it takes less than 256 MiB",
    )
