"""Every field of every record is read: where one is taken away, what the compiler makes of a call is another."""

import random
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from autosp_aot.commands.check.undrawn import undrawn
from autosp_aot.ir.operators import DTYPE_NAMES
from autosp_aot.ir.placement import REPLICATE
from autosp_aot.ir.program import Dtype, Input, Instr, PerRank, Program, Ref, Section, Value, flatten, map_args
from autosp_aot.memory.costs import costs
from autosp_aot.memory.rank_classes import unlike_ranks
from autosp_aot.ops import table
from autosp_aot.ops.record import OwnOp
from autosp_aot.passes.lay_out import lay_out
from autosp_aot.passes.query_rows import split_query_rows
from autosp_aot.runtime.execute import Executor
from tests.sharding import attention_cases, routing_cases

META = torch.device("meta")


def attention(op: str) -> tuple[tuple, dict]:
    """A call of an attention that drops out, reads a vector, and has two query heads to a key/value head."""
    make = attention_cases.ARGUMENTS[op]
    for seed in range(9999):
        *args, scoring = make(random.Random(seed))
        if {"score", "dropout"} <= scoring.keys() and 2 in args[-3:-1]:
            return tuple(args), scoring
    raise AssertionError(f"no call of {op} among the cases")


def call(op: str) -> tuple[tuple, dict]:
    """Arguments of a call, tensors in place of what it reads."""
    if op in attention_cases.ARGUMENTS:
        return attention(op)
    if op in routing_cases.ARGUMENTS:
        return tuple(routing_cases.ARGUMENTS[op](random.Random(0))), {}
    if op == "autosp.rescale":
        return (torch.rand(3), torch.tensor(2.0), torch.tensor(1.0)), {}
    return (torch.tensor(5), 1, (2, 3), ()), {"dtype": Dtype("f64")}


def one_call(op: str) -> tuple[Program, dict[str, Tensor]]:
    """A program of one call, and its inputs."""
    args, kwargs = call(op)
    tensors = {f"x{at}": leaf for at, leaf in enumerate(leaf for leaf in flatten(args) if isinstance(leaf, Tensor))}
    names = iter(tensors)
    refs = map_args(args, lambda leaf: Ref(next(names)) if isinstance(leaf, Tensor) else leaf)
    with torch.no_grad():
        plain = {name: torch.float64 if isinstance(value, Dtype) else value for name, value in kwargs.items()}
        results = table.OURS[op].kernel(*args, **plain)
    results = [results] if isinstance(results, Tensor) else results
    value = lambda name, t: Value(name, DTYPE_NAMES[t.dtype], tuple(t.shape), REPLICATE)  # noqa: E731
    outs = tuple(value(f"y{at}", t) for at, t in enumerate(results))
    instr = Instr(outs, op, refs, tuple(kwargs.items()))
    inputs = tuple(Input("batch", value(name, t)) for name, t in tensors.items())
    section = Section("step", (), (instr,), tuple((out.name, out.name) for out in outs))
    return Program(1, inputs, (section,)), tensors


def outcomes(program: Program, tensors: dict[str, Tensor], first_head: Instr) -> Iterator[object]:
    """What each reader of records makes of a call: a result, or the kind of error."""
    (instr,) = program.instrs()
    operands = [program.values()[name] for name in instr.refs()]
    readers: tuple[Callable[[], object], ...] = (
        lambda: table.schema(instr.op),
        lambda: table.spec_of(instr, operands, 2).extents,
        lambda: costs(program, "cpu"),
        lambda: lay_out(reversed_in_memory(instr.op), "cpu"),
        lambda: unlike_ranks(replace(program, ranks=2, sections=(replace(program.sections[0], instrs=(first_head,)),))),
        lambda: split_query_rows(program, 99),
        lambda: undrawn(program),
        lambda: table.is_quadratic(instr.op),
        lambda: [table.is_quadratic_gradient(op.name) for op in table.ALL],
        lambda: executed(program, tensors, traced=False),
        lambda: traced(program, tensors),
    )
    for reader in readers:
        try:
            yield reader()
        except Exception as error:  # which one it is, is the outcome: a record without a field fails in any way
            yield type(error)


def reversed_in_memory(op: str) -> Program:
    """A plain call of the operator whose operands lie in memory with their dims in the opposite order."""
    args = call(op)[0]
    if op == "autosp.expert_mm":
        args = torch.zeros(3).long(), torch.zeros(3, 8).bfloat16(), torch.zeros(2, 8, 16).bfloat16()
    tensors = [leaf for leaf in flatten(args) if isinstance(leaf, Tensor)]
    names = iter(range(len(tensors)))
    refs = map_args(args, lambda leaf: Ref(f"r{next(names)}") if isinstance(leaf, Tensor) else leaf)
    value = lambda name, t: Value(name, DTYPE_NAMES[t.dtype], tuple(t.shape), REPLICATE)  # noqa: E731
    orders = [tuple(reversed(range(t.dim()))) for t in tensors]
    inputs = tuple(Input("batch", value(f"x{at}", tensors[at].permute(order))) for at, order in enumerate(orders))
    turned = [
        Instr((value(f"r{at}", tensors[at]),), "aten.permute.default", (Ref(f"x{at}"), order))
        for at, order in enumerate(orders)
    ]
    (made,) = one_call(op)[0].instrs()
    plain = tuple((name, number) for name, number in made.kwargs if name == "scale")
    refs = tuple(None if name == "grad_lse" else ref for name, ref in zip(table.OURS[op].arguments, refs))
    outs = made.outs if op != "autosp.expert_mm" else (Value("y0", "bf16", (3, 16)),)
    section = Section("step", (), (*turned, replace(made, outs=outs, args=refs, kwargs=plain)), ())
    return Program(1, inputs, (section,))


def executed(program: Program, tensors: dict[str, Tensor], traced: bool) -> list[tuple]:
    values = dict(tensors)
    for _ in Executor(program, 0, META, traced).run("step", values):
        raise AssertionError("one rank meets nobody")
    return [(t.device.type, tuple(t.shape)) for name, t in values.items() if name not in tensors]


def traced(program: Program, tensors: dict[str, Tensor]) -> list[tuple]:
    """Results where values are not known."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return executed(program, {name: mode.from_tensor(t) for name, t in tensors.items()}, traced=True)


FIELDS = [
    (op, field.name)
    for op in table.ALL
    for field in fields(OwnOp)
    if getattr(op, field.name) not in (None, "", False)
]


@pytest.mark.parametrize("op, field", FIELDS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_record_without_a_field_is_seen(monkeypatch, op, field):
    program, tensors = one_call(op.name)
    (instr,) = program.instrs()
    first_head = replace(instr, args=(*instr.args[:-1], PerRank((0, 1))))
    before = list(outcomes(program, tensors, first_head))
    default = next(f.default for f in fields(OwnOp) if f.name == field)
    less = replace(op, **{field: None if default is MISSING else default})
    records = tuple(less if other is op else other for other in table.ALL)
    monkeypatch.setattr(table, "ALL", records)
    monkeypatch.delitem(table.OURS, op.name)
    monkeypatch.setitem(table.OURS, less.name, less)
    table._spec.cache_clear()
    after = list(outcomes(program, tensors, first_head))
    table._spec.cache_clear()
    assert after != before


def test_records_are_in_order_and_called_as_torch_calls_them():
    assert [op.name for op in table.ALL] == sorted(op.name for op in table.ALL)
    assert all(op.signature.startswith(f"{op.name}(") for op in table.ALL)
