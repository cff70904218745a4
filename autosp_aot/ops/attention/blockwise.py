"""Attention in plain torch with O(S) memory, for what no kernel has: windows, score expressions, gradients of lse.

    for a block of rows:  for each block of keys that some row of it can see:
        scores = score(q k' * scale)  ->  online softmax (Dao et al., arXiv:2205.14135)

    q, out, grad_out: [B, n, R, D]   k, v: [B, n, T, D]   lse: [B, n, R]   vectors: [B or 1, n or 1, R or 1, T or 1]

Which blocks can be seen follows from bounds on the scores: a block of which every score is below HIDDEN weighs nothing
in a row that sees anything else. Rows that see nothing else are given those blocks too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from autosp_aot.ir.intervals import HIDDEN, INF
from autosp_aot.ir.operators import wide
from autosp_aot.ir.score_expr import evaluate
from autosp_aot.ops.attention.arguments import KernelCall, Saved
from autosp_aot.ops.attention.block_bounds import blocks_of, ends_of
from autosp_aot.ops.attention.workspace import gradient, outputs
from autosp_aot.targets.table import TARGETS

# An lse beyond this has lost digits of the weights: they are divided by their sum.
ROUNDED = 100.0


def blockwise(call: KernelCall) -> tuple[Tensor, Tensor]:
    """Output and lse."""
    blocks, scoring = _Blocks(call), call.scoring
    results = outputs(call.q, call.v.shape[3], call.q.device.type)
    for rows in _blocks(call.q, call.q.shape[2]):
        seen, hidden = blocks.keys(rows)
        state = _state(call, rows, blocks.dtype)
        for keys in seen:
            state = blocks.add(state, rows, keys)
        if hidden and bool((state[0] <= HIDDEN).any()):
            for keys in hidden:
                state = blocks.add(state, rows, keys)
        top, total, out = state
        empty = total == 0
        if scoring.safe:
            total = total.masked_fill(empty, 1.0)
        results[0][:, :, rows] = out / total.unsqueeze(-1)
        results[1][:, :, rows] = (top + total.log()).masked_fill(empty, -INF if scoring.safe else float("nan"))
    return results


def blockwise_backward(call: KernelCall, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: the scores are made again block by block from lse."""
    blocks, scale = _Blocks(call), call.scoring.scale
    grad_q, grad_k, grad_v = (gradient(t, blocks.dtype).zero_() for t in (call.q, call.k, call.v))
    for rows, keys, block, weights, grad_scores in blocks.gradients(saved):
        grad_v[:, :, keys] += block.dropped(weights).transpose(-1, -2) @ saved.grad_out[:, :, rows].to(blocks.dtype)
        grad_products = block.gradient(block.products, grad_scores) * scale
        grad_q[:, :, rows] += grad_products @ call.k[:, :, keys].to(blocks.dtype)
        grad_k[:, :, keys] += grad_products.transpose(-1, -2) @ call.q[:, :, rows].to(blocks.dtype)
    return grad_q.to(call.q.dtype), grad_k.to(call.k.dtype), grad_v.to(call.v.dtype)


def blockwise_vector_gradient(call: KernelCall, saved: Saved, which: int) -> Tensor:
    """The gradient of vector number `which`, of its shape, in the dtype of the computation."""
    blocks = _Blocks(call, shortcuts=False)
    gradient = torch.zeros(call.vectors[which].shape, dtype=blocks.dtype, device=call.q.device)
    for rows, keys, block, _, grad_scores in blocks.gradients(saved):
        _cut(gradient, rows, keys).add_(block.gradient(block.vectors[which], grad_scores))
    return gradient


@dataclass(frozen=True)
class _Block:
    """Scores [B, n, rows, keys] as the softmax takes them, and the graph from products and vectors to them."""

    scores: Tensor
    graph: Tensor
    products: Tensor
    vectors: list[Tensor]
    factor: Tensor | None

    def dropped(self, weights: Tensor) -> Tensor:
        """Weights after dropout, or a gradient before it."""
        return weights if self.factor is None else weights * self.factor

    def gradient(self, leaf: Tensor, grad_scores: Tensor) -> Tensor:
        """The gradient of products or of a vector, from that of the scores."""
        if self.graph is leaf:
            return grad_scores
        (found,) = torch.autograd.grad(self.graph, leaf, grad_scores, allow_unused=True)
        return torch.zeros_like(leaf) if found is None else found


