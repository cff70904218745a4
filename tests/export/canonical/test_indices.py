"""Lookups at indices that follow from shapes alone are held against what is looked up."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.export.mend import H, Mend, Model, S, made, trains_as_eager

FIX = "shorten the sequence (--seq), or make the table that long"


class Table(Model):
    """A table of `rows`, looked up by `look` at positions that end with S - 1."""

    rows = S - 1

    def set_up(self):
        self.table = nn.Parameter(torch.randn(self.rows, H))
        self.register_buffer("known", torch.arange(2 * S), persistent=False)

    def inner(self, x, labels):
        return x + self.look(torch.arange(x.shape[1]))

    def look(self, at):
        return F.embedding(at, self.table)


class Indexed(Table):
    def look(self, at):
        return self.table[at]


class IndexedFromTheEnd(Table):
    def look(self, at):
        return self.table[-1 - at]


class Selected(Table):
    def look(self, at):
        return self.table.index_select(0, at)


class Gathered(Table):
    def look(self, at):
        return self.table.gather(0, at[:, None].expand(-1, H))


class Taken(Table):
    def look(self, at):
        return torch.take_along_dim(self.table, at[:, None], 0)


class Written(Table):
    def look(self, at):
        counts = torch.zeros(self.rows).scatter_add(0, at, torch.ones(len(at)))
        return self.table.mean(0) * counts.sum()


class Put(Table):
    def look(self, at):
        counts = torch.zeros(self.rows)
        counts[at] = 1.0
        return self.table.mean(0) * counts.sum()


class OfTwo(Table):
    """Relative positions, from -(S - 1) to S - 1."""

    rows = 2 * S - 1

    def look(self, at):
        return F.embedding(at[:, None] - at, self.table).mean(0)


class FromABuffer(Table):
    def look(self, at):
        return self.table[self.known[: len(at)]]


class Shifted(Table):
    """As OPT and RoBERTa have it: two rows in front."""

    rows = S + 1

    def look(self, at):
        return F.embedding(at + 2, self.table)


WRONG = (Table, Indexed, IndexedFromTheEnd, Selected, Gathered, Taken, Written, Put, OfTwo, FromABuffer, Shifted)
RANGES = {IndexedFromTheEnd: (-S, -1), OfTwo: (1 - S, S - 1), Shifted: (2, S + 1)}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_there_is_refused_with_its_line_and_a_longer_table_builds(kind, capfd):
    problem = Mend("index-out-of-range", FIX, kind, kind).refusal(capfd)
    low, high = RANGES.get(kind, (0, S - 1))
    assert problem.code == "index-out-of-range" and problem.fix == FIX
    assert f" looks up {low} to {high}, and there are {kind.rows}" in problem.what
    first, last = kind.look.__code__.co_firstlineno, max(end for _, _, end in kind.look.__code__.co_lines() if end)
    assert problem.where in [f"test_indices.py:{line}" for line in range(first + 1, last + 1)]
    offset = {"look": lambda self, at: kind.look(self, at)} if kind is not OfTwo else {"look": shifted_up}
    trains_as_eager(made(type("Longer", (kind,), {"rows": 2 * S + 2, **offset})))


def shifted_up(self, at):
    return F.embedding(at[:, None] - at + S - 1, self.table).mean(0)


class ByTheBatch(Table):
    """What is looked up follows from the batch: nothing is known."""

    def inner(self, x, labels):
        return x + F.embedding(labels.clamp(max=S - 2), self.table)


class Whole(Table):
    rows = S


@pytest.mark.parametrize("kind", [ByTheBatch, Whole])
def test_other_lookups_build(kind):
    trains_as_eager(made(kind))
