"""What two passes make of a small loss: its beginning of backward in forward, and slices of its sequence."""

from dataclasses import replace

import pytest

from autosp_aot.ir.text import print_program
from autosp_aot.passes.early_backward import EarlyBackward
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.sections import Sections
from autosp_aot.passes.tile import Tile
from tests.passes.texts import after, parsed

WHOLE = """\
autosp program 1
ranks 1
parameter %g: f64[4] @ Replicate
parameter %w: f64[4, 8] @ Replicate
batch %x: f64[6, 4] @ Replicate
tangent %t: f64[] @ Replicate
section step takes ()
  %h: f64[6, 4] @ Replicate = aten.mul.Tensor(%x, %g)
  %y: f64[6, 8] @ Replicate = aten.mm.default(%h, %w)
  %e: f64[6, 8] @ Replicate = aten.exp.default(%y)
  %loss: f64[] @ Replicate = aten.sum.default(%e)
  %grad.y: f64[6, 8] @ Replicate = aten.mul.Tensor(%e, %t)
  %h.t: f64[4, 6] @ Replicate = aten.permute.default(%h, [1, 0])
  %grad.w: f64[4, 8] @ Replicate = aten.mm.default(%h.t, %grad.y)
  %w.t: f64[8, 4] @ Replicate = aten.permute.default(%w, [1, 0])
  %grad.h: f64[6, 4] @ Replicate = aten.mm.default(%grad.y, %w.t)
  %grad.rows: f64[6, 4] @ Replicate = aten.mul.Tensor(%grad.h, %x)
  %grad.g: f64[4] @ Replicate = aten.sum.dim_IntList(%grad.rows, [0])
gives (loss=%loss, grad.g=%grad.g, grad.w=%grad.w)
"""
HEADER = """\
autosp program 1
ranks 2
layout cut6 = 0:3 3:6
parameter %g: f64[4] @ Replicate
parameter %w: f64[4, 8] @ Replicate
batch %x: f64[6, 4] @ Replicate
tangent %t: f64[] @ Replicate
"""
FORWARD = """\
section forward takes ()
  %x.shard: f64[3, 4] @ Shard(0, cut6) = shard(%x)
  %h: f64[3, 4] @ Shard(0, cut6) = aten.mul.Tensor(%x.shard, %g)
  %y: f64[3, 8] @ Shard(0, cut6) = aten.mm.default(%h, %w)
  %e: f64[3, 8] @ Shard(0, cut6) = aten.exp.default(%y)
  %loss: f64[] @ Partial = aten.sum.default(%e)
  %loss.all_reduce: f64[] @ Replicate = all_reduce(%loss)
"""
GIVES = "gives (loss=%loss.all_reduce)\n"
# From the logits' gradient to that of what they are made of: as wide as h again.
BEGINNING = """\
  %grad.y: f64[3, 8] @ Shard(0, cut6) = aten.mul.Tensor(%e, %t)
  %h.t: f64[4, 3] @ Shard(1, cut6) = aten.permute.default(%h, [1, 0])
  %grad.w: f64[4, 8] @ Partial = aten.mm.default(%h.t, %grad.y)
  %w.t: f64[8, 4] @ Replicate = aten.permute.default(%w, [1, 0])
  %grad.h: f64[3, 4] @ Shard(0, cut6) = aten.mm.default(%grad.y, %w.t)
"""
RESCALED = """\
  %grad.w: f64[4, 8] @ Partial = autosp.rescale(%early.grad.w, %t, %early.t)
  %grad.h: f64[3, 4] @ Shard(0, cut6) = autosp.rescale(%early.grad.h, %t, %early.t)
"""
REST = """\
  %grad.rows: f64[3, 4] @ Shard(0, cut6) = aten.mul.Tensor(%grad.h, %x.shard)
  %grad.g: f64[4] @ Partial = aten.sum.dim_IntList(%grad.rows, [0])
gives (grad.g=%grad.g, grad.w=%grad.w)
section sum_gradients takes (%grad.g, %grad.w)
  %grad.g.all_reduce: f64[4] @ Replicate; %grad.w.all_reduce: f64[4, 8] @ Replicate = all_reduce(%grad.g, %grad.w)
gives (grad.g=%grad.g.all_reduce, grad.w=%grad.w.all_reduce)
"""


