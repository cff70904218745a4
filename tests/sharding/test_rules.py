"""Every rule: under every strategy it allows, the ranks' results put together are the whole operator's result."""

import random

import pytest
import torch

from autosp_aot.ir.operators import DTYPES, overload
from autosp_aot.ir.placement import even_bounds
from autosp_aot.ir.program import Dtype, Instr, Ref, Value, at_rank, map_args
from autosp_aot.ops.table import ALL, OURS, spec_of
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Spec, Strategy
from autosp_aot.sharding.table import RULES
from tests.boxes import joined, parts
from tests.sharding import attention_cases, convolution_cases, lookup_cases, routing_cases, scan_cases
from tests.sharding.drawing import ids, normal, sizes

CASES = 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _reshape(rng):
    factors = sizes(rng, 4, 4)
    ends = sorted(rng.sample(range(1, 4), rng.randint(0, 3)))
    groups = [factors[a:b] for a, b in zip([0, *ends], [*ends, 4])]
    shape = tuple(torch.Size(group).numel() for group in groups)
    source = normal(rng, *factors)
    return (source, shape) if rng.random() < 0.5 else (source.reshape(shape), tuple(factors))


def _slice(rng):
    shape = sizes(rng, 3, 7)
    dim = rng.randrange(3)
    start = rng.randrange(shape[dim])
    end = rng.randint(start, shape[dim])
    if rng.random() < 0.3:
        dim, start = dim - 3, start - shape[dim]
    return normal(rng, *shape), dim, start, end, rng.choice([1, 1, 1, 2])


def _slice_backward(rng):
    whole, dim, start, end, step = _slice(rng)
    grad = overload("aten.slice.Tensor")(whole, dim, start, end, step)
    return grad, tuple(whole.shape), dim, start, end, step


def _slice_scatter(rng):
    whole, dim, start, end, step = _slice(rng)
    return whole, overload("aten.slice.Tensor")(whole, dim, start, end, step) * 2, dim, start, end, step


def _norm(rng, backward: bool):
    b, s, h = sizes(rng, 3)
    x, weight, bias = normal(rng, b, s, h), normal(rng, h), normal(rng, h)
    if not backward:
        return x, (h,), weight, bias, 1e-5
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, [h], weight, bias, 1e-5)
    return normal(rng, b, s, h), x, (h,), mean, rstd, weight, bias, (True, True, True)


def _nll(rng, backward: bool):
    rows, c = rng.choice([(), *[(rng.randint(1, 9),)] * 4]), rng.randint(2, 5)
    scores, target = normal(rng, *rows, c).log_softmax(-1), ids(rng, c, *rows)
    if rows:
        target[rng.randrange(rows[0])] = -100
    weight = rng.choice([None, normal(rng, c).abs()])
    reduction = rng.choice([0, 2])
    if not backward:
        return scores, target, weight, reduction, -100
    grad = normal(rng, *rows) if reduction == 0 else normal(rng)
    return grad, scores, target, weight, rng.choice([1, 2]) if reduction else 0, -100, normal(rng).abs() + 1


def _softmax(rng, backward: bool, log: bool):
    x = normal(rng, *sizes(rng, 3))
    dim = rng.randrange(3)
    if not backward:
        return x, dim, False
    y = x.log_softmax(dim) if log else x.softmax(dim)
    return normal(rng, *x.shape), y, dim, Dtype("f64")


def _cat(rng):
    shape, dim = sizes(rng, 3), rng.randrange(3)
    tensors = [normal(rng, *shape[:dim], size, *shape[dim + 1 :]) for size in sizes(rng, 3)]
    return tuple(tensors), dim


def _reduced(rng):
    dims = tuple(sorted(rng.sample(range(3), rng.randint(1, 3))))
    return normal(rng, *sizes(rng, 3)), dims, rng.random() < 0.5


def _reduced_one(rng):
    return normal(rng, *sizes(rng, 3)), rng.randrange(3), rng.random() < 0.5


def _mm(rng):
    i, j, k = sizes(rng, 3)
    return normal(rng, i, k), normal(rng, k, j)


def _bmm(rng):
    b, i, j, k = sizes(rng, 4)
    return normal(rng, b, i, k), normal(rng, b, k, j)


def _addmm(rng):
    a, b = _mm(rng)
    bias = normal(rng, b.shape[1]) if rng.random() < 0.5 else normal(rng, a.shape[0], b.shape[1])
    return bias, a, b


def _baddbmm(rng):
    a, b = _bmm(rng)
    bias = normal(rng, a.shape[1], b.shape[2]) if rng.random() < 0.5 else normal(rng, a.shape[0], 1, b.shape[2])
    return bias, a, b


