"""Models without their weights: parameters are fake tensors, buffers stay real (their values go into the artifact)."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autosp_aot.errors import BuildError, Problem


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """While it holds, every parameter registered on any module loses its storage at once: a model of any size is free.

    They are meta tensors, on which `.to(dtype)` and initialisation work; `fake_copy` makes them fit for capture.
    """
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy with fake CPU parameters, tied ones still tied; the module itself is left alone.

    Raises BuildError for a module that keeps a computed tensor.

    Never capture meta tensors themselves: their losses have no gradient kernel and yield zeros without a word.
    """
    kept = [
        f"{name}.{attribute}".removeprefix(".")
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    if kept:
        raise BuildError(Problem(
            "state-mutated", f"the model keeps what a step computed in {', '.join(kept)}", "build_model",
            "state that outlives a step is not part of the program", "give a model that has not run, and keeps nothing;"
            " for torch.nn.utils.weight_norm take torch.nn.utils.parametrizations.weight_norm",
        ))  # fmt: skip
    return copy.deepcopy(module, {id(p): _fake(p, mode) for p in module.parameters()})


def _fake(parameter: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    meta = torch.empty_like(parameter, device="meta", requires_grad=False)
    return nn.Parameter(FakeTensor(mode, meta, torch.device("cpu")), requires_grad=parameter.requires_grad)
