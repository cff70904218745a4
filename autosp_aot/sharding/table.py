"""Every sharding rule, one line an operator, sorted; whatever works element by element needs none."""

from dataclasses import dataclass
from functools import lru_cache

from autosp_aot.ir.program import Instr, Ref, Value, map_args
from autosp_aot.sharding import attention, contractions, convolutions, experts, lookups, random, views
from autosp_aot.sharding.contractions import notation, plus_product, reduction, whole_dim
from autosp_aot.sharding.pointwise import pointwise
from autosp_aot.sharding.scans import along, over_places
from autosp_aot.sharding.spec import Spec

RULES = {
    "aten._log_softmax.default": whole_dim(1, operands=1),
    "aten._log_softmax_backward_data.default": whole_dim(2, operands=2),
    "aten._softmax.default": whole_dim(1, operands=1),
    "aten._softmax_backward_data.default": whole_dim(2, operands=2),
    "aten.addmm.default": plus_product("iK", "Kj", "ij"),
    "aten.amax.default": reduction(sums=False, linear=False),
    "aten.amin.default": reduction(sums=False, linear=False),
    "aten.arange.start_step": views.arange,
    "aten.argmax.default": reduction(sums=False, linear=False),
    "aten.argmin.default": reduction(sums=False, linear=False),
    "aten.avg_pool2d.default": over_places(2, linear=True),
    "aten.avg_pool2d_backward.default": over_places(2, linear=True),
    "aten.baddbmm.default": plus_product("biK", "bKj", "bij"),
    "aten.bmm.default": notation("bik,bkj->bij", linear=((0,), (1,)), contraction=True),
    "aten.bucketize.Tensor": lookups.among,
    "aten.cat.default": views.cat,
    "aten.constant_pad_nd.default": views.pad,
    "aten.convolution.default": convolutions.convolution,
    "aten.convolution_backward.default": convolutions.convolution_backward,
    "aten.cummax.default": along(1),
    "aten.cummin.default": along(1),
    "aten.cumprod.default": along(1),
    "aten.cumsum.default": along(1, linear=True),
    "aten.dot.default": notation("i,i->", linear=((0,), (1,))),
    "aten.embedding.default": contractions.embedding,
    "aten.embedding_dense_backward.default": contractions.embedding_backward,
    "aten.expand.default": views.expand,
    "aten.flip.default": along(1, linear=True),
    "aten.full.default": views.factory(0),
    "aten.gather.default": lookups.gather,
    "aten.histc.default": experts.histc,
    "aten.index.Tensor": lookups.index,
    "aten.index_put.default": lookups.index_put,
    "aten.isin.Tensor_Tensor": lookups.among,
    "aten.kthvalue.default": along(2, default=-1),
    "aten.linalg_solve_triangular.default": contractions.triangular_solve,
    "aten.logcumsumexp.default": along(1),
    "aten.logsumexp.default": reduction(sums=False, linear=False),
    "aten.max.dim": along(1),
    "aten.max_pool2d_with_indices.default": over_places(2),
    "aten.max_pool2d_with_indices_backward.default": over_places(2, linear=True),
    "aten.median.dim": along(1),
    "aten.min.dim": along(1),
    "aten.mm.default": notation("ik,kj->ij", linear=((0,), (1,)), contraction=True),
    "aten.mode.default": along(1, default=-1),
    "aten.mv.default": notation("ik,k->i", linear=((0,), (1,)), contraction=True),
    "aten.native_layer_norm.default": contractions.layer_norm,
    "aten.native_layer_norm_backward.default": contractions.layer_norm_backward,
    "aten.nll_loss_backward.default": contractions.nll_loss_backward,
    "aten.nll_loss_forward.default": contractions.nll_loss,
    "aten.ones.default": views.factory(0),
    "aten.permute.default": views.permute,
    "aten.prod.default": reduction(sums=False, linear=False),
    "aten.prod.dim_int": reduction(sums=False, linear=False),
    "aten.reflection_pad1d.default": over_places(1, linear=True),
    "aten.reflection_pad1d_backward.default": over_places(1, linear=True),
    "aten.replication_pad1d.default": over_places(1, linear=True),
    "aten.replication_pad1d_backward.default": over_places(1, linear=True),
    "aten.reshape.default": views.reshape,
    "aten.roll.default": along(2, linear=True),
    "aten.scatter.src": lookups.scatter(linear=True),
    "aten.scatter.value": lookups.scatter(linear=False),
    "aten.scatter_add.default": lookups.scatter(linear=True),
    "aten.scatter_reduce.two": lookups.scatter(linear=False),
    "aten.searchsorted.Tensor": lookups.among,
    "aten.slice.Tensor": views.slice_,
    "aten.slice_backward.default": views.slice_backward,
    "aten.slice_scatter.default": views.slice_scatter,
    "aten.sort.default": along(1, default=-1),
    "aten.sort.stable": along(1, default=-1),
    "aten.sum.default": reduction(sums=True, linear=True),
    "aten.sum.dim_IntList": reduction(sums=True, linear=True),
    "aten.topk.default": along(2, default=-1),
    "aten.tril.default": views.triangle,
    "aten.triu.default": views.triangle,
    "aten.unfold.default": along(1, linear=True),
    "aten.zeros.default": views.factory(0),
    "autosp.attention": attention.attention,
    "autosp.attention_backward": attention.attention_backward,
    "autosp.attention_rows": attention.attention,
    "autosp.attention_rows_backward": attention.attention_backward,
    "autosp.attention_rows_vector_gradient": attention.vector_gradient,
    "autosp.attention_vector_gradient": attention.vector_gradient,
    "autosp.expert_mm": experts.expert_mm,
    "autosp.expert_mm_weight_grad": experts.expert_mm_weight_grad,
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
