"""The passes, in order; what each makes is verified, and proved to be the whole step."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.errors import BuildError, Problem
from autosp_aot.ir.program import Program
from autosp_aot.ir.verify import verify
from autosp_aot.passes.early_backward import compute_early
from autosp_aot.passes.inplace import reuse
from autosp_aot.passes.keep.policy import plan
from autosp_aot.passes.offload import offload
from autosp_aot.passes.order import order
from autosp_aot.passes.partition import Fallback, partition
from autosp_aot.passes.query_rows import split_query_rows
from autosp_aot.passes.recompute import recompute
from autosp_aot.passes.release import release
from autosp_aot.passes.sections import only_section, split_sections
from autosp_aot.passes.tile import tile
from autosp_aot.proof.derive import derive
from autosp_aot.sharding.spec import Strategy


@dataclass(frozen=True)
class Compiled:
    """The whole step, and what the passes have made of it so far.

    `decisions` say how calls were placed, `fallbacks` what computes replicated, `kept` what forward keeps, and why.
    """

    whole: Program
    program: Program
    decisions: dict[str, Strategy]
    fallbacks: tuple[Fallback, ...]
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What passes are told. With `decisions` the partition takes them again instead of choosing."""

    sequence_dims: Mapping[str, int]
    config: BuildConfig
    decisions: Mapping[str, Strategy] | None = None


Pass = Callable[[Compiled, Task], Compiled]
Passes = tuple[tuple[str, Pass], ...]
Watch = Callable[[str, Program], None]


def unwatched(name: str, program: Program) -> None:
    """Nobody looks at what a pass made."""


def _on_whole(rewrite: Callable[[Program, Task], Program]) -> Pass:
    """A pass that changes what the step is said to be, before it is split."""

    def run(step: Compiled, task: Task) -> Compiled:
        whole = rewrite(step.whole, task)
        return replace(step, whole=whole, program=whole)

    return run


def _on_ranks(rewrite: Callable[[Program, Task], Program]) -> Pass:
    """A pass over the program of all ranks."""
    return lambda step, task: replace(step, program=rewrite(step.program, task))


def _partition(step: Compiled, task: Task) -> Compiled:
    found = partition(step.whole, task.sequence_dims, task.config.ranks, task.decisions)
    if task.config.strict and found.fallbacks:
        raise BuildError(*dict.fromkeys(map(_refused, found.fallbacks)))
    return Compiled(step.whole, found.program, found.decisions, found.fallbacks)


def _early(step: Compiled, task: Task) -> Compiled:
    return replace(step, program=compute_early(step.program, step.whole, task.sequence_dims, task.config.tile))


def _tile(step: Compiled, task: Task) -> Compiled:
    return replace(step, program=tile(step.program, step.whole, task.sequence_dims, task.config.tile))


def _plan(step: Compiled, task: Task) -> Compiled:
    def scheduled(kept: Collection[str], offload: str) -> Program:
        made = replace(step, kept=dict.fromkeys(kept, ""))
        told = replace(task, config=replace(task.config, offload=offload))
        for _, run in SCHEDULE:
            made = run(made, told)
        return made.program

    return replace(step, kept=plan(step.program, task.config, task.sequence_dims, scheduled))


QUERY_ROWS = "query-rows", _on_whole(lambda whole, task: split_query_rows(whole, task.config.ranks))
PARTITION = "partition", _partition
SECTIONS = "sections", _on_ranks(lambda program, task: split_sections(program))
ONE_SECTION = "section", _on_ranks(lambda program, task: only_section(program))
EARLY = "early", _early
PLAN = "plan", _plan
RECOMPUTE = "recompute", lambda step, task: replace(step, program=recompute(step.program, step.kept))
TILE = "tile", _tile
ORDER = "order", _on_ranks(lambda program, task: order(program, task.config.target))
OFFLOAD = "offload", _on_ranks(lambda program, task: offload(program, task.config, task.sequence_dims))
RELEASE = "release", _on_ranks(lambda program, task: release(program))
REUSE = "reuse", _on_ranks(lambda program, task: reuse(program, task.config.target))

# Offload comes after whatever moves instructions: a copy's place is where it overlaps with work.
SCHEDULE: Passes = (RECOMPUTE, TILE, ORDER, OFFLOAD, RELEASE, REUSE)
PIPELINE: Passes = (QUERY_ROWS, PARTITION, SECTIONS, EARLY, PLAN, *SCHEDULE)
# Of a program that gives the loss alone: nothing is kept, computed early or computed again.
EVALUATION: Passes = (QUERY_ROWS, PARTITION, ONE_SECTION, TILE, ORDER, RELEASE, REUSE)


def compile_program(
    whole: Program,
    sequence_dims: Mapping[str, int],
    config: BuildConfig,
    decisions: Mapping[str, Strategy] | None = None,
    watch: Watch = unwatched,
) -> Compiled:
    """From the whole step to the step of every rank.

    `decisions` (of an earlier build of this step) are taken again instead of choosing. `watch` is shown what is there
    before the first pass, under the name `capture`, and after each, before that is verified. Raises BuildError, and
    ArtifactError for decisions that do not fit.
    """
    return _compiled(PIPELINE, whole, Task(sequence_dims, config, decisions), watch)


def compile_evaluation(
    whole: Program, sequence_dims: Mapping[str, int], config: BuildConfig, watch: Watch = unwatched
) -> Compiled:
    """The same for a program that gives the loss alone: of every rank, one section `evaluate`."""
    return _compiled(EVALUATION, whole, Task(sequence_dims, config), watch)


def _compiled(passes: Passes, whole: Program, task: Task, watch: Watch) -> Compiled:
    step = Compiled(whole, whole, {}, ())
    watch("capture", whole)
    verify(whole)
    for name, run in passes:
        step = run(step, task)
        watch(name, step.program)
        verify(step.program)
        if step.program is not step.whole:
            derive(step.program, step.whole)
    return step


def _refused(fallback: Fallback) -> Problem:
    return Problem(
        "operator-without-rule",
        f"{fallback.op} would be computed on every rank, gathering {fallback.gathered_bytes} bytes",
        fallback.source,
        "it has no sharding rule, and --strict was given",
        "use another operator, or build without --strict",
    )
