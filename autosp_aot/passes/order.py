"""Instruction scheduling for peak memory.

    %g = mm(%big.t, %x)                 %y = mul(%big, 2)          each goes
    %y = mul(%big, 2)            ->     %g = mm(%big.t, %x)        up to where its operands are, if more dies with it
    %s = cos(%p)                        ...                        than it makes (products for weights),
    ...                                 %s = cos(%p)               down to its first reader, if it makes more (what is
    %z = mul(%y, %s)                    %z = mul(%y, %s)           recomputed)

Over the instructions that it passes, a move raises the most that is alive nowhere, and lowers the sum, or at the peak
the most: the peak never rises. Collectives and copies keep their order; a view stands before its first reader.

Method: list scheduling by what an instruction leaves alive (Sethi and Ullman 1970, J. ACM 17(4); best for trees: Liu
1987, SIAM J. Alg. Disc. Meth. 8(3)) as local search from the given order, since for graphs it is NP-hard.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import Instr, Program, values_of
from autosp_aot.ir.structure.table import copies, meets
from autosp_aot.memory.costs import Storages, heaviest
from autosp_aot.passes.inplace import writable
from autosp_aot.passes.step import Step

# How far an instruction is moved at once, in instructions: several layers' parts between two collectives.
REACH = 200
ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Node:
    """An instruction to be placed: the storages that end with the last node that uses them, those it makes among them.

    `takes` are storages that its result may be written into where they end with it, `after` the nodes it reads from,
    `work_bytes` what it needs while it runs. A node that is `fixed` stays; others may pass it.
    """

    uses: tuple[str, ...]
    made_bytes: int = 0
    takes: tuple[str, ...] = ()
    after: tuple[int, ...] = ()
    work_bytes: int = 0
    fixed: bool = False


@dataclass(frozen=True)
class Order:
    """Reorders every section, with the memory that kernels of `target` need."""

    target: str
    name: ClassVar[str] = "order"

    def __call__(self, step: Step) -> Step:
        return step.with_program(order(step.program, self.target))


def order(program: Program, target: str) -> Program:
    """The program with each section's instructions in an order with a lower peak; it has no `free` yet."""
    storages = Storages(program, heaviest(program), target)
    needed = [{name for _, name in section.gives}.union(section.takes) for section in program.sections]
    sections = []
    for at, section in enumerate(program.sections):
        lasting = {name for _, name in section.gives}.union(*needed[at + 1 :])
        sections.append(replace(section, instrs=_ordered(section.instrs, lasting, storages)))
    return replace(program, sections=tuple(sections))


def _ordered(instrs: tuple[Instr, ...], lasting: Collection[str], storages: Storages) -> tuple[Instr, ...]:
    """The instructions of a section or body, after which the values of `lasting` are still needed."""
    moments, whole = [], []
    for instr in instrs:
        if instr.body is not None:
            tile = storages.inside(instr, instr.body, values_of(instr.body.instrs), 0)
            inside = _ordered(instr.body.instrs, instr.body.gives, tile)
            instr = replace(instr, body=replace(instr.body, instrs=inside))
        whole.append(instr)
        moments.append(storages.step(instr, ""))
    owner = storages.owner
    stay = {""}.union(owner[name] for name in lasting if name in owner)
    nodes: list[Node] = []
    node_of: list[int | None] = []
    maker: dict[str, int] = {}
    for instr, moment in zip(whole, moments):
        refs, outs = instr.refs(), [out.name for out in instr.values()]
        made = [name for name in outs if owner[name] == name]
        after = tuple(dict.fromkeys(maker[name] for name in refs if name in maker))
        if instr.op.startswith("aten.") and not made:
            node_of.append(None)
            maker.update((name, node) for node in after for name in outs)
            continue
        node_of.append(len(nodes))
        maker |= dict.fromkeys(outs, len(nodes))
        uses = tuple(dict.fromkeys(owner[name] for name in (*refs, *made) if owner[name] not in stay))
        made_bytes = sum(storages.bytes[name] for name in made)
        takes = tuple(owner[refs[at]] for at in writable(instr, storages.tensors))
        fixed = meets(instr.op) or copies(instr.op)
        nodes.append(Node(uses, made_bytes, takes, after, moment.peak_bytes - moment.alive_bytes, fixed))
    places = schedule(nodes, storages.bytes)
    made_at = {name: places[node] for name, node in maker.items()}
    return _in_order(whole, [None if node is None else places[node] for node in node_of], made_at)


