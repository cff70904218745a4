"""Whatever can count is seen to count: the loss turns after 500 steps, which two steps alone do not show."""

import argparse
import array
import itertools
import random
import types
from collections import Counter, UserDict, deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from autosp_aot.errors import BuildError
from autosp_aot.export.joint import capture
from autosp_aot.export.kept import counting, fill, keeper, mark
from autosp_aot.export.subject import Subject
from tests.export import counted
from tests.export.counted import next_step
from tests.export.mend import Model, S, batch, made, trains_as_eager

HELD = types.SimpleNamespace(n=0)


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class SlottedList(list):
    __slots__ = ("n",)

    def __init__(self, *elements):
        super().__init__(*elements)
        self.n = 0


@dataclass
class Counting:
    n: int = 0


class Counts:
    n = 0


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0


class Private:
    __slots__ = ("__n",)

    def __init__(self):
        self.__n = 0

    def up(self) -> int:
        self.__n += 1
        return self.__n


class Named(dict):
    """Attributes are elements, as many configurations have it."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class Beside(dict):
    """A dict with an attribute of its own."""

    n = 0


def counted_by(held):
    return property(lambda model: up(held))


CALLS = types.SimpleNamespace(n=0)


def of_a_function() -> int:
    of_a_function.n = getattr(of_a_function, "n", 0) + 1
    return of_a_function.n


def of_a_default(seen=[]) -> int:
    seen.append(1)
    return len(seen)


def generated():
    n = 0
    while True:
        n += 1
        yield n


def delegating():
    yield from generated()


def imported_late() -> int:
    from tests.export import counted_late

    counted_late.STEP += 1
    return counted_late.STEP


def up_from_none(owner):
    owner.n = getattr(owner, "n", 0) + 1
    return owner.n


def up(owner, by=1):
    """Add one to what is called n."""
    owner.n += by
    return owner.n


def longer(container):
    container.append(1)
    return len(container)


def again(model, more):
    model.n = model.n + more
    return model.n if isinstance(model.n, (int, float, Fraction, Decimal, np.generic)) else len(model.n)


# What is set up as `n`, and how many a step is, counted up.
COUNTS = {
    "a number": (0, lambda m: again(m, 1)),
    "a fraction": (Fraction(0), lambda m: again(m, 1)),
    "a decimal": (Decimal(0), lambda m: again(m, 1)),
    "a number of numpy": (np.int64(0), lambda m: again(m, 1)),
    "an array of numpy": (np.zeros(1), lambda m: m.n.__iadd__(1)[0]),
    "a list": ([], lambda m: longer(m.n)),
    "a list in a list": ([[0]], lambda m: longer(m.n[0])),
    "a tuple": ((), lambda m: again(m, (1,))),
    "text": ("", lambda m: again(m, "x")),
    "bytes": (bytearray(), lambda m: longer(m.n)),
    "a deque": (deque(), lambda m: longer(m.n)),
    "a deque of some length": (deque(maxlen=1000), lambda m: longer(m.n)),
    "a dict": ({}, lambda m: m.n.update({len(m.n): 1}) or len(m.n)),
    "a set": (set(), lambda m: m.n.add(len(m.n)) or len(m.n)),
    "a counter": (Counter(), lambda m: m.n.update(x=1) or m.n["x"]),
    "a namespace": (types.SimpleNamespace(n=0), lambda m: up(m.n)),
    "an object": (Counting(), lambda m: up(m.n)),
    "an object with slots": (Slotted(), lambda m: up(m.n)),
    "an attribute of a list in slots": (SlottedList(), lambda m: up(m.n)),
    "an object in a list": ([Counting()], lambda m: up(m.n[0])),
    "a module in a list": ([Layer()], lambda m: up(m.n[0])),
    "an object with private slots": (Private(), lambda m: m.n.up()),
    "a namespace of arguments": (argparse.Namespace(n=0), lambda m: up(m.n)),
    "a dict with attributes": (Named(n=0), lambda m: up(m.n)),
    "an attribute of a dict": (Beside(), lambda m: up(m.n)),
    "a dict of the user's": (UserDict(n=0), lambda m: m.n.update(n=m.n["n"] + 1) or m.n["n"]),
    "an array": (array.array("q", [0]), lambda m: m.n.__setitem__(0, m.n[0] + 1) or m.n[0]),
    "a large array of numpy": (np.zeros(2**18), lambda m: m.n.__iadd__(1)[0]),
    "a large list": ([0] * 2000, lambda m: m.n.__setitem__(0, m.n[0] + 1) or m.n[0]),
    "a set of one": ({0}, lambda m: m.n.add(m.n.pop() + 1) or max(m.n)),
    "an attribute of a parameter": (None, lambda m: up_from_none(m.gain)),
    "a property": (None, lambda m: m.calls),
    "a generator of another": (delegating(), lambda m: next(m.n)),
    "an iterator": (itertools.count(), lambda m: next(m.n)),
    "a generator": (generated(), lambda m: next(m.n)),
    "random numbers": (random.Random(0), lambda m: 1000 * (m.n.random() < 1e-6)),
    "random numbers of numpy": (np.random.default_rng(0), lambda m: 1000 * (m.n.random() < 1e-6)),
    "old random numbers of numpy": (np.random.RandomState(0), lambda m: 1000 * (m.n.rand() < 1e-6)),
    "a global object": (None, lambda m: up(HELD)),
    "a class": (None, lambda m: up(Counts)),
    "a function": (None, lambda m: of_a_function()),
    "a default": (None, lambda m: of_a_default()),
    "another file": (None, lambda m: setattr(counted, "STEP", counted.STEP + 1) or counted.STEP),
    "a class of another file": (None, lambda m: up(counted.Counts)),
    "a file that a function imports": (None, lambda m: imported_late()),
    "a function of another file": (None, lambda m: next_step()),
}


def turning(count, inner):
    class Turning(Model):
        calls = counted_by(CALLS)

        def set_up(self):
            self.n = count

        def count(self) -> int:
            return inner(self)

        def inner(self, x, labels):
            return x if self.count() < 500 else 2 * x

    return Turning


@pytest.mark.parametrize("name", COUNTS)
def test_what_counts_is_refused_and_left_alone(name):
    count, inner = COUNTS[name]
    before = mark(count), HELD.n, Counts.n, counted.STEP, counted.Counts.n, len(of_a_default.__defaults__[0])
    model = made(turning(count, inner))
    with pytest.raises(BuildError) as caught:
        capture(Subject(model, batch(S), "cpu"))
    problem = caught.value.problems[0]
    assert problem.code == "state-kept" and problem.what.startswith("forward keeps "), problem.what
    assert problem.where.startswith(("test_kept.py:", "counted.py:"))
    after = mark(count), HELD.n, Counts.n, counted.STEP, counted.Counts.n, len(of_a_default.__defaults__[0])
    assert name.startswith("a generator") or before == after


class Noting(Model):
    """Keeps all kinds of things, and computes with none."""

    def set_up(self):
        self.n, self.seen, self.names, self.text = 0, deque(maxlen=4), {}, ""
        self.lock, self.generated = torch.multiprocessing.RLock(), generated()

    def inner(self, x, labels):
        with self.lock:
            self.n += 1
        self.seen.append(x.detach())
        self.names[f"step {self.n}"] = x.detach().norm()
        self.text = f"at {self.n}"
        return x


def test_what_only_a_log_reads_is_captured_beside_what_cannot_be_copied():
    model = made(Noting)
    trains_as_eager(model, steps=3)
    assert next(model.generated) == 1


@pytest.mark.parametrize("value", [
    3, 2.5, np.float32(2), Fraction(1, 2), [1, 2], (1, 2), deque([1], 9), "ab", b"ab", bytearray(b"a"), {"a": 1},
    {1, 2}, np.ones(2), frozenset({1}),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_a_value_that_counts_is_of_the_same_kind_and_told_from_the_first(value):
    other = counting(value, 7)
    assert type(other) is type(value) and mark(other) != mark(value)
    assert mark(value) == mark(value)


@pytest.mark.parametrize("value", [[1, 2], deque([1], 9), {"a": 1}, {1, 2}, bytearray(b"a"), Counter("ab")])
def test_contents_are_given_back(value):
    before, restore = repr(value), keeper(value)
    fill(value, counting(value, 9))
    assert repr(value) != before
    restore()
    assert repr(value) == before


@pytest.mark.parametrize("value", [
    random.Random(3), np.random.default_rng(3), np.random.RandomState(3), np.ones(3),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_states_are_given_back(value):
    before, restore = mark(value), keeper(value)
    value.fill(2) if isinstance(value, np.ndarray) else (value.random() if hasattr(value, "random") else value.rand())
    assert mark(value) != before
    restore()
    assert mark(value) == before
