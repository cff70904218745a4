"""What forward computes in eval mode without gradients: the loss of a batch, and nothing else.

    step                  %u = autosp.uniform(...) ... %loss = ..., %grad = ...
    evaluation            %loss = ...          no dropout, and whatever else forward does with `self.training`

Nearly always forward is then exported as the same calls as in training, and the evaluation is the part of the captured
step that the loss needs. Where it is not, it is captured.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autosp_aot.errors import BuildError
from autosp_aot.export.canonical import canonical_program, forward_part
from autosp_aot.export.fake import fake_copy
from autosp_aot.export.joint import Joint, capture_exported, export_forward
from autosp_aot.program import Program, rename


def capture_evaluation(
    model: nn.Module, batch, target: str, joint: Joint, whole: Program, known: Mapping[str, Tensor]
) -> tuple[Program, dict[str, Tensor]]:
    """The evaluation of a model as a program of one section `step`, and the values of its constants by name.

    `joint` is its captured step and `whole` that as a program; `known` are the values that names of buffers and
    constants stand for there. The model is left alone. Raises BuildError.
    """
    mode = FakeTensorMode()
    with torch.no_grad():
        forward = export_forward(fake_copy(model, mode).eval(), batch, mode, target)
        if forward.calls() == joint.calls and _same(forward.literals(), joint.constants):
            return forward_part(whole), {}
        program, constants = canonical_program(capture_exported(forward))
    return _renamed(program, constants, known)


@contextlib.contextmanager
def in_eval_mode() -> Iterator[None]:
    """While it holds, a BuildError says that it is about eval mode, and how to do without."""
    try:
        yield
    except BuildError as error:
        fix = "; or build without the evaluation program: --no-evaluation (evaluation=False)"
        said = (replace(p, what=f"in eval mode, {p.what}", fix=p.fix + fix) for p in error.problems)
        raise BuildError(*said) from error


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _renamed(
    program: Program, constants: dict[str, Tensor], known: Mapping[str, Tensor]
) -> tuple[Program, dict[str, Tensor]]:
    """Constants under other names where those stand for other values in the step."""
    others = [name for name, value in constants.items() if name in known and not _equal(value, known[name])]
    names = {name: f"evaluate.{name}" for name in others}
    (step,) = program.sections
    inputs = (
        replace(entry, value=replace(entry.value, name=names.get(entry.value.name, entry.value.name)))
        for entry in program.inputs
    )
    section = replace(step, instrs=tuple(rename(instr, names) for instr in step.instrs))
    renamed = replace(program, inputs=tuple(inputs), sections=(section,))
    return renamed, {names.get(name, name): value for name, value in constants.items()}
