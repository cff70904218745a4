"""Every field of every record is read: where one is taken away, the compiler makes something else of a program."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace

import pytest
import torch

from autosp_aot.ir.program import Program
from autosp_aot.ir.structure.moves import move_between
from autosp_aot.ir.structure.record import Structural
from autosp_aot.ir.structure.table import STRUCTURE, copies, meets, moves, to_host
from autosp_aot.ir.text import parse_program
from autosp_aot.ir.verify import verify
from autosp_aot.memory.costs import costs, curve
from autosp_aot.proof.collectives import collectives_of
from autosp_aot.proof.derive import derive
from autosp_aot.runtime.simulate import simulate

WHOLE = """\
autosp program 1
ranks 1
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
section step takes ()
  %a: f32[4, 4] @ Replicate = aten.neg.default(%x)
  %y: f32[4, 4] @ Replicate = aten.mm.default(%a, %w)
  %c: f32[4, 4] @ Replicate = aten.exp.default(%y)
  %s: f32[] @ Replicate = aten.sum.default(%a)
  %m: f32[] @ Replicate = aten.amax.default(%a)
  %t: f32[] @ Replicate = aten.sum.default(%c)
gives (loss=%t, sum=%s, most=%m)
"""
RANKS = """\
autosp program 1
ranks 2
layout cut4 = 0:2 2:4
layout cut4' = 0:1 1:2 2:3 3:4
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
section evaluate takes ()
  %x.shard: f32[2, 4] @ Shard(0, cut4) = shard(%x)
  %a: f32[2, 4] @ Shard(0, cut4) = aten.neg.default(%x.shard)
  %a.offload: f32[2, 4] @ Shard(0, cut4) = offload(%a, 0)
  %a.host: f32[2, 4] @ Shard(0, cut4) = wait(%a.offload, %a)
  free(%a, %a.offload)
  %a.fetch: f32[2, 4] @ Shard(0, cut4) = fetch(%a.host)
  %a.back: f32[2, 4] @ Shard(0, cut4) = wait(%a.fetch, %a.host)
  %a.columns: f32[4, 2] @ Shard(1, cut4) = all_to_all(%a.back)
  %a.whole: f32[4, 4] @ Replicate = all_gather(%a.columns)
  %w.shard: f32[2, 4] @ Shard(0, cut4) = shard(%w)
  %w.relayout: f32[2, 4] @ Shard(0, cut4) = relayout(%w.shard, [1, 0])
  %y: f32[4, 4] @ Partial = aten.mm.default(%a.columns, %w.relayout)
  %y.rows: f32[2, 4] @ Shard(0, cut4) = reduce_scatter(%y)
  %c: f32[2, 4] @ Shard(0, cut4) = tiles(%y.rows) in 2
    %tile.y: f32[1, 4] @ Shard(0, cut4') = shard(%y.rows)
    %tile.y.relayout: f32[1, 4] @ Shard(0, cut4') = relayout(%tile.y, [1, 0])
    %tile.c: f32[1, 4] @ Shard(0, cut4') = aten.exp.default(%tile.y.relayout)
    free(%tile.y, %tile.y.relayout)
  gives (%tile.c)
  %s: f32[] @ Partial = aten.sum.default(%a.back)
  %m: f32[] @ Replicate = aten.amax.default(%a.whole)
  %t: f32[] @ Partial = aten.sum.default(%c)
  %t.whole: f32[] @ Replicate; %s.whole: f32[] @ Replicate = all_reduce(%t, %s)
gives (loss=%t.whole, sum=%s.whole, most=%m)
"""
# What is never legal: two of what goes one by one.
TWICE = [
    RANKS.replace(once, f"; %v: f32{shape} = ".join(once.split(" = ")).replace(operand, f"{operand}, %w"))
    for once, operand, shape in (
        ("Shard(0, cut4) = shard(%x)", "%x", "[2, 4] @ Shard(0, cut4)"),
        ("Shard(0, cut4) = offload(%a, 0)", "%a", "[4, 4] @ Replicate"),
        ("Shard(0, cut4) = fetch(%a.host)", "%a.host", "[4, 4] @ Replicate"),
        ("Shard(0, cut4) = relayout(%w.shard, [1, 0])", "%w.shard", "[4, 4] @ Replicate"),
    )
]


def outcomes() -> Iterator[object]:
    """What each reader of records makes of the program: a result, or the kind of error."""
    whole, program = parse_program(WHOLE, {}), parse_program(RANKS, {})
    readers: tuple[Callable[[], object], ...] = (
        lambda: verify(program),
        *(lambda text=text: verify(parse_program(text, {})) for text in TWICE),
        lambda: derive(program, whole),
        lambda: curve(program, 0, "cpu"),
        lambda: costs(program, "cpu"),
        lambda: collectives_of(program, 1),
        lambda: results([program.for_rank(rank) for rank in range(2)]),
    )
    for reader in readers:
        try:
            yield reader()
        except Exception as error:  # which one it is, is the outcome: a record without a field fails in any way
            yield type(error)


def results(programs: list[Program]) -> list[dict[str, float]]:
    """What each rank gives."""
    inputs = {"w": torch.arange(16.0).view(4, 4), "x": torch.eye(4)}
    return [{label: float(t) for label, t in given.items()} for given in simulate(programs, inputs, torch.ones(()))]


FIELDS = [
    (record, field.name)
    for record in STRUCTURE.values()
    for field in fields(Structural)
    if field.name not in ("name", "attributes") and getattr(record, field.name) != field.default
]


@pytest.mark.parametrize("record, field", FIELDS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_record_without_a_field_is_seen(monkeypatch, record, field):
    before = list(outcomes())
    default = next(f.default for f in fields(Structural) if f.name == field)
    assert default is not MISSING
    monkeypatch.setitem(STRUCTURE, record.name, replace(record, **{field: default}))
    assert list(outcomes()) != before


def test_the_program_has_every_instruction_and_is_right():
    program = parse_program(RANKS, {})
    assert STRUCTURE.keys() == {instr.op for instr in program.instrs() if not instr.op.startswith("aten.")}
    legal, *refused, derived, _, _, _, (first, second) = outcomes()
    assert legal is None and derived is None and None not in refused
    (whole,) = results([parse_program(WHOLE, {})])
    assert first == second == pytest.approx(whole)


def test_what_is_asked_of_a_name():
    groups = [{op for op in (*STRUCTURE, "aten.mm.default") if ask(op)} for ask in (meets, moves, copies, to_host)]
    collectives = {"all_to_all", "all_gather", "reduce_scatter", "all_reduce"}
    assert groups == [collectives, {*collectives, "shard", "relayout"}, {"offload", "fetch", "wait"}, {"offload"}]


def test_a_move_is_the_one_that_fits():
    values = parse_program(RANKS, {}).values()
    at = {name: value.placement for name, value in values.items()}
    assert move_between(at["x"], at["x.shard"]) == "shard"
    assert move_between(at["a.back"], at["a.columns"]) == "all_to_all"
    assert move_between(at["a.columns"], at["x"]) == "all_gather"
    assert move_between(at["y"], at["y.rows"]) == "reduce_scatter"
    assert move_between(at["y"], at["x"]) == "all_reduce"
