import logging
import os
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


class Model(nn.Module):
    """Each test's model is this one with another `changed`, whose first line is the line that is named."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, tokens, labels):
        return cross_entropy(self.head(self.changed(self.embedding(tokens))).flatten(0, 1), labels.flatten())

    def line(self) -> str:
        """The first line in the body of `changed`."""
        return f"test_watch.py:{type(self).changed.__code__.co_firstlineno + 1}"


class Cuda(Model):
    def changed(self, x):
        with torch.autocast("cuda", torch.bfloat16):
            return x * 2


class Cpu(Model):
    def changed(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x * 2


class CudaOff(Model):
    def changed(self, x):
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return x * 2


AUTOCAST = """\
error[autocast-device]: autocast for {device} is on inside forward, and the target is {target}
  where  {line}
  why    the step is captured on CPU: the casts in the program would not be those of the target
  fix    give the model its dtype, as with model.to(torch.bfloat16), instead of autocast"""


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("target", ["cpu", "cuda", "rocm"])
def test_autocast_to_cuda_is_refused_for_every_target(refusal, target):
    assert refusal(Cuda(), target) == AUTOCAST.format(device="cuda", target=target, line=Cuda().line())


def test_autocast_to_cpu_is_refused_for_another_target(refusal):
    assert refusal(Cpu(), "cuda") == AUTOCAST.format(device="cpu", target="cuda", line=Cpu().line())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_as_a_decorator_is_refused_although_torch_has_turned_it_off(refusal):
    class CudaDecorated(Model):
        @torch.autocast("cuda", torch.bfloat16)
        def changed(self, x):
            return x * 2

    assert "error[autocast-device]: autocast for cuda is on" in refusal(CudaDecorated())


# Decorators of a file that was imported before anyone watched.


@torch.autocast("cuda", enabled=False)
def off(x):
    return x * 2


@torch.amp.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=False)
def off_by_keywords(x):
    return x * 2


@torch.amp.autocast("cuda", torch.float16, False)
def off_by_place(x):
    return x * 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.cuda.amp.autocast(enabled=False)
    def off_for_cuda(x):
        return x * 2

    @torch.cuda.amp.autocast(False)
    def off_for_cuda_by_place(x):
        return x * 2

    @torch.cuda.amp.autocast()
    def on_for_cuda(x):
        return x * 2

    @torch.autocast("cuda", dtype=torch.bfloat16)
    def on(x):
        return x * 2

    @torch.autocast("cuda", enabled=bool(os.sep))
    def on_by_a_condition(x):
        return x * 2


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("decorated", [off, off_by_keywords, off_by_place, off_for_cuda, off_for_cuda_by_place])
def test_autocast_that_a_decorator_turns_off_is_off(captured, decorated, target):
    captured(type("Decorated", (Model,), {"changed": lambda self, x: decorated(x)})(), target)


@pytest.mark.parametrize("decorated", [on, on_for_cuda, on_by_a_condition])
def test_autocast_that_a_decorator_turns_on_is_on(refusal, decorated):
    said = refusal(type("Decorated", (Model,), {"changed": lambda self, x: decorated(x)})())
    assert said.startswith("error[autocast-device]: autocast for cuda is on inside forward, and the target is cpu\n")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_autocast_that_is_off_changes_nothing_on_any_device(captured, target):
    joint = captured(CudaOff(), target)
    values = [node.meta.get("val") for node in joint.graph_module.graph.nodes]
    assert not any(value.dtype == torch.bfloat16 for value in values if isinstance(value, torch.Tensor))


class Reentrant(Model):
    def changed(self, x):
        return checkpoint(torch.sin, x, use_reentrant=True)


class NotReentrant(Model):
    def changed(self, x):
        return checkpoint(torch.sin, x, use_reentrant=False)


def test_reentrant_checkpointing_is_refused(refusal):
    assert refusal(Reentrant()) == (
        "error[reentrant-checkpoint]: checkpointing with use_reentrant=True runs a backward inside of backward\n"
        f"  where  {Reentrant().line()}\n"
        "  why    capture keeps what is computed forward, and would lose it\n"
        "  fix    checkpoint with use_reentrant=False"
    )


def test_other_checkpointing_is_captured(captured):
    assert "grad.embedding.weight" in captured(NotReentrant()).outputs


class Hooked(Model):
    def changed(self, x):
        x.register_hook(lambda grad: 2 * grad)
        return x


class Unchanged(Model):
    def changed(self, x):
        return x


def test_a_hook_registered_in_forward_is_refused(refusal):
    assert refusal(Hooked()) == (
        "error[gradient-hook]: forward has a hook on a gradient\n"
        f"  where  {Hooked().line()}\n"
        "  why    capture does not keep hooks, and the gradients would differ\n"
        "  fix    compute what the hook does in forward, or after backward"
    )


def test_hooks_on_modules_are_refused(refusal):
    model = Unchanged()
    model.head.register_full_backward_hook(lambda module, grad_in, grad_out: grad_in)
    model.embedding.register_full_backward_pre_hook(lambda module, grad_out: grad_out)
    assert [line for line in refusal(model).splitlines() if line.startswith("error")] == [
        "error[gradient-hook]: module 'embedding' has a hook on a gradient",
        "error[gradient-hook]: module 'head' has a hook on a gradient",
    ]


def test_hooks_on_every_module_are_refused(refusal):
    hook = nn.modules.module.register_module_full_backward_hook(lambda module, grad_in, grad_out: grad_in)
    try:
        said = refusal(Unchanged())
    finally:
        hook.remove()
    assert said.startswith("error[gradient-hook]: every module has a hook on a gradient\n")


class Replaced(Model):
    def changed(self, x):
        self.count = self.count + 1
        return x


def test_a_replaced_buffer_is_refused(refusal):
    assert refusal(Replaced()) == (
        "error[state-mutated]: forward replaces the buffer 'count' of Replaced\n"
        f"  where  {Replaced().line()}\n"
        "  why    state that outlives the step is not part of the program\n"
        "  fix    compute it without changing a buffer or an input"
    )


class Drawn(Model):
    def changed(self, x):
        return x * random.random()


class NumpyRandom(Model):
    def changed(self, x):
        return x * float(np.random.rand())


class Seeded(Model):
    def changed(self, x):
        torch.manual_seed(0)
        torch.random.set_rng_state(torch.get_rng_state())
        with torch.random.fork_rng():
            return nn.functional.dropout(x)


def test_setting_torchs_generator_in_forward_is_refused(refusal):
    first = Seeded.changed.__code__.co_firstlineno + 1
    assert refusal(Seeded()) == "\n".join(
        "error[random-operator]: forward sets the state of torch's random generator\n"
        f"  where  test_watch.py:{line}\n"
        "  why    draws follow from the run's seed and the number of the step alone\n"
        "  fix    take that out of forward"
        for line in range(first, first + 3)
    )


def test_a_draw_of_numpys_random_is_refused(refusal):
    said = refusal(NumpyRandom())
    assert said.startswith("error[random-operator]: forward draws from numpy's random module\n")


def test_a_draw_of_pythons_random_is_refused(refusal):
    assert refusal(Drawn()) == (
        "error[random-operator]: forward draws from Python's random module\n"
        f"  where  {Drawn().line()}\n"
        "  why    the number drawn while building would stay for every step\n"
        "  fix    draw with torch operators, as with torch.rand(()) and torch.where"
    )


def test_torch_is_as_it_was_after_watching(captured):
    before = [vars(torch.autograd.Function)["apply"], vars(nn.Module)["__setattr__"], torch.autocast.__enter__]
    captured(Unchanged())
    assert [vars(torch.autograd.Function)["apply"], vars(nn.Module)["__setattr__"], torch.autocast.__enter__] == before


class Talking(Model):
    def changed(self, x):
        print("of x:", x)
        logging.getLogger(__name__).warning("of %s", x.shape)
        return x


def test_what_forward_prints_while_it_is_captured_is_not_seen(captured, capfd):
    captured(Talking())
    assert capfd.readouterr().out == ""
