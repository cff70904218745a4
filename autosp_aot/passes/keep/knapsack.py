"""The plan that takes least time within a budget: one option for each run of segments, by dynamic programming.

    segment 0      keep 900 B, 0 s  |  keep 100 B, 3 s  |  with segment 1: keep 100 B, 8 s
    chosen         keep 100 B, then what is best for segment 1 with 100 B kept before it, ...

While a segment is worked on, forward or backward, what earlier segments keep is there, and what it needs itself. So an
option fits or not by the sum that was kept before it, and of the plans for the first segments only those count that no
other beats in both bytes and price. Method: knapsack over undominated states (Nemhauser and Ullmann 1969).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

# Sums are rounded up to so many steps of the largest there can be: the budget is kept, and the states stay few.
STEPS = 2**14


@dataclass(frozen=True, slots=True)
class Option:
    """A way to treat `length` segments: bytes they keep, bytes they need beside what is kept before them, and time."""

    length: int
    kept_bytes: int
    needed_bytes: int
    seconds: float


Some = TypeVar("Some", bound=Option)
Options = Sequence[Sequence[Some]]
Price = Callable[[float, int, Option], float | None]


def cheapest(options: Options[Some], budget_bytes: int) -> list[Some] | None:
    """The options, in order, that take the least seconds within the budget; None where none do.

    `options[i]` are those of a run that begins with segment i. Exact up to the rounding of `STEPS`.
    """

    def price(seconds: float, before: int, option: Option) -> float | None:
        return seconds + option.seconds if before + option.needed_bytes <= budget_bytes else None

    return _least(options, price)


def tightest(options: Options[Some]) -> list[Some]:
    """The options that need the least budget."""
    found = _least(options, lambda most, before, option: max(most, before + option.needed_bytes))
    assert found is not None, "a price is refused by none"
    return found


def _least(options: Options[Some], price: Price) -> list[Some] | None:
    """The options of the least price: `price` of that of the options before, the bytes these keep, and the next."""
    step = 1 + sum(max((option.kept_bytes for option in choices), default=0) for choices in options) // STEPS
    states: list[dict[int, tuple[float, tuple]]] = [{} for _ in range(len(options) + 1)]
    states[0][0] = (0.0, ())
    for at, choices in enumerate(options):
        for kept, (so_far, chosen) in _undominated(states[at]):
            for option in choices:
                total, after = kept - (-option.kept_bytes // step), states[at + option.length]
                new = price(so_far, kept * step, option)
                if new is not None and (total not in after or new < after[total][0]):
                    after[total] = new, (option, chosen)
    if not states[-1]:
        return None
    _, chosen = min(states[-1].values(), key=lambda state: state[0])
    found = []
    while chosen:
        option, chosen = chosen
        found.append(option)
    return found[::-1]


def _undominated(states: dict[int, tuple[float, tuple]]) -> list[tuple[int, tuple[float, tuple]]]:
    """The states, by bytes, whose price is less than that of every one with fewer."""
    found: list[tuple[int, tuple[float, tuple]]] = []
    for kept, state in sorted(states.items()):
        if not found or state[0] < found[-1][1][0]:
            found.append((kept, state))
    return found
