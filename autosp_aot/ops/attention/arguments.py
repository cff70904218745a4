"""The arguments of attention operators by name, and what a kernel is given of them.

    autosp.attention(q, k, v, vectors, seed, group, first_head, scale=, causal=, window=, score=, ...)
        Arguments(q, k, v, vectors, seed, group, scoring, first_head)
            KernelCall(q, k, v, vectors, scoring)        a key/value head and its query heads, or the rows of a head

    q: [B, n, S, D]   k: [B, m, T, D]   v: [B, m, T, Dv]   out: [B, n, S, Dv]   lse: [B, n, S]
    vectors: [B or 1, n or 1, S or 1, T or 1] each, what `score` reads beside products and positions

Over heads and query rows as one dim q is [B, L, D], out [B, L, Dv] and lse [B, L]; vectors are whole,
[B or 1, N or 1, S or 1, T or 1], or cut as q is, [B or 1, L, T or 1].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from autosp_aot.ops.random import keep


@dataclass(frozen=True)
class Dropout:
    """Which weights [B, heads, rows, keys] are dropped with probability `p`: those are the sizes of the whole.

    `first_head` is the number of the first head of a call.
    """

    seed: Tensor
    site: int
    p: float
    heads: int
    rows: int
    keys: int
    first_head: int

    def factor(self, batch: int, heads: int, row: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        """What the weights of a block are multiplied with, 0 or 1 / (1 - p)."""
        head = torch.arange(self.first_head, self.first_head + heads, device=row.device).view(1, -1, 1, 1)
        at = torch.arange(batch, device=row.device).view(-1, 1, 1, 1) * self.heads + head
        kept = keep(self.seed, self.site, (at * self.rows + row) * self.keys + key, self.p)
        return kept.to(dtype) * (0.0 if self.p == 1 else 1 / (1 - self.p))


@dataclass(frozen=True)
class Scoring:
    """From the products of queries and keys to weights: times `scale`, then `score`, then softmax, then `dropout`.

    `causal` hides the keys after a row's own position, `window` all but the last `window` keys up to it. Rows that see
    nothing give zeros where `safe`, else NaN as the softmax does. `first_row` is the position of the first row.
    Where `traced`, what is done does not depend on values: every block that positions allow is computed.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    score: object = None
    safe: bool = True
    dropout: Dropout | None = None
    first_row: int = 0
    traced: bool = False

    @property
    def plain(self) -> bool:
        """Whether softmax, causal or not, is all there is."""
        return self.score is None and self.window is None and self.dropout is None


@dataclass(frozen=True)
class Saved:
    """What backward is given besides: the gradient of the output, the output, its lse, and the gradient of that."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None

    def part(self, of: Callable[[Tensor], Tensor]) -> "Saved":
        grad_lse = None if self.grad_lse is None else of(self.grad_lse)
        return Saved(of(self.grad_out), of(self.out), of(self.lse), grad_lse)


@dataclass(frozen=True)
class KernelCall:
    """What one kernel works on: as many key/value heads as query heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    vectors: list[Tensor]
    scoring: Scoring

    def keys(self, keys: slice, **scoring) -> "KernelCall":
        """The call over some of its keys, scored otherwise."""
        k, v = self.k[:, :, keys], self.v[:, :, keys]
        return replace(self, k=k, v=v, scoring=replace(self.scoring, **scoring))


@dataclass(frozen=True)
class HeadRun:
    """Query heads that read one key/value head, or all where each has its own, as they are numbered on a rank."""

    heads: slice
    kv: slice


@dataclass(frozen=True)
class RowRun:
    """Positions of one head: where they are on a rank, its key/value head there, its number, and the first row."""

    part: slice
    kv: slice
    head: int
    first: int

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.first + self.part.stop - self.part.start

    def rows(self, tensor: Tensor) -> Tensor:
        """The run's part of a tensor [B, L, ...], as [B, 1, rows, ...]."""
        return tensor[:, self.part].unsqueeze(1)

    def vectors(self, vectors: list[Tensor]) -> list[Tensor]:
        """What the run reads of vectors, as views of [B or 1, 1, rows or 1, T or 1]."""
        found = []
        for vector in vectors:
            if vector.dim() == 3:
                found.append(self.rows(vector))
                continue
            (vector,) = of_heads([vector], slice(self.head, self.head + 1))
            found.append(vector[:, :, self.first : self.stop] if vector.shape[2] > 1 else vector)
        return found