def _solve(rng):
    b, n, k = sizes(rng, 3)
    left = rng.random() < 0.5
    matrix = normal(rng, b, n, n) + 5 * torch.eye(n, dtype=torch.float64)
    right = normal(rng, b, n, k) if left else normal(rng, b, k, n)
    return matrix, right, {"upper": rng.random() < 0.5, "left": left, "unitriangular": rng.random() < 0.5}


def _expand(rng):
    shape = tuple(sizes(rng, 3))
    source = tuple(1 if rng.random() < 0.4 else size for size in shape)
    return normal(rng, *source[rng.randint(0, 1) if source[0] == 1 else 0 :]), shape


def _permute(rng):
    return normal(rng, *sizes(rng, 4)), tuple(rng.sample(range(4), 4))


def _pad(rng):
    return normal(rng, *sizes(rng, 3)), tuple(rng.randint(0, 2) for _ in range(2 * rng.randint(1, 3))), 1.5


def _embedding(rng):
    return normal(rng, 7, rng.randint(1, 4)), ids(rng, 7, *sizes(rng, 2))


def _embedding_backward(rng):
    tokens = ids(rng, 7, *sizes(rng, 2))
    return normal(rng, *tokens.shape, rng.randint(1, 4)), tokens, 7, -1, False


def _broadcast(rng):
    shape = sizes(rng, 3)
    other = [1 if rng.random() < 0.3 else size for size in shape][rng.randint(0, 2) :]
    first, second = (shape, other) if rng.random() < 0.5 else (other, shape)
    return normal(rng, *first), normal(rng, *second)


ARGUMENTS = {
    "aten._log_softmax.default": lambda rng: _softmax(rng, False, True),
    "aten._log_softmax_backward_data.default": lambda rng: _softmax(rng, True, True),
    "aten._softmax.default": lambda rng: _softmax(rng, False, False),
    "aten._softmax_backward_data.default": lambda rng: _softmax(rng, True, False),
    "aten.addmm.default": _addmm,
    "aten.amax.default": _reduced,
    "aten.amin.default": _reduced,
    "aten.argmax.default": _reduced_one,
    "aten.argmin.default": _reduced_one,
    "aten.arange.start_step": lambda rng: (
        start := rng.randint(-3, 3), start + 2 * rng.randint(1, 6), rng.choice([1, 2])
    ),  # fmt: skip
    "aten.baddbmm.default": _baddbmm,
    "aten.bmm.default": _bmm,
    "aten.cat.default": _cat,
    "aten.constant_pad_nd.default": _pad,
    "aten.dot.default": lambda rng: (x := normal(rng, *sizes(rng, 1)), x * 2),
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.expand.default": _expand,
    "aten.full.default": lambda rng: (tuple(sizes(rng, 2)), 2.5),
    "aten.full_like.default": lambda rng: (normal(rng, *sizes(rng, 3)), 2.5),
    "aten.linalg_solve_triangular.default": _solve,
    "aten.logsumexp.default": _reduced,
    "aten.mm.default": _mm,
    "aten.mv.default": lambda rng: (x := normal(rng, *sizes(rng, 2)), x[0] * 2),
    "aten.native_layer_norm.default": lambda rng: _norm(rng, False),
    "aten.native_layer_norm_backward.default": lambda rng: _norm(rng, True),
    "aten.nll_loss_backward.default": lambda rng: _nll(rng, True),
    "aten.nll_loss_forward.default": lambda rng: _nll(rng, False),
    "aten.ones.default": lambda rng: (tuple(sizes(rng, 2)),),
    "aten.ones_like.default": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "aten.permute.default": _permute,
    "aten.prod.default": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "aten.prod.dim_int": _reduced_one,
    "aten.reshape.default": _reshape,
    "aten.slice.Tensor": _slice,
    "aten.slice_backward.default": _slice_backward,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.sum.default": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "aten.sum.dim_IntList": _reduced,
    "aten.tril.default": lambda rng: (normal(rng, *sizes(rng, 3)), rng.randint(-3, 3)),
    "aten.triu.default": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "aten.zeros.default": lambda rng: (tuple(sizes(rng, 2)),),
    "aten.zeros_like.default": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "autosp.uniform": lambda rng: (torch.tensor(rng.randrange(2**40)), rng.randrange(9), tuple(sizes(rng, 3)), ()),
    # Elementwise operators have no line in the table; these stand for them.
    "aten._to_copy.default": lambda rng: (normal(rng, *sizes(rng, 3)).float(),),
    "aten.add.Tensor": _broadcast,
    "aten.div.Tensor": _broadcast,
    "aten.mul.Tensor": _broadcast,
    "aten.neg.default": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "aten.silu_backward.default": lambda rng: (x := normal(rng, *sizes(rng, 3)), x * 2),
    "aten.where.self": lambda rng: (normal(rng, 3, 1) > 0, *(normal(rng, 3, 4), normal(rng, 4))),
}
for cases in (attention_cases, convolution_cases, lookup_cases, routing_cases, scan_cases):
    ARGUMENTS |= cases.ARGUMENTS
