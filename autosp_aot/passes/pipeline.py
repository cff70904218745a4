"""The passes, in order; what each makes is verified, and proved to be the unsharded step."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.ir.program import Program
from autosp_aot.ir.verify import verify
from autosp_aot.passes.early_backward import EarlyBackward
from autosp_aot.passes.inplace import Reuse
from autosp_aot.passes.keep.policy import Keep
from autosp_aot.passes.lay_out import LayOut
from autosp_aot.passes.offload import Offload
from autosp_aot.passes.order import Order
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.query_rows import QueryRows
from autosp_aot.passes.recompute import Recompute
from autosp_aot.passes.release import Release
from autosp_aot.passes.sections import OnlySection, Sections
from autosp_aot.passes.step import Pass, Step
from autosp_aot.passes.tile import Tile
from autosp_aot.proof.derive import derive
from autosp_aot.sharding.spec import Strategy

Watch = Callable[[str, Program], None]
Decisions = Mapping[str, Strategy]


def pipeline(config: BuildConfig, decisions: Decisions | None = None) -> tuple[Pass, ...]:
    """The passes of a step. With `decisions` the partition takes them again instead of choosing."""
    return (
        QueryRows(config.ranks),
        Partition(config.ranks, decisions, config.strict),
        Sections(),
        EarlyBackward(config.tile, config.target),
        Keep(config, lambda offload: schedule(replace(config, offload=offload))),
        *schedule(config),
    )


def schedule(config: BuildConfig) -> tuple[Pass, ...]:
    """The passes after the choice of what is kept, which tries them.

    Offload comes after whatever moves instructions: a copy's place is where it overlaps with work.
    """
    return (
        Recompute(),
        Tile(config.tile, config.target),
        LayOut(config.target),
        Order(config.target),
        Offload(config),
        Release(),
        Reuse(config.target),
    )


def evaluation_pipeline(config: BuildConfig) -> tuple[Pass, ...]:
    """The passes of a program that gives the loss alone: nothing is kept, computed early or recomputed."""
    return (
        QueryRows(config.ranks),
        Partition(config.ranks, strict=config.strict),
        OnlySection(),
        Tile(config.tile, config.target),
        LayOut(config.target),
        Order(config.target),
        Release(),
        Reuse(config.target),
    )


def unwatched(name: str, program: Program) -> None:
    """Nobody looks at what a pass made."""


def compile_program(
    whole: Program,
    sequence_dims: Mapping[str, int],
    config: BuildConfig,
    decisions: Decisions | None = None,
    watch: Watch = unwatched,
) -> Step:
    """From the unsharded step to the step of every rank.

    `decisions` (of an earlier build of this step) are taken again instead of choosing. `watch` is shown what is there
    before the first pass, under the name `capture`, and after each, before that is verified. Raises BuildError, and
    ArtifactError for decisions that do not fit.
    """
    return run_passes(pipeline(config, decisions), Step(whole, whole, sequence_dims), watch)


def compile_evaluation(
    whole: Program, sequence_dims: Mapping[str, int], config: BuildConfig, watch: Watch = unwatched
) -> Step:
    """The same for a program that gives the loss alone: of every rank, one section `evaluate`."""
    return run_passes(evaluation_pipeline(config), Step(whole, whole, sequence_dims), watch)


def run_passes(passes: tuple[Pass, ...], step: Step, watch: Watch = unwatched) -> Step:
    """Run passes over a step; what each makes is shown to `watch`, verified, and derived from the unsharded step.

    Raises what passes raise, and ArtifactError for what a pass made wrong.
    """
    watch("capture", step.program)
    verify(step.program)
    for one in passes:
        step = one(step)
        watch(one.name, step.program)
        verify(step.program)
        if step.program is not step.whole:
            derive(step.program, step.whole)
    return step
