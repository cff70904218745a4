"""Memory that a model has under two names, found before it is captured: an optimizer changes both, a program one.

    head.weight.data = embedding.weight.data    two parameters of one memory: each has a gradient and a step of its own
    self.transposed = self.weight.data.t()      a constant of the program, stale from the second step on
"""

import mmap
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.keeping import arrays_of, tensors_of
from autosp_aot.export.user_code import made_at


def refuse_shared(model: nn.Module) -> None:
    """BuildError naming parameters that overlap, tensors that lie in one, those that need a gradient and are none, and
    those that a step has computed which is over."""
    parameters = dict(model.named_parameters())
    others = dict(model.named_buffers()) | dict(tensors_of(model)) | dict(arrays_of(model))
    kept = [name for name, tensor in others.items() if tensor.grad_fn is not None]
    if kept:
        raise BuildError(Problem(
            "state-mutated", f"the model keeps what a step computed in {', '.join(kept)}", made_at(model, kept[0]),
            "state that outlives a step is not part of the program", "give a model that has not run, and keeps nothing;"
            " for torch.nn.utils.weight_norm take torch.nn.utils.parametrizations.weight_norm",
        ))  # fmt: skip
    pairs = list(_overlapping(parameters | others))
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    viewed = {a if b in parameters else b: b if b in parameters else a for a, b in pairs
              if (a in parameters) != (b in parameters)}  # fmt: skip
    problems = [
        Problem("parameters-overlap", f"parameters {a!r} and {b!r} share memory", made_at(model, a),
                "an optimizer steps each of them, and so changes both; as two parameters of a program they would part",
                _one(a, b, parameters))
        for a, b in pairs if a in parameters and b in parameters and trained & {a, b}
    ] + [
        Problem("parameters-overlap", f"elements of parameter {name!r} share memory", made_at(model, name),
                "an optimizer cannot step it", "make a parameter of the part that repeats, and expand it in forward")
        for name, parameter in parameters.items() if parameter.requires_grad and 0 in _steps(parameter)
    ] + [
        Problem("parameter-viewed", f"{name!r} lies in the memory of parameter {parameter!r}", made_at(model, name),
                "what is trained or loaded into that would not reach it: it would be a constant of the program",
                "compute it from the parameter in forward")
        for name, parameter in viewed.items()
    ] + [
        Problem("parameter-unregistered", f"{name!r} needs a gradient and is no parameter", made_at(model, name),
                "it would be a constant of the program", "make it an nn.Parameter, or call requires_grad_(False)")
        for name, tensor in others.items() if tensor.requires_grad
    ]  # fmt: skip
    if problems:
        raise BuildError(*problems)


def _one(a: str, b: str, parameters: Mapping[str, Tensor]) -> str:
    """How to make one parameter of two that share memory."""
    place = lambda t: (t.shape, t.stride(), t.storage_offset(), t.dtype)  # noqa: E731
    if parameters[a].requires_grad != parameters[b].requires_grad:
        frozen, trained = (b, a) if parameters[a].requires_grad else (a, b)
        return f"compute with {trained}.detach() in forward, in place of {frozen}"
    if place(parameters[a]) == place(parameters[b]):
        return f"make them one parameter, as in model.{b} = model.{a}"
    return "keep one of them as a parameter, and compute what is to be the other from it in forward"


def _overlapping(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors have an element in common."""
    dense = {name: tensor for name, tensor in tensors.items() if tensor.layout is torch.strided and tensor.numel()}
    extents = {name: _extent(tensor) for name, tensor in dense.items()}
    near: list[str] = []  # those before, by where they begin, that reach so far
    for name in sorted(dense, key=extents.__getitem__):
        space, first, _ = extents[name]
        near = [other for other in near if extents[other][0] == space and extents[other][2] > first]
        yield from ((other, name) for other in near if _overlap(dense[other], dense[name], first - extents[other][1]))
        near.append(name)


def _overlap(a: Tensor, b: Tensor, between: int) -> bool:
    """Whether two tensors have an element in common, `b` so many bytes after `a`: laid over memory that nobody uses."""
    (_, first, end), (_, other_first, other_end) = (_extent(tensor) for tensor in (a, b))
    with mmap.mmap(-1, max(end - first, between + other_end - other_first)) as nothing:
        laid = [
            np.ndarray((*t.shape, t.itemsize), np.uint8, nothing, at, (*(s * t.itemsize for s in t.stride()), 1))
            for t, at in ((a, 0), (b, between))
        ]
        found = np.shares_memory(laid[0], laid[1])
        laid.clear()
    return found


def _steps(tensor: Tensor) -> list[int]:
    """The strides of the dims in which a tensor has more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


def _extent(tensor: Tensor) -> tuple[str, int, int]:
    """A memory, the byte of it where a tensor begins, and where it ends; each storage of meta tensors is one."""
    storage, steps = tensor.untyped_storage(), zip(tensor.shape, tensor.stride())
    start = 0 if tensor.is_meta else storage.data_ptr()
    first = start + int(tensor.storage_offset()) * tensor.itemsize
    space = f"meta {storage._cdata}" if tensor.is_meta else str(tensor.device)
    return space, first, first + (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.itemsize
