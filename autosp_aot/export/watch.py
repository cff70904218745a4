"""What capture drops without a word, seen while the user's forward runs, and refused.

with torch.autocast("cuda"):        makes no casts when captured on CPU
checkpoint(f, x, use_reentrant=True) traced through: its own backward is lost
x.register_hook(double)             lost
self.count = self.count + 1         of a buffer: lost
if random.random() < 0.1:           drawn once, while building
torch.manual_seed(0)                dropped: draws follow from the seed and the number of the step
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.user_code import called_at, is_users


@contextlib.contextmanager
def watched(target: str, place: str) -> Iterator[None]:
    """Forward (defined at `place`) may run while it holds; then BuildError names all in it that capture would drop."""
    watch = _Watch(target)
    before = _states()
    with watch.seeing():
        yield
    for module, state in _states().items():
        if state != before[module]:
            watch.problems.append(
                Problem(
                    "random-operator",
                    f"forward draws from {module} random module",
                    place,
                    "the number drawn while building would stay for every step",
                    "draw with torch operators",
                )
            )
    if watch.problems:
        raise BuildError(*dict.fromkeys(watch.problems))


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
    if modules or parameters:
        raise BuildError(*(_hook(what, "build_model") for what in modules + parameters))


def _states() -> dict[str, tuple]:
    """The states of random modules that are not torch's."""
    kind, keys, *more = np.random.get_state()
    return {"Python's": random.getstate(), "numpy's": (kind, keys.tobytes(), *more)}


class _Watch:
    def __init__(self, target: str):
        self.target = target
        self.problems: list[Problem] = []
        self.asked: dict[torch.autocast, bool] = {}

    @contextlib.contextmanager
    def seeing(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for owner, name, see in (
                (torch.autocast, "__init__", self.autocast_made),
                (torch.autocast, "__enter__", self.autocast_entered),
                (torch.autograd.Function, "apply", self.function_applied),
                (torch.Tensor, "register_hook", self.hook_registered),
                (nn.Module, "__setattr__", self.attribute_set),
                *((torch, name, self.generator_set) for name in ("manual_seed", "set_rng_state")),
                *((torch.random, name, self.generator_set) for name in ("manual_seed", "set_rng_state", "fork_rng")),
            ):
                undo.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, _seen(vars(owner)[name], see))
            yield

    def autocast_made(
        self, region: torch.autocast, device_type: str, dtype=None, enabled: bool = True, *_, **__
    ) -> None:
        # The region itself forgets: torch turns it off where it has no such device.
        self.asked[region] = enabled

    def autocast_entered(self, region: torch.autocast) -> None:
        if region.device == "cpu" and self.target == "cpu":
            return
        # One made before, as a decorator, can have been turned off by torch as well as by the user.
        if self.asked.get(region, region.device != "cpu" or region._enabled):
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

    def hook_registered(self, tensor: torch.Tensor, *_) -> None:
        self.problems.append(_hook("forward", called_at()))

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
