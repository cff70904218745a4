"""The passes, in order: Program -> Program."""

from dataclasses import dataclass
from functools import partial

from autosp_aot.config import BuildConfig
from autosp_aot.derive import derive
from autosp_aot.errors import BuildError, Problem
from autosp_aot.passes.partition import Fallback, partition
from autosp_aot.passes.query_rows import split_query_rows
from autosp_aot.passes.recompute import recompute
from autosp_aot.passes.release import release
from autosp_aot.passes.sections import split_sections
from autosp_aot.program import Program
from autosp_aot.verify import verify


@dataclass(frozen=True)
class Compiled:
    """The whole step, the program of all ranks, how each value was placed, and what computes replicated."""

    whole: Program
    program: Program
    decisions: dict[str, str]
    fallbacks: tuple[Fallback, ...]


def compile_program(whole: Program, sequence_dims: dict[str, int], config: BuildConfig) -> Compiled:
    """From the whole step to the step of every rank, verified before and after each pass. Raises BuildError."""
    whole = split_query_rows(whole, config.ranks)
    verify(whole)
    partitioned = partition(whole, sequence_dims, config.ranks)
    if config.strict and partitioned.fallbacks:
        raise BuildError(*dict.fromkeys(map(_refused, partitioned.fallbacks)))
    program = partitioned.program
    for run in (lambda program: program, split_sections, partial(recompute, policy=config.recompute), release):
        program = run(program)
        verify(program)
        derive(program, whole)
    return Compiled(whole, program, partitioned.decisions, partitioned.fallbacks)


def _refused(fallback: Fallback) -> Problem:
    return Problem(
        "operator-without-rule",
        f"{fallback.op} would be computed on every rank, gathering {fallback.gathered_bytes} bytes",
        fallback.source,
        "it has no sharding rule, and --strict was given",
        "use another operator, or build without --strict",
    )
