"""What is known of an operator of our own: one record, which everything that treats operators reads.

    OwnOp("autosp.expert_mm", "autosp.expert_mm(ids, x, weight) -> y", expert_mm, workspace, rule, flops, traced)

ATen's operators have their schemas in torch and a line in `sharding/table.py`; `ops/table.py` answers for both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from autosp_aot.ir.structure.moves import in_order
from autosp_aot.sharding.call import Rule

Shape = tuple[int, ...]
FEW = 512  # bytes that a workspace counts for single numbers


@dataclass(frozen=True)
class OverHeads:
    """An attention over heads. Its last two arguments are the query heads of a key/value head, and its first head.

    Operand `query` is q, k and v follow. `over_rows` is the same over heads and query rows as one dim, for more ranks
    than heads; `of_keys` are the results that have no dim of query rows.
    """

    query: int
    over_rows: str
    of_keys: tuple[int, ...] = ()


@dataclass(frozen=True)
class Demand:
    """What a kernel takes the memory of an operand to be.

    holds     whether a tensor's is so
    order     the dims of a copy that is so, as they lie in memory, outermost first
    source    file and line of the kernel that says it
    """

    holds: Callable[[Tensor], bool]
    order: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class OwnOp:
    """An operator of our own.

    name           as programs call it, `autosp.<name>`
    signature      the arguments as programs give them; artifacts record it and are refused where it has changed
    kernel         its results on tensors of any device
    workspace      (arguments on meta tensors, target=) -> results with the strides that the kernel makes, and the bytes
                   that it needs beside them at most
    rule           its sharding rule; None where `derive` knows the operator itself
    flops          (shapes of its tensor operands, keyword arguments) -> FLOPs of its products; None where it does none
    traced         the kernel in ATen's operators whatever the values, as torch.export needs it; None: the kernel itself
    quadratic      whether its work grows with the square of the sequence: the forward pass is cut between these
    gradient       of a quadratic operator, the one that makes the gradients of its operands
    over_heads     of an attention over heads, what else is known of it
    site           where the number of a drawing operator's stream is: the place or the name of the argument
    makes_memory   whether it makes a tensor of none, so has to be told the device
    demands        (arguments, target=) -> what its kernels take the memory of operands to be, by their names
    """

    name: str
    signature: str
    kernel: Callable
    workspace: Callable[..., tuple[list[Tensor], int]]
    rule: Rule | None
    flops: Callable[[list[Shape], Mapping], int] | None = None
    traced: Callable | None = None
    quadratic: bool = False
    gradient: str = ""
    over_heads: OverHeads | None = None
    site: int | str | None = None
    makes_memory: bool = False
    demands: Callable[..., Mapping[str, Demand]] | None = None

    @property
    def arguments(self) -> dict[str, bool]:
        """The names of its arguments in order, and whether each is given by its place; others are by keyword."""
        said = self.signature.partition("(")[2].partition(")")[0].split(", ")
        return {name.partition("=")[0]: "=" not in name for name in said}

    def unmet(self, args: Sequence, keywords: Mapping, target: str) -> dict[int, Demand]:
        """The demands that do not hold of a call with positional `args`, by the operand's place among them."""
        if self.demands is None:
            return {}
        places = {name: at for at, name in enumerate(self.arguments)}
        found = {places[name]: demand for name, demand in self.demands(*args, target=target, **keywords).items()}
        return {at: demand for at, demand in found.items() if not demand.holds(args[at])}

    def laid_out(self, args: Sequence, keywords: Mapping, target: str) -> list:
        """The positional `args` of a call, copied where they do not lie as is demanded."""
        demands = self.unmet(args, keywords, target)
        return [in_order(arg, demands[at].order) if at in demands else arg for at, arg in enumerate(args)]
