"""Every row of the table against its operator of torch, in ONNX's own evaluator; and calls that are none of it."""

import pytest
import torch
from onnx.reference import ReferenceEvaluator

from autosp_aot.commands.interchange.onnx_file import onnx_model
from autosp_aot.commands.interchange.onnx_operators import ROWS, standard
from autosp_aot.ir.operators import DTYPE_NAMES, DTYPES, overload
from autosp_aot.ir.program import Dtype, Input, Instr, Program, Ref, Section, Value, map_args
from tests.commands.interchange.reference import GatherElements

DRAW = torch.Generator().manual_seed(0)
X, Y = (torch.randn(3, 4, dtype=torch.float64, generator=DRAW) for _ in range(2))
P, N = X.abs() + 0.1, torch.arange(12).view(3, 4)
T, U = X > 0, Y > 0
IDS, PICK = torch.tensor([[1, 0], [2, 2]]), torch.tensor([[0, 3], [1, 1], [2, 0]])
SINGLE = X.float()
F64, I64 = Dtype("f64"), Dtype("i64")
NAMES = "abs alias ceil clone cos erf exp floor gelu isnan neg reciprocal relu sigmoid silu sin tanh".split()
UNARY = {
    **dict.fromkeys(NAMES, X),
    "bitwise_not": T, "log": P, "logical_not": T, "sqrt": P,
}  # fmt: skip
BINARY = "add div eq ge gt le lt mul sub".split()
CALLS = [
    *((f"aten.{name}.default", (x,)) for name, x in UNARY.items()),
    *((f"aten.{name}.Tensor", (X, Y)) for name in BINARY),
    *((f"aten.{name}.Scalar", (X, 0.5)) for name in BINARY),
    ("aten.add.Tensor", (X, 0.5)),
    ("aten.eq.Scalar", (N, 7.0)),
    ("aten.bitwise_not.default", (N,)),
    *((f"aten.bitwise_{name}.Tensor", pair) for name in ("and", "or") for pair in ((T, U), (N, N + 1))),
    *((f"aten.logical_{name}.default", (T, U)) for name in ("and", "or", "xor")),
    *((f"aten.{name}.default", (X, Y)) for name in ("maximum", "minimum")),
    ("aten.gelu.default", (X,), {"approximate": "tanh"}),
    ("aten._log_softmax.default", (X, 1, False)),
    ("aten._softmax.default", (X, 0, False)),
    ("aten._to_copy.default", (X,), {"dtype": Dtype("f32")}),
    ("aten._to_copy.default", (X,), {"dtype": Dtype("b8")}),
    ("aten.addmm.default", (Y[0, :3], X, Y.t().contiguous())),
    ("aten.arange.start_step", (7, 1, -2), {"dtype": I64}),
    ("aten.bmm.default", (X.view(1, 3, 4), Y.view(1, 4, 3))),
    ("aten.mm.default", (X, Y.view(4, 3))),
    ("aten.cat.default", ((X, Y, X), 1)),
    ("aten.clamp.default", (X, -0.5, 0.5)),
    ("aten.clamp.default", (X, None, 0)),
    ("aten.constant_pad_nd.default", (X, (1, 2, 0, 3), 0.5)),
    ("aten.constant_pad_nd.default", (N, (0, 1), -100.0)),
    ("aten.convolution.default", (X.view(1, 2, 6), Y.view(4, 1, 3), Y[0], (2,), (1,), (1,), False, (0,), 2)),
    ("aten.convolution.default", (X.view(1, 2, 6), Y.view(2, 2, 3), None, (1,), (2,), (2,), False, (0,), 1)),
    ("aten.cumsum.default", (X, -1)),
    ("aten.embedding.default", (X, IDS, 0)),
    ("aten.expand.default", (X.view(3, 1, 4), (3, 2, -1))),
    ("aten.flip.default", (X, (-1, 0))),
    ("aten.full.default", ((2, 3), 7), {"dtype": F64}),
    ("aten.full_like.default", (X, 0.3)),
    ("aten.gather.default", (X, -1, PICK)),
    ("aten.index.Tensor", (X, (None, IDS))),
    ("aten.masked_fill.Scalar", (X, T, float("-inf"))),
    ("aten.native_layer_norm.default", (SINGLE, (4,), SINGLE[0], SINGLE[1], 1e-5)),
    ("aten.nll_loss_forward.default", (X, torch.tensor([1, -100, 3]), None, 2, -100)),
    ("aten.nll_loss_forward.default", (X, torch.tensor([1, -100, 3]), P[0], 1, -100)),
    ("aten.ones.default", ((2, 3),), {"dtype": Dtype("b8")}),
    ("aten.ones_like.default", (X,)),
    ("aten.permute.default", (X.view(1, 3, 4), (-1, 0, 1))),
    ("aten.pow.Scalar", (2, X)),
    ("aten.pow.Tensor_Scalar", (X, 3)),
    ("aten.pow.Tensor_Tensor", (P, Y)),
    ("aten.reshape.default", (X, (2, -1))),
    ("aten.reshape.default", (X[:0], (4, 0))),
    ("aten.rsub.Scalar", (X, 1)),
    ("aten.scalar_tensor.default", (0.3,), {"dtype": F64}),
    ("aten.scatter.src", (X, 1, PICK[:, :1], Y[:, :1].contiguous())),
    ("aten.scatter_add.default", (X, 1, PICK, Y[:, :2].contiguous())),
    ("aten.slice.Tensor", (X, 1, 1, 9223372036854775807, 2)),
    ("aten.slice.Tensor", (X, -1, -3, -1)),
    ("aten.slice_backward.default", (X, (3, 9), 1, -6, -2, 1)),
    ("aten.slice_backward.default", (X, (3, 9), 1, 5, 9223372036854775807, 1)),
    ("aten.sum.default", (X,)),
    ("aten.sum.dim_IntList", (X, (-1,), True)),
    ("aten.sum.dim_IntList", (X, ())),
    ("aten.topk.default", (X, 2, 1, False)),
    ("aten.tril.default", (X, -1)),
    ("aten.triu.default", (X, 1)),
    ("aten.where.self", (T, X, Y)),
    ("aten.zeros.default", ((2, 3),), {"dtype": I64}),
    ("aten.zeros_like.default", (X,)),
]
BF16 = X.bfloat16()
OTHERS = [
    ("aten.add.Tensor", (X, Y), {"alpha": 2}),
    ("aten.addmm.default", (Y[0, :3], X, Y.t().contiguous()), {"beta": 0.5}),
    ("aten.mul.Tensor", (X, SINGLE)),
    ("aten.mul.Tensor", (BF16, 0.1)),
    ("aten.div.Tensor", (N, N + 1)),
    ("aten.lt.Scalar", (N, 0.5)),
    ("aten.sum.default", (T,)),
    ("aten.arange.start_step", (0.0, 1.0, 0.3), {"dtype": F64}),
    ("aten.index.Tensor", (X, (IDS, IDS))),
    ("aten.index.Tensor", (X, (T[:, 0],))),
    ("aten.gather.default", (X, 1, PICK[:2])),
    ("aten.constant_pad_nd.default", (X, (-1, 0))),
    ("aten.slice_backward.default", (X, (3, 9), 1, 0, 8, 2)),
    ("aten.native_layer_norm.default", (X, (4,), X[0], X[1], 1e-5)),
    ("aten.convolution.default", (X.view(1, 2, 6), Y.view(2, 2, 3), None, (1,), (0,), (1,), True, (0,), 1)),
    ("aten.rsqrt.default", (P,)),
]


