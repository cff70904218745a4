"""What a program costs, read off its text: bytes alive over time, bytes moved, floating operations.

Storage is counted, not names: a view shares its operand's storage, which lives until the last of its names is released.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from autosp_aot.operators import COLLECTIVES, FREE
from autosp_aot.placement import received_bytes
from autosp_aot.program import ITEMSIZE, RECOMPUTED, Instr, PerRank, Program, Section, Value, map_ints

VIEWS = {
    "aten.permute.default": lambda tensor, instr: tensor.permute(instr.args[1]),
    "aten.expand.default": lambda tensor, instr: tensor.expand(instr.args[1]),
    "aten.reshape.default": lambda tensor, instr: tensor.reshape(instr.args[1]),
    "aten.slice.Tensor": lambda tensor, instr: torch.ops.aten.slice.Tensor(tensor, *instr.args[1:]),
}
CONTRACTIONS = (
    "aten.mm.default", "aten.bmm.default", "aten.addmm.default", "autosp.expert_mm", "autosp.expert_mm_weight_grad",
)  # fmt: skip
# Products of [S, D] and [D, S] or [S, S] and [S, D] that attention does, forward and backward.
ATTENTION_PRODUCTS = {
    "autosp.attention": 2, "autosp.attention_rows": 2,
    "autosp.attention_backward": 5, "autosp.attention_rows_backward": 5,
    "autosp.attention_vector_gradient": 2, "autosp.attention_rows_vector_gradient": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """Collectives of one kind in one section: how many, and the bytes that the worst rank receives."""

    section: str
    op: str
    count: int
    received_bytes: int


@dataclass(frozen=True)
class Costs:
    """Of the rank with the largest boxes. Parameters, optimizer state and kernels' workspace are not in it."""

    peak_bytes: int
    peak_at: str
    kept_bytes: int
    flops: int
    recomputed_flops: int
    moved: tuple[Moved, ...]


def costs(program: Program) -> Costs:
    """The costs of a program of all ranks (or of one, `Program.for_rank`)."""
    largest = map_ints(program, lambda n: max(n.values) if isinstance(n, PerRank) else n)
    peak, peak_at, kept = _memory(largest)
    values = largest.values()
    flops = {again: sum(_flops(instr, values) for instr in _calls(largest, again)) for again in (False, True)}
    return Costs(peak, peak_at, kept, flops[False] + flops[True], flops[True], tuple(moved(program)))


def moved(program: Program) -> list[Moved]:
    """The traffic of each kind of collective in each section."""
    values = map_ints(program, lambda n: n.values[0]).values()
    counts: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    for section in program.sections:
        for instr in section.instrs:
            if instr.op in COLLECTIVES:
                key = section.name, instr.op
                counts[key] += 1
                pairs = zip(instr.refs(), instr.values())
                received[key] += sum(_received(values[name], values[out.name], program.ranks) for name, out in pairs)
    return [Moved(*key, counts[key], received[key]) for key in counts]


def _received(source: Value, target: Value, ranks: int) -> int:
    return received_bytes(source.placement, target.placement, source.whole_shape, ITEMSIZE[source.dtype], ranks)


def _memory(program: Program) -> tuple[int, str, int]:
    """Peak bytes, the instruction at which it is reached, and bytes that cross from forward to backward."""
    alive = _Storages(program)
    kept = 0
    for section in program.sections:
        if section.name == "backward":
            kept = alive.total
        for instr in section.instrs:
            alive.step(instr, section)
    return alive.peak, alive.peak_at, kept


class _Storages:
    """Live storages: each name holds a meta tensor, names that share storage share its bytes."""

    def __init__(self, program: Program):
        self.tensors: dict[str, torch.Tensor] = {}
        self.owner: dict[str, str] = {}
        self.users: Counter[str] = Counter()
        self.bytes: dict[str, int] = {}
        self.total, self.peak, self.peak_at = 0, 0, ""
        for entry in program.inputs:
            self.tensors[entry.value.name] = _meta(entry.value)
            self.owner[entry.value.name] = ""

    def step(self, instr: Instr, section: Section) -> None:
        if instr.op == FREE:
            for name in instr.refs():
                self.release(name)
            return
        for out in instr.values():
            self.make(out, instr)
        if self.total > self.peak:
            what = instr.values()[0].name if instr.values() else instr.op
            self.peak, self.peak_at = self.total, f"{section.name}: {what}"

    def make(self, out: Value, instr: Instr) -> None:
        view = VIEWS.get(instr.op)
        if view is not None:
            operand = instr.refs()[0]
            tensor = view(self.tensors[operand], instr)
            if tensor.untyped_storage()._cdata == self.tensors[operand].untyped_storage()._cdata:
                self.tensors[out.name], self.owner[out.name] = tensor, self.owner[operand]
                self.users[self.owner[operand]] += 1
                return
        self.tensors[out.name], self.owner[out.name] = _meta(out), out.name
        self.bytes[out.name] = prod(out.shape) * ITEMSIZE[out.dtype]
        self.users[out.name] = 1
        self.total += self.bytes[out.name]

    def release(self, name: str) -> None:
        owner = self.owner.pop(name)
        del self.tensors[name]
        self.users[owner] -= 1
        if owner and not self.users[owner]:
            self.total -= self.bytes.pop(owner)


def _meta(value: Value) -> torch.Tensor:
    return torch.empty(value.shape, dtype=torch.uint8, device="meta")


def _calls(program: Program, recomputed: bool) -> list[Instr]:
    found = []
    for instr in program.instrs():
        if instr.values() and instr.values()[0].name.startswith(RECOMPUTED) == recomputed:
            found.append(instr)
    return found


def _flops(instr: Instr, values: dict[str, Value]) -> int:
    """Multiplications and additions of the products in a call; all else is linear and small beside them."""
    shapes = [values[name].shape for name in instr.refs()]
    if instr.op in ATTENTION_PRODUCTS:
        first = 0 if instr.op in ("autosp.attention", "autosp.attention_rows") else 1
        q, k = shapes[first], shapes[first + 1]
        scoring = dict(instr.kwargs)
        seen = k[2] // 2 if scoring.get("causal") else k[2]
        return ATTENTION_PRODUCTS[instr.op] * 2 * prod(q) * min(seen, scoring.get("window", seen))
    if instr.op in CONTRACTIONS:
        a, b = shapes[-2:]
        return 2 * prod(a) * b[-1]
    return 0
