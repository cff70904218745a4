"""The runner: what it shows, in which order, and that nothing a pass makes is believed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.program import Program
from autosp_aot.ir.verify import verify
from autosp_aot.passes.pipeline import compile_program, pipeline, run_passes
from autosp_aot.passes.step import Step
from tests.mutants import planted, released_too_early, without

DIMS = {"input_ids": 1, "labels": 1}
CONFIG = BuildConfig(2)


@dataclass(frozen=True)
class Changed:
    """A pass that does anything."""

    change: Callable[[Program], Program]
    name: str = "changed"

    def __call__(self, step: Step) -> Step:
        return replace(step, program=self.change(step.program))


def test_every_pass_is_shown_what_it_made_in_order(tiny2):
    seen, names = {}, [one.name for one in pipeline(CONFIG)]
    compiled = compile_program(tiny2.whole, DIMS, CONFIG, watch=seen.__setitem__)
    assert list(seen) == ["capture", *names]
    assert seen["capture"] is tiny2.whole and seen[names[-1]] is compiled.program
    for program in seen.values():
        verify(program)


@pytest.mark.parametrize(("plant", "code"), [
    (released_too_early, "program-illegal"),
    (lambda program: planted(program, without("div.all_reduce")), "placement-wrong"),
])  # fmt: skip
def test_a_pass_that_makes_something_wrong_is_refused_after_it_was_shown(tiny2, plant, code):
    seen, passes = [], (*pipeline(CONFIG), Changed(plant))
    with pytest.raises(ArtifactError, match=code):
        run_passes(passes, Step(tiny2.whole, tiny2.whole, DIMS), lambda name, program: seen.append(name))
    assert seen[-1] == "changed"


def test_another_pass_needs_no_other_edit(tiny2):
    nothing = Changed(lambda program: program)
    step = run_passes((nothing, *pipeline(CONFIG), nothing), Step(tiny2.whole, tiny2.whole, DIMS))
    assert step.program == tiny2.program


def test_what_is_known_of_a_step_is_found_once_and_carried(tiny2):
    step = compile_program(tiny2.whole, DIMS, CONFIG)
    assert step.labels.by_value["tokens.embedding"] and step.segments and step.kept and step.decisions