class _Blocks:
    """Any block of a call's scores.

    With `shortcuts` a block in which vectors happen to change no score is the products: right but for their gradients.
    """

    def __init__(self, call: KernelCall, shortcuts: bool = True):
        self.q, self.k, self.v, self.vectors, self.scoring = call.q, call.k, call.v, call.vectors, call.scoring
        self.dtype = wide(self.q.dtype)
        self.size, self.blocks = TARGETS[self.q.device.type].attention_block, _blocks(self.k, self.k.shape[2])
        keyed = [vector.shape[2] == 1 and not self.scoring.traced for vector in self.vectors]
        self.ends = [ends_of(vector, self.size) if known else None for vector, known in zip(self.vectors, keyed)]
        self.plain: set[int] = set()
        self.shortcuts = shortcuts

    def keys(self, rows: slice) -> tuple[list[slice], list[slice]]:
        """Blocks of keys that rows can see, and those of which no score is above HIDDEN."""
        scoring = self.scoring
        first, last = scoring.first_row + rows.start, scoring.first_row + rows.stop - 1
        start = 0 if scoring.window is None else max(first - scoring.window + 1, 0) // self.size
        stop = last // self.size + 1 if scoring.causal else len(self.blocks)
        blocks = self.blocks[start:stop]
        if scoring.score is None or scoring.traced or not blocks:
            return blocks, []
        known = [both or ends_of(_cut(v, rows, slice(None)), self.size) for both, v in zip(self.ends, self.vectors)]
        own = lambda end: end if len(end) == 1 else end[start:stop]  # noqa: E731
        ends = [(own(low), own(high)) for low, high in known]
        hidden, plain = blocks_of(scoring.score, (first, last), blocks, ends)
        self.plain = {keys.start for keys, is_plain in zip(blocks, plain) if is_plain and self.shortcuts}
        seen = [keys for keys, is_hidden in zip(blocks, hidden) if not is_hidden]
        return seen, [keys for keys, is_hidden in zip(blocks, hidden) if is_hidden]

    def block(self, rows: slice, keys: slice, differentiable: bool = False) -> _Block:
        scoring, device = self.scoring, self.q.device
        left, right = self.q[:, :, rows].to(self.dtype), self.k[:, :, keys].to(self.dtype)
        products = scores = left @ right.transpose(-1, -2) * scoring.scale
        vectors = [_cut(vector, rows, keys) for vector in self.vectors]
        at = torch.arange(rows.start, rows.stop, device=device).view(1, 1, -1, 1) + scoring.first_row
        key = torch.arange(keys.start, keys.stop, device=device).view(1, 1, 1, -1)
        if scoring.score is not None and keys.start not in self.plain:
            with torch.set_grad_enabled(differentiable):
                products = products.requires_grad_(differentiable)
                vectors = [v.detach().requires_grad_(differentiable and v.is_floating_point()) for v in vectors]
                leaves = {"s": products, "q": at, "k": key} | {f"v{n}": vector for n, vector in enumerate(vectors)}
                scores = evaluate(scoring.score, leaves).to(self.dtype).expand_as(products)
        graph, scores = scores, scores.detach()
        if scoring.causal:
            scores = scores.masked_fill(key > at, -INF)
        if scoring.window is not None:
            scores = scores.masked_fill(key <= at - scoring.window, -INF)
        drop = scoring.dropout
        factor = None if drop is None else drop.factor(self.q.shape[0], self.q.shape[1], at, key, self.dtype)
        return _Block(scores, graph, products, vectors, factor)

    def add(self, state: tuple[Tensor, Tensor, Tensor], rows: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Highest score, sum of weights and weighted sum of values of each row, with one more block of keys."""
        top, total, out = state
        block = self.block(rows, keys)
        scores = block.scores
        higher = torch.maximum(top, scores.amax(-1))
        base = higher.masked_fill(higher == -INF, 0.0)
        weights, shrink = torch.exp(scores - base.unsqueeze(-1)), torch.exp(top - base)
        out = out * shrink.unsqueeze(-1) + block.dropped(weights) @ self.v[:, :, keys].to(self.dtype)
        return higher, total * shrink + weights.sum(-1), out

    def total(self, rows: slice, seen: list[slice], base: Tensor) -> Tensor:
        """The sum of weights of each row: one, but for what lse lost of it in rounding."""
        blocks = (self.block(rows, keys).scores - base[:, :, rows].unsqueeze(-1) for keys in seen)
        return reduce(torch.add, (torch.exp(scores).sum(-1) for scores in blocks))

    def gradients(self, saved: Saved) -> Iterator[tuple[slice, slice, _Block, Tensor, Tensor]]:
        """Of each block that counts: rows, keys, scores, weights, and the gradient of the scores."""
        lse, grad_lse = saved.lse, saved.grad_lse
        base = lse.masked_fill(lse == -INF, INF)
        for rows in _blocks(self.q, self.q.shape[2]):
            seen, hidden = self.keys(rows)
            mine, total = lse[:, :, rows], None
            if hidden and bool(((mine <= HIDDEN) & (mine > -INF)).any()):
                seen = seen + hidden
            rounded = mine.isfinite() & (mine.abs() > ROUNDED)
            if self.scoring.score is not None and (self.scoring.traced or bool(rounded.any())):
                total = self.total(rows, seen, base).masked_fill(~rounded, 1.0).unsqueeze(-1)
            grad = saved.grad_out[:, :, rows].to(self.dtype)
            delta = (grad * saved.out[:, :, rows].to(self.dtype)).sum(-1, keepdim=True)
            if grad_lse is not None:
                delta = delta - grad_lse[:, :, rows].unsqueeze(-1)
            for keys in seen:
                block = self.block(rows, keys, differentiable=True)
                weights = torch.exp(block.scores - base[:, :, rows].unsqueeze(-1))
                weights = weights if total is None else weights / total
                grad_weights = block.dropped(grad @ self.v[:, :, keys].to(self.dtype).transpose(-1, -2))
                yield rows, keys, block, weights, weights * (grad_weights - delta)


def _blocks(like: Tensor, count: int) -> list[slice]:
    size = TARGETS[like.device.type].attention_block
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _cut(vector: Tensor, rows: slice, keys: slice) -> Tensor:
    """A view of what a block of rows and keys reads of a vector."""
    return vector[:, :, rows if vector.shape[2] > 1 else slice(None), keys if vector.shape[3] > 1 else slice(None)]


def _state(call: KernelCall, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows that have seen nothing yet."""
    top = call.q.new_full((*call.q.shape[:2], rows.stop - rows.start), -INF, dtype=dtype)
    return top, torch.zeros_like(top), call.q.new_zeros((*top.shape, call.v.shape[3]), dtype=dtype)
