"""Partition: an expected text, and what it must and must not move."""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.errors import BuildError
from autosp_aot.export.fake import weightless
from autosp_aot.ir.program import Input, Instr, Program, Ref, Section, Value
from autosp_aot.ir.text import print_program
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.step import Step
from examples import llama, plain

BEFORE = Program(
    1,
    (Input("parameter", Value("w", "f32", (3, 3))), Input("batch", Value("x", "f32", (2, 5, 3)))),
    (
        Section(
            "step",
            (),
            (
                Instr((Value("rows", "f32", (10, 3)),), "aten.reshape.default", (Ref("x"), (10, 3))),
                Instr((Value("h", "f32", (10, 3)),), "aten.mm.default", (Ref("rows"), Ref("w"))),
                Instr((Value("swapped", "f32", (3, 10)),), "aten.permute.default", (Ref("rows"), (1, 0))),
                Instr((Value("g", "f32", (3, 3)),), "aten.mm.default", (Ref("swapped"), Ref("h"))),
                Instr((Value("loss", "f32", ()),), "aten.sum.default", (Ref("h"),)),
            ),
            (("loss", "loss"), ("grad.w", "g")),
        ),
    ),
)
AFTER = """\
autosp program 1
ranks 2
layout cut5 = 0:3 3:5
constants $0 $1
parameter %w: f32[3, 3] @ Replicate
batch %x: f32[2, 5, 3] @ Replicate
section step takes ()
  %x.shard: f32[2, $0, 3] @ Shard(1, cut5) = shard(%x)
  %rows: f32[$1, 3] @ Shard(0, cut5, outer=2) = aten.reshape.default(%x.shard, [$1, 3])
  %h: f32[$1, 3] @ Shard(0, cut5, outer=2) = aten.mm.default(%rows, %w)
  %swapped: f32[3, $1] @ Shard(1, cut5, outer=2) = aten.permute.default(%rows, [1, 0])
  %g: f32[3, 3] @ Partial = aten.mm.default(%swapped, %h)
  %loss: f32[] @ Partial = aten.sum.default(%h)
  %loss.all_reduce: f32[] @ Replicate = all_reduce(%loss)
gives (loss=%loss.all_reduce, grad.w=%g)
"""


def test_a_product_and_its_gradient_over_two_ranks():
    assert print_program(Partition(2)(Step(BEFORE, BEFORE, {"x": 1})).program) == (AFTER, {"$0": (3, 2), "$1": (6, 4)})


def test_chunks_are_cut_at_the_edges_nearest_to_home():
    x, chunks = Value("x", "f32", (1, 16, 9)), Value("chunks", "f32", (1, 4, 4, 9))
    total, loss = Value("total", "f32", (1, 4, 4, 9)), Value("loss", "f32", ())
    instrs = (
        Instr((chunks,), "aten.reshape.default", (Ref("x"), chunks.shape)),
        Instr((total,), "aten.cumsum.default", (Ref("chunks"), 2)),
        Instr((loss,), "aten.sum.default", (Ref("total"),)),
    )
    program = Program(1, (Input("batch", x),), (Section("step", (), instrs, (("loss", "loss"),)),))
    found = Partition(3)(Step(program, program, {"x": 1}))
    bounds = {name: strategy.bounds for name, strategy in found.decisions.items()}
    assert bounds == dict.fromkeys(("chunks", "total", "loss"), ((0, 2), (2, 3), (3, 4)))


def test_what_is_read_as_a_sum_is_not_made_as_summands_where_a_cut_along_another_dim_costs_less():
    decay, states = Value("decay", "f32", (4, 6, 6)), Value("states", "f32", (4, 6, 50))
    decayed, scanned = (replace(decay, name=name) for name in ("decayed", "scanned"))
    negated, mixed = (replace(states, name=name) for name in ("negated", "mixed"))
    loss = Value("loss", "f32", ())
    instrs = (
        Instr((decayed,), "aten.exp.default", (Ref("decay"),)),
        Instr((scanned,), "aten.cumsum.default", (Ref("decayed"), 2)),
        Instr((negated,), "aten.neg.default", (Ref("states"),)),
        Instr((mixed,), "aten.bmm.default", (Ref("scanned"), Ref("negated"))),
        Instr((loss,), "aten.sum.default", (Ref("mixed"),)),
    )
    inputs = tuple(Input("batch", value) for value in (decay, states))
    program = Program(1, inputs, (Section("step", (), instrs, (("loss", "loss"),)),))
    found = Partition(2)(Step(program, program, {"decay": 2, "states": 1})).decisions
    assert [found[name].factor for name in ("decayed", "scanned", "negated", "mixed")] == [2, 0, 1, 0]


def test_the_heads_move_once_each_way_and_nothing_that_carries_the_sequence_is_gathered():
    with weightless():
        model = llama.build_model(num_hidden_layers=1, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    artifact = compile_model(model, llama.example_batch(1, 4096), {"input_ids": 1, "labels": 1}, BuildConfig(4), "")
    values, moved = artifact.program.values(), Counter()
    for section in artifact.program.sections:
        for instr in section.instrs:
            if instr.op in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce"):
                moved[section.name, instr.op] += sum(prod(values[name].whole_shape) for name in instr.refs())
    heads = (8 + 4 + 4 + 8) * 8 * 4096
    assert moved["forward", "all_to_all"] == moved["backward", "all_to_all"] == heads
    assert set(moved) == {
        ("forward", "all_to_all"), ("backward", "all_to_all"),
        ("forward", "all_reduce"), ("sum_gradients", "all_reduce"),
    }  # fmt: skip
    assert moved["forward", "all_reduce"] == 2
    assert not artifact.manifest.step.fallbacks


def test_no_value_has_a_row_and_a_column_for_every_position():
    with weightless():
        model = plain.build_model(layers=1, max_length=65536)
    artifact = compile_model(model, plain.example_batch(1, 65536), {"input_ids": 1, "labels": 1}, BuildConfig(2), "")
    programs = (artifact.whole, artifact.program.for_rank(0))
    assert all(prod(value.shape) < 65536**2 / 2 for program in programs for value in program.values().values())


class Distances(nn.Module):
    """A loss through an operator that has no sharding rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x):
        return torch.cdist(x * self.weight, x + self.weight).mean()


def test_an_operator_without_a_rule_computes_replicated_and_is_listed():
    batch = {"x": torch.ones(2, 6, 4, dtype=torch.float64)}
    artifact = compile_model(Distances(), batch, {"x": 1}, BuildConfig(2), "")
    listed = [(f.op, f.source.partition(":")[0]) for f in artifact.manifest.step.fallbacks]
    assert ("aten._cdist_forward.default", "test_partition.py") in listed
    assert {op for op, _ in listed} == {"aten._cdist_forward.default", "aten._cdist_backward.default"}


def test_strict_refuses_it():
    batch = {"x": torch.ones(2, 6, 4, dtype=torch.float64)}
    with pytest.raises(BuildError, match="operator-without-rule") as caught:
        compile_model(Distances(), batch, {"x": 1}, BuildConfig(2, strict=True), "")
    assert "aten._cdist_forward.default" in str(caught.value) and "test_partition.py" in str(caught.value)
