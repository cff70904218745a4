"""Constructs that torch.export would silently drop, seen while the user's forward runs, and refused.

with torch.autocast("cuda"):        makes no casts when captured on CPU
checkpoint(f, x, use_reentrant=True) traced through: its own backward is lost
x.register_hook(double)             lost
torch.autograd.grad(y.sum(), x)     a gradient inside of forward: a constant
self.count = self.count + 1         of a buffer: lost
torch.manual_seed(0)                dropped: draws follow from the seed and the number of the step
"""

import ast
import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType, ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as modules_of_torch
from torch.utils.checkpoint import CheckpointFunction

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.user_code import called_at, is_users, made_at

TENSOR_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
MODULE_HOOKS = ("register_backward_hook", "register_full_backward_hook", "register_full_backward_pre_hook")
GLOBAL_HOOKS = ("_global_backward_hooks", "_global_backward_pre_hooks")
# Whether regions of autocast were asked to be on: they forget, since torch turns them off where it has no such device.
_asked: WeakKeyDictionary[torch.autocast, bool] = WeakKeyDictionary()


@contextlib.contextmanager
def watched(target: str) -> Iterator[None]:
    """Forward may run while it holds; then BuildError names all in it that capture would drop."""
    watch = _Watch(target)
    with watch.seeing():
        yield
    if watch.problems:
        raise BuildError(*dict.fromkeys(watch.problems))


@contextlib.contextmanager
def autocast_noted() -> Iterator[None]:
    """While it holds, the user's code may make regions of autocast, as decorators, that forward enters later."""
    with _seeing((torch.autocast, "__init__", _autocast_made)):
        yield


def refuse_hooks(model: nn.Module) -> None:
    """BuildError naming all modules and parameters that carry hooks on gradients."""
    modules = [
        f"module {name or type(module).__name__!r}"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    parameters = [
        f"parameter {name!r}"
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    ]
    every = ["every module"] if any(getattr(modules_of_torch, name) for name in GLOBAL_HOOKS) else []
    if modules or parameters or every:
        raise BuildError(*(_hook(what, made_at(model)) for what in every + modules + parameters))


def _autocast_made(region: torch.autocast, device_type: str, dtype=None, enabled: bool = True, *_, **__) -> None:
    _asked[region] = enabled


@contextlib.contextmanager
def _seeing(*watching: tuple[type | ModuleType, str, Callable[..., None]]) -> Iterator[None]:
    """While it holds, methods (of an owner, by name) tell a function of every call first."""
    with contextlib.ExitStack() as undo:
        for owner, name, see in watching:
            undo.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, _seen(vars(owner)[name], see))
        yield


