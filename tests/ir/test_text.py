"""The text is the program: what is printed is read back, and only that."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp_aot.errors import ArtifactError
from autosp_aot.ir.placement import Cut, Placement
from autosp_aot.ir.program import Dtype, Input, Instr, PerRank, Program, Ref, Section, Value, Where
from autosp_aot.ir.text import parse_program, print_program

HALVES = Placement(Cut(0, 1, ((0, 3), (3, 5))))
SIZE = PerRank((3, 2))
PROGRAM = Program(
    2,
    (Input("parameter", Value("w", "f32", (8, 4))), Input("batch", Value("ids", "i64", (5,)))),
    (
        Section(
            "step",
            (),
            (
                Instr((Value("ids.shard", "i64", (SIZE,), HALVES),), "shard", (Ref("ids"),)),
                Instr((Value("embed.embedding", "f32", (SIZE, 4), HALVES),), "aten.embedding.default",
                      (Ref("w"), Ref("ids.shard")), (), Where("model.py:3", "embed")),
                Instr((), "free", (Ref("ids.shard"),)),
                Instr((None, Value("b", "f32", (4,), Placement(None, True))), "aten.odd.default",
                      ((Ref("embed.embedding"), None), -1, 1e-06, float("-inf"), True, "tanh", (SIZE, 4)),
                      (("dtype", Dtype("f32")),)),
            ),
            (("loss", "b"),),
        ),
    ),
)  # fmt: skip
TEXT = """\
autosp program 1
ranks 2
layout cut5 = 0:3 3:5
constants $0
parameter %w: f32[8, 4] @ Replicate
batch %ids: i64[5] @ Replicate
section step takes ()
  %ids.shard: i64[$0] @ Shard(0, cut5) = shard(%ids)
  %embed.embedding: f32[$0, 4] @ Shard(0, cut5) = aten.embedding.default(%w, %ids.shard)  # model.py:3 embed
  free(%ids.shard)
  _; %b: f32[4] @ Partial = aten.odd.default([%embed.embedding, None], -1, 1e-06, -inf, True, "tanh", [$0, 4], dtype=dtype:f32)
gives (loss=%b)
"""  # noqa: E501


def test_a_program_prints_as_expected_and_is_read_back():
    assert print_program(PROGRAM) == (TEXT, {"$0": (3, 2)})
    assert parse_program(TEXT, {"$0": (3, 2)}) == PROGRAM


def test_a_rank_s_numbers_make_a_rank_s_program():
    assert parse_program(TEXT, {"$0": 2}) == PROGRAM.for_rank(1)


def test_a_real_program_is_read_back(tiny):
    text, constants = print_program(tiny.program)
    again = parse_program(text, constants)
    assert again == tiny.program and print_program(again) == (text, constants)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=3, max_size=3, unique=True))
def test_values_may_be_called_anything(names):
    ids, made, label = names
    where = Where(f"{label}.py:3", made)
    add = Instr((Value(made, "f32", ()),), "aten.add.Tensor", (Ref(ids), Ref(ids)), (), where)
    step = Section("step", (ids,), (add, Instr((), "free", (Ref(ids),))), ((label, made),))
    program = Program(1, (Input("batch", Value(ids, "f32", ())),), (step,))
    text, _ = print_program(program)
    assert parse_program(text, {}) == program and len(text.split("\n")) == 8


@pytest.mark.parametrize("name", ["a b", "a\\u0062", "a\\u20", "a\\x"])
def test_a_name_has_one_spelling(name):
    text, _ = print_program(PROGRAM)
    with pytest.raises(ArtifactError, match="program-syntax"):
        parse_program(text.replace("%embed.embedding", f"%{name}"), {"$0": 2})


def test_a_damaged_line_is_refused_with_its_number():
    with pytest.raises(ArtifactError) as caught:
        parse_program(TEXT.replace("shard(%ids)", "shard(%ids"), {"$0": 2})
    assert str(caught.value) == (
        "error[program-syntax]: line 8 of a program cannot be read:"
        " '  %ids.shard: i64[$0] @ Shard(0, cut5) = shard(%ids'\n"
        "  why    not an instruction\n"
        "  fix    build the artifact again"
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("autosp program 1", "autosp program 2"),
        ("Shard(0, cut5)", "Shard(0, other)"),
        ("f32[4] @ Partial", "f31[4] @ Partial"),
        ("@ Partial", "@ Sum"),
        ("constants $0\n", ""),
        ("-inf, True", "-inf, __import__"),
        ("gives (loss=%b)\n", ""),
        ("0:3 3:5", "0:3"),
        ("gives (loss=%b)\n", "gives (loss=%b)\nmore\n"),
        ("gives (loss=%b)\n", "gives (loss=%b)"),
    ],
)
def test_what_the_printer_would_not_write_is_refused(before, after):
    text = TEXT.replace(before, after, 1)
    assert text != TEXT
    with pytest.raises(ArtifactError, match="program-syntax"):
        parse_program(text, {"$0": 2} if "constants" in text else {})
