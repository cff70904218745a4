"""Arguments of a call as a kernel demands them: what a program does by instructions, for calls without one."""

from autosp_aot.ir.structure.moves import in_order
from autosp_aot.ops.table import OURS


def laid_out(op: str, args: tuple, keywords: dict, target: str = "cpu") -> tuple:
    """The positional arguments, copied where they do not lie as the kernel of `target` reads them."""
    found = list(args)
    for at, demand in OURS[op].unmet(args, keywords, target).items():
        found[at] = in_order(args[at], demand.order)
    return tuple(found)
