"""What a build compares with eager before it is written: the artifact itself where a step takes seconds, else the same
model at a short length on two ranks. What capture gets wrong does not depend on the length.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autosp_aot.artifact.batches import Constant
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.write import Artifact
from autosp_aot.commands.check.oracle import Built, EagerFailed, Outcome, compare
from autosp_aot.commands.check.undrawn import NotComparable, draws
from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.keeping import left_alone
from autosp_aot.export.user_code import said

# Operations of a step of all ranks that take about a second on a core, and how many ranks run in one process.
FLOPS_LIMIT, RANKS_LIMIT = 10**10, 8
SHORTEST = 32  # positions of a short length, at least
STEPS = 2

Batch = Mapping[str, Tensor | Constant]


def compare_build(
    model: nn.Module, batch: Batch, length: int, artifact: Artifact, config: BuildConfig,
    shortened: Callable[[int], Batch], compiled: Callable[[Batch, BuildConfig], Artifact],
) -> str:  # fmt: skip
    """Compare a build with eager; what was compared, or why nothing was.

    `length` are the positions of a sequence of `batch`; `shortened` gives a batch of another length, and `compiled` an
    artifact for one. The model is left as it was. Raises BuildError (`differs-from-eager`).
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return "nothing: weights of this size are not made while building"
    flops = artifact.manifest.step.costs.flops * config.ranks
    positions, ranks = length, config.ranks
    if flops > FLOPS_LIMIT or ranks > RANKS_LIMIT:
        while positions // 2 >= SHORTEST:
            positions //= 2
        ranks = min(ranks, 2)
        if flops * positions // length > FLOPS_LIMIT:
            return f"nothing: a step of {positions} positions takes {flops * positions / length:.0e} operations"
        short = replace(config, ranks=ranks, recompute="none", memory_budget_bytes=None, tile="off", offload="off")
        try:
            batch = shortened(positions)
            artifact = compiled(batch, short)
        except BuildError as error:
            return f"nothing: at {positions} positions the model is refused ({error.problems[0].code})"
    with _left_as_it_was(model):
        try:
            outcome = compare(model, batch, _built(artifact), STEPS)
        except NotComparable as error:
            return f"nothing: {error}"
        except EagerFailed as error:
            return f"nothing: on this machine the model itself fails with {said(error.raised)}"
    if outcome.beyond:
        raise BuildError(differs(outcome))
    dropped = ", dropout off" if draws(artifact.whole) else ""
    return f"{STEPS} steps of SGD, {positions} positions, {ranks} rank{'s' * (ranks > 1)}{dropped}"


def differs(outcome: Outcome) -> Problem:
    """What is said of programs that do not do what eager does."""
    worst = [f"{label}: {error:.1e}, at most {outcome.limits[label]:.0e} is rounding"
             for label, error in outcome.beyond.items()][:5]  # fmt: skip
    where = f"step {outcome.steps + 1}, first in {outcome.module}" + (f" ({outcome.place})" if outcome.place else "")
    return Problem(
        "differs-from-eager", f"{len(outcome.beyond)} results are not those of eager", where, "\n".join(worst),
        "if the model does the same in every run, this is a fault of autosp-aot: please report it; --no-eager-check "
        "builds what was captured",
    )  # fmt: skip


def _built(artifact: Artifact) -> Built:
    ranks = range(artifact.manifest.ranks)
    by_rank = lambda program: [program.for_rank(rank) for rank in ranks]  # noqa: E731
    evaluation = None if artifact.evaluation is None else by_rank(artifact.evaluation.program)
    return Built(artifact.whole, by_rank(artifact.program), evaluation, artifact.buffers)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """When it ends parameters, buffers, gradients, and whatever else forward keeps are as before; so are generators."""
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.random.fork_rng(), left_alone(model):
        try:
            for parameter in model.parameters():
                parameter.grad = None
            yield
        finally:
            with torch.no_grad():
                for tensor, before in values:
                    tensor.copy_(before)
            for parameter, gradient in gradients:
                parameter.grad = gradient
