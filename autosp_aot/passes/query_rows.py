"""More ranks than heads: attention over heads and query rows as one dim, so that it can be cut anywhere.

    out, lse = attention(q, k, v)                     q: [B, N, S, D]
      ->
    rows = reshape(q)                                 [B, N * S, D]
    o, l = attention_rows(rows, k, v, rows=S)         rank r: positions lo..hi of N * S, and the k/v heads they read
    out, lse = reshape(o), reshape(l)

A vector of the score with a dim of heads and a dim of rows is reshaped likewise, others stay as they are.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import Instr, Program, Ref, Value
from autosp_aot.ops.record import OverHeads
from autosp_aot.ops.table import OURS
from autosp_aot.passes.step import Step


@dataclass(frozen=True)
class QueryRows:
    """Rewrites attention with fewer query heads than `ranks`, before the step is partitioned."""

    ranks: int
    name: ClassVar[str] = "query-rows"

    def __call__(self, step: Step) -> Step:
        whole = split_query_rows(step.whole, self.ranks)
        return replace(step, whole=whole, program=whole)


def split_query_rows(whole: Program, ranks: int) -> Program:
    """Rewrite every attention that has fewer query heads than there are ranks."""
    (step,) = whole.sections
    values = whole.values()
    instrs: list[Instr] = []
    for instr in step.instrs:
        kind = OURS[instr.op].over_heads if instr.op in OURS else None
        if kind is not None and values[instr.refs()[kind.query]].sizes[1] < ranks:
            instrs += _rewritten(instr, kind, values)
        else:
            instrs.append(instr)
    return replace(whole, sections=(replace(step, instrs=tuple(instrs)),))


def _rewritten(instr: Instr, kind: OverHeads, values: dict[str, Value]) -> list[Instr]:
    """The call over rows: whatever has a dim of heads and a dim of query rows is reshaped."""
    heads, rows = values[instr.refs()[kind.query]].shape[1:3]
    first, before, of_keys = instr.values()[0].name, [], (kind.query + 1, kind.query + 2)

    def flat(arg, at: int):
        if not isinstance(arg, Ref) or at in of_keys or values[arg.name].shape[1:3] != (heads, rows):
            return arg
        value = _flat(values[arg.name], f"{first}.rows_{at}")
        before.append(Instr((value,), "aten.reshape.default", (arg, value.shape), (), instr.where))
        return Ref(value.name)

    vectors = next(at for at, arg in enumerate(instr.args) if isinstance(arg, tuple))
    tensors = [flat(arg, at) for at, arg in enumerate(instr.args[:vectors])]
    given = tuple(flat(arg, vectors + at) for at, arg in enumerate(instr.args[vectors]))
    seed, *which, group, _ = instr.args[vectors + 1 :]
    outs, after = [], []
    for at, out in enumerate(instr.outs):
        if out is None or out.shape[1:3] != (heads, rows) or at in kind.of_keys:
            outs.append(out)
            continue
        flat_out = _flat(out, f"{out.name}.rows")
        outs.append(flat_out)
        after.append(Instr((out,), "aten.reshape.default", (Ref(flat_out.name), out.shape), (), instr.where))
    args = (*tensors, given, seed, *which, group, rows, 0)
    return [*before, Instr(tuple(outs), kind.over_rows, args, instr.kwargs, instr.where), *after]


def _flat(value: Value, name: str) -> Value:
    batch, heads, rows, *rest = value.sizes
    return Value(name, value.dtype, (batch, heads * rows, *rest))
