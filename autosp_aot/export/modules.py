"""Modules that cannot be captured, found before forward runs."""

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.user_code import made_at

# What attention kernels that are no torch operators have in their names, as transformers has them.
KERNELS = ("flash", "flex")


def refuse_modules(model: nn.Module) -> None:
    """BuildError naming all modules whose attention is a foreign kernel, that are scripted, or are not finished."""
    problems = []
    for name, module in model.named_modules():
        said = f"module {name or type(module).__name__!r}"
        attention = getattr(vars(module).get("config"), "_attn_implementation", None)
        if isinstance(attention, str) and any(kernel in attention for kernel in KERNELS):
            problems.append(_attention(attention, made_at(model)))
        if isinstance(module, ScriptModule):
            problems.append(_scripted(said, made_at(model, name)))
            continue
        lazy = [key for key, value in module._parameters.items() if is_lazy(value)]
        problems += [_lazy(f"parameter {key!r} of {said}", made_at(model, name)) for key in lazy]
        problems += [_overriding(f"parameter {key!r} of {said}", value, made_at(model, name))
                     for key, value in module._parameters.items() if _overrides(value)]  # fmt: skip
    if problems:
        raise BuildError(*dict.fromkeys(problems))


def _attention(name: str, place: str) -> Problem:
    return Problem(
        "attention-implementation",
        f"the model's attention is {name!r}",
        place,
        "that is a kernel of its own: capture cannot see which queries it lets see which keys",
        'give the model attn_implementation="sdpa" or "eager": the kernel to run with is chosen for the target',
    )


def _scripted(said: str, place: str) -> Problem:
    return Problem(
        "scripted-module",
        f"{said} is compiled by torch.jit",
        place,
        "its code is no Python that could be captured",
        "give the module that it was made of",
    )


def _lazy(said: str, place: str) -> Problem:
    return Problem(
        "lazy-parameter",
        f"{said} has no shape yet",
        place,
        "it gets one when the model runs for the first time",
        "give the shape, or run the model once in build_model",
    )


def _overrides(parameter: nn.Parameter | None) -> bool:
    """Whether torch's functions do something else with a parameter, by its class."""
    kind = type(parameter)
    own = getattr(kind, "__torch_function__", None)
    return own not in (None, nn.Parameter.__torch_function__) and kind.__module__.partition(".")[0] != "torch"


def _overriding(said: str, parameter: nn.Parameter, place: str) -> Problem:
    return Problem(
        "parameter-overrides",
        f"{said} is a {type(parameter).__name__}, which has a __torch_function__ of its own",
        place,
        "the step is captured of plain parameters",
        "make it an nn.Parameter, and compute in forward what its class does",
    )
