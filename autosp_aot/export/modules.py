"""Modules that cannot be captured, found before forward runs."""

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import UninitializedTensorMixin

from autosp_aot.errors import BuildError, Problem

# What attention kernels that are no torch operators have in their names, as transformers has them.
KERNELS = ("flash", "flex")


def refuse_modules(model: nn.Module) -> None:
    """BuildError naming all modules whose attention is a foreign kernel, that are scripted, or are not finished."""
    problems = []
    for name, module in model.named_modules():
        said = f"module {name or type(module).__name__!r}"
        attention = getattr(vars(module).get("config"), "_attn_implementation", None)
        if isinstance(attention, str) and any(kernel in attention for kernel in KERNELS):
            problems.append(_attention(attention))
        if isinstance(module, ScriptModule):
            problems.append(_scripted(said))
            continue
        lazy = [key for key, value in module._parameters.items() if isinstance(value, UninitializedTensorMixin)]
        problems += [_lazy(f"parameter {key!r} of {said}") for key in lazy]
    if problems:
        raise BuildError(*dict.fromkeys(problems))


def _attention(name: str) -> Problem:
    return Problem(
        "attention-implementation",
        f"the model's attention is {name!r}",
        "build_model",
        "that is a kernel of its own: capture cannot see which queries it lets see which keys",
        'give the model attn_implementation="sdpa" or "eager": the kernel to run with is chosen for the target',
    )


def _scripted(said: str) -> Problem:
    return Problem(
        "scripted-module",
        f"{said} is compiled by torch.jit",
        "build_model",
        "its code is no Python that could be captured",
        "give the module that it was made of",
    )


def _lazy(said: str) -> Problem:
    return Problem(
        "lazy-parameter",
        f"{said} has no shape yet",
        "build_model",
        "it gets one when the model runs for the first time",
        "give the shape, or run the model once in build_model",
    )