def schedule(nodes: Sequence[Node], sizes: Mapping[str, int]) -> list[int]:
    """The place of each node in an order with a peak no higher than that of the given one; `sizes` are in bytes."""
    found = _Schedule(nodes, sizes)
    for _ in range(ROUNDS):
        if not found.improve():
            break
    return found.places


class _Schedule:
    def __init__(self, nodes: Sequence[Node], sizes: Mapping[str, int]):
        self.nodes, self.sizes = nodes, sizes
        self.readers: list[list[int]] = [[] for _ in nodes]
        self.last: dict[str, int] = {}
        for at, node in enumerate(nodes):
            for earlier in node.after:
                self.readers[earlier].append(at)
            self.last.update((storage, at) for storage in node.uses)
        self.order, self.places = list(range(len(nodes))), list(range(len(nodes)))

    def improve(self) -> bool:
        """Try to move every node once in each direction; whether any was."""
        curve, _ = self.curve(self.order, len(self.order))
        self.worst = self.order[curve.index(max(curve))] if curve else 0
        earlier = [self.earlier(node) for node in list(self.order)]
        later = [self.later(node) for node in reversed(list(self.order))]
        return any(earlier) or any(later)

    def left(self, node: int) -> int:
        """The bytes by which more is alive after the node than before."""
        uses, place = self.nodes[node].uses, self.places[node]
        return self.nodes[node].made_bytes - sum(self.sizes[s] for s in uses if self.last[s] == place)

    def earlier(self, node: int) -> bool:
        """Move the node to where its operands are, if less is alive after it and that is better."""
        place = self.places[node]
        first = max((self.places[other] + 1 for other in self.nodes[node].after), default=0)
        first = max(first, place - REACH)
        if first == place or self.nodes[node].fixed or self.left(node) >= 0:
            return False
        return self.replace(first, [node, *self.order[first:place]])

    def later(self, node: int) -> bool:
        """Move the node to before its first reader, if more is alive after it and that is better."""
        place = self.places[node]
        last = min((self.places[other] - 1 for other in self.readers[node]), default=len(self.order) - 1)
        last = min(last, place + REACH)
        if last == place or self.nodes[node].fixed or self.left(node) <= 0:
            return False
        return self.replace(place, [*self.order[place + 1 : last + 1], node])

    def replace(self, first: int, run: list[int]) -> bool:
        """Put `run` at place `first` instead of what stands there, if that is better."""
        end = first + len(run)
        (before, _), (after, ends) = self.curve(self.order[first:end], end), self.curve(run, end)
        lower = max(after) < max(before) and self.worst in run
        if max(after) > max(before) or sum(after) >= sum(before) and not lower:
            return False
        self.order[first:end] = run
        for at, node in enumerate(run, first):
            self.places[node] = at
        self.last |= {storage: first + at for storage, at in ends.items()}
        return True

    def curve(self, run: list[int], end: int) -> tuple[list[int], dict[str, int]]:
        """The most alive during each node of `run`, done up to place `end`, and what ends at which of them."""
        ends: dict[str, int] = {}
        for at, node in enumerate(run):
            ends.update((storage, at) for storage in self.nodes[node].uses if self.last[storage] < end)
        alive, most = 0, []
        for at, node in enumerate(run):
            gone = [storage for storage in self.nodes[node].uses if ends.get(storage) == at]
            taken = any(storage in gone for storage in self.nodes[node].takes)
            alive += self.nodes[node].made_bytes
            most.append(alive - taken * self.nodes[node].made_bytes + self.nodes[node].work_bytes)
            alive -= sum(self.sizes[storage] for storage in gone)
        return most, ends


def _in_order(instrs: Sequence[Instr], places: Sequence[int | None], made_at: dict[str, int]) -> tuple[Instr, ...]:
    """Nodes at their places; a view before the first that reads it, or after what it is a view of if nobody does."""
    keys: list[int] = []
    read_at: dict[str, int] = {}
    for instr, place in zip(reversed(instrs), reversed(places)):
        if place is None:
            readers = [read_at[out.name] for out in instr.values() if out.name in read_at]
            place = min(readers, default=max((made_at[name] for name in instr.refs() if name in made_at), default=0))
        keys.append(place)
        read_at.update((name, min(place, read_at.get(name, place))) for name in instr.refs())
    keys.reverse()
    return tuple(instrs[at] for at in sorted(range(len(instrs)), key=keys.__getitem__))
