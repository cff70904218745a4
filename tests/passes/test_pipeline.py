"""The runner: what it shows, in which order, and that nothing a pass makes is believed."""

from dataclasses import replace

import pytest

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.verify import verify
from autosp_aot.passes import pipeline
from autosp_aot.passes.pipeline import PIPELINE, compile_program
from tests.mutants import planted, released_too_early, without

DIMS = {"input_ids": 1, "labels": 1}


def test_every_pass_is_shown_what_it_made_in_order(tiny2):
    seen = {}
    compiled = compile_program(tiny2.whole, DIMS, BuildConfig(2), watch=seen.__setitem__)
    assert list(seen) == ["capture", *(name for name, _ in PIPELINE)]
    assert seen["capture"] is tiny2.whole and seen[PIPELINE[-1][0]] is compiled.program
    for program in seen.values():
        verify(program)


@pytest.mark.parametrize(("plant", "code"), [
    (released_too_early, "program-illegal"),
    (lambda program: planted(program, without("div.all_reduce")), "placement-wrong"),
])  # fmt: skip
def test_a_pass_that_makes_something_wrong_is_refused_after_it_was_shown(tiny2, monkeypatch, plant, code):
    wrong = ("wrong", lambda step, task: replace(step, program=plant(step.program)))
    monkeypatch.setattr(pipeline, "PIPELINE", (*PIPELINE, wrong))
    seen = []
    with pytest.raises(ArtifactError, match=code):
        compile_program(tiny2.whole, DIMS, BuildConfig(2), watch=lambda name, program: seen.append(name))
    assert seen[-1] == "wrong"


def test_another_pass_needs_no_other_edit(tiny2, monkeypatch):
    nothing = ("nothing", lambda step, task: step)
    monkeypatch.setattr(pipeline, "PIPELINE", (nothing, *PIPELINE, nothing))
    assert compile_program(tiny2.whole, DIMS, BuildConfig(2)).program == tiny2.program
