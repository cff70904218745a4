"""Boxes and what moves between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autosp_aot.ir.placement import (
    PARTIAL,
    REPLICATE,
    Cut,
    Placement,
    covers,
    disjoint,
    even_bounds,
    local_shape,
    window,
)
from autosp_aot.ir.program import Input, Instr, Program, Ref, Section, Value, per_rank
from autosp_aot.ir.transfers import received_bytes, transfers
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.simulate import lockstep
from tests.boxes import joined, parts

SHAPE = (4, 6, 3)


@st.composite
def placements(draw, ranks: int, partial: bool):
    dim = draw(st.sampled_from([None, 0, 1, 2]))
    if dim is None:
        return PARTIAL if partial else REPLICATE
    outer = draw(st.sampled_from([n for n in range(1, SHAPE[dim] + 1) if SHAPE[dim] % n == 0]))
    extent = SHAPE[dim] // outer
    cuts = sorted(draw(st.lists(st.integers(0, extent), min_size=ranks - 1, max_size=ranks - 1)))
    bounds = list(zip([0, *cuts], [*cuts, extent]))
    if draw(st.booleans()):  # copies: some boxes reach further
        bounds = [(lo, draw(st.integers(hi, extent))) if lo < hi else (lo, hi) for lo, hi in bounds]
    return Placement(Cut(dim, outer, tuple(bounds)), partial)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_gets_from_any_placement_to_any_other(data):
    ranks = data.draw(st.integers(2, 4))
    source = data.draw(placements(ranks, data.draw(st.booleans())))
    target = data.draw(placements(ranks, False))
    value = torch.randn(SHAPE, dtype=torch.float64)
    names = [Value(n, "f64", tuple(map(per_rank, zip(*(local_shape(SHAPE, p, r) for r in range(ranks))))), p)
             for n, p in (("x", source), ("y", target))]  # fmt: skip
    move = Instr((names[1],), "all_to_all", (Ref("x"),))
    program = Program(ranks, (Input("batch", names[0]),), (Section("step", (), (move,), (("y", "y"),)),))
    runs = [
        Executor(program.for_rank(rank), rank, torch.device("cpu")).run("step", {"x": box})
        for rank, box in enumerate(parts(value, source, ranks))
    ]
    boxes = [result["y"] for result in lockstep(runs)]
    torch.testing.assert_close(joined(boxes, target, SHAPE), value)


def test_a_rank_takes_its_own_copy_before_another_rank_s():
    copies = Placement(Cut(0, 1, ((0, 3), (2, 4))))
    assert [piece.box for piece in transfers(copies, REPLICATE, (4,), 1, 0)] == [((0, 3, 4),)]
    assert [piece.box for piece in transfers(copies, REPLICATE, (4,), 0, 1)] == [((0, 0, 2),)]


@pytest.mark.parametrize(("extent", "sizes"), [(4, [2, 1, 1]), (2, [1, 1, 0]), (9, [3, 3, 3])])
def test_even_bounds_differ_by_at_most_one(extent, sizes):
    assert [hi - lo for lo, hi in even_bounds(extent, 3)] == sizes


def test_a_window_clips_every_rank_to_what_it_holds():
    assert window(((0, 3), (3, 6)), 1, 4) == ((0, 2), (2, 4))


def test_boxes_that_overlap_or_leave_a_gap_are_told_apart():
    assert not disjoint(((0, 2), (1, 3))) and disjoint(((0, 2), (1, 1), (2, 3)))
    assert not covers(((0, 2), (3, 4)), 4) and covers(((0, 2), (1, 4)), 4)


def test_an_all_to_all_of_four_ranks_receives_three_quarters_of_a_share():
    rows, columns = Placement(Cut(0, 1, even_bounds(8, 4))), Placement(Cut(1, 1, even_bounds(8, 4)))
    assert received_bytes(rows, columns, (8, 8), 2, 4) == 8 * 8 * 2 // 4 * 3 // 4
