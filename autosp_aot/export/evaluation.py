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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.canonical.canonical import canonical_program, forward_part
from autosp_aot.export.joint import Joint, capture_exported, export_forward
from autosp_aot.export.state import refuse_state
from autosp_aot.export.subject import Subject
from autosp_aot.export.user_code import defined_at
from autosp_aot.ir.fold_names import folded
from autosp_aot.ir.program import Program, rename


def capture_evaluation(
    subject: Subject, joint: Joint, whole: Program, known: Mapping[str, Tensor]
) -> tuple[Program, dict[str, Tensor]]:
    """The evaluation of a model as a program of one section `step`, and the values of its constants by name.

    `joint` is its captured step and `whole` that as a program; `known` are the values that names of buffers and
    constants stand for there. The model is left alone. Raises BuildError.
    """
    subject = replace(subject, prepared=_switched)
    with torch.no_grad():
        refuse_state(subject)
        forward = export_forward(subject)
        if forward.calls() == joint.calls and _same(forward.literals(), joint.constants):
            return forward_part(whole), {}
        program, constants = canonical_program(capture_exported(forward))
    if not any(program.instrs()):
        raise BuildError(Problem("no-loss", "forward computes no loss", forward.place,
                                 "what it returns is a constant or one of its inputs",
                                 "return the loss in eval mode as well"))  # fmt: skip
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


def _switched(model: nn.Module) -> nn.Module:
    """A model put into eval mode; BuildError where its weights are others then, as of one that merges adapters."""
    before, writes = _held(model), _Writes()
    with writes:
        model.eval()
    after = _held(model)
    changed = [name for name in before | after if not _kept(before.get(name), after.get(name), writes.written)]
    if changed:
        own = (m.train for m in model.modules() if type(m).train is not nn.Module.train)
        raise BuildError(Problem(
            "state-mutated", f"the model changes {', '.join(folded(changed))}", next(map(defined_at, own), "eval"),
            "an artifact holds weights and buffers once, for training and evaluation",
            "let train() and eval() leave parameters and buffers alone"))  # fmt: skip
    return model


# What a name of a parameter or buffer stands for: a tensor, and its memory.
_Held = tuple[Tensor, torch.UntypedStorage]


def _held(model: nn.Module) -> dict[str, _Held]:
    named = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    return {name: (tensor, tensor.untyped_storage()) for name, tensor in named}


def _kept(before: _Held | None, after: _Held | None, written: set[int]) -> bool:
    if before is None or after is None:
        return False
    (tensor, storage), (now, memory) = before, after
    return tensor is now and storage._cdata == memory._cdata and memory._cdata not in written


class _Writes(TorchDispatchMode):
    """While it holds, storages that are written to are remembered."""

    def __init__(self):
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | (kwargs or {})
        for argument in func._schema.arguments:
            if argument.is_write:
                leaves = tree_leaves(given.get(argument.name))
                self.written |= {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        return func(*args, **kwargs or {})


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
