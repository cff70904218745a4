"""The refusal of a budget: what the least is that a step needs, for what, and what would help."""

from collections.abc import Mapping

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.errors import BuildError, Problem
from autosp_aot.ir.program import Program
from autosp_aot.ir.units import bytes_text
from autosp_aot.memory.costs import Moment, alive, highest

LISTED = 5


class BudgetTooSmall(BuildError):
    """`budget-too-small`: nothing that the options leave open fits; `least` is the program that comes nearest."""

    def __init__(self, problem: Problem, least: Program):
        super().__init__(problem)
        self.least = least

    def __reduce__(self):
        return BudgetTooSmall, (*self.problems, self.least)


def too_small(program: Program, config: BuildConfig, sequence_dims: Mapping[str, int]) -> BudgetTooSmall:
    """The refusal, where `program` takes the least of all that the options leave open; it has every `free`."""
    rank, moments = highest(program, config.target)
    at = max(range(len(moments)), key=lambda at: moments[at].peak_bytes)
    parameters = sum(entry.value.nbytes() for entry in program.inputs)
    least, values = parameters + moments[at].peak_bytes, alive(program, rank, at, config.target)
    later = (section for section in program.sections if section.name != "forward")
    given = {name for section in later for _, name in section.gives}
    gradients = sum(nbytes for value, nbytes in values if value.name in given)
    made = {out.name: instr for instr in program.instrs() for out in instr.values()}
    lines = [f"at the peak, in {moments[at].section} at {moments[at].name}:",
             f"  {bytes_text(parameters)} parameters and batch",
             f"  {bytes_text(gradients)} gradients",
             f"  {bytes_text(moments[at].peak_bytes - gradients)} else, of which the largest:"]  # fmt: skip
    for value, nbytes in [entry for entry in values if entry[0].name not in given][:LISTED]:
        source = made[value.name].where.source
        lines.append(f"    {bytes_text(nbytes)} {value.name}" + (f" ({source})" if source else ""))
    lasting = parameters + _after_backward(moments)
    if lasting > config.budget_bytes:
        fix = (f"give {bytes_text(least)}, or train fewer or narrower parameters: with gradients and sums of these they"
               f" take {bytes_text(lasting)}, which neither more ranks nor a shorter sequence changes")  # fmt: skip
    else:
        fix = _less(program, config, sequence_dims, parameters + gradients, least)
    what = f"needs at least {bytes_text(least)} per rank; budget is {bytes_text(config.budget_bytes)}"
    return BudgetTooSmall(Problem("budget-too-small", what, why="\n".join(lines), fix=fix), program)


def _after_backward(moments: list[Moment]) -> int:
    """What no length changes: the most that gradients take while they are summed, or all of them."""
    summing = (moment.peak_bytes for moment in moments if moment.section == "sum_gradients")
    return max(summing, default=moments[-1].alive_bytes)


def _less(program: Program, config: BuildConfig, dims: Mapping[str, int], lasting: int, least: int) -> str:
    """What takes less; of the length the part for which the budget has room beside what lasts."""
    length = max((e.value.whole_shape[dims[e.value.name]] for e in program.inputs if e.value.name in dims), default=0)
    fits = max(0, length * (config.budget_bytes - lasting) // max(least - lasting, 1))
    options = ["--recompute auto"] * (config.recompute != "auto") + ["--offload host"] * (config.offload == "off")
    sequence = f"or a sequence of about {fits} (in proportion; autosp-aot plan --max-seq searches)"
    return ", ".join([f"give {bytes_text(least)}", "more ranks", *options, sequence])