FORWARD_TILED = """\
section forward takes ()
  %x.shard: f64[3, 4] @ Shard(0, cut6) = shard(%x)
  %h: f64[3, 4] @ Shard(0, cut6); %e: f64[3, 8] @ Shard(0, cut6); %loss: f64[] @ Partial = tiles(%x.shard, %g, %w) in 2
    %tile.x.shard: f64[$0, 4] @ Shard(0, cut6') = shard(%x.shard)
    %tile.h: f64[$0, 4] @ Shard(0, cut6') = aten.mul.Tensor(%tile.x.shard, %g)
    %tile.y: f64[$0, 8] @ Shard(0, cut6') = aten.mm.default(%tile.h, %w)
    %tile.e: f64[$0, 8] @ Shard(0, cut6') = aten.exp.default(%tile.y)
    %tile.loss: f64[] @ Partial = aten.sum.default(%tile.e)
  gives (%tile.h, %tile.e, %tile.loss)
  %loss.all_reduce: f64[] @ Replicate = all_reduce(%loss)
"""
BACKWARD_TILED = """\
section backward takes (%x.shard, %h, %e)
  %w.t: f64[8, 4] @ Replicate = aten.permute.default(%w, [1, 0])
  %grad.w: f64[4, 8] @ Partial; %grad.g: f64[4] @ Partial = tiles(%e, %t, %h, %w.t, %x.shard) in 2
    %tile.e: f64[$0, 8] @ Shard(0, cut6') = shard(%e)
    %tile.grad.y: f64[$0, 8] @ Shard(0, cut6') = aten.mul.Tensor(%tile.e, %t)
    %tile.h: f64[$0, 4] @ Shard(0, cut6') = shard(%h)
    %tile.h.t: f64[4, $0] @ Shard(1, cut6') = aten.permute.default(%tile.h, [1, 0])
    %tile.grad.w: f64[4, 8] @ Partial = aten.mm.default(%tile.h.t, %tile.grad.y)
    %tile.grad.h: f64[$0, 4] @ Shard(0, cut6') = aten.mm.default(%tile.grad.y, %w.t)
    %tile.x.shard: f64[$0, 4] @ Shard(0, cut6') = shard(%x.shard)
    %tile.grad.rows: f64[$0, 4] @ Shard(0, cut6') = aten.mul.Tensor(%tile.grad.h, %tile.x.shard)
    %tile.grad.g: f64[4] @ Partial = aten.sum.dim_IntList(%tile.grad.rows, [0])
  gives (%tile.grad.w, %tile.grad.g)
"""


@pytest.fixture
def step():
    """Of two ranks, in sections."""
    return Sections()(Partition(2)(replace(parsed(WHOLE), sequence_dims={"x": 0})))


def test_whole_runs_of_local_calls_are_done_slice_by_slice(step):
    text, numbers = print_program(Tile(2, "cpu")(step).program)
    layouts = "layout cut6 = 0:3 3:6\nlayout cut6' = 0:2 2:3 3:5 5:6\nconstants $0\n"
    header = HEADER.replace("layout cut6 = 0:3 3:6\n", layouts)
    _, end = REST.split("gives (grad.g", 1)
    assert text == header + FORWARD_TILED + GIVES + BACKWARD_TILED + "gives (grad.g" + end
    assert numbers == {"$0": (2, 1, 2, 1)}


def test_the_beginning_of_backward_is_done_in_forward_with_a_guess_of_the_tangent(step):
    taken = "section backward takes (%x.shard, %h, %e)\n"
    assert after(EarlyBackward("off", "cpu"), step) == HEADER + FORWARD + GIVES + taken + BEGINNING + REST
    early = BEGINNING.replace("%grad.", "%early.grad.").replace("%t)", "%early.t)")
    taken = "section backward takes (%x.shard, %early.grad.w, %early.grad.h)\n"
    guess = "guess %early.t: f64[] @ Replicate\n"
    assert after(EarlyBackward(2, "cpu"), step) == HEADER + guess + FORWARD + early + GIVES + taken + RESCALED + REST
