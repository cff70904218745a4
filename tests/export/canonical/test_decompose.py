"""Each decomposition against its operator: values and gradients in fp64 and bf16, and no larger values on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_aot.export.canonical.decompose import DECOMPOSITIONS

aten = torch.ops.aten
B, S, H = 3, 12, 8


def _targets(x: Tensor) -> Tensor:
    return (x.detach().flip(0) * 0.5 + 0.1).sigmoid()


def _labels(*shape: int) -> Tensor:
    labels = torch.arange(B * S).view(B, S) * 5 % H
    labels[0, :4] = -100
    return labels if not shape else labels.view(shape)


def _classes_first(**options):
    return lambda x: F.cross_entropy(x.transpose(1, 2), _labels(), **options)


def _put(x: Tensor) -> Tensor:
    return aten.index_put(x, [x.detach() > 0.5], x.new_full((), 0.25))


def _stat(x: Tensor, at: int) -> Tensor:
    """A vector of positive numbers, as running statistics and weights are."""
    return torch.linspace(0.5 + 0.1 * at, 1.5, H, dtype=x.dtype)


def _running(x: Tensor) -> Tensor:
    stats = [_stat(x, at) for at in range(4)]
    return aten._native_batch_norm_legit_no_training(x.flatten(0, 1), *stats, 0.1, 1e-5)[0]


def _running_legit(x: Tensor) -> Tensor:
    stats = [_stat(x, at) for at in range(4)]
    return aten._native_batch_norm_legit(x.flatten(0, 1), *stats, False, 0.1, 1e-5)[0]


def _convolution(x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 4 * H * 3, dtype=x.dtype).view(4 * H, 1, 3)
    return F.conv1d(x.transpose(1, 2), weight, _stat(x, 1).repeat(4), 1, 2, 1, H)


def _zeros(x: Tensor) -> Tensor:
    """Whatever was in the memory of x: 0 * x would be NaN for some of it."""
    return torch.zeros_like(x)


def _weighted(x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, _targets(x), _stat(x, 1), pos_weight=_stat(x, 2))


CASES = {
    "all": lambda x: x * (x > 0).all(1, keepdim=True),
    "all of all": lambda x: x * (x > -9).all(),
    "all over dims": lambda x: x * aten.all.dims(x > 0, [0, 2], True),
    "amax over dims": lambda x: x.amax((1, 2)),
    "amin over dims": lambda x: x.amin((0, 2), keepdim=True),
    "aminmax": lambda x: torch.cat(torch.aminmax(x, dim=2)),
    "any": lambda x: x * (x > 1).any(1, keepdim=True),
    "any of all": lambda x: x * (x > 1).any(),
    "any over dims": lambda x: x * aten.any.dims(x > 1, [0, 2], True),
    "batch norm": lambda x: x + aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0],
    "batch norm, running": _running,
    "batch norm, running, as captured": _running_legit,
    "binary": lambda x: F.binary_cross_entropy(x.sigmoid(), _targets(x)),
    "binary of logits": lambda x: F.binary_cross_entropy_with_logits(x, _targets(x)),
    "binary of logits, weighted": _weighted,
    "classes first": _classes_first(),
    "classes first, each": _classes_first(reduction="none"),
    "classes first, smoothed": _classes_first(label_smoothing=0.1),
    "convolution": _convolution,
    "count": lambda x: x / x.count_nonzero((1,))[:, None],
    "count of all": lambda x: x / x.count_nonzero(),
    "eye": lambda x: x @ torch.eye(H, dtype=x.dtype) + x @ torch.eye(H, H, dtype=x.dtype),
    "fill": lambda x: aten.fill.Tensor(x, x[0, 0, 0]) * x,
    "glu": lambda x: F.glu(x, 2),
    "group norm": lambda x: x + F.group_norm(x.transpose(1, 2), 2, _stat(x, 1), _stat(x, 2)).transpose(1, 2),
    "huber": lambda x: F.huber_loss(x, _targets(x), delta=0.3),
    "huber of each": lambda x: F.huber_loss(x, _targets(x), delta=0.3, reduction="none"),
    "index add": lambda x: x.index_add(1, torch.tensor([0, 3, 3]), x[:, :3], alpha=2),
    "index select": lambda x: x.index_select(2, torch.tensor([1, 1, 5])),
    "linspace": lambda x: x * torch.linspace(-1, 1, H, dtype=x.dtype),
    "logsigmoid": F.logsigmoid,
    "max": lambda x: x.max(),
    "mean": lambda x: x.mean(1),
    "mean of all": lambda x: x.mean(),
    "min": lambda x: x.min(),
    "mse": lambda x: F.mse_loss(x, _targets(x)),
    "unsafe index": lambda x: aten._unsafe_index(x, [None, torch.tensor([3, 3, 0])]),
    "new": lambda x: x * x.new_zeros(H) + x.new_ones(H),
    "new, empty": lambda x: x + _zeros(x.new_empty(H)) + _zeros(x.new_empty_strided((H,), (1,))),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=2),
    "norm of all": lambda x: x.norm(),
    "norm 1": lambda x: torch.norm(x, 1, dim=1),
    "old norm": lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]),
    "pad by less than nothing": lambda x: F.pad(x, (-1, 2, 1, -3)),
    "put": _put,
    "repeat": lambda x: x.repeat(2, 1, 3),
    "select scatter": lambda x: x.select_scatter(x[:, 0] * 2, 1, -1),
    "smooth l1": lambda x: F.smooth_l1_loss(x, _targets(x), beta=0.3),
    "soft margin": lambda x: F.soft_margin_loss(x, _targets(x)),
    "softmax of classes first": lambda x: x.log_softmax(1),
    "std": lambda x: x.std(2),
    "unfold": lambda x: x.unfold(1, 4, 1) * 2,
    "unfold of images": lambda x: F.unfold(x[:, None], (3, 1), padding=(1, 0)),
    "var": lambda x: x.var(1, correction=0),
    "var of all": lambda x: x.var(),
    "var and mean": lambda x: torch.cat(torch.var_mean(x, 2)),
}  # fmt: skip


def _step(function):
    """Values, and gradients of a sum in which every value counts differently."""

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = function(x)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
        return out, torch.autograd.grad((out * weights).sum(), x)[0]

    return step


def _input(dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.bfloat16).to(dtype).requires_grad_()


def _traced(name: str, dtype: torch.dtype, table: dict):
    return make_fx(_step(CASES[name]), decomposition_table=table)(_input(dtype))


def _error(found, reference) -> float:
    """The worst difference of the values and of the gradient, each against its norm."""
    pairs = zip(found, reference)
    return max(_relative(a.detach().double(), b.detach().double()) for a, b in pairs)


def _relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", sorted(CASES))
def test_values_and_gradients_are_the_operator_s(name):
    graph = _traced(name, torch.float64, DECOMPOSITIONS)
    assert _error(graph(_input(torch.float64)), _step(CASES[name])(_input(torch.float64))) <= 1e-14


@pytest.mark.parametrize("name", sorted(CASES))
def test_bf16_is_as_near_as_the_operator_s_own(name):
    wide = _step(CASES[name])(_input(torch.float32))
    own = _error(_step(CASES[name])(_input(torch.bfloat16)), wide)
    assert _error(_traced(name, torch.bfloat16, DECOMPOSITIONS)(_input(torch.bfloat16)), wide) <= 2 * own


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_value_has_more_elements_than_the_operator_s(name):
    largest = [
        max(n.meta["val"].numel() for n in _traced(name, torch.float32, table).graph.nodes if _is_tensor(n))
        for table in (DECOMPOSITIONS, {})
    ]
    assert largest[0] <= largest[1]


def _is_tensor(node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def test_every_decomposition_has_a_case_and_only_those_that_choose_are_left():
    before, after = (
        {n.target for name in CASES for n in _traced(name, torch.float64, table).graph.nodes}
        for table in ({}, DECOMPOSITIONS)
    )
    assert {str(op) for op in DECOMPOSITIONS if op not in before} == set()
    partly = {
        aten._log_softmax.default, aten._log_softmax_backward_data.default, aten.amax.default, aten.amin.default,
        aten.constant_pad_nd.default, aten.convolution.default, aten.convolution_backward.default,
        aten.index_put.default,
    }  # fmt: skip
    assert {str(op) for op in DECOMPOSITIONS if op in after} == set(map(str, partly))
