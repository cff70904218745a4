"""Matches the softmax pattern of attention.

    s = q @ k.T              the product that its scores are made of, element by element
    p = softmax(f(s))        with one more key, a sink, or without
    out = dropout(p) @ v     the sum of values that is all its weights are used for
"""

import math
import operator

import torch
from torch.fx import Node

from autosp_aot.export.attention.products import Product, product_of
from autosp_aot.export.canonical.constants import CASTS, functional, is_elementwise
from autosp_aot.export.canonical.shapes import RESHAPES, SAME

aten = torch.ops.aten


def without_sink(softmax: Node) -> tuple[Node, Node | None, Node]:
    """Scores, a sink joined to them as one more key (or None), and the weights of the keys.

    x = cat([scores, sink], -1);  p = softmax(x - x.max(-1, keepdim=True));  weights = p[..., :-1]
    """
    joined = _unshifted(softmax.args[0])
    if joined.target is aten.cat.default and len(joined.args[0]) == 2 and len(softmax.users) == 1:
        (scores, sink), (weights,) = joined.args[0], softmax.users
        last = (-1, joined.meta["val"].dim() - 1)
        cut = weights.target is aten.slice.Tensor and weights.args[1] in last and weights.args[2:] == (0, -1)
        if cut and joined.args[1] in last and sink.meta["val"].shape[-1] == 1:
            return scores, sink, weights
    return joined, None, softmax


def _unshifted(scores: Node) -> Node:
    """Scores before their own maximum was taken from them: the softmax is the same."""
    if scores.target is not aten.sub.Tensor or not isinstance(scores.args[1], Node):
        return scores
    whole, highest = scores.args[0], scores.args[1]
    while highest.target in (aten.detach.default, operator.getitem):
        highest = highest.args[0]
    if highest.target not in (aten.max.dim, aten.amax.default) or highest.args[0] is not whole:
        return scores
    return whole if highest.args[1] in (-1, [-1]) and highest.args[2:] == (True,) else scores


def weighted_sum(softmax: Node) -> tuple[Product | None, float]:
    """The product of a softmax's result with values, if that is all it is used for, and the dropout in between."""
    node, dropout = softmax, 0.0
    while len(node.users) == 1:
        (user,) = node.users
        last = product_of(user, 0)
        if last is not None:
            i, _, c = last.letters
            return (last if last.left is node is not last.right and last.words[0][-2:] == i + c else None), dropout
        shapes = [n.meta["val"].shape[-2:] for n in (node, user) if isinstance(n.meta.get("val"), torch.Tensor)]
        if user.target is aten.dropout.default and not dropout:
            dropout = user.args[1] if user.args[2] else 0.0
        elif user.target not in (*SAME, *CASTS, *RESHAPES, aten.type_as.default) or user.args[0] is not node:
            break
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            break
        node = user
    return None, 0.0


def scores_product(node: Node, shape: tuple[int, ...]) -> tuple[Product | None, tuple[int, ...]]:
    """The first product of matrices of which scores of this shape are made element by element, and the scores' leading
    dims as they are where there are most of them."""
    todo, seen, lead = [node], set(), shape[:-2]
    while todo:
        node = todo.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, torch.Tensor) or value.shape[-2:] != shape[-2:]:
            continue
        seen.add(node)
        if value.dim() > len(lead) + 2 and value.numel() == math.prod(shape):
            lead = value.shape[:-2]
        product = product_of(node, 2)
        if product is not None and product.words[2][-2:] == "".join(product.letters[:2]):
            return product, lead
        target = functional(node.target) if node.op == "call_function" else None
        if target is not None and (target in (*SAME, *RESHAPES, aten.type_as.default) or is_elementwise(target)):
            todo += node.all_input_nodes[::-1]
    return None, lead
