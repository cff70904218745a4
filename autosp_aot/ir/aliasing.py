"""Which values may lie in one memory, so that none is written into while another is read.

    %a = aten.mm.default(...)           memory of its own
    %v = aten.permute.default(%a, ..)   that of %a: torch says that results of this operator may be views
    %s = shard(%v)                      that of %a: where a rank keeps all it has, nothing is copied

More is taken to be shared than is: a reshape that copies shares too. What lies in an input is never written into.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import torch
from torch._C import DispatchKey

from autosp_aot.ir.operators import OWN, overload
from autosp_aot.ir.program import Instr
from autosp_aot.ir.structure.table import TILES

KERNELS = (DispatchKey.CPU, DispatchKey.CompositeExplicitAutograd)
# These give views that torch does not say are some.
UNSAID = ("aten::_unsafe_view", "aten::lift", "aten::unsafe_split", "aten::unsafe_split_with_sizes")


class Aliases:
    """The values alive at a place of a program, by what made the memories they may lie in."""

    def __init__(self, inputs: Iterable[str]):
        self.roots = {name: frozenset((name,)) for name in inputs}
        self.inputs = set(self.roots)
        self.names: Counter[str] = Counter()

    def copy(self) -> "Aliases":
        """One that goes on from here on its own."""
        other = Aliases(self.inputs)
        other.roots, other.names = dict(self.roots), Counter(self.names)
        return other

    def make(self, instr: Instr) -> None:
        """Know the results of `instr`."""
        shared = frozenset().union(*(self.roots[name] for name in _shared(instr)))
        for out in instr.values():
            self.roots[out.name] = shared or frozenset((out.name,))
            self.names.update(self.roots[out.name])

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self.names.subtract(self.roots[name])

    def ends(self, instr: Instr, name: str, released: Iterable[str]) -> bool:
        """Whether operand `name` of `instr`, once `released` are gone, leaves memory that nothing else lies in.

        Nor does the instruction read it under another name.
        """
        own = self.roots[name]
        ending = Counter(root for other in released for root in self.roots.get(other, ()))
        read = {other for other in instr.refs() if other != name and own & self.roots[other]}
        return not read and all(root not in self.inputs and self.names[root] == ending[root] for root in own)


def _shared(instr: Instr) -> list[str]:
    """The operands that results of `instr` may be views of."""
    if instr.into is not None:
        return [instr.refs()[instr.into]]
    if instr.op.startswith(OWN) or instr.op == TILES:
        return []
    found = overload(instr.op)
    return [] if found is not None and _makes_memory(found) else instr.refs()


@cache
def _makes_memory(op: torch._ops.OpOverload) -> bool:
    """No result is said to be a view, and the operator is not made of others that may be."""
    own_kernel = any(map(op.has_kernel_for_dispatch_key, KERNELS)) and op._schema.name not in UNSAID
    return own_kernel and all(result.alias_info is None for result in op._schema.returns)
