"""A model's step on all ranks in one process, against eager."""

from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autosp_aot.builder import model_values
from autosp_aot.config import BuildConfig
from autosp_aot.export.canonical import canonical_program
from autosp_aot.export.fake import fake_copy
from autosp_aot.export.joint import capture
from autosp_aot.passes.pipeline import Compiled, Watch, compile_program, unwatched
from autosp_aot.program import Program
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.runtime.simulate import simulate
from tests.exactness import difference, eager


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
) -> Compiled:
    """Build for `ranks` ranks; loss and every gradient of every rank are eager's, infinities and nan included.

    `options` are BuildConfig's.
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


def sharded(
    model: nn.Module, batch: dict[str, Tensor], ranks: int, dims: dict[str, int] | None = None, **options
) -> tuple[Compiled, list[dict[str, Tensor]]]:
    """What a model is built to, and every rank's results.

    `dims` are the inputs' sequence dims, by default 1 of all; `options` are BuildConfig's.
    """
    compiled, inputs = built(model, batch, ranks, dims, **options)
    programs = [compiled.program.for_rank(rank) for rank in range(ranks)]
    return compiled, simulate(programs, inputs, inputs["grad_loss"])


def built(
    model: nn.Module,
    batch: dict[str, Tensor],
    ranks: int,
    dims: dict[str, int] | None = None,
    watch: Watch = unwatched,
    **options,
) -> tuple[Compiled, dict[str, Tensor]]:
    """What a model is built to, and all inputs of its programs, tangents of one among them."""
    mode = FakeTensorMode()
    whole, constants = canonical_program(capture(fake_copy(model, mode), batch, mode, "cpu"))
    dims = dims or {name: 1 for name, tensor in batch.items() if tensor.dim() > 1}
    compiled = compile_program(whole, dims, BuildConfig(ranks, **options), watch=watch)
    tangents = [entry.value for entry in compiled.program.inputs if entry.kind in ("tangent", "guess")]
    ones = {value.name: torch.ones((), dtype=DTYPES[value.dtype]) for value in tangents}
    return compiled, model_values(model) | dict(model.named_buffers()) | constants | batch | ones


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
