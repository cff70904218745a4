"""Sections: one list of instructions becomes forward, backward and the sum of gradients."""

from autosp_aot.passes.sections import OnlySection, Sections
from tests.passes.texts import after, parsed

HEADER = """\
autosp program 1
ranks 2
layout cut5 = 0:3 3:5
constants $0
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[5, 4] @ Replicate
tangent %t: f32[] @ Replicate
"""
FORWARD = """\
  %x.shard: f32[$0, 4] @ Shard(0, cut5) = shard(%x)
  %h: f32[$0, 4] @ Shard(0, cut5) = aten.mm.default(%x.shard, %w)
  %total: f32[] @ Partial = aten.sum.default(%h)
  %loss: f32[] @ Replicate = all_reduce(%total)
"""
BACKWARD = """\
  %g: f32[$0, 4] @ Shard(0, cut5) = aten.mul.Tensor(%h, %t)
  %swapped: f32[4, $0] @ Shard(1, cut5) = aten.permute.default(%x.shard, [1, 0])
  %grad: f32[4, 4] @ Partial = aten.mm.default(%swapped, %g)
"""
CUT = {"$0": (3, 2)}


def test_backward_is_what_the_loss_does_not_need_and_partial_sums_are_summed_at_its_end():
    step = parsed(f"{HEADER}section step takes ()\n{FORWARD}{BACKWARD}gives (loss=%loss, grad.w=%grad)\n", CUT)
    assert after(Sections(), step) == (
        f"{HEADER}section forward takes ()\n{FORWARD}gives (loss=%loss)\n"
        f"section backward takes (%x.shard, %h)\n{BACKWARD}gives (grad.w=%grad)\n"
        "section sum_gradients takes (%grad)\n"
        "  %grad.all_reduce: f32[4, 4] @ Replicate = all_reduce(%grad)\n"
        "gives (grad.w=%grad.all_reduce)\n"
    )


def test_a_program_of_the_loss_alone_is_an_evaluation():
    text = f"{HEADER}section step takes ()\n{FORWARD}gives (loss=%loss)\n"
    assert after(OnlySection(), parsed(text, CUT)) == text.replace("section step", "section evaluate")
