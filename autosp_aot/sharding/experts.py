"""Products of rows with experts, and counts of rows."""

from autosp_aot.sharding.contractions import LETTERS, notation
from autosp_aot.sharding.spec import Spec, from_notation

# Cost looks at what moves: counting every expert's products for every row would let work outweigh it.
expert_mm = notation("t,tk,Ekn->tn", linear=((1,), (2,)))
expert_mm_weight_grad = notation("t,tk,tn->Ekn", linear=((1,), (2,)))


def histc(call) -> Spec | None:
    """Counts add up, where the bins do not depend on the data."""
    if len(call.instr.args) < 4 or not call.instr.args[2] < call.instr.args[3]:
        return None
    shape = call.operands[0].shape
    return from_notation(f"{LETTERS[: len(shape)]}->Z", [shape], [call.results[0].shape])
