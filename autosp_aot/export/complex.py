"""Complex values as pairs of reals, while the forward graph is run for its joint graph: programs have no complex dtype.

    z = view_as_complex(x)         z = (x[..., 0], x[..., 1])
    y = z * w                      y = (z.re * w.re - z.im * w.im, z.re * w.im + z.im * w.re)
    view_as_real(y)                stack([y.re, y.im], -1)

What is linear is done to both parts, a product by its four. Gradients are those of the real operators, which for a
real loss are torch's (https://docs.pytorch.org/docs/stable/notes/autograd.html, "Autograd for Complex Numbers": the
conjugate Wirtinger derivative, the gradient of both parts). The values of a complex buffer or literal are the same
pair, as `torch.view_as_real` has it, and so they are stored.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from autosp_aot.errors import BuildError, Problem

aten = torch.ops.aten
REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class Complex:
    """A complex value by its parts, of one shape and dtype."""

    re: Tensor
    im: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return next(complex_ for complex_, real in REAL.items() if real is self.re.dtype)


Number = Any  # a tensor, a Complex, or a number of Python, complex or real
Op = torch._ops.OpOverload


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor [...] as its parts [..., 2]; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_pair(parts: Tensor) -> Complex:
    """The value whose parts [..., 2] these are."""
    return Complex(parts.select(-1, 0), parts.select(-1, 1))


def concerned(target: object, args: tuple, kwargs: Mapping) -> bool:
    """Whether a call takes a complex value, or makes one of reals."""
    leaves = tree_leaves((args, dict(kwargs)), is_leaf=_is_pair)
    return target in MAKERS or any(isinstance(n, (Complex, complex)) or n in REAL for n in leaves if _known(n))


def called(target: Op, args: tuple, kwargs: Mapping, place: str):
    """What a call gives, complex values as pairs. Raises BuildError (`complex-operator`) for one that is not known."""
    rule = MAKERS.get(target) or RULES.get(target)
    with torch.autocast("cpu", enabled=False):  # which leaves complex values alone
        if rule is None and target in LINEAR:
            return _linear(target, args, kwargs)
        if rule is not None:
            return rule(target, *args, **kwargs)
    raise BuildError(Problem(
        "complex-operator", f"{target} is called with complex values", place,
        "complex values are pairs of reals here, for which it has no rule",
        "write it with real numbers, or with products, sums and views of complex ones",
    ))  # fmt: skip


def memory_of(node: Node) -> Node:
    """What made the memory that a node's result may lie in: whatever torch says of it is a view is followed."""
    while node.args and isinstance(node.args[0], Node):
        views = isinstance(node.target, Op) and any(result.alias_info for result in node.target._schema.returns)
        if not views and node.target is not operator.getitem:
            break
        node = node.args[0]
    return node


def refuse_written(node: Node, complex_memory: set[Node], place: str) -> None:
    """Raise BuildError (`complex-operator`) where a node writes into memory that a complex value lies in.

    A pair may be a copy where torch has a view: conjugates, and both parts put together.
    """
    if not isinstance(node.target, Op) or not node.target._schema.is_mutable:
        return
    written = [
        given
        for argument, given in zip(node.target._schema.arguments, node.args)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Node)
    ]
    if any(memory_of(given) in complex_memory for given in written):
        raise BuildError(Problem(
            "complex-operator", f"{node.target} writes into the memory of a complex value", place,
            "complex values are pairs of reals here, which may be copies of what is written",
            "compute new parts, and make a complex value of them with view_as_complex",
        ))  # fmt: skip


def _known(leaf: object) -> bool:
    return isinstance(leaf, (Complex, complex, torch.dtype))


def _is_pair(leaf: object) -> bool:
    return isinstance(leaf, Complex)


def _linear(target: Op, args: tuple, kwargs: Mapping):
    """Both parts, one after the other; a real operand among several has no imaginary part."""

    def part(pick: Callable[[Complex], Tensor], imaginary: bool):
        def of(leaf):
            if isinstance(leaf, Complex):
                return pick(leaf)
            if isinstance(leaf, torch.dtype):
                return REAL.get(leaf, leaf)
            floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return torch.zeros_like(leaf) if imaginary and floating else leaf

        mapped = tree_map(of, (args, dict(kwargs)), is_leaf=_is_pair)
        return target(*mapped[0], **mapped[1])

    re, im = part(lambda z: z.re, False), part(lambda z: z.im, True)
    return [Complex(a, b) for a, b in zip(re, im)] if isinstance(re, (list, tuple)) else Complex(re, im)


def _parts(value: Number) -> tuple[Any, Any]:
    """Real and imaginary part, tensors or numbers; None for that of a real."""
    if isinstance(value, Complex):
        return value.re, value.im
    return (value.real, value.imag) if isinstance(value, complex) else (value, None)


def _product(target: Callable[..., Tensor], a: Number, b: Number, *rest) -> Complex:
    """Of any operator that is linear in each of two operands."""
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    of = lambda x, y: target(x, y, *rest) if isinstance(x, Tensor) else target(y, x, *rest)  # noqa: E731
    if ai is None:
        return Complex(of(ar, br), of(ar, bi))
    if bi is None:
        return Complex(of(ar, br), of(ai, br))
    return Complex(of(ar, br) - of(ai, bi), of(ar, bi) + of(ai, br))


