import pytest
import torch

from autosp_aot.ir.score_expr import NODES, check, evaluate

CAUSAL = ("aten.where.ScalarOther", ("aten.le.Tensor", "k", "q"), "s", float("-inf"))


def nested(depth: int):
    return "s" if depth == 0 else ("aten.neg.default", nested(depth - 1))


ALLOWED = CAUSAL, "s", ("aten.add.Tensor", "s", "v1"), ("cast", "f32", ("constant", "b8", True))


@pytest.mark.parametrize("score", ALLOWED)
def test_expressions_of_elementwise_operators_are_allowed(score):
    check(score, 2)


@pytest.mark.parametrize(("score", "why"), [
    (("aten.add.Tensor", "s", "v2"), "no leaf 'v2'"),
    (("aten.add_.Tensor", "s", "q"), "is no part of a score expression"),
    (("aten.sum.default", "s"), "is no part of a score expression"),
    (("aten.rand_like.default", "s"), "is no part of a score expression"),
    (("os.system.default", "s"), "is no part of a score expression"),
    (("aten.masked_fill.Tensor", "s", "v0", "v1"), "is no part of a score expression"),  # its value has no dims
    (("aten.floor_divide.default", "s", "v0"), "is no part of a score expression"),  # it has no derivative
    (("constant", "f99", 0.0), "is no part of a score expression"),
    (("cast", "f99", "s"), "is no part of a score expression"),
    ((), "is no part of a score expression"),
    (nested(NODES + 1), f"more than {NODES} parts"),
])  # fmt: skip
def test_all_else_is_refused(score, why):
    with pytest.raises(ValueError, match=why):
        check(score, 2)


def test_an_expression_is_evaluated_over_what_its_leaves_are():
    leaves = {"s": torch.ones(1, 1, 2, 2), "q": torch.arange(2).view(1, 1, 2, 1), "k": torch.arange(2).view(1, 1, 1, 2)}
    assert evaluate(CAUSAL, leaves).flatten().tolist() == [1, float("-inf"), 1, 1]
    assert evaluate(("constant", "f64", 2.5), leaves).dtype is torch.float64
    assert evaluate(("cast", "i32", "s"), leaves).dtype is torch.int32
