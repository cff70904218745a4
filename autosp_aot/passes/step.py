"""What passes work on: a step, and what is known of it so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from autosp_aot.artifact.manifest import Fallback
from autosp_aot.ir.program import Program
from autosp_aot.passes.analysis.labels import Labels
from autosp_aot.passes.analysis.segments import Segment
from autosp_aot.sharding.spec import Strategy


@dataclass(frozen=True)
class Step:
    """The unsharded step, and the program of all ranks that passes have made of it so far.

    `sequence_dims` say which dim of which input is the sequence. The partition adds where the sequence is in each value
    (`labels`), how calls were placed (`decisions`) and what computes replicated (`fallbacks`); the choice of what is
    saved for backward adds the `segments` of forward, and `kept`: the values that are saved, and why.
    """

    whole: Program
    program: Program
    sequence_dims: Mapping[str, int]
    labels: Labels | None = None
    decisions: Mapping[str, Strategy] = field(default_factory=dict)
    fallbacks: tuple[Fallback, ...] = ()
    segments: tuple[Segment, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    def with_program(self, program: Program) -> "Step":
        return replace(self, program=program)


class Pass(Protocol):
    """A rewrite of a step. Options are its fields; `name` is what `--dump` and refusals call it."""

    @property
    def name(self) -> str: ...

    def __call__(self, step: Step) -> Step: ...
