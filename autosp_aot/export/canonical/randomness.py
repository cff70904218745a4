"""Operators that draw, spelled as one operator that draws by position, and arithmetic on what it drew.

    out, mask = native_dropout(x, p, True)         u = autosp.uniform(seed, site, [B, S, H], [], dtype=f32)
                                            ->     mask = u < 1 - p
                                                   out = x * mask * (1 / (1 - p))

Every draw is a site of its own, numbered in the order of the graph. From uniform draws on, formulas and dtypes are
those of torch's kernels (ATen/core/TransformationHelper.h, ATen/native/cpu/DistributionTemplates.h).
"""

import math

import torch
from torch.fx import Graph, Node

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.canonical.constants import arguments
from autosp_aot.export.source import where
from autosp_aot.ir.program import Ref, map_args

aten = torch.ops.aten


def refuse_random(graph: Graph) -> None:
    """BuildError naming every operator of a captured step that draws in a way that has no lowering."""
    problems = [
        Problem(
            "random-operator",
            f"{node.target} draws random numbers",
            where(node).source,
            "the draws would have to be the same at every number of ranks",
            "draw with dropout, bernoulli, rand, randn, uniform, normal, exponential or randint",
        )
        for node in graph.nodes
        if _draws(node) and node.target not in LOWERINGS
    ]
    if problems:
        raise BuildError(*dict.fromkeys(problems))


def _draws(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return arguments(node).get("dropout_p") != 0


def lower(node: Node, canonical) -> tuple[str, ...]:
    """Emit the calls that stand for a node of LOWERINGS; the names of its results."""
    results = LOWERINGS[node.target](_Draw(node, canonical))
    return tuple(ref.name for ref in (results if isinstance(results, tuple) else (results,)))


class _Draw:
    """A drawing node: its arguments by name (tensors as Refs), and calls that emit what stands for it."""

    def __init__(self, node: Node, canonical):
        self.node, self.canonical, self.given = node, canonical, arguments(node)
        result = node.meta["val"]
        self.result = result[0] if isinstance(result, (tuple, list)) else result

    def __getitem__(self, name: str):
        return self.canonical.arguments(self.given[name])

    @property
    def wide(self) -> torch.dtype:
        """The dtype torch computes in before it rounds to the result's."""
        return torch.float64 if self.result.dtype is torch.float64 else torch.float32

    def uniform(self, dtype: torch.dtype) -> Ref:
        """A new draw from [0, 1) of the result's shape."""
        return Ref(self.canonical.uniform(self.node, self.result, dtype))

    def call(self, op: torch._ops.OpOverload, *args) -> Ref:
        result = op(*map_args(args, lambda leaf: self.canonical.meta(leaf) if isinstance(leaf, Ref) else leaf))
        return Ref(self.canonical.emit(self.node, str(op), args, (), [result])[0])

    def cast(self, value: Ref, dtype: torch.dtype) -> Ref:
        return Ref(self.canonical.cast(self.node, value, dtype))

    def plus(self, value: Ref, other) -> Ref:
        return self.call(aten.add.Tensor if isinstance(other, Ref) else aten.add.Scalar, value, other)

    def times(self, value: Ref, other) -> Ref:
        return self.call(aten.mul.Tensor if isinstance(other, Ref) else aten.mul.Scalar, value, other)

    def below(self, probability) -> Ref:
        """True with a probability, a number or a tensor of them."""
        if isinstance(probability, Ref):
            wide = torch.promote_types(self.canonical.meta(probability).dtype, torch.float32)
            return self.call(aten.lt.Tensor, self.uniform(wide), probability)
        return self.call(aten.lt.Scalar, self.uniform(torch.float32), probability)


def _dropout(draw: _Draw) -> tuple[Ref, Ref]:
    p = 0.0 if draw["train"] is False else draw["p"]
    mask = draw.below(1 - p)
    return draw.times(draw.times(draw["input"], mask), 0.0 if p == 1 else 1 / (1 - p)), mask


def _dropout_backward(draw: _Draw) -> Ref:
    return draw.times(draw.times(draw["grad_output"], draw["mask"]), draw["scale"])


def _bernoulli(draw: _Draw) -> Ref:
    return draw.cast(draw.below(draw["p" if "p" in draw.given else "self"]), draw.result.dtype)


def _rand(draw: _Draw) -> Ref:
    return draw.uniform(draw.result.dtype)


def _uniform(draw: _Draw) -> Ref:
    """u * (to - from) + from."""
    drawn = draw.cast(draw.uniform(draw.result.dtype), draw.wide)
    return draw.cast(draw.plus(draw.times(drawn, draw["to"] - draw["from"]), draw["from"]), draw.result.dtype)


def _normal(draw: _Draw) -> Ref:
    """sqrt(-2 log(1 - u)) cos(2 pi v), times std, plus mean (Box and Muller, 1958)."""
    log = draw.call(aten.log1p.default, draw.call(aten.neg.default, draw.uniform(draw.wide)))
    radius = draw.call(aten.sqrt.default, draw.times(log, -2.0))
    drawn = draw.times(radius, draw.call(aten.cos.default, draw.times(draw.uniform(draw.wide), 2 * math.pi)))
    if "std" in draw.given:
        drawn = draw.plus(draw.times(drawn, draw["std"]), draw["mean"])
    return draw.cast(drawn, draw.result.dtype)


def _exponential(draw: _Draw) -> Ref:
    """-log(1 - u) / lambd, never 0, so that its logarithm is finite (the gumbel distribution)."""
    log = draw.call(aten.log1p.default, draw.call(aten.neg.default, draw.uniform(draw.wide)))
    least = torch.finfo(draw.wide).eps / 2
    drawn = draw.call(aten.clamp_min.default, draw.call(aten.neg.default, log), least)
    return draw.cast(draw.call(aten.div.Scalar, drawn, draw["lambd"]), draw.result.dtype)


def _randint(draw: _Draw) -> Ref:
    """floor(u * (high - low)) + low, of 53 random bits."""
    low = draw["low"] if "low" in draw.given else 0
    drawn = draw.cast(draw.times(draw.uniform(torch.float64), float(draw["high"] - low)), torch.int64)
    return draw.cast(draw.plus(drawn, low), draw.result.dtype)


LOWERINGS = {
    aten.bernoulli.Tensor: _bernoulli,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    aten.exponential.default: _exponential,
    aten.native_dropout.default: _dropout,
    aten.native_dropout_backward.default: _dropout_backward,
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.normal.float_float: _normal,
    aten.normal_functional.default: _normal,
    aten.rand.default: _rand,
    aten.rand_like.default: _rand,
    aten.randint.default: _randint,
    aten.randint.low: _randint,
    aten.randint_like.default: _randint,
    aten.randint_like.low_dtype: _randint,
    aten.randn.default: _normal,
    aten.randn_like.default: _normal,
    aten.uniform.default: _uniform,
}