def _einsum(target: Op, equation: str, operands: list[Number], **_) -> Complex:
    """Of one operand, or two; of more from left to right would be another order."""
    if len(operands) == 1:
        return Complex(target(equation, [operands[0].re]), target(equation, [operands[0].im]))
    return _product(lambda x, y: target(equation, [x, y]), *operands)


def _sum(target: Op, a: Number, b: Number, *, alpha: float = 1) -> Complex:
    """a + b or a - b."""
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    re = target(ar, br, alpha=alpha)
    if bi is None:
        return Complex(re, ai.expand(re.shape))
    return Complex(re, target(torch.zeros_like(re) if ai is None else ai, bi, alpha=alpha))


def _quotient(target: Op, a: Number, b: Number) -> Complex:
    br, bi = _parts(b)
    if bi is None:
        ar, ai = _parts(a)
        return Complex(target(ar, br), target(ai, br))
    length = br * br + bi * bi
    return _product(aten.mul.Tensor, a, Complex(br / length, -bi / length))


def _cast(target: Op, x: Number, *args, dtype: torch.dtype | None = None, **_) -> Number:
    """To another dtype; a real has no imaginary part, and of a complex value none is left in a real dtype."""
    wanted = dtype or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
    wanted = wanted or next((arg.dtype for arg in args if isinstance(arg, (Tensor, Complex))), x.dtype)
    if not isinstance(x, Complex):
        x = x.to(REAL[wanted])
        return Complex(x, torch.zeros_like(x))
    if wanted not in REAL:
        return x.re.to(wanted)
    return Complex(x.re.to(REAL[wanted]), x.im.to(REAL[wanted]))


def _polar_part(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The absolute value or the angle, by both parts; the gradient at zero is zero."""

    def part(target: Op, z: Complex) -> Tensor:
        zero = (z.re == 0) & (z.im == 0)
        elsewhere = function(torch.where(zero, torch.ones_like(z.re), z.re), z.im)
        return torch.where(zero, function(z.re, z.im).detach(), elsewhere)

    return part


def _exp(target: Op, z: Complex) -> Complex:
    return _polar(target, z.re.exp(), z.im)


def _polar(target: Op, length: Tensor, angle: Tensor) -> Complex:
    return Complex(length * angle.cos(), length * angle.sin())


def _filled(value: float) -> Callable[..., Complex]:
    return lambda target, z, **_: Complex(torch.full_like(z.re, value), torch.zeros_like(z.im))


# What makes complex values of reals.
MAKERS: dict[Op, Callable] = {
    aten.complex.default: lambda target, re, im: Complex(re, im),
    aten.polar.default: _polar,
    aten.view_as_complex.default: lambda target, x: as_pair(x),
}
CONJUGATE = lambda target, z: Complex(z.re, -z.im)  # noqa: E731
SAME = lambda target, z: z  # noqa: E731
CASTS = (
    aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
)  # fmt: skip
RULES: dict[Op, Callable] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.outer.default,
                     aten.mv.default, aten.dot.default), _product),
    **dict.fromkeys((aten._conj.default, aten.conj.default, aten.conj_physical.default, aten._conj_physical.default),
                    CONJUGATE),
    **dict.fromkeys((aten.resolve_conj.default, aten.resolve_neg.default), SAME),
    aten.abs.default: _polar_part(torch.hypot),
    aten.angle.default: _polar_part(lambda re, im: torch.atan2(im, re)),
    aten.div.Tensor: _quotient,
    aten.einsum.default: _einsum,
    aten.exp.default: _exp,
    aten.imag.default: lambda target, z: z.im,
    aten.ones_like.default: _filled(1.0),
    aten.real.default: lambda target, z: z.re,
    aten.square.default: lambda target, z: _product(aten.mul.Tensor, z, z),
    aten.view_as_real.default: lambda target, z: torch.stack([z.re, z.im], -1),
    aten.zeros_like.default: _filled(0.0),
}  # fmt: skip
# What is linear over the reals, whatever it takes besides.
LINEAR = frozenset({
    aten.alias.default, aten.cat.default, aten.chunk.default, aten.clone.default, aten.contiguous.default,
    aten.cumsum.default, aten.detach.default, aten.diagonal.default, aten.embedding.default, aten.expand.default,
    aten.expand_as.default, aten.flatten.using_ints, aten.flip.default, aten.gather.default, aten.index.Tensor,
    aten.index_select.default, aten.mean.default, aten.mean.dim, aten.movedim.int, aten.movedim.intlist,
    aten.narrow.default, aten.neg.default, aten.permute.default, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.reshape.default, aten.roll.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor,
    aten.split_with_sizes.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.stack.default,
    aten.sum.default, aten.sum.dim_IntList, aten.t.default, aten.transpose.int, aten.tril.default, aten.triu.default,
    aten.unbind.int, aten.unflatten.int, aten.unsqueeze.default, aten.view.default, aten.view_as.default,
    aten.where.self,
})  # fmt: skip
