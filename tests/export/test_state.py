"""State outside of buffers: refused where a later step computes with it, with its name and line; else captured."""

import functools
import random
import time

import numpy as np
import pytest
import torch

from autosp_aot.commands.build.builder import build
from autosp_aot.errors import BuildError
from tests.export.mend import DIMS, H, Mend, Model, S, batch, made, trains_as_eager

AT_INPUT = "take it as an input of forward: a count as a scalar tensor of the batch, a memory as a tensor"
SOMETHING = "take what changes as an input of forward: a number as a scalar tensor of the batch"
STEPS, SEEN = 0, []


class Memory(Model):
    def inner(self, x, labels):
        if self.memory is not None:
            x = x + self.memory
        self.memory = x.mean(1, keepdim=True).detach()  # here
        return x


class FoundLater(Model):
    def inner(self, x, labels):
        last = getattr(self, "last", None)
        self.last = x.detach()  # here
        return x if last is None else x + last


class MemoryGiven(Model):
    def inner(self, x, labels, memory):
        return x + memory


class Count(Model):
    def set_up(self):
        self.step = 0

    def inner(self, x, labels):
        self.step += 1  # here
        return x * min(1.0, self.step / 100)


class Threshold(Count):
    def inner(self, x, labels):
        self.step += 1  # here
        return x if self.step < 777 else 2 * x


class Every(Count):
    def inner(self, x, labels):
        self.step = self.step + 1  # here
        return x * 2 if self.step % 50 == 0 else x


class OneStep(Count):
    def inner(self, x, labels):
        self.step += 1
        if self.step == 4321:
            self.late = True  # nothing says before that there will be such an attribute
        return x * 2 if getattr(self, "late", False) else x


class Alternating(Count):
    def inner(self, x, labels):
        self.step += 1  # here
        return x.detach() if self.step % 2 else x


class Annealed(Count):
    def inner(self, x, labels):
        self.step = (self.step or 1.0) * 0.999  # here
        return x * 2 if self.step < 0.5 else x


class Counted(Count):
    def set_up(self):
        count = 0

        def scaled(x):
            nonlocal count
            count += 1  # here
            return x * count

        self.scaled = scaled

    def inner(self, x, labels):
        return self.scaled(x)


class OfItsClass(Model):
    steps = 0

    def inner(self, x, labels):
        OfItsClass.steps += 1  # here
        return x if OfItsClass.steps < 500 else 2 * x


class Global(Model):
    def inner(self, x, labels):
        global STEPS
        STEPS += 1  # here
        return x * STEPS


class Tensor(Model):
    def set_up(self):
        self.step = torch.zeros(())

    def inner(self, x, labels):
        self.step = self.step + 1  # here
        return x * self.step


class First(Model):
    def set_up(self):
        self.first = True

    def inner(self, x, labels):
        x = 2 * x if self.first else x
        self.first = False  # here
        return x


class Timed(Model):
    def inner(self, x, labels):
        return x * time.monotonic()  # here


class StepGiven(Model):
    def inner(self, x, labels, step):
        return torch.where(step < 777, x * (step / 100).clamp(max=1), x)


class Growing(Model):
    def set_up(self):
        self.history = []

    def inner(self, x, labels):
        self.history.append(x.detach().mean())  # here
        return x + torch.stack(self.history).mean()


class GrowingGlobal(Model):
    def inner(self, x, labels):
        SEEN.append(x.detach().mean(1, keepdim=True))  # here
        return x + SEEN[0]


class Full(Growing):
    def inner(self, x, labels):
        self.history.append(x.detach().mean())  # here
        return x if len(self.history) < 30 else 2 * x


class WeightsKept(Model):
    def inner(self, x, labels):
        if self.memory is None:
            self.memory = self.gain.detach() * 2  # here
        return x * self.memory


class DrawKept(Model):
    def inner(self, x, labels):
        if self.memory is None:
            self.memory = torch.rand(x.shape[-1])  # here
        return x * self.memory


MENDS = [
    Mend("state-kept", AT_INPUT, Memory, MemoryGiven, more=("memory",)),
    Mend("state-kept", AT_INPUT, FoundLater, MemoryGiven, more=("memory",)),
    *(Mend("state-kept", AT_INPUT, kind, StepGiven, more=("step",))
      for kind in (Count, Threshold, Every, Alternating, Annealed, Counted, OfItsClass, Global, Tensor, First)),
    *(Mend("state-kept", AT_INPUT, kind, MemoryGiven, more=("memory",))
      for kind in (Growing, GrowingGlobal, Full, WeightsKept, DrawKept)),
    Mend("state-kept", SOMETHING, Timed, StepGiven, more=("step",)),
]  # fmt: skip


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: mend.refused.__name__)
def test_what_is_kept_between_steps_is_refused_with_a_fix_that_builds(mend, capfd):
    mend.holds(capfd)
    assert STEPS == OfItsClass.steps == 0 and SEEN == []


