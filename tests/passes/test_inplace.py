"""Reuse: elementwise results are written into operands that end, and into nothing else."""

import pytest
import torch
from torch import Tensor

from autosp_aot.errors import ArtifactError
from autosp_aot.ir.operators import overload, writer
from autosp_aot.ir.text import parse_program, print_program
from autosp_aot.ir.verify import verify
from autosp_aot.passes.inplace import reuse
from autosp_aot.passes.release import release

TEXT = """\
autosp program 1
ranks 1
parameter %w: f32[4, 6] @ Replicate
batch %x: f32[4, 6] @ Replicate
section step takes ()
{lines}
gives (loss=%y)
"""
MADE = "  %a: f32[4, 6] @ Replicate = aten.exp.default(%x)"
MORE = "  %b: f32[4, 6] @ Replicate = aten.cos.default(%x)"


def in_place(*lines: str) -> list[str]:
    """The lines of a program that writes results into operands, `free` left out."""
    program = reuse(release(parse_program(TEXT.format(lines="\n".join(lines)), {})), "cpu")
    verify(program)
    text, _ = print_program(program)
    assert parse_program(text, {}) == program
    return [line for line in text.splitlines() if line.startswith("  %")]


def test_a_result_takes_the_memory_of_the_first_operand_that_ends():
    assert in_place(MADE, MORE, "  %c: f32[4, 6] @ Replicate = aten.mul.Tensor(%w, %b)",
                    "  %y: f32[4, 6] @ Replicate = aten.mul.Tensor(%c, %a)")[2:] == [
        "  %c: f32[4, 6] @ Replicate = aten.mul.Tensor(%w, %b, into=%b)",
        "  %y: f32[4, 6] @ Replicate = aten.mul.Tensor(%c, %a, into=%c)",
    ]  # fmt: skip


def test_a_view_of_all_that_ends_with_it_is_taken():
    lines = in_place(MADE, "  %v: f32[24] @ Replicate = aten.reshape.default(%a, [24])",
                     "  %y: f32[24] @ Replicate = aten.neg.default(%v)")  # fmt: skip
    assert lines[-1].endswith("aten.neg.default(%v, into=%v)")


@pytest.mark.parametrize("lines", [
    ("%t: f32[4, 6] @ Replicate = aten.mul.Tensor(%x, %w)",),
    ("%t: f32[4, 6] @ Replicate = aten.neg.default(%a)", "%u: f32[4, 6] @ Replicate = aten.mul.Tensor(%t, %a)"),
    ("%v: f32[24] @ Replicate = aten.reshape.default(%a, [24])", "%t: f32[4, 6] @ Replicate = aten.neg.default(%a)",
     "%u: f32[24] @ Replicate = aten.neg.default(%v)"),
    ("%v: f32[6, 4] @ Replicate = aten.permute.default(%x, [1, 0])",
     "%t: f32[6, 4] @ Replicate = aten.neg.default(%v)"),
    ("%v: f32[2, 6] @ Replicate = aten.slice.Tensor(%a, 0, 0, 2)", "%t: f32[2, 6] @ Replicate = aten.neg.default(%v)"),
    ("%s: f32[1, 6] @ Replicate = aten.sum.dim_IntList(%x, [0], True)",
     "%t: f32[4, 6] @ Replicate = aten.mul.Tensor(%x, %s)"),
    ("%t: f32[4, 6] @ Replicate = aten.cumsum.default(%a, 0)",),
    ("%t: b8[4, 6] @ Replicate = aten.gt.Scalar(%a, 0)",),
    ("%v: f32[6, 4] @ Replicate = aten.permute.default(%a, [1, 0])",
     "%s: f32[6, 4] @ Replicate = aten.reshape.default(%x, [6, 4])",
     "%t: f32[6, 4] @ Replicate = aten.mul.Tensor(%s, %v)"),
], ids=["inputs", "read later", "a view is read later", "a view of an input", "a part", "broadcast", "not elementwise",
        "another dtype", "other strides"])  # fmt: skip
def test_memory_that_is_not_taken(lines):
    found = in_place(MADE, *(f"  {line}" for line in lines), "  %y: f32[4, 6] @ Replicate = aten.exp.default(%w)")
    assert [line for line in found if "%t:" in line and "into" not in line]


LEGAL = TEXT.format(lines=f"""\
{MADE}
  %v: f32[24] @ Replicate = aten.reshape.default(%a, [24])
  free(%a)
  %y: f32[24] @ Replicate = aten.neg.default(%v, into=%v)  # model.py:7
  free(%v)""")


@pytest.mark.parametrize("old, new, said", [
    ("\n  free(%v)", "", "v is written into"),
    ("  free(%a)\n", "", "v is written into"),
    ("aten.exp.default(%x)", "aten.permute.default(%x, [0, 1])", "v is written into"),
    ("aten.reshape.default(%a, [24])\n  free(%a)", "aten._unsafe_view.default(%a, [24])", "v is written into"),
    ("aten.neg.default", "aten.cumsum.default", "aten.cumsum.default cannot write into v"),
    ("%y: f32[24] @ Replicate = aten.neg", "_ = aten.neg", "aten.neg.default cannot write into v"),
    ("%y: f32[24]", "%y: f32[4, 6]", "y is of another type than v, into which it is written"),
])  # fmt: skip
def test_what_may_not_be_written_into(old, new, said):
    verify(parse_program(LEGAL, {}))
    with pytest.raises(ArtifactError) as caught:
        verify(parse_program(LEGAL.replace(old, new), {}))
    assert said in str(caught.value)


def test_the_whole_text_of_a_refusal():
    with pytest.raises(ArtifactError) as caught:
        verify(parse_program(LEGAL.replace("  free(%a)\n", ""), {}))
    assert str(caught.value) == (
        "error[program-illegal]: v is written into\n"
        "  where  y = aten.neg.default(...) (model.py:7)\n"
        "  why    it, or what may lie in its memory, is not released right after\n"
        "  fix    build the artifact again"
    )


# --- torch's elementwise operators ---------------------------------------------------------------------------------


def elementwise() -> list[str]:
    """Every operator of torch that can write into an operand."""
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")]
    names = {f"aten.{schema.name[6:]}.{schema.overload_name or 'default'}" for schema in schemas}
    return sorted(name for name in names if writer(name))


def example(argument, at: int, dtype: torch.dtype):
    """Argument number `at` of a call on tensors of a dtype."""
    kind = str(argument.type)
    if kind == "Tensor":
        numbers = torch.rand(3, 37, generator=torch.Generator().manual_seed(at)) * 4
        return (numbers + 0.1).to(dtype)
    if argument.has_default_value():
        return argument.default_value
    return {"number": 2, "float": 0.7, "int": 1, "bool": True, "Optional[str]": "floor"}[kind]


def supports(function, arguments: dict) -> bool:
    """Whether torch has the operator for these dtypes: it has no table of them, it says so by an error of the call.

    Asked is the plain call: the one in place, which is under test, may not fail where this does not.
    """
    try:
        function(**arguments)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_elementwise_operators_give_the_same_bits_in_place(dtype):
    compared = 0
    for name in elementwise():
        function, (writing, out) = overload(name), writer(name)
        made = {a.name: example(a, at, dtype) for at, a in enumerate(function._schema.arguments)}
        if not supports(function, made):
            continue
        wanted = function(**made)
        for operand, tensor in made.items():
            if isinstance(tensor, Tensor) and (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape):
                given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in made.items()}
                found = writing(**given, **{out: given[operand]})
                assert found.data_ptr() == given[operand].data_ptr(), name
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=name)
                compared += 1
    assert compared > 20
