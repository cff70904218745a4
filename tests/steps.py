"""A model's step on all ranks in one process, against eager."""

import copy
from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import Captured, capture_model, model_values
from autosp_aot.export.complex import as_real
from autosp_aot.export.evaluation import capture_evaluation
from autosp_aot.export.subject import Subject
from autosp_aot.ir.program import Program
from autosp_aot.passes.pipeline import Watch, compile_evaluation, compile_program, unwatched
from autosp_aot.passes.step import Step
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.runtime.simulate import simulate
from tests.eager import difference, eager


def half_labelled(length: int) -> dict[str, Tensor]:
    """Two rows of tokens 3..63; the first half of the first row has no labels."""
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 64, (2, length), generator=draw) for _ in range(2))
    labels[0, : length // 2] = -100
    return {"input_ids": ids, "labels": labels}


def equal_to_eager(
    model: nn.Module,
    batch: dict[str, Tensor],
    ranks: int,
    limit: float = 1e-12,
    dims: dict[str, int] | None = None,
    **options,
) -> Step:
    """Build for `ranks` ranks; loss and every gradient of every rank are eager's, infinities and nan included.

    `options` are BuildConfig's, and `step` what was captured before.
    """
    compiled, results = sharded(model, batch, ranks, dims, **options)
    reference = eager(model, batch)
    for result in results:
        gradients = {name.removeprefix("grad."): g for name, g in result.items() if name != "loss"}
        if reference[0].isfinite() and reference[0] != 0:
            assert difference(reference, result["loss"], gradients) <= limit
        else:
            torch.testing.assert_close((result["loss"], gradients), reference, equal_nan=True)
    return compiled


def captured(model: nn.Module, batch: dict[str, Tensor]) -> Captured:
    """A model's step, to be built in several ways."""
    return capture_model(Subject(model, batch, "cpu"))


def sharded(
    model: nn.Module,
    batch: dict[str, Tensor],
    ranks: int,
    dims: dict[str, int] | None = None,
    step: Captured | None = None,
    **options,
) -> tuple[Step, list[dict[str, Tensor]]]:
    """What a model is built to, and every rank's results.

    `dims` are the inputs' sequence dims, by default 1 of all; `step` is what was captured before; `options` are
    BuildConfig's.
    """
    compiled, inputs = built(model, batch, ranks, dims, step=step, **options)
    programs = [compiled.program.for_rank(rank) for rank in range(ranks)]
    return compiled, simulate(programs, inputs, inputs["grad_loss"])


def built(
    model: nn.Module,
    batch: dict[str, Tensor],
    ranks: int,
    dims: dict[str, int] | None = None,
    watch: Watch = unwatched,
    step: Captured | None = None,
    **options,
) -> tuple[Step, dict[str, Tensor]]:
    """What a model is built to, and all inputs of its programs, tangents of one among them."""
    step = step or captured(model, batch)
    compiled = compile_program(step.whole, dims or _dims(batch), BuildConfig(ranks, **options), watch=watch)
    tangents = [entry.value for entry in compiled.program.inputs if entry.kind in ("tangent", "guess")]
    ones = {value.name: torch.ones((), dtype=DTYPES[value.dtype]) for value in tangents}
    return compiled, _values(model) | step.constants | batch | ones


def evaluation(
    model: nn.Module, batch: dict[str, Tensor], ranks: int, step: Captured | None = None, **options
) -> tuple[Step, dict[str, Tensor]]:
    """What a model's eval mode is built to, and all inputs of its programs."""
    ((compiled, inputs),) = evaluations(model, batch, [ranks], step, **options)
    return compiled, inputs


def evaluations(
    model: nn.Module, batch: dict[str, Tensor], several: Iterable[int], step: Captured | None = None, **options
) -> Iterator[tuple[Step, dict[str, Tensor]]]:
    """The same for several numbers of ranks, from one capture."""
    step, known = step or captured(model, batch), _values(model)
    whole, constants = capture_evaluation(Subject(model, batch, "cpu"), step.joint, step.whole, known | step.constants)
    for ranks in several:
        compiled = compile_evaluation(whole, _dims(batch), BuildConfig(ranks, **options))
        yield compiled, known | step.constants | constants | batch


def losses(compiled: Step, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The loss that an evaluation gives on every rank."""
    programs = [compiled.program.for_rank(rank) for rank in range(compiled.program.ranks)]
    return [result["loss"] for result in simulate(programs, inputs, torch.ones(()))]


def eager_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the unsharded model in eval mode; the model is left in the modes it had."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        result = model(**batch)
    return result if isinstance(result, Tensor) else result.loss


def _dims(batch: dict[str, Tensor]) -> dict[str, int]:
    return {name: 1 for name, tensor in batch.items() if tensor.dim() > 1}


def _values(model: nn.Module) -> dict[str, Tensor]:
    return model_values(model) | {name: as_real(buffer) for name, buffer in model.named_buffers()}


def gathers(program: Program, elements: int) -> list[str]:
    """Names of the values with at least so many elements that are gathered whole."""
    values = program.values()
    names = [name for instr in program.instrs() if instr.op == "all_gather" for name in instr.refs()]
    return [name for name in names if prod(values[name].whole_shape) >= elements]


def worst(reference, results: list[dict]) -> float:
    """The worst difference of any rank's loss and gradients, in fp32 or wider."""
    wide = lambda t: t.float() if t.dtype is torch.bfloat16 else t  # noqa: E731
    return max(
        difference(reference, wide(r["loss"]), {n.removeprefix("grad."): wide(g) for n, g in r.items() if n != "loss"})
        for r in results
    )