@dataclass(frozen=True)
class Arguments:
    """A rank's call of an attention operator.

    `first_head` is the number of q's first head in the whole; key/value head number h // group serves query head h, and
    k's first head is number first_head // group. Over heads and `rows` as one dim, q begins at position `start`.
    `scoring` is what `Scoring` takes, and where `dropout` is not zero the `site` of the draws and the number of all
    `heads`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    vectors: list[Tensor]
    seed: Tensor | None
    group: int
    scoring: Mapping[str, Any]
    first_head: int = 0
    rows: int = 0
    start: int = 0

    def head_runs(self) -> list[HeadRun]:
        """All heads at once where they are one to one, else a run a key/value head."""
        count = self.q.shape[1]
        if self.group == 1:
            return [HeadRun(slice(0, count), slice(0, count))]
        first_kv, runs, at = self.first_head // self.group, [], 0
        while at < count:
            kv = (self.first_head + at) // self.group
            end = min((kv + 1) * self.group - self.first_head, count)
            runs.append(HeadRun(slice(at, end), slice(kv - first_kv, kv - first_kv + 1)))
            at = end
        return runs

    def row_runs(self) -> list[RowRun]:
        """A run for each head that q has a position of."""
        stop, at, runs = self.start + self.q.shape[1], self.start, []
        while at < stop:
            head, row = divmod(at, self.rows)
            end = min((head + 1) * self.rows, stop)
            kv = head // self.group - self.start // self.rows // self.group
            runs.append(RowRun(slice(at - self.start, end - self.start), slice(kv, kv + 1), head, row))
            at = end
        return runs

    def of_heads(self, run: HeadRun) -> KernelCall:
        """What a kernel is given of a run; one key/value head is repeated by stride, not by copy."""
        q, k, v = self.q[:, run.heads], self.k[:, run.kv], self.v[:, run.kv]
        scoring = self._scoring(self.first_head + run.heads.start, q.shape[2])
        each = q.shape[1]
        vectors = of_heads(self.vectors, run.heads)
        return KernelCall(q, k.expand(-1, each, -1, -1), v.expand(-1, each, -1, -1), vectors, scoring)

    def of_rows(self, run: RowRun) -> KernelCall:
        scoring = replace(self._scoring(run.head, self.rows), first_row=run.first)
        return KernelCall(run.rows(self.q), self.k[:, run.kv], self.v[:, run.kv], run.vectors(self.vectors), scoring)

    def _scoring(self, head: int, rows: int) -> Scoring:
        """The scoring of a call whose first head has number `head`, over so many rows of the whole."""
        scoring = dict(self.scoring)
        p, site, heads = scoring.pop("dropout", 0.0), scoring.pop("site", 0), scoring.pop("heads", 0)
        if not p:
            return Scoring(**scoring)
        assert self.seed is not None, "what is dropped is drawn"
        return Scoring(**scoring, dropout=Dropout(self.seed, site, p, heads, rows, self.k.shape[2], head))


def of_heads(vectors: list[Tensor], heads: slice) -> list[Tensor]:
    """Views of what some heads read."""
    return [vector[:, heads if vector.shape[1] > 1 else slice(None)] for vector in vectors]


def named(function: Callable, arguments: str) -> Callable:
    """`function` of Arguments, where `arguments` has "out" of Saved, and with "which", as one of a program's arguments.

    `arguments` are their names in order, separated by commas; scoring comes by keyword, and they may.
    """
    names = arguments.split(", ")
    saving = {field.name for field in fields(Saved)}

    def called(*values, **scoring):
        given = dict(zip(names, values)) | {name: scoring.pop(name) for name in names[len(values) :] if name in scoring}
        if not len(values) <= len(names) == len(given):
            raise TypeError(f"{max(len(values), len(given))} arguments for {arguments}")
        saved = [Saved(**{name: given.pop(name) for name in names if name in saving})] if "out" in given else []
        which = [given.pop("which")] if "which" in given else []
        return function(Arguments(**given, scoring=scoring), *saved, *which)

    return called
