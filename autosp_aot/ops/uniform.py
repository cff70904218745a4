"""Draws from [0, 1): every element follows from its position in the whole value, so a rank draws its box of it."""

import torch
from torch import Tensor

from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.program import Dtype, per_rank
from autosp_aot.ops import random
from autosp_aot.ops.record import FEW, OwnOp
from autosp_aot.sharding.call import Call
from autosp_aot.sharding.spec import Axis, Spec

# Numbers of 8 bytes that are alive a position while a block of positions is drawn.
NUMBERS = 4


def _rule(call: Call) -> Spec:
    """Every dim is parallel; a rank is told which box of the whole shape it draws."""
    shape = call.results[0].shape

    def localize(args, local):
        start, stop = (per_rank(tuple(bounds[at] for bounds in local.bounds)) for at in (0, 1))
        return (*args[:-1], (local.factor, local.outer, start, stop))

    return Spec(shape, frozenset(), ((),), (tuple((Axis(dim),) for dim in range(len(shape))),), localize=localize)


def _workspace(seed: Tensor, site: int, shape, box, dtype: Dtype, target: str) -> tuple[list[Tensor], int]:
    if box:
        dim, outer, start, stop = box
        shape = (*shape[:dim], outer * (stop - start), *shape[dim + 1 :])
    result = torch.empty(shape, dtype=DTYPES[dtype.name], device="meta")
    return [result], NUMBERS * 8 * min(result.numel(), random.BLOCK) + FEW


UNIFORM = OwnOp(
    "autosp.uniform",
    "autosp.uniform(seed, site, shape, box, dtype) -> draws",
    random.uniform,
    _workspace,
    _rule,
    site=1,
    makes_memory=True,
)
