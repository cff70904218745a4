"""Copies to host memory and back: `offload` and `fetch` start one, `wait` gives what it made once it is done."""

from collections.abc import Mapping, Sequence
from operator import eq

import torch
from torch import Tensor

from autosp_aot.ir.program import Instr
from autosp_aot.ir.structure.record import Action, At, HostMemory, LaidOut, Structural, Values


def _copy(instr: Instr, sources: Values, targets: Values, at: At, host: HostMemory) -> Action:
    return host.step(instr)


def _new_layout(_: Instr, operands: Sequence[Tensor], *__: object) -> LaidOut:
    return [torch.empty_like(operands[0])], 0


def _same_layout(_: Instr, operands: Sequence[Tensor], *__: object) -> LaidOut:
    return [operands[0]], 0


def _place(instr: Instr, *_: object) -> Mapping[str, object]:
    return {"byte": instr.args[-1]}


def _nothing(*_: object) -> Mapping[str, object]:
    return {}


HOST_COPIES = (
    Structural("offload", eq, _new_layout, _copy, _place, operands=1, starts=True, to_host=True),
    Structural("fetch", eq, _new_layout, _copy, _nothing, operands=1, starts=True, from_host=True),
    Structural("wait", eq, _same_layout, _copy, _nothing, operands=2, awaits=True, from_host=True),
)