def test_what_turns_in_one_step_alone_is_refused(capfd):
    assert Mend("state-kept", AT_INPUT, OneStep, StepGiven).refusal(capfd).code == "state-kept"


class Reversed(torch.autograd.Function):
    """Its gradient alone depends on the factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None


class Warmed(Count):
    """A reversal that begins after some steps, of which a loss says nothing."""

    def inner(self, x, labels):
        self.step += 1
        return Reversed.apply(x, 0.0 if self.step < 20 else 1.0)


class Backwards(torch.autograd.Function):
    """Counts how often it has run backward."""

    times = 0

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        Backwards.times += 1
        return grad if Backwards.times < 20 else 2 * grad


class BackwardCounted(Model):
    def inner(self, x, labels):
        return Backwards.apply(x)


@pytest.mark.parametrize(("kind", "what"), [(Warmed, "step"), (BackwardCounted, "test_state.py: Backwards.times")])
def test_what_gradients_alone_depend_on_is_refused(kind, what):
    with pytest.raises(BuildError) as caught:
        build(made(kind), batch(S), 2, sequence_dims=DIMS, target="cpu", eager_check=False)
    assert caught.value.problems[0].what == f"forward keeps {what} from one step to the next"


@functools.lru_cache
def table(width: int) -> torch.Tensor:
    return torch.linspace(0, 1, width, dtype=torch.float64)


class CachedFunction(Model):
    def inner(self, x, labels):
        return x + table(x.shape[-1])


def test_a_function_that_keeps_constants_is_captured_and_left_without_tensors_of_capture():
    model = made(CachedFunction)
    trains_as_eager(model)
    table.cache_clear()
    build(model, batch(S), 2, sequence_dims=DIMS, target="cpu", eager_check=False)
    assert type(table(H)) is torch.Tensor


class LazyBuffer(Model):
    """Registers a buffer when it needs one."""

    def inner(self, x, labels):
        if not hasattr(self, "mask"):
            mask = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
            self.register_buffer("mask", mask / mask.sum(1, keepdim=True), persistent=False)
        return self.mask @ x


def test_a_buffer_that_is_registered_when_it_is_needed_is_a_cache():
    trains_as_eager(made(LazyBuffer))


class PythonDraw(Model):
    def inner(self, x, labels):
        return x * 2 if random.random() < 0.5 else x  # here


class NumpyDraw(Model):
    def inner(self, x, labels):
        return x * float(np.random.rand())  # here


class TorchDraw(Model):
    def inner(self, x, labels):
        return torch.where(torch.rand(()) < 0.5, 2 * x, x)


DRAWN = "draw with torch operators, as with torch.rand(()) and torch.where"
DRAWS = [Mend("random-operator", DRAWN, kind, TorchDraw) for kind in (PythonDraw, NumpyDraw)]
MENDS = [*MENDS, *DRAWS]


@pytest.mark.parametrize("mend", DRAWS, ids=lambda mend: mend.refused.__name__)
def test_a_draw_of_python_or_numpy_is_refused_and_leaves_their_state_alone(mend, capfd):
    state = random.getstate(), np.random.get_state()[1].tolist()
    mend.holds(capfd)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())


class Cache(Model):
    """Follows from constants alone."""

    def inner(self, x, labels):
        if self.memory is None:
            self.memory = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype), 1)
        return x + self.memory @ x


class CacheByLength(Model):
    def set_up(self):
        self.known = {}

    def inner(self, x, labels):
        if x.shape[1] not in self.known:
            self.known[x.shape[1]] = torch.arange(x.shape[1])[None, :, None] * 0.1
        return x + self.known[x.shape[1]]


class MadeAtFirst(Model):
    def set_up(self):
        self.first = True

    def inner(self, x, labels):
        if self.first:
            self.first, self.scale = False, 3.0
        return x * self.scale


class Logs(Model):
    """Counts, and keeps what it saw, for a log."""

    def set_up(self):
        self.step, self.log, self.history = 0, {}, []

    def inner(self, x, labels):
        self.step += 1
        self.last = self.log["norm"] = x.norm().detach()
        self.history.append(x.detach().mean())
        self.mean = 0.9 * getattr(self, "mean", 0) + 0.1 * x.detach().mean()
        return x


class Reported(Logs):
    """Reads a value in a step that is not the first."""

    def inner(self, x, labels):
        self.step += 1
        if self.step % 50 == 0:
            self.log["norm"] = x.norm().item()
        return x


class WithinAStep(Model):
    def inner(self, x, labels):
        self.now = x
        twice, self.now = self.now * 2, None
        return twice


@pytest.mark.parametrize("kind", [Cache, CacheByLength, MadeAtFirst, Logs, Reported, WithinAStep])
def test_what_no_later_step_computes_with_is_captured(kind):
    trains_as_eager(made(kind), steps=3)