class _Watch:
    def __init__(self, target: str):
        self.target = target
        self.problems: list[Problem] = []

    def seeing(self) -> contextlib.AbstractContextManager:
        return _seeing(
            (torch.autocast, "__init__", _autocast_made),
            (torch.autocast, "__enter__", self.autocast_entered),
            (torch.autograd.Function, "apply", self.function_applied),
            *((torch.Tensor, name, self.hook_registered) for name in TENSOR_HOOKS),
            *((nn.Module, name, self.hook_registered) for name in MODULE_HOOKS),
            (torch.autograd.graph.saved_tensors_hooks, "__init__", self.saved_changed),
            (torch.autograd, "_engine_run_backward", self.gradient_taken),
            (nn.Module, "__setattr__", self.attribute_set),
            *((torch, name, self.generator_set) for name in ("manual_seed", "set_rng_state")),
            *((torch.random, name, self.generator_set) for name in ("manual_seed", "set_rng_state", "fork_rng")),
        )

    def autocast_entered(self, region: torch.autocast) -> None:
        if region.device == "cpu" and self.target == "cpu":
            return
        asked = _asked.get(region, region._enabled or _asked_by_decorator(sys._getframe(2)))
        # One that was made before anyone watched, and elsewhere, can have been turned off by torch or by the user.
        if asked or (asked is None and region.device != "cpu"):
            self.problems.append(
                Problem(
                    "autocast-device",
                    f"autocast for {region.device} is on inside forward, and the target is {self.target}",
                    called_at(),
                    "the step is captured on CPU: the casts in the program would not be those of the target",
                    "give the model its dtype, as with model.to(torch.bfloat16), instead of autocast",
                )
            )

    def function_applied(self, function: type, *_, **__) -> None:
        if issubclass(function, CheckpointFunction):
            self.problems.append(
                Problem(
                    "reentrant-checkpoint",
                    "checkpointing with use_reentrant=True runs a backward inside of backward",
                    called_at(),
                    "capture keeps what is computed forward, and would lose it",
                    "checkpoint with use_reentrant=False",
                )
            )

    def hook_registered(self, *_, **__) -> None:
        self.problems.append(_hook("forward", called_at()))

    def saved_changed(self, hooks: torch.autograd.graph.saved_tensors_hooks, *_, **__) -> None:
        if type(hooks).__module__.partition(".")[0] != "torch" or is_users(sys._getframe(2)):
            self.problems.append(_hook("what forward saves for backward", called_at()))

    def gradient_taken(self, *_, **__) -> None:
        self.problems.append(
            Problem(
                "gradient-inside",
                "forward takes a gradient itself",
                called_at(),
                "capture does not see how a gradient depends on what it is taken of",
                "write that gradient out in torch operators",
            )
        )

    def generator_set(self, *_, **__) -> None:
        if is_users(sys._getframe(2)):
            self.problems.append(
                Problem(
                    "random-operator",
                    "forward sets the state of torch's random generator",
                    called_at(),
                    "draws follow from the run's seed and the number of the step alone",
                    "take that out of forward",
                )
            )

    def attribute_set(self, module: nn.Module, name: str, value: object) -> None:
        # What torch puts around a module that has two names is set up by setting attributes.
        buffer = vars(module).get("_buffers", {}).get(name)
        if buffer is not None and value is not buffer and is_users(sys._getframe(2)):
            self.problems.append(
                Problem(
                    "state-mutated",
                    f"forward replaces the buffer {name!r} of {type(module).__name__}",
                    called_at(),
                    "state that outlives the step is not part of the program",
                    "compute it without changing a buffer or an input",
                )
            )


def _seen(original, see: Callable[..., None]):
    """The method `original`, telling `see` of every call first."""
    function = original.__func__ if isinstance(original, classmethod) else original

    def call(*args, **kwargs):
        see(*args, **kwargs)
        return function(*args, **kwargs)

    return classmethod(call) if isinstance(original, classmethod) else call


def _hook(what: str, place: str) -> Problem:
    return Problem(
        "gradient-hook",
        f"{what} has a hook on a gradient",
        place,
        "capture does not keep hooks, and the gradients would differ",
        "compute what the hook does in forward, or after backward",
    )


def _asked_by_decorator(frame: FrameType | None) -> bool | None:
    """What `enabled` says in the decorator that is entering autocast; None where none is, or it is not written there.

        @torch.autocast("cuda", enabled=False)
        def forward(self, x): ...
    """
    while frame is not None and not is_users(frame) and frame.f_code.co_name != "decorate_autocast":
        frame = frame.f_back
    function = frame and frame.f_locals.get("func")
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    for node in ast.walk(ast.parse("".join(linecache.getlines(code.co_filename)))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not node.decorator_list:
            continue
        if node.decorator_list[0].lineno == code.co_firstlineno and node.name == code.co_name:
            calls = [call for call in node.decorator_list if isinstance(call, ast.Call)]
            regions = [call for call in calls if "autocast" in ast.unparse(call.func)]
            return _enabled(regions[0]) if len(regions) == 1 else None
    return None


def _enabled(call: ast.Call) -> bool | None:
    """`enabled` of `torch.autocast(device, dtype, enabled)` or `torch.cuda.amp.autocast(enabled)`; None if computed."""
    words = {word.arg: word.value for word in call.keywords}
    first = call.args[0] if call.args else words.get("device_type", ast.Constant(""))
    said = words.get("enabled", call.args[2] if len(call.args) > 2 else ast.Constant(True))
    if isinstance(first, ast.Constant) and isinstance(first.value, bool):
        said = first
    return bool(said.value) if isinstance(said, ast.Constant) else None
