"""Which ATen operators are standard operators of ONNX: a row each, for the calls in which both mean the same.

    aten.mul.Tensor(%x, %y)              Mul(x, y)
    aten.rsub.Scalar(%x, 1)              Sub(1, x)
    aten.slice.Tensor(%x, 1, 0, 4, 1)    Slice(x, [0], [4], [1], [1])
    aten.add.Tensor(%x, %y, alpha=2)     none: `Add` has no alpha, and the row does not read it
    aten.mul.Tensor(%f16, %f32)          none: `Mul` takes operands of one dtype

An argument that a row does not read must have its default, and dtypes must be those of ONNX's own schemas. What a
number would lose in the dtype of its operand ONNX would compute without, so such a call stays ATen's.
"""

from collections.abc import Callable, Mapping

from autosp_aot.commands.interchange.onnx_calls import TYPES, AtenCall, Constant, Standard, fits
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Instr, Value

Row = Callable[[AtenCall], Standard | None]


def standard(instr: Instr, values: Mapping[str, Value]) -> Standard | None:
    """The standard operator that means what an ATen call does; None where there is none. `values` are its operands."""
    row = ROWS.get(instr.op)
    if row is None:
        return None
    call = AtenCall(instr, values)
    found = row(call)
    return found if found is not None and call.all_read and fits(found, instr.outs) else None


def _ints(*numbers: int) -> Constant:
    return Constant("i64", numbers)


def _of(op: str, *names: str, **attributes) -> Row:
    """A row whose operands, in this order, are all there is to the call."""
    return lambda call: Standard(op, call.operands(*names), attributes)


def _axis(op: str, name: str = "dim") -> Row:
    return lambda call: Standard(op, call.operands("self"), {"axis": call[name]})


def _softmax(op: str) -> Row:
    return lambda call: None if call["half_to_float"] else _axis(op)(call)


def _boolean(op: str, bitwise: str, *names: str) -> Row:
    """Bits of a truth are the truth."""
    return lambda call: _of(op if call["self"].dtype == "b8" else bitwise, *names)(call)


def _reshape(call: AtenCall) -> Standard:
    call["shape"]
    attributes = {"allowzero": 1} if 0 in call.shape else {}
    return Standard("Reshape", (call["self"], _ints(*call.shape)), attributes)


def _permute(call: AtenCall) -> Standard:
    return Standard("Transpose", (call["self"],), {"perm": _positive(call["dims"], call["self"])})


def _positive(dims: tuple[int, ...], of: Value) -> tuple[int, ...]:
    return tuple(dim % max(len(of.shape), 1) for dim in dims)


def _expand(call: AtenCall) -> Standard:
    call["size"]
    return Standard("Expand", (call["self"], _ints(*call.shape)))


def _cast(call: AtenCall) -> Standard:
    call["dtype"]
    return Standard("Cast", (call["self"],), {"to": TYPES[call.dtype]})


def _cat(call: AtenCall) -> Standard | None:
    tensors = call["tensors"]
    alike = all(len(tensor.shape) == len(call.shape) for tensor in tensors)
    return Standard("Concat", tensors, {"axis": call["dim"]}) if alike else None


def _slice(call: AtenCall) -> Standard:
    dim = call["dim"]
    start, end = (default if given is None else given for given, default in
                  ((call["start"], 0), (call["end"], call["self"].shape[dim])))  # fmt: skip
    return Standard("Slice", (call["self"], _ints(start), _ints(end), _ints(dim), _ints(call["step"])))


def _flip(call: AtenCall) -> Standard:
    dims, shape = call["dims"], call["self"].shape
    minus, ends = (-1,) * len(dims), tuple(-shape[dim] - 1 for dim in dims)
    return Standard("Slice", (call["self"], _ints(*minus), _ints(*ends), _ints(*dims), _ints(*minus)))


def _slice_backward(call: AtenCall) -> Standard | None:
    sizes, dim, grad = call["input_sizes"], call["dim"], call["grad_output"]
    start, _ = call["start"], call["end"]
    size = sizes[dim]
    before = min(max(start + size if start < 0 else start, 0), size)
    lead = [0] * len(sizes)
    trail = [0] * len(sizes)
    lead[dim], trail[dim] = before, size - before - grad.shape[dim]
    return None if call["step"] != 1 else Standard("Pad", (grad, _ints(*lead, *trail), Constant(grad.dtype, 0)))


