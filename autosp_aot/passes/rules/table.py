"""Every sharding rule, one line an operator, sorted; whatever works element by element needs none."""

from dataclasses import dataclass
from functools import lru_cache

from autosp_aot.passes.rules import attention, contractions, random, views
from autosp_aot.passes.rules.contractions import notation, reduction, whole_dim
from autosp_aot.passes.rules.pointwise import pointwise
from autosp_aot.passes.rules.spec import Spec
from autosp_aot.program import Instr, Ref, Value, map_args

RULES = {
    "aten._log_softmax.default": whole_dim(1, operands=1),
    "aten._log_softmax_backward_data.default": whole_dim(2, operands=2),
    "aten._softmax.default": whole_dim(1, operands=1),
    "aten._softmax_backward_data.default": whole_dim(2, operands=2),
    "aten.addmm.default": contractions.addmm,
    "aten.amax.default": reduction(sums=False, linear=False),
    "aten.arange.start_step": views.arange,
    "aten.bmm.default": notation("bik,bkj->bij", linear=((0,), (1,)), contraction=True),
    "aten.cat.default": views.cat,
    "aten.constant_pad_nd.default": views.pad,
    "aten.embedding.default": contractions.embedding,
    "aten.embedding_dense_backward.default": contractions.embedding_backward,
    "aten.expand.default": views.expand,
    "aten.full.default": views.factory(0),
    "aten.logsumexp.default": reduction(sums=False, linear=False),
    "aten.mean.dim": reduction(sums=False, linear=True),
    "aten.mm.default": notation("ik,kj->ij", linear=((0,), (1,)), contraction=True),
    "aten.native_layer_norm.default": contractions.layer_norm,
    "aten.native_layer_norm_backward.default": contractions.layer_norm_backward,
    "aten.new_zeros.default": views.factory(1),
    "aten.nll_loss_backward.default": contractions.nll_loss_backward,
    "aten.nll_loss_forward.default": contractions.nll_loss,
    "aten.ones.default": views.factory(0),
    "aten.permute.default": views.permute,
    "aten.reshape.default": views.reshape,
    "aten.slice.Tensor": views.slice_,
    "aten.slice_backward.default": views.slice_backward,
    "aten.sum.default": reduction(sums=True, linear=True),
    "aten.sum.dim_IntList": reduction(sums=True, linear=True),
    "aten.zeros.default": views.factory(0),
    "autosp.attention": attention.attention,
    "autosp.attention_backward": attention.attention_backward,
    "autosp.attention_rows": attention.attention,
    "autosp.attention_rows_backward": attention.attention_backward,
    "autosp.uniform": random.uniform,
}


@dataclass(frozen=True)
class Call:
    """An instruction with the whole shapes of what it reads and writes, as a rule sees it."""

    instr: Instr
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    ranks: int

    @property
    def results_by_position(self) -> tuple[bool, ...]:
        return tuple(out is not None for out in self.instr.outs)


def spec_of(instr: Instr, operands: list[Value], ranks: int) -> Spec | None:
    """The rule of a call over whole shapes; None for an operator that has none (it computes replicated)."""
    anonymous = tuple(Value("", v.dtype, v.shape) for v in operands)
    outs = tuple(out and Value("", out.dtype, out.shape) for out in instr.outs)
    bare = Instr(outs, instr.op, map_args(instr.args, _blank), map_args(instr.kwargs, _blank))
    return _spec(bare, anonymous, ranks)


def _blank(leaf):
    return Ref("") if isinstance(leaf, Ref) else leaf


@lru_cache(maxsize=4096)
def _spec(instr: Instr, operands: tuple[Value, ...], ranks: int) -> Spec | None:
    call = Call(instr, operands, tuple(instr.values()), ranks)
    return RULES.get(instr.op, pointwise)(call)
