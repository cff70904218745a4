"""Which dims are the sequence: found by following the inputs' sequence dims through the rules, never by size.

    input_ids [B, S]  --embedding-->  [B, S, H]  --reshape-->  [B*S, H]      labels: dim 1;  dim 1;  dim 0 inside B
    arange(S) -> cos [1, S, D],  q [B, N, S, D] * cos                        the arange gets it back from q

A label is a place inside a dim: the dim has `outer * extent * inner` positions, `extent` of them along the sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from autosp_aot.ir.placement import Bounds, Cut, Placement, even_bounds, scale
from autosp_aot.ir.program import Program
from autosp_aot.ops.table import spec_of
from autosp_aot.sharding.spec import Dims, Spec


@dataclass(frozen=True, slots=True, order=True)
class Label:
    """The sequence inside a dim of `outer * extent * inner` positions."""

    dim: int
    outer: int
    extent: int
    inner: int


@dataclass(frozen=True)
class Labels:
    """The sequence labels of every value, and the shares of the sequence that make a value's home.

    `lengths` are those of the sequences: one, or a source's and a target's. With `tiles` every rank's share is cut into
    so many again.
    """

    lengths: tuple[int, ...]
    ranks: int
    by_value: dict[str, tuple[Label, ...]]
    tiles: int = 1

    def home(self, name: str) -> Placement | None:
        """A value's sequence shard; None where it does not carry the sequence."""
        labels = self.by_value.get(name)
        if not labels:
            return None
        label = labels[0]
        return Placement(Cut(label.dim, label.outer, scale(self.bounds(label.extent), label.inner)))

    def bounds(self, extent: int) -> Bounds:
        """Even shares. Of a dim a little longer or shorter than a sequence the last rank has the difference."""
        return _home_bounds(self.lengths, self.ranks, self.tiles, extent)


@lru_cache
def _home_bounds(lengths: tuple[int, ...], ranks: int, tiles: int, extent: int) -> Bounds:
    length = min(lengths, key=lambda length: abs(length - extent))
    if abs(extent - length) * ranks > length:
        return _cut_again(even_bounds(extent, ranks), tiles)
    clamped = [(min(lo, extent), min(hi, extent)) for lo, hi in _cut_again(even_bounds(length, ranks), tiles)]
    clamped[-1] = (clamped[-1][0], extent)
    return tuple(clamped)


def _cut_again(bounds: Bounds, tiles: int) -> Bounds:
    return tuple((lo + a, lo + b) for lo, hi in bounds for a, b in even_bounds(hi - lo, tiles))


def find_labels(program: Program, sequence_dims: Mapping[str, int], ranks: int) -> Labels:
    """Follow `sequence_dims` (input name -> dim) through a whole program until nothing changes."""
    values = program.values()
    found: dict[str, set[Label]] = {name: set() for name in values}
    lengths = {values[name].sizes[dim] for name, dim in sequence_dims.items()}
    for name, dim in sequence_dims.items():
        found[name].add(Label(dim, 1, values[name].sizes[dim], 1))
    calls = []
    for instr in program.instrs():
        spec = spec_of(instr, [values[name] for name in instr.refs()], ranks)
        if spec is not None:
            names = [*instr.refs(), *(out.name for out in instr.values())]
            calls.append((spec, list(zip(names, (*spec.operands, *spec.results)))))
    changed = True
    while changed:
        changed = False
        for order in (calls, calls[::-1]):
            for spec, tensors in order:
                changed |= _spread(spec, tensors, found)
    return Labels(_apart(lengths), ranks, {name: tuple(sorted(labels)) for name, labels in found.items() if labels})


def _apart(lengths: set[int]) -> tuple[int, ...]:
    """The lengths, longest first, without those that are a longer one less up to an eighth: a part of the same."""
    kept: list[int] = []
    for length in sorted(lengths, reverse=True):
        if all(8 * (longer - length) > longer for longer in kept):
            kept.append(length)
    return tuple(kept)


def _spread(spec: Spec, tensors: list[tuple[str, Dims]], found: dict[str, set[Label]]) -> bool:
    """Give every tensor of a call the labels that the others have on shared factors; True if any is new."""
    if not any(found[name] for name, _ in tensors):
        return False
    inside = {place for name, dims in tensors for label in found[name] if (place := _in_factor(spec, dims, label))}
    for a, b in (*spec.follows, *(pair[::-1] for pair in spec.follows)):
        if (a, 1, spec.extents[a], 1) in inside:
            inside.add((b, 1, spec.extents[b], 1))
    changed = False
    for name, dims in tensors:
        for factor, outer, extent, inner in inside:
            label = _in_tensor(spec, dims, factor, outer, extent, inner)
            if label is not None and label not in found[name] and not _within(label, found[name]):
                found[name].add(label)
                changed = True
    return changed


def _within(label: Label, known: set[Label]) -> bool:
    """One dim carries the sequence once."""
    return any(other.dim == label.dim for other in known)


def _in_factor(spec: Spec, dims: Dims, label: Label) -> tuple[int, int, int, int] | None:
    """A tensor's label as a place inside one factor: (factor, outer, extent, inner)."""
    before, size = 1, label.outer * label.extent * label.inner
    if not size:
        return None
    for at, axis in enumerate(dims[label.dim], 1):
        extent = spec.size(axis)
        after = size // before // extent
        divides = axis.group == 1 and label.outer % before == 0 and label.inner % after == 0
        if divides and (label.outer // before < extent or at == len(dims[label.dim])):
            if axis.size is None:
                return axis.factor, label.outer // before, label.extent, label.inner // after
            if label.outer == before and label.inner == after:
                return axis.factor, 1, spec.extents[axis.factor], 1
        before *= extent
    return None


def _in_tensor(spec: Spec, dims: Dims, factor: int, outer: int, extent: int, inner: int) -> Label | None:
    for dim, axes in enumerate(dims):
        before = 1
        for at, axis in enumerate(axes):
            if axis.factor == factor and axis.group == 1:
                after = 1
                for later in axes[at + 1 :]:
                    after *= spec.size(later)
                if axis.size is None:
                    return Label(dim, before * outer, extent, inner * after)
                if outer == inner == 1 and extent == spec.extents[factor]:
                    return Label(dim, before, axis.size, after)
            before *= spec.size(axis)
    return None