def _pad(call: AtenCall) -> Standard | None:
    source, pad = call.operands("self", "value"), call["pad"]
    rest = (0,) * (len(call.shape) - len(pad) // 2)
    lead, trail = rest + pad[-2::-2], rest + pad[::-2]
    return None if min(pad, default=0) < 0 else Standard("Pad", (source[0], _ints(*lead, *trail), source[1]))


def _sum(call: AtenCall) -> Standard:
    call["dtype"]
    dims = call["dim"]
    axes = (_ints(*dims),) if dims else ()
    return Standard("ReduceSum", (call["self"], *axes), {"keepdims": int(call["keepdim"])})


def _sum_all(call: AtenCall) -> Standard:
    call["dtype"]
    return Standard("ReduceSum", (call["self"],), {"keepdims": 0})


def _cumsum(call: AtenCall) -> Standard:
    call["dtype"]
    return Standard("CumSum", (call["self"], Constant("i64", call["dim"])))


def _embedding(call: AtenCall) -> Standard:
    for unused_forward in ("padding_idx", "scale_grad_by_freq", "sparse"):
        call[unused_forward]
    return Standard("Gather", call.operands("weight", "indices"), {"axis": 0})


def _index(call: AtenCall) -> Standard | None:
    indices = call["indices"]
    at = [dim for dim, index in enumerate(indices) if index is not None]
    return Standard("Gather", (call["self"], indices[at[0]]), {"axis": at[0]}) if len(at) == 1 else None


def _gather(call: AtenCall) -> Standard | None:
    source, index = call["self"], call["index"]
    (dim,) = _positive((call["dim"],), source)
    return Standard("GatherElements", (source, index), {"axis": dim}) if _along(source, index, dim) else None


def _scatter(**attributes) -> Row:
    def row(call: AtenCall) -> Standard | None:
        source, index, src = call["self"], call["index"], call["src"]
        (dim,) = _positive((call["dim"],), source)
        if index.shape != src.shape or not _along(source, index, dim):
            return None
        return Standard("ScatterElements", (source, index, src), {"axis": dim} | attributes)

    return row


def _along(source: Value, index: Value, dim: int) -> bool:
    """Whether shapes differ in one dim alone."""
    return source.shape[:dim] + source.shape[dim + 1 :] == index.shape[:dim] + index.shape[dim + 1 :]


def _masked_fill(call: AtenCall) -> Standard:
    source, value = call.operands("self", "value")
    return Standard("Where", (call["mask"], value, source))


def _filled(name: str | None, number: int = 0) -> Row:
    """A row whose result is one number everywhere: that of an argument, or a known one."""

    def row(call: AtenCall) -> Standard | None:
        for argument in list(call.unread):
            call[argument]
        value = Constant(call.dtype, (call[name] if name else number,))
        return Standard("ConstantOfShape", (_ints(*call.shape),), {"value": value}) if value.exact else None

    return row


def _arange(call: AtenCall) -> Standard | None:
    dtype, numbers = call.dtype, (call["start"], call["end"], call["step"])
    call["dtype"]
    whole = not DTYPES[dtype].is_floating_point and all(isinstance(number, int) for number in numbers)
    return Standard("Range", tuple(Constant(dtype, number) for number in numbers)) if whole else None


def _tril(op_upper: int) -> Row:
    return lambda call: Standard("Trilu", (call["self"], Constant("i64", call["diagonal"])), {"upper": op_upper})


def _topk(call: AtenCall) -> Standard:
    order = {"axis": call["dim"], "largest": int(call["largest"]), "sorted": int(call["sorted"])}
    return Standard("TopK", (call["self"], _ints(call["k"])), order)


def _layer_norm(call: AtenCall) -> Standard:
    sizes, operands = call["normalized_shape"], call.operands("input", "weight", "bias")
    return Standard("LayerNormalization", operands, {"axis": -len(sizes), "epsilon": call["eps"]})


def _nll_loss(call: AtenCall) -> Standard:
    reduction = ("none", "mean", "sum")[call["reduction"]]
    operands = tuple(operand for operand in call.operands("self", "target", "weight") if operand is not None)
    attributes = {"reduction": reduction, "ignore_index": call["ignore_index"]}
    return Standard("NegativeLogLikelihoodLoss", operands, attributes)


def _convolution(call: AtenCall) -> Standard | None:
    dims = len(call.shape) - 2
    strides, pads, dilations = (n * dims if len(n) == 1 else n for n in
                                (call["stride"], call["padding"], call["dilation"]))  # fmt: skip
    call["output_padding"]
    attributes = {"strides": strides, "pads": pads * 2, "dilations": dilations, "group": call["groups"]}
    operands = call.operands("input", "weight", "bias")
    return None if call["transposed"] else Standard("Conv", operands[: 2 + (operands[2] is not None)], attributes)


def _gelu(call: AtenCall) -> Standard:
    return Standard("Gelu", (call["self"],), {"approximate": call["approximate"]})


_BOTH = ("self", "other")
_UNARY = {
    "abs": "Abs", "alias": "Identity", "ceil": "Ceil", "clone": "Identity", "cos": "Cos", "erf": "Erf", "exp": "Exp",
    "floor": "Floor", "isnan": "IsNaN", "log": "Log", "logical_not": "Not", "neg": "Neg", "reciprocal": "Reciprocal",
    "relu": "Relu", "sigmoid": "Sigmoid", "silu": "Swish", "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh",
}  # fmt: skip
_BINARY = {
    "add": "Add", "div": "Div", "eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual",
    "lt": "Less", "mul": "Mul", "sub": "Sub",
}  # fmt: skip

ROWS: dict[str, Row] = {
    **{f"aten.{name}.default": _of(op, "self") for name, op in _UNARY.items()},
    **{f"aten.{name}.{kind}": _of(op, *_BOTH) for name, op in _BINARY.items() for kind in ("Tensor", "Scalar")},
    "aten._log_softmax.default": _softmax("LogSoftmax"),
    "aten._softmax.default": _softmax("Softmax"),
    "aten._to_copy.default": _cast,
    "aten.addmm.default": _of("Gemm", "mat1", "mat2", "self"),
    "aten.arange.start_step": _arange,
    "aten.bitwise_and.Tensor": _boolean("And", "BitwiseAnd", *_BOTH),
    "aten.bitwise_not.default": _boolean("Not", "BitwiseNot", "self"),
    "aten.bitwise_or.Tensor": _boolean("Or", "BitwiseOr", *_BOTH),
    "aten.bmm.default": _of("MatMul", "self", "mat2"),
    "aten.cat.default": _cat,
    "aten.clamp.default": _of("Clip", "self", "min", "max"),
    "aten.constant_pad_nd.default": _pad,
    "aten.convolution.default": _convolution,
    "aten.cumsum.default": _cumsum,
    "aten.embedding.default": _embedding,
    "aten.expand.default": _expand,
    "aten.flip.default": _flip,
    "aten.full.default": _filled("fill_value"),
    "aten.full_like.default": _filled("fill_value"),
    "aten.gather.default": _gather,
    "aten.gelu.default": _gelu,
    "aten.index.Tensor": _index,
    "aten.logical_and.default": _of("And", *_BOTH),
    "aten.logical_or.default": _of("Or", *_BOTH),
    "aten.logical_xor.default": _of("Xor", *_BOTH),
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.maximum.default": _of("Max", *_BOTH),
    "aten.minimum.default": _of("Min", *_BOTH),
    "aten.mm.default": _of("MatMul", "self", "mat2"),
    "aten.native_layer_norm.default": _layer_norm,
    "aten.nll_loss_forward.default": _nll_loss,
    "aten.ones.default": _filled(None, 1),
    "aten.ones_like.default": _filled(None, 1),
    "aten.permute.default": _permute,
    "aten.pow.Scalar": _of("Pow", "self", "exponent"),
    "aten.pow.Tensor_Scalar": _of("Pow", "self", "exponent"),
    "aten.pow.Tensor_Tensor": _of("Pow", "self", "exponent"),
    "aten.reshape.default": _reshape,
    "aten.rsub.Scalar": _of("Sub", "other", "self"),
    "aten.scalar_tensor.default": _filled("s"),
    "aten.scatter.src": _scatter(),
    "aten.scatter_add.default": _scatter(reduction="add"),
    "aten.slice.Tensor": _slice,
    "aten.slice_backward.default": _slice_backward,
    "aten.sum.default": _sum_all,
    "aten.sum.dim_IntList": _sum,
    "aten.topk.default": _topk,
    "aten.tril.default": _tril(0),
    "aten.triu.default": _tril(1),
    "aten.where.self": lambda call: Standard("Where", (call["condition"], call["self"], call["other"])),
    "aten.zeros.default": _filled(None),
    "aten.zeros_like.default": _filled(None),
}

