"""One step for one device becomes one step for all ranks: every value placed, every move of data written out.

    q: [B, N, S, D]                        q: [B, N, S/P, D] @ Shard(2)
    out, lse = attention(q, k, v)    ->    q.all_to_all: [B, N/P, S, D] @ Shard(1) = all_to_all(q)
                                           out, lse @ Shard(1) = attention(q.all_to_all, ...)

In graph order each call takes the strategy with the least cost: bytes the worst rank must receive for its operands, and
to bring its results home; then the worst rank's work. Ties go to the first candidate; home comes first. Gathering a
value to compute the same on every rank is the last resort, however small it is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import ClassVar

from autosp_aot.artifact.manifest import Fallback
from autosp_aot.errors import BuildError, Problem
from autosp_aot.ir.placement import PARTIAL, REPLICATE, Placement, covers, local_shape
from autosp_aot.ir.program import ITEMSIZE, Input, Instr, Program, Ref, Value, with_refs
from autosp_aot.ir.structure.moves import move_between
from autosp_aot.ir.transfers import received_bytes
from autosp_aot.ops.table import spec_of
from autosp_aot.passes.analysis.labels import Labels, find_labels
from autosp_aot.passes.analysis.partial_ok import summed_last
from autosp_aot.passes.decisions import decision_wrong
from autosp_aot.passes.step import Step
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Spec, Strategy, even_split

# What a byte that stays on the device, and a floating operation, cost in received bytes. They only break near ties:
# links are at least this much slower than memory and arithmetic on every device since the A100.
LOCAL_BYTE = 1 / 16
FLOP = 1 / 1024

FLOATS = ("f64", "f32", "bf16", "f16")


@dataclass(frozen=True)
class Candidate:
    """A strategy for a call: where it places operands and results, and what it costs.

    `gathers` says that nothing is cut though data has to come first: the last resort. `received_bytes` are the worst
    rank's, for the operands; `home_bytes` to reshard the results home; `work` is local, in bytes received.
    """

    strategy: Strategy
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    gathers: bool
    received_bytes: int
    home_bytes: int
    work: float

    @property
    def price(self) -> tuple[bool, float]:
        return self.gathers, self.received_bytes + self.home_bytes + self.work


@dataclass(frozen=True)
class Partition:
    """Partitions the step for `ranks` ranks; `decisions`, of an earlier build of it, are taken instead of choosing.

    Raises ArtifactError (`decision-wrong`) for decisions that the step does not allow, and BuildError where it is
    `strict` and an operator has no rule.
    """

    ranks: int
    decisions: Mapping[str, Strategy] | None = None
    strict: bool = False
    name: ClassVar[str] = "partition"

    def __call__(self, step: Step) -> Step:
        labels = find_labels(step.whole, step.sequence_dims, self.ranks)
        found = _Partition(step.whole, labels, self.ranks, self.decisions)
        program = found.run()
        if self.strict and found.fallbacks:
            raise BuildError(*dict.fromkeys(map(_refused, found.fallbacks)))
        return replace(
            step, program=program, labels=labels, decisions=found.decisions, fallbacks=tuple(found.fallbacks)
        )


def _refused(fallback: Fallback) -> Problem:
    return Problem(
        "operator-without-rule",
        f"{fallback.op} would be computed on every rank, gathering {fallback.gathered_bytes} bytes",
        fallback.source,
        "it has no sharding rule, and --strict was given",
        "use another operator, or build without --strict",
    )


@dataclass(frozen=True)
class Weighed:
    """A call's candidates, cheapest first, and chosen strategy; `spec` is its rule (None: it has none).

    `small` says that it is token ids, labels or positions, for which nothing but the whole is considered.
    """

    spec: Spec | None
    small: bool
    choices: tuple[Candidate, ...]
    taken: Candidate
    labels: Labels


def weigh(
    program: Program, sequence_dims: Mapping[str, int], ranks: int, decisions: Mapping[str, Strategy], name: str
) -> Weighed:
    """What the call that makes `name` could have been given, where all calls before it took `decisions`.

    Raises ArtifactError (`decision-wrong`) for decisions that this program does not allow.
    """
    state = _Partition(program, find_labels(program, sequence_dims, ranks), ranks, decisions)
    for instr in program.sections[0].instrs:
        if any(out.name == name for out in instr.values()):
            return state.weighed(instr)
        state.place(instr)
    raise AssertionError(f"nothing makes {name}")


class _Partition:
    def __init__(self, program: Program, labels: Labels, ranks: int, replay: Mapping[str, Strategy] | None):
        self.program, self.labels, self.ranks, self.replay = program, labels, ranks, replay
        self.whole = program.values()
        self.versions = {entry.value.name: {REPLICATE: entry.value.name} for entry in program.inputs}
        self.instrs: list[Instr] = []
        self.taken: Counter[str] = Counter()
        self.decisions: dict[str, Strategy] = {}
        self.fallbacks: list[Fallback] = []
        self.summed_last = summed_last(program, ranks)
        self.small = 2 * max((prod(e.value.sizes) for e in program.inputs if e.kind == "batch"), default=0)

    def run(self) -> Program:
        (step,) = self.program.sections
        for instr in step.instrs:
            self.place(instr)
        wrong = [name for name, strategy in (self.replay or {}).items() if self.decisions.get(name) != strategy]
        if wrong:
            raise decision_wrong(wrong[0], "no call of the step records that")
        gives = tuple((label, self.given(label, name)) for label, name in step.gives)
        inputs = tuple(Input(entry.kind, entry.value) for entry in self.program.inputs)
        return Program(self.ranks, inputs, (replace(step, instrs=tuple(self.instrs), gives=gives),))

    def given(self, label: str, name: str) -> str:
        """A result of the step: whole on every rank, or (gradients, summed later) a partial sum."""
        versions = self.versions[name]
        if label != "loss" and PARTIAL in versions and REPLICATE not in versions:
            return versions[PARTIAL]
        return self.bring(name, REPLICATE, self.program.sections[0].instrs[-1])

    def place(self, instr: Instr) -> None:
        spec = self.spec(instr)
        choice = self.fall_back(instr) if spec is None else self.choose(instr, spec)
        strategy, operands = choice.strategy, choice.operands
        brought = [self.bring(name, placement, instr) for name, placement in zip(instr.refs(), operands)]
        outs = self.local_outs(instr, choice.results)
        args = with_refs(instr, brought)
        if spec is not None and spec.localize is not None and strategy.factor is not None:
            shapes = [self.local(self.whole[n], p).shape for n, p in zip(instr.refs(), operands)]
            local = Local(strategy, shapes, [out.shape for out in outs if out is not None])
            args = replace(args, args=spec.localize(args.args, local))
        self.instrs.append(replace(args, outs=outs))
        for out in outs:
            if out is not None:
                self.versions[out.name] = {out.placement: out.name}
        if strategy != Strategy():
            self.decisions[instr.values()[0].name] = strategy

    def spec(self, instr: Instr) -> Spec | None:
        return spec_of(instr, [self.whole[name] for name in instr.refs()], self.ranks)

    def fall_back(self, instr: Instr) -> Candidate:
        """No rule: operands whole, computed on every rank."""
        gathered = sum(self.price(name, REPLICATE) for name in instr.refs())
        if self.ranks > 1 and instr.refs():
            self.fallbacks.append(Fallback(instr.op, instr.where.source, gathered))
        operands, results = (tuple(REPLICATE for _ in values) for values in (instr.refs(), instr.values()))
        return Candidate(Strategy(), operands, results, gathered > 0, gathered, 0, 0.0)

    def choose(self, instr: Instr, spec: Spec) -> Candidate:
        """The cheapest, or the one that was given; what cuts nothing but has to gather only where there is no other."""
        if self.replay is None:
            return min(self.choices(instr, spec), key=lambda choice: choice.price)
        name = instr.values()[0].name
        strategy = self.replay.get(name, Strategy())
        found = list(self.allowed(instr, spec, [strategy])) if _fits(strategy, spec, self.ranks) else []
        if not found:
            raise decision_wrong(name, "the sharding rule does not allow it here")
        return found[0]

    def weighed(self, instr: Instr) -> Weighed:
        spec = self.spec(instr)
        if spec is None:
            taken = self.fall_back(instr)
            return Weighed(None, False, (taken,), taken, self.labels)
        found = sorted(self.choices(instr, spec), key=lambda choice: choice.price)
        return Weighed(spec, self.is_small(instr), tuple(found), self.choose(instr, spec), self.labels)

    def choices(self, instr: Instr, spec: Spec) -> list[Candidate]:
        """All that is allowed of: home, where the operands are now, what the rule proposes, everything whole.

        Each also for partial sums. Where home or what is now cannot be, or nothing is free, and the rule proposes
        nothing: every factor in even shares too.
        """
        if self.ranks == 1 or self.is_small(instr):
            return list(self.allowed(instr, spec, [Strategy()]))
        names = [*instr.refs(), *(out.name for out in instr.values())]
        tensors = list(zip(names, (*spec.operands, *spec.results)))
        near = [spec.strategy_of(dims, home) for name, dims in tensors if (home := self.labels.home(name))]
        held = ((dims, p) for name, dims in zip(names, spec.operands) for p in self.versions[name] if p.cut)
        near += [spec.strategy_of(*cut) for cut in held]
        proposed = [Strategy(factor, bounds) for factor, bounds in spec.splits]
        cuts = dict.fromkeys(cut for cut in (*near, *proposed, Strategy()) if cut is not None)
        partial = [at for at in spec.linear if all(self.is_partial(instr.refs()[i]) for i in at)]
        found = list(self.allowed(instr, spec, [replace(cut, partial=at) for at in [(), *partial] for cut in cuts]))
        cannot_be = any(cut is None or cut.factor in spec.whole for cut in near)
        free = not near or any(not choice.received_bytes + choice.home_bytes for choice in found)
        if not proposed and (cannot_be or not free):
            splits = ((factor, even_split(extent, self.ranks)) for factor, extent in enumerate(spec.extents))
            even = [Strategy(factor, cut) for factor, cut in splits if cut and factor not in spec.whole]
            found += self.allowed(instr, spec, [split for split in even if split not in cuts])
        return found

    def allowed(self, instr: Instr, spec: Spec, strategies: list[Strategy]) -> Iterator[Candidate]:
        """Those of the strategies that the rule allows and the operands can have, with what they cost."""
        for strategy in strategies:
            placed = spec.instantiate(strategy)
            if placed is not None and self.reachable(instr, placed[0]):
                yield self.priced(instr, spec, strategy, *placed)

    def is_small(self, instr: Instr) -> bool:
        """Token ids, labels, positions and what follows from them alone: whole on every rank, whatever shifts them."""
        if any(out.dtype in FLOATS or prod(out.sizes) > self.small for out in instr.values()):
            return False
        return all(REPLICATE in self.versions[name] for name in instr.refs())

    def is_partial(self, name: str) -> bool:
        return any(placement.partial for placement in self.versions[name])

    def reachable(self, instr: Instr, operands: tuple[Placement, ...]) -> bool:
        """A partial sum cannot be made, only kept."""
        return all(not p.partial or p in self.versions[name] for name, p in zip(instr.refs(), operands))

    def priced(self, instr: Instr, spec: Spec, strategy: Strategy, operands, results) -> Candidate:
        received = sum(self.price(name, placement) for name, placement in dict.fromkeys(zip(instr.refs(), operands)))
        home_bytes, touched = 0, 0
        for out, placement in zip(instr.values(), results):
            home = self.labels.home(out.name)
            if home is None and placement == PARTIAL and out.name not in self.summed_last:
                home_bytes += prod(out.sizes) * ITEMSIZE[out.dtype] * (self.ranks - 1) // self.ranks
            if home not in (None, placement) and not placement.replicated:
                home_bytes += _moved(placement, home, out.shape, out.dtype, self.ranks)
                touched += _largest(out.shape, out.dtype, placement, self.ranks)
        read = zip((self.whole[name] for name in instr.refs()), operands)
        touched += sum(_largest(value.shape, value.dtype, placement, self.ranks) for value, placement in read)
        touched += sum(_largest(out.shape, out.dtype, p, self.ranks) for out, p in zip(instr.values(), results))
        flops = 0.0
        if spec.contraction:
            share = 1.0
            if strategy.factor is not None:
                longest = max(hi - lo for lo, hi in strategy.bounds) * strategy.outer
                share = longest / max(spec.extents[strategy.factor], 1)
            flops = 2.0 * prod(spec.extents) * share
        gathers = strategy.factor is None and received > 0
        work = touched * LOCAL_BYTE + flops * FLOP
        return Candidate(strategy, operands, results, gathers, received, home_bytes, work)

    def price(self, name: str, placement: Placement) -> int:
        return self.source(name, placement)[0]

    def source(self, name: str, placement: Placement) -> tuple[int, Placement]:
        """The cheapest way to a placement: bytes received, and the version to go from."""
        value = self.whole[name]
        best = None
        for version in self.versions[name]:
            if version == placement:
                return 0, version
            if placement.partial:
                continue
            price = _moved(version, placement, value.shape, value.dtype, self.ranks)
            if best is None or price < best[0]:
                best = price, version
        assert best is not None
        return best

    def bring(self, name: str, placement: Placement, instr: Instr) -> str:
        """The name of a value at a placement, moving it there if need be."""
        versions = self.versions[name]
        if placement in versions:
            return versions[placement]
        _, source = self.source(name, placement)
        op = move_between(source, placement)
        value = self.whole[name]
        moved = replace(self.local(value, placement), name=self.fresh(f"{name}.{op}"))
        self.instrs.append(Instr((moved,), op, (Ref(versions[source]),), (), instr.where))
        versions[placement] = moved.name
        return moved.name

    def fresh(self, name: str) -> str:
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name}.{self.taken[name] - 1}"

    def local_outs(self, instr: Instr, results: tuple[Placement, ...]) -> tuple[Value | None, ...]:
        placements = iter(results)
        return tuple(None if out is None else self.local(out, next(placements)) for out in instr.outs)

    def local(self, value: Value, placement: Placement) -> Value:
        return replace(value, shape=Local.shape(value.shape, placement, self.ranks), placement=placement)


def _fits(strategy: Strategy, spec: Spec, ranks: int) -> bool:
    """The rule has that factor, and the intervals of all ranks cover it."""
    if strategy.factor is None:
        return True
    if strategy.factor >= len(spec.extents) or len(strategy.bounds) != ranks:
        return False
    return covers(strategy.bounds, spec.extents[strategy.factor] // strategy.outer)


@cache
def _moved(source: Placement, target: Placement, shape: tuple[int, ...], dtype: str, ranks: int) -> int:
    return received_bytes(source, target, shape, ITEMSIZE[dtype], ranks)


@cache
def _largest(shape: tuple[int, ...], dtype: str, placement: Placement, ranks: int) -> int:
    """Bytes of the largest box."""
    return max(prod(local_shape(shape, placement, rank)) for rank in range(ranks)) * ITEMSIZE[dtype]