KWARGS = dict.fromkeys(("aten._to_copy.default", "autosp.uniform"), (("dtype", Dtype("f64")),))
KWARGS["aten.sort.stable"] = (("dim", 1), ("stable", True))


def test_every_rule_has_cases():
    undefined = {"aten.empty_like.default"}  # what it makes is anything
    assert {*RULES, *(op.name for op in ALL if op.rule)} - set(ARGUMENTS) == undefined


@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_shards_put_together_equal_the_whole(op):
    tried = 0
    for seed in range(CASES):
        rng = random.Random(f"{op} {seed}")
        args, kwargs = ARGUMENTS[op](rng), dict(KWARGS.get(op, ()))
        if args and isinstance(args[-1], dict):
            *args, kwargs = args
        tried += _check(op, tuple(args), kwargs, rng)
    assert tried >= CASES


def _check(op: str, args: tuple, kwargs: dict, rng: random.Random) -> int:
    """Check some strategies of one call; how many."""
    ranks = rng.randint(2, 5)
    tensors = [leaf for leaf in _leaves(args) if isinstance(leaf, torch.Tensor)]
    whole = _run(op, args, kwargs)
    names = iter(range(len(tensors)))
    refs = map_args(args, lambda leaf: Ref(f"x{next(names)}") if isinstance(leaf, torch.Tensor) else leaf)
    operands = [Value(f"x{at}", NAMES[t.dtype], tuple(t.shape)) for at, t in enumerate(tensors)]
    outs = tuple(Value(f"y{at}", NAMES[t.dtype], tuple(t.shape)) for at, t in enumerate(whole))
    instr = Instr(outs, op, refs, tuple(kwargs.items()))
    spec = spec_of(instr, operands, ranks)
    assert spec is not None
    tried = 0
    for strategy in _strategies(spec, ranks, rng):
        placed = spec.instantiate(strategy)
        if placed is not None:
            _compare(instr, spec, strategy, placed, tensors, whole, ranks)
            tried += 1
    return tried


def _strategies(spec: Spec, ranks: int, rng: random.Random) -> list[Strategy]:
    found = [Strategy(partial=partial) for partial in ((), *spec.linear)]
    for factor, extent in enumerate(spec.extents):
        if factor not in spec.whole:
            cuts = sorted(rng.randint(0, extent) for _ in range(ranks - 1))
            uneven = tuple(zip([0, *cuts], [*cuts, extent]))
            bounds = [even_bounds(extent, ranks), uneven, *(b for f, b in spec.splits if f == factor)]
            found += [Strategy(factor, b, partial) for b in bounds for partial in ((), *spec.linear)]
            outer = rng.choice([n for n in range(1, extent + 1) if extent % n == 0])
            found.append(Strategy(factor, even_bounds(extent // outer, ranks), outer=outer))
    return found


def _compare(instr: Instr, spec: Spec, strategy: Strategy, placed, tensors, whole, ranks: int) -> None:
    operands, results = placed
    args = instr.args
    if spec.localize is not None and strategy.factor is not None:
        shapes = [Local.shape(tuple(t.shape), p, ranks) for t, p in zip(tensors, operands)]
        made = [Local.shape(out.shape, p, ranks) for out, p in zip(instr.outs, results)]
        args = spec.localize(args, Local(strategy, shapes, made))
    limit = 1e-5 if any(t.dtype == torch.float32 for t in tensors) else 1e-9
    boxes = [parts(t, p, ranks) for t, p in zip(tensors, operands)]
    local = []
    for rank in range(ranks):
        names = {f"x{at}": box[rank] for at, box in enumerate(boxes)}
        fill = lambda leaf: names[leaf.name] if isinstance(leaf, Ref) else at_rank(leaf, rank)  # noqa: E731
        local.append(_run(instr.op, map_args(args, fill), dict(instr.kwargs)))
    for at, (out, placement) in enumerate(zip(whole, results)):
        found = joined([mine[at] for mine in local], placement, tuple(out.shape))
        torch.testing.assert_close(found, out, rtol=limit, atol=limit, msg=lambda text: f"{strategy} {placed}\n{text}")


def _run(op: str, args, kwargs) -> tuple[torch.Tensor, ...]:
    plain = lambda leaf: DTYPES[leaf.name] if isinstance(leaf, Dtype) else leaf  # noqa: E731
    args, kwargs = map_args(args, plain), {key: plain(value) for key, value in kwargs.items()}
    if op in OURS:
        args = OURS[op].laid_out(args, kwargs, "cpu")
    result = (OURS[op].kernel if op in OURS else overload(op))(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def _leaves(arg):
    if isinstance(arg, tuple):
        for item in arg:
            yield from _leaves(item)
    else:
        yield arg