def called(op, args, kwargs=None):
    """The call as an instruction, its operands by name, and what torch makes of it."""
    tensors: dict[str, torch.Tensor] = {}

    def leaf(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        return Ref(next((n for n, t in tensors.items() if t is argument), None) or new(argument))

    def new(tensor):
        tensors[f"x{len(tensors)}"] = tensor
        return f"x{len(tensors) - 1}"

    plain = {k: DTYPES[v.name] if isinstance(v, Dtype) else v for k, v in (kwargs or {}).items()}
    found = overload(op)(*args, **plain)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    if op == "aten.nll_loss_forward.default":
        found[1] = None
    outs = tuple(t if t is None else value(f"out{at}", t) for at, t in enumerate(found))
    return Instr(outs, op, map_args(args, leaf), tuple((kwargs or {}).items())), tensors, found


def value(name, tensor):
    return Value(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def named(calls):
    return [pytest.param(call, id=f"{call[0]}-{at}") for at, call in enumerate(calls)]


@pytest.mark.parametrize("call", named(CALLS))
def test_a_standard_node_gives_what_torch_gives(call, manifest):
    instr, tensors, wanted = called(*call)
    inputs = tuple(Input("batch", value(name, tensor)) for name, tensor in tensors.items())
    given = tuple((f"given{at}", out.name) for at, out in enumerate(instr.outs) if out is not None)
    model = onnx_model(Program(1, inputs, (Section("forward", (), (instr,), given),)), manifest, 0)
    assert {node.domain for node in model.graph.node} == {""}
    evaluator = ReferenceEvaluator(model, new_ops=[GatherElements])
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    found = evaluator.run(None, arrays, check_shape_annotations=True)
    for array, tensor in zip(found, (tensor for tensor in wanted if tensor is not None), strict=True):
        torch.testing.assert_close(torch.as_tensor(array), tensor)


def test_every_row_has_a_call():
    assert {call[0] for call in CALLS} == set(ROWS)


@pytest.mark.parametrize("call", named(OTHERS))
def test_a_call_that_means_something_else_is_not_standard(call):
    instr, tensors, _ = called(*call)
    assert standard(instr, {name: value(name, tensor) for name, tensor in tensors.items()}) is None
