"""More ranks than heads: attention over heads and query rows as one dim, so that it can be cut anywhere.

    out, lse = attention(q, k, v)                     q: [B, N, S, D]
      ->
    rows = reshape(q)                                 [B, N * S, D]
    o, l = attention_rows(rows, k, v, rows=S)         rank r: positions lo..hi of N * S, and the k/v heads they read
    out, lse = reshape(o), reshape(l)
"""

from dataclasses import replace

from autosp_aot.program import Instr, Program, Ref, Value

ROWS = {"autosp.attention": "autosp.attention_rows", "autosp.attention_backward": "autosp.attention_rows_backward"}


def split_query_rows(whole: Program, ranks: int) -> Program:
    """Rewrite every attention that has fewer query heads than there are ranks."""
    (step,) = whole.sections
    values = whole.values()
    instrs: list[Instr] = []
    for instr in step.instrs:
        heads = instr.op in ROWS and values[instr.refs()[0]].shape[1]
        instrs += _rewritten(instr, values) if heads and heads < ranks else [instr]
    return replace(whole, sections=(replace(step, instrs=tuple(instrs)),))


def _rewritten(instr: Instr, values: dict[str, Value]) -> list[Instr]:
    """The call over rows: operands and results with a dim of query rows are reshaped; k, v and their gradients stay."""
    backward = instr.op == "autosp.attention_backward"
    q = values[instr.refs()[1 if backward else 0]]
    rows = q.shape[2]
    before, refs = [], []
    for at, name in enumerate(instr.refs()):
        if (at in (2, 3)) if backward else (at in (1, 2)):
            refs.append(Ref(name))
            continue
        flat = _flat(values[name], f"{instr.values()[0].name}.rows_{at}")
        before.append(Instr((flat,), "aten.reshape.default", (Ref(name), flat.shape), (), instr.where))
        refs.append(Ref(flat.name))
    outs, after = [], []
    for at, out in enumerate(instr.outs):
        if out is None or (backward and at > 0):
            outs.append(out)
            continue
        flat = _flat(out, f"{out.name}.rows")
        outs.append(flat)
        after.append(Instr((out,), "aten.reshape.default", (Ref(flat.name), out.shape), (), instr.where))
    scale, causal, group, _ = instr.args[len(refs) :]
    call = Instr(tuple(outs), ROWS[instr.op], (*refs, scale, causal, group, rows, 0), (), instr.where)
    return [*before, call, *after]


def _flat(value: Value, name: str) -> Value:
    batch, heads, rows, *rest = value.shape
    return Value(name, value.dtype, (batch, heads * rows, *rest))
