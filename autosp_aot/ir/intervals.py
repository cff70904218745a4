"""What values a score expression can take: interval arithmetic at many places at once.

    where(k <= q, s, -inf) at a place where q is 0..1023 and k 2048..3071:    k <= q is False    ->    -inf

A value is `c * s` plus a number between `low` and `high`; no product s of queries and keys is as large as SCORES.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from autosp_aot.ir.program import Arg

SCORES = 1e30
# A score that cannot be above weighs nothing beside one that is not hidden: keys are hidden by the lowest fp32 or bf16.
HIDDEN = -SCORES
INF = float("inf")


@dataclass(frozen=True)
class Part:
    """At every place `c * s` plus a number between `low` and `high`; c is NaN where nothing is known. All fp64, 1-D."""

    c: Tensor
    low: Tensor
    high: Tensor

    @property
    def hidden(self) -> Tensor:
        """Where it is below HIDDEN whatever s is."""
        return (self.high <= HIDDEN) & ~self.c.isnan()


@dataclass(frozen=True)
class Position:
    """A sum `q * at_q + k * at_k + plus`."""

    at_q: int
    at_k: int
    plus: int


Known = Part | Position
# A comparison of two parts: where it is surely true, and where it may be.
Comparison = Callable[[Part, Part], tuple[Tensor, Tensor]]


class Intervals:
    """The evaluation of an expression at `size` places at once, given what its leaves are there.

    Positions may be given as `Position`, then `distances` are those of a key from its query at each place.
    """

    def __init__(self, size: int, leaves: Mapping[str, Known], distances: Tensor | None = None):
        self.size, self.leaves, self.distances = size, leaves, distances

    def number(self, low: Tensor | float, high: Tensor | float | None = None, c: float = 0.0) -> Part:
        """`c * s` plus a number between low and high (by default low itself), for all places or one a place."""
        ends = (c, low, low if high is None else high)
        return Part(*(torch.as_tensor(end, dtype=torch.float64).expand(self.size) for end in ends))

    def unknown(self) -> Part:
        return self.number(-INF, INF, float("nan"))

    def of(self, score: Arg) -> Known:
        if isinstance(score, str):
            return self.leaves[score]
        if not isinstance(score, tuple):
            return self.number(float(score))
        head, *rest = score
        if head == "constant":
            return self.of(rest[1])
        if head == "cast":
            return self.cast(rest[0], self.of(rest[1]))
        rule = RULES.get(head.split(".")[1])
        return self.unknown() if rule is None else rule(self, *map(self.of, rest))

    def cast(self, dtype: str, part: Known) -> Known:
        if isinstance(part, Position):
            return part if dtype in ("i64", "i32") else self.unknown()
        if dtype == "b8":
            return self.negated(self.compared(part, self.number(0), _equal))
        return part if dtype in ("f64", "f32", "bf16", "f16") else _map_ends(part, torch.trunc)

    def compared(self, a: Known, b: Known, rule: Comparison) -> Part:
        """A comparison; of positions it is known where it depends on their distance alone."""
        if isinstance(a, Position) or isinstance(b, Position):
            at, other = _position(a), _position(b)
            if at is None or other is None or at.at_q - other.at_q != -(at.at_k - other.at_k):
                return self.number(0, 1)
            assert self.distances is not None, "positions come with distances"
            difference = self.distances * (at.at_k - other.at_k) + (at.plus - other.plus)
            low, high = rule(self.number(difference), self.number(0))
            return self.number(low.double(), high.double())
        if bool((a.c != 0).any() | (b.c != 0).any()):
            return self.number(0, 1)
        low, high = rule(a, b)
        return self.number(low.double(), high.double())

    def negated(self, a: Known) -> Part:
        return self.number(1 - a.high, 1 - a.low) if _is_truth(a) else self.unknown()

    def both(self, a: Known, b: Known) -> Part:
        if not (_is_truth(a) and _is_truth(b)):
            return self.unknown()
        return self.number(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high))

    def either(self, a: Known, b: Known) -> Part:
        if not (_is_truth(a) and _is_truth(b)):
            return self.unknown()
        return self.number(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high))

    def where(self, condition: Known, yes: Known, no: Known) -> Part:
        if isinstance(yes, Position) or isinstance(no, Position) or not _is_truth(condition):
            return self.unknown()
        surely, never = condition.low > 0, condition.high <= 0

        def pick(a: Tensor, b: Tensor, mixed: Tensor) -> Tensor:
            return torch.where(surely, a, torch.where(never, b, mixed))

        c = pick(yes.c, no.c, torch.where(yes.c == no.c, yes.c, float("nan")))
        low = pick(yes.low, no.low, torch.minimum(yes.low, no.low))
        return Part(c, low, pick(yes.high, no.high, torch.maximum(yes.high, no.high)))

    def added(self, a: Known, b: Known, sign: int = 1) -> Known:
        if isinstance(a, Position) or isinstance(b, Position):
            at, other = _position(a), _position(b)
            if at is None or other is None:
                return self.unknown()
            return Position(at.at_q + sign * other.at_q, at.at_k + sign * other.at_k, at.plus + sign * other.plus)
        if sign < 0:
            b = Part(-b.c, -b.high, -b.low)
        return Part(a.c + b.c, a.low + b.low, a.high + b.high)

    def multiplied(self, a: Known, b: Known) -> Known:
        if isinstance(b, Position):
            return self.unknown() if isinstance(a, Position) else self.multiplied(b, a)
        if isinstance(a, Position):
            times = _position(b)
            if times is None:
                return self.unknown()
            return Position(a.at_q * times.plus, a.at_k * times.plus, a.plus * times.plus)
        for x, y in ((a, b), (b, a)):
            if bool(((y.c == 0) & (y.low == y.high) & y.low.isfinite()).all()):
                ends = torch.nan_to_num(torch.stack([x.low * y.low, x.high * y.low]), nan=0.0, posinf=INF, neginf=-INF)
                return Part(x.c * y.low, ends.amin(0), ends.amax(0))
        if bool((a.c != 0).any() | (b.c != 0).any()):
            return self.unknown()
        corners = torch.stack([x * y for x in (a.low, a.high) for y in (b.low, b.high)])
        corners = torch.nan_to_num(corners, nan=0.0, posinf=INF, neginf=-INF)
        return self.number(corners.amin(0), corners.amax(0))

    def divided(self, a: Known, b: Known) -> Known:
        if isinstance(b, Position) or bool(((b.c != 0) | (b.low != b.high) | (b.low == 0)).any()):
            return self.unknown()
        return self.multiplied(a, self.number(1 / b.low))


def _position(part: Known) -> Position | None:
    """A position, or a whole number that is the same at every distance as one."""
    if isinstance(part, Position):
        return part
    if bool((part.c != 0).any()) or bool((part.low != part.low[0]).any() | (part.high != part.low[0]).any()):
        return None
    number = float(part.low[0])
    return Position(0, 0, int(number)) if number.is_integer() else None


def _is_truth(part: Known) -> TypeGuard[Part]:
    if isinstance(part, Position) or bool((part.c != 0).any()):
        return False
    return all(bool(((end == 0) | (end == 1)).all()) for end in (part.low, part.high))


def _map_ends(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    return Part(part.c, change(part.low), change(part.high))


def _less(a: Part, b: Part) -> tuple[Tensor, Tensor]:
    return a.high < b.low, a.low < b.high


def _less_equal(a: Part, b: Part) -> tuple[Tensor, Tensor]:
    return a.high <= b.low, a.low <= b.high


def _equal(a: Part, b: Part) -> tuple[Tensor, Tensor]:
    return (a.low == a.high) & (b.low == b.high) & (a.low == b.low), (a.low <= b.high) & (b.low <= a.high)


# By the operator's name; nothing is known of what an operator makes that is not here.
RULES: dict[str, Callable[..., Known]] = {
    "__and__": Intervals.both,
    "__or__": Intervals.either,
    "add": Intervals.added,
    "bitwise_and": Intervals.both,
    "bitwise_not": Intervals.negated,
    "bitwise_or": Intervals.either,
    "div": Intervals.divided,
    "eq": lambda on, a, b: on.compared(a, b, _equal),
    "ge": lambda on, a, b: on.compared(b, a, _less_equal),
    "gt": lambda on, a, b: on.compared(b, a, _less),
    "le": lambda on, a, b: on.compared(a, b, _less_equal),
    "logical_and": Intervals.both,
    "logical_not": Intervals.negated,
    "logical_or": Intervals.either,
    "lt": lambda on, a, b: on.compared(a, b, _less),
    "masked_fill": lambda on, x, condition, value: on.where(condition, value, x),
    "mul": Intervals.multiplied,
    "ne": lambda on, a, b: on.negated(on.compared(a, b, _equal)),
    "rsub": lambda on, a, b: on.added(b, a, -1),
    "sub": lambda on, a, b: on.added(a, b, -1),
    "tanh": lambda on, x: on.number(-1, 1),
    "where": Intervals.where,
}
