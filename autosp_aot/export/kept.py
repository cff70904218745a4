"""What a model can keep between steps beside tensors: how one value is told from another, and what others there are.

    7, 0.5, np.int64(7), Fraction(7)     numbers                 any number
    [a, b], deque, {..}, set, "text"     as long as they are     any length
    np.zeros(3)                          their elements          any element
    random.Random, itertools.count()     where they are          none that could be tried
"""

import array
import hashlib
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from numbers import Number
from types import GeneratorType
from typing import Any

import numpy as np
from torch import Tensor

SEQUENCES = (list, tuple, deque, str, bytes, bytearray)
FILLED = (list, deque, dict, set, bytearray)
CONTAINERS = (*SEQUENCES[:3], dict, set, frozenset)
RANDOM = (random.Random, np.random.Generator, np.random.RandomState)
LEAVES = (Number, str, bytes, bytearray, type(None), Tensor, np.ndarray, array.array, *RANDOM)
LARGEST = 1000  # of containers that are looked into; tables of a tokenizer hold no state
LONGEST = 10**4  # of what grows
LARGEST_BYTES = 2**28  # of arrays that are looked at


def is_leaf(value) -> bool:
    """Whether nothing is looked for inside of a value."""
    return isinstance(value, LEAVES) or (hasattr(type(value), "__next__") and not hasattr(value, "__dict__"))


def mark(value) -> object:
    """What tells a value from others of its place; of a container its length, of what is not known here which it is."""
    if isinstance(value, (set, frozenset)) and all(map(is_leaf, value)):
        return frozenset(value)
    if isinstance(value, CONTAINERS):
        inside = value.values() if isinstance(value, dict) else value
        return type(value), len(value), hash(tuple(map(id, inside))) if len(value) > LARGEST else None
    if isinstance(value, np.ndarray):
        return value.shape, hashlib.blake2b(value.tobytes()).digest() if value.nbytes <= LARGEST_BYTES else id(value)
    if isinstance(value, random.SystemRandom):
        return Same(value)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, GeneratorType):
        names = {} if value.gi_frame is None else value.gi_frame.f_locals
        at = -1 if value.gi_frame is None else value.gi_frame.f_lasti
        counts = {name: mark(local) for name, local in names.items() if isinstance(local, (Number, str, *CONTAINERS))}
        return at, counts, mark(value.gi_yieldfrom)
    if hasattr(type(value), "__next__"):
        return _place(value)
    return (type(value), repr(value)) if isinstance(value, LEAVES) and not isinstance(value, Tensor) else Same(value)


def _place(iterator) -> object:
    """Where an iterator is, as it says to whoever would copy it."""
    try:
        return repr(iterator.__reduce__()[1:])
    except TypeError:
        return repr(iterator)


def counting(value, number: float):
    """The value of the kind of `value` that counts `number`: that number, or so long. TypeError where there is none."""
    kind = type(value)
    if isinstance(value, np.ndarray):
        return np.full_like(value, number)
    if isinstance(value, Number):
        return kind(number)
    length = int(min(max(number, 0), LONGEST))
    if isinstance(value, SEQUENCES) and value:
        longer = islice(cycle(value), length) if isinstance(value, deque) else (value * length)[:length]
        return deque(longer, value.maxlen) if isinstance(value, deque) else longer
    if isinstance(value, (set, frozenset)):
        return value | {object() for _ in range(length)}
    if isinstance(value, dict) and value:
        made = dict.copy(value)
        made.update((object(), inside) for inside in islice(cycle(list(value.values())), length))
        return made
    raise TypeError(f"{type(value).__name__} does not count")


def keeper(value) -> Callable[[], None]:
    """What gives a value back the contents that it has now."""
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.ndarray):
        before = value.copy() if value.nbytes <= LARGEST_BYTES else value
        return lambda: np.copyto(value, before) if value.flags.writeable else None
    if isinstance(value, FILLED):
        contents = _kind(value)(value)
        return lambda: fill(value, contents)
    return lambda: None


def fill(value, contents) -> None:
    """Put the contents of another container into one, whatever methods of its kind a class of the user's replaces."""
    kind = _kind(value)
    kind.clear(value)
    kind.extend(value, contents) if hasattr(kind, "extend") else kind.update(value, contents)


def _kind(value) -> type[Any]:
    return next(kind for kind in (OrderedDict, *FILLED) if isinstance(value, kind))


class Same:
    """Equal to what holds the very same object."""

    def __init__(self, held: object):
        self.held = held

    def __eq__(self, other) -> bool:
        return isinstance(other, Same) and self.held is other.held
