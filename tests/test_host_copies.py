"""What verify says of copies to host memory: each wrong text is refused with the line that has it."""

import pytest

from autosp_aot.errors import ArtifactError
from autosp_aot.ir.text import parse_program, print_program
from autosp_aot.ir.verify import verify

LEGAL = """\
autosp program 1
ranks 1
batch %x: f32[4] @ Replicate
section forward takes ()
  %a: f32[4] @ Replicate = aten.neg.default(%x)
  %b: f32[4] @ Replicate = aten.neg.default(%a)
  %a.offload: f32[4] @ Replicate = offload(%a, 0)
  %b.offload: f32[4] @ Replicate = offload(%b, 16)
  %a.host: f32[4] @ Replicate = wait(%a.offload, %a)
  free(%a, %a.offload)
  %b.host: f32[4] @ Replicate = wait(%b.offload, %b)
  %loss: f32[4] @ Replicate = aten.neg.default(%b)
  free(%b, %b.offload)
gives (loss=%loss)
section backward takes (%a.host, %b.host)
  %a.fetch: f32[4] @ Replicate = fetch(%a.host)
  %a.back: f32[4] @ Replicate = wait(%a.fetch, %a.host)
  free(%a.fetch, %a.host)
  %g: f32[4] @ Replicate = aten.neg.default(%a.back)
gives (grad.w=%g)
section sum_gradients takes (%g)
gives (grad.w=%g)
"""


def test_a_legal_program_and_its_text():
    program = parse_program(LEGAL, {})
    verify(program)
    assert print_program(program) == (LEGAL, {})


@pytest.mark.parametrize("old, new, said", [
    # what a copy reads is released before its wait
    ("  %a.host: f32[4] @ Replicate = wait(%a.offload, %a)\n  free(%a, %a.offload)\n",
     "  free(%a)\n  %a.host: f32[4] @ Replicate = wait(%a.offload, %a)\n", "a is used but not alive"),
    ("  %a.back: f32[4] @ Replicate = wait(%a.fetch, %a.host)\n  free(%a.fetch, %a.host)\n",
     "  free(%a.host)\n  %a.back: f32[4] @ Replicate = wait(%a.fetch, %a.host)\n", "a.host is used but not alive"),
    # what it makes is released, or read, before its wait
    ("  %a.host: f32[4] @ Replicate = wait(%a.offload, %a)\n  free(%a, %a.offload)\n", "  free(%a.offload)\n",
     "a.offload is released before its copy is waited for"),
    ("aten.neg.default(%a.back)", "aten.neg.default(%a.fetch)", "a.fetch is used but not alive"),
    ("  free(%a.fetch, %a.host)\n  %g: f32[4] @ Replicate = aten.neg.default(%a.back)",
     "  %g: f32[4] @ Replicate = aten.neg.default(%a.fetch)", "a.fetch is read before its copy is waited for"),
    ("%g: f32[4] @ Replicate = aten.neg.default(%a.back)", "%g: f32[4] @ Replicate = fetch(%b.host)",
     "section backward gives grad.w, but g is not on the device"),
    # a wait that waits for nothing, or twice, or for another copy
    ("wait(%b.offload, %b)", "wait(%b, %b)", "b is no copy of b that is to be waited for"),
    ("wait(%a.fetch, %a.host)\n", "wait(%a.fetch, %a.host)\n  %a.2: f32[4] @ Replicate = wait(%a.fetch, %a.host)\n",
     "a.fetch is no copy of a.host that is to be waited for"),
    ("wait(%a.offload, %a)", "wait(%a.offload, %b)", "a.offload is no copy of b that is to be waited for"),
    ("  %a.back: f32[4] @ Replicate = wait(%a.fetch, %a.host)\n  free(%a.fetch, %a.host)\n"
     "  %g: f32[4] @ Replicate = aten.neg.default(%a.back)", "  %g: f32[4] @ Replicate = aten.neg.default(%x)",
     "section backward ends before the copy a.fetch is waited for"),
    # what is in host memory is read on the device, or fetched where it is not
    ("aten.neg.default(%a.back)", "aten.neg.default(%b.host)", "b.host is in host memory"),
    ("aten.neg.default(%a.back)", "fetch(%a.back)", "a.back is fetched, and it is not in host memory"),
    ("aten.neg.default(%a.back)", "offload(%b.host, 32)", "b.host is in host memory"),
    ("aten.neg.default(%a.back)", "fetch(%a.host)", "a.host is used but not alive"),
    ("gives (loss=%loss)", "gives (loss=%b.host)", "section forward gives loss, but b.host is not on the device"),
    # places in the pool
    ("offload(%b, 16)", "offload(%b, 12)", "b.offload is put at bytes 12 to 28, where a.offload is until byte 16"),
    ("offload(%b, 16)", "offload(%b, 18)", "b.offload is put at 18, which is no place for f32"),
    ("offload(%b, 16)", "offload(%b, -16)", "b.offload is put at -16, which is no place for f32"),
    ("offload(%b, 16)", "offload(%b, True)", "b.offload is put at True, which is no place for f32"),
    ("offload(%b, 16)", "offload(%b)", "b.offload is put at Ref(name='b'), which is no place for f32"),
    # types
    ("%a.back: f32[4]", "%a.back: f32[2]", "a.back is of another type than a.fetch, of which it is a copy"),
    ("%b.host: f32[4]", "%b.host: bf16[4]", "b.host is of another type than b.offload, of which it is a copy"),
    ("fetch(%a.host)", "fetch(%a.host, %b.host)", "fetch has 2 operands and 1 results"),
    ("wait(%a.fetch, %a.host)", "wait(%a.fetch)", "wait has 1 operands and 1 results"),
])  # fmt: skip
def test_what_is_illegal(old, new, said):
    assert LEGAL.count(old) == 1
    with pytest.raises(ArtifactError) as caught:
        verify(parse_program(LEGAL.replace(old, new), {}))
    assert f"error[program-illegal]: {said}\n" in str(caught.value)


def test_a_place_is_taken_again_once_its_value_is_released():
    start = "  %c.offload: f32[4] @ Replicate = offload(%a.back, 0)\n"
    wait = "  %c: f32[4] @ Replicate = wait(%c.offload, %a.back)\n"
    end = "gives (grad.w=%g)\nsection sum"
    verify(parse_program(LEGAL.replace(end, start + wait + end), {}))


def test_the_whole_text_of_a_refusal():
    wrong = LEGAL.replace("offload(%b, 16)", "offload(%b, 0)  # model.py:7")
    with pytest.raises(ArtifactError) as caught:
        verify(parse_program(wrong, {}))
    assert str(caught.value) == (
        "error[program-illegal]: b.offload is put at bytes 0 to 16, where a.offload is until byte 16\n"
        "  where  b.offload = offload(...) (model.py:7)\n"
        "  fix    build the artifact again"
    )
