"""What is illegal in any program: each is refused with the line that has it."""

import pytest

from autosp_aot.errors import ArtifactError
from autosp_aot.ir.text import parse_program
from autosp_aot.ir.verify import verify

LEGAL = """\
autosp program 1
ranks 2
layout cut4 = 0:2 2:4
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
section forward takes ()
  %x.shard: f32[2, 4] @ Shard(0, cut4) = shard(%x)  # model.py:1
  %y: f32[2, 4] @ Shard(0, cut4) = aten.mm.default(%x.shard, %w)  # model.py:2
  %s: f32[] @ Partial = aten.sum.default(%y)  # model.py:3
  free(%y)
  %s.all_reduce: f32[] @ Replicate = all_reduce(%s)  # model.py:4
  free(%s)
gives (loss=%s.all_reduce)
section backward takes (%x.shard)
  %g: f32[4, 2] @ Partial = aten.permute.default(%x.shard, [1, 0])  # model.py:5
  free(%x.shard)
gives (grad.w=%g)
section sum_gradients takes (%g)
  %g.all_reduce: f32[4, 2] @ Replicate = all_reduce(%g)  # model.py:6
gives (grad.w=%g.all_reduce)
"""


def refused(text: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        verify(parse_program(text, {}))
    return str(caught.value)


def test_a_legal_program():
    verify(parse_program(LEGAL, {}))


@pytest.mark.parametrize("old, new, said", [
    ("gives (grad.w=%g)", "  %h: f32[4, 4] @ Replicate = aten.neg.default(%x.shard)\ngives (grad.w=%g)",
     "x.shard is used but not alive"),
    ("%y: f32[2, 4]", "%w: f32[2, 4]", "w is made twice"),
    ("batch %x", "seed %x", "the seed x is not one i64 number"),
    ("%g.all_reduce: f32", "%g: f32", "g is made twice"),
    ("aten.mm.default(%x.shard, %w)", "aten.mm.default(%x.shard, %v)", "v is used but not alive"),
    ("takes (%x.shard)", "takes ()", "x.shard is used but not alive"),
    ("takes (%g)", "takes (%y)", "section sum_gradients takes y, which no earlier section made or kept"),
    ("gives (loss=%s.all_reduce)", "gives (loss=%s)", "section forward gives loss, but s is not alive at its end"),
    ("gives (grad.w=%g)", "gives (grad.w=%s.all_reduce)",
     "section backward gives grad.w, but s.all_reduce is not alive at its end"),
    ("section backward", "section again", "sections forward, again, sum_gradients"),
    ("aten.sum.default(%y)", "os.system(%y)", "os.system is not an operator"),
    ("  free(%y)\n", "  _ = aten.neg.default(%y)\n  free(%y)\n", "aten.neg.default gives nothing that has a name"),
    ("shard(%x)", "shard(%x, %w)", "shard has 2 operands and 1 results"),
    ("all_reduce(%s)", "all_reduce(%s, %s.all_reduce)", "s.all_reduce is used but not alive"),
    ("all_reduce(%g)", "all_reduce(%g, %w)", "all_reduce has operands, and a result for each"),
    ("free(%s)", "free(%s, %s)", "a value is released twice"),
    ("= shard(%x)", "= all_to_all()", "all_to_all has 0 operands and 1 results"),
    ("Shard(0, cut4) = shard", "Shard(2, cut4) = shard",
     "x.shard has a placement for another shape or number of ranks"),
    ("0:2 2:4", "0:2 3:4", "the boxes of x.shard leave a gap"),
    ("0:2 2:4", "1:2 2:4", "the boxes of x.shard leave a gap"),
    ("0:2 2:4", "0:4 4:2", "x.shard has a box that ends before it begins"),
])  # fmt: skip
def test_what_is_illegal(old, new, said):
    assert LEGAL.count(old) == 1
    assert f"error[program-illegal]: {said}\n" in refused(LEGAL.replace(old, new))


def test_the_whole_text_of_a_refusal():
    late = "  free(%s)\n  %n: f32[] @ Partial = aten.neg.default(%s)  # model.py:9\n"
    assert refused(LEGAL.replace("  free(%s)\n", late)) == (
        "error[program-illegal]: s is used but not alive\n"
        "  where  n = aten.neg.default(...) (model.py:9)\n"
        "  why    it was released before\n"
        "  fix    build the artifact again"
    )
