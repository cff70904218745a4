"""What a step's text says of its inputs, and inputs made up from that: parameters and a batch without a model."""

import torch
from torch import Tensor

from autosp_aot.ir.program import Program, Value
from autosp_aot.ir.vocabularies import vocabularies
from autosp_aot.ops.random import step_seed
from autosp_aot.runtime.execute import DTYPES

# Operators whose integer results are operands' elements, moved, or a constant.
KEEP_ELEMENTS = frozenset({
    "aten._to_copy.default", "aten.cat.default", "aten.clone.default", "aten.constant_pad_nd.default",
    "aten.expand.default", "aten.masked_fill.Scalar", "aten.permute.default", "aten.reshape.default",
    "aten.select.int", "aten.slice.Tensor", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.self",
})  # fmt: skip


def labels(whole: Program) -> dict[str, tuple[int, int]]:
    """(number of classes, ignore_index) of the values that a cross entropy takes its targets from, however shifted."""
    values = whole.values()
    made_by = {out.name: instr for instr in whole.instrs() for out in instr.values()}
    found: dict[str, tuple[int, int]] = {}
    for instr in whole.instrs():
        if instr.op in ("aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default"):
            scores, target = instr.refs()[:2]
            waiting = [target]
            while waiting:
                name = waiting.pop()
                found[name] = values[scores].sizes[-1 if len(values[scores].sizes) == 1 else 1], instr.args[4]
                if name in made_by and made_by[name].op in KEEP_ELEMENTS:
                    refs = made_by[name].refs()
                    waiting += [ref for ref in refs if values[ref].dtype[0] == "i" and ref not in found]
    return found


def made_up(whole: Program, seed: int = 0) -> dict[str, Tensor]:
    """Parameters, a batch and, for a step that draws, a seed; by name.

    Matrices are normal with variance 1 / last dim, vectors are near one, so that no gradient vanishes. Ids are within
    their vocabulary. Labels are classes, and `ignore_index` for half of the first row. Other integers, of which nothing
    is known, are ones and, at the end of the first row, zeros: right for a mask, positions, segments or types alike.
    """
    rng = torch.Generator().manual_seed(seed)
    ids, classes = vocabularies(whole), labels(whole)
    made = {}
    for entry in whole.inputs:
        name, shape = entry.value.name, entry.value.sizes
        if entry.kind == "seed":
            made[name] = step_seed(seed, 0)
        if entry.kind not in ("parameter", "batch"):
            continue
        if DTYPES[entry.value.dtype].is_floating_point:
            tensor = _normal(entry.value, rng)
        elif name in ids:
            tensor = torch.randint(ids[name], shape, generator=rng)
        elif name in classes:
            count, ignored = classes[name]
            tensor = torch.randint(count, shape, generator=rng)
            _first_row(tensor)[: shape[-1] // 2] = ignored
        else:
            tensor = torch.ones(shape)
            if shape:
                _first_row(tensor)[shape[-1] * 3 // 4 :] = 0
        made[name] = tensor.to(DTYPES[entry.value.dtype])
    return made


def _normal(value: Value, rng: torch.Generator) -> Tensor:
    noise = torch.randn(value.sizes, generator=rng, dtype=torch.float64)
    return noise / value.sizes[-1] ** 0.5 if len(value.sizes) > 1 else 1 + noise / 10


def _first_row(tensor: Tensor) -> Tensor:
    """A view of the first of all rows of a tensor of one dim or more."""
    return tensor[(0,) * (tensor.dim() - 1)]
