"""autograd.Functions of the user: captured with their own backward, or refused."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tests.export.test_joint import eager, run


class Model(nn.Module):
    """Each test has its own function between the embedding and the head."""

    def __init__(self, inner=lambda x, model: x):
        super().__init__()
        self.embedding, self.head, self.inner = nn.Embedding(8, 4), nn.Linear(4, 8), inner
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, tokens, labels):
        x = self.inner(self.embedding(tokens) + self.weight, self)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class TwoTimesThree(Function):
    """Multiplies by two, and its gradient by three."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class Parts(Function):
    """Two results, an argument that is no tensor, saved tensors, and a write to a tensor of its own."""

    @staticmethod
    def forward(ctx, scale, x, y):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        z = x.clone()
        z.mul_(scale)
        return z * y, z.sum()

    @staticmethod
    def backward(ctx, grad, grad_sum):
        x, y = ctx.saved_tensors
        return None, grad * y * ctx.scale + 5 * grad_sum, (grad * x).sum((0, 1))


class SetUp(Function):
    """Its context is set up apart."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] * 7


class Outer(Function):
    """Applies another in forward, and gives an argument back."""

    @staticmethod
    def forward(ctx, x):
        return TwoTimesThree.apply(x) + 1, x

    @staticmethod
    def backward(ctx, grad, grad_x):
        return TwoTimesThree.apply(grad) - grad_x


FACTOR = torch.tensor(0.5)


class Scales(Function):
    """Reads a tensor that no step changes, in forward and in backward."""

    @staticmethod
    def forward(ctx, x):
        return x * FACTOR

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + FACTOR)


class Own(TwoTimesThree):
    """Has an apply of its own."""

    @classmethod
    def apply(cls, x):
        return super().apply(x + 1)


two_times_three = TwoTimesThree.apply


class ReadsBackward(Function):
    """Its backward reads a parameter that it did not save."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.model.weight, None


def parts(x, model):
    y, total = Parts.apply(3, x, model.weight)
    return y + total


INNER = {
    "an apply of its own": lambda x, model: Own.apply(x),
    "checkpointed": lambda x, model: checkpoint(two_times_three, x, use_reentrant=False),
    "constants": lambda x, model: Scales.apply(x),
    "in autocast": lambda x, model: in_autocast(x),
    "nested": lambda x, model: sum(Outer.apply(x)),
    "parts": parts,
    "reads a parameter": lambda x, model: ReadsBackward.apply(x, model),
    "set up": lambda x, model: SetUp.apply(SetUp.apply(x)),
    "under another name": lambda x, model: two_times_three(x),
    "two times three": lambda x, model: TwoTimesThree.apply(TwoTimesThree.apply(x)),
}


def in_autocast(x):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return TwoTimesThree.apply(x @ x.new_ones(4, 4)).float()


@pytest.mark.parametrize("name", sorted(INNER))
def test_loss_and_gradients_are_bitwise_eager_s(captured, batch, name):
    torch.manual_seed(0)
    model = Model(INNER[name])
    found, expected = run(captured(model), model, batch), eager(model, batch)
    assert found.keys() == expected.keys()
    for label, tensor in expected.items():
        assert torch.equal(found[label], tensor), label


class ReadsForward(Function):
    @staticmethod
    def forward(ctx, x, model):
        return x * model.weight

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Writes(Function):
    @staticmethod
    def forward(ctx, x, model):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3, None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (ReadsForward, "reads a tensor that is not its argument"),
        (Writes, "writes to its arguments"),
    ],
)
def test_one_that_is_no_function_of_its_tensors_is_refused_with_its_line(refusal, function, why):
    def inner(x, model):
        return function.apply(x, model)

    assert refusal(Model(inner)) == (
        f"error[custom-gradient]: the autograd.Function {function.__name__} {why}\n"
        f"  where  test_functions.py:{inner.__code__.co_firstlineno + 1}\n"
        "  why    its backward cannot be captured as a function of tensors\n"
        "  fix    give it every tensor as an argument, save those it needs, and write to none"
    )


class ReadsOther(Function):
    @staticmethod
    def forward(ctx, x, other):
        ctx.other = other
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.other[0], None


@pytest.mark.parametrize("other", [lambda model: torch.ones(4), lambda model: 2 * model.weight], ids=["new", "made"])
@pytest.mark.filterwarnings("ignore:Error detected in ReadsOtherBackward")
def test_a_backward_that_reads_what_was_not_saved_is_refused_with_its_line(refusal, other):
    inner = lambda x, model: ReadsOther.apply(x, [other(model)])  # noqa: E731
    assert refusal(Model(inner)) == (
        "error[custom-gradient]: the autograd.Function ReadsOther is given a tensor inside of an argument\n"
        f"  where  test_functions.py:{inner.__code__.co_firstlineno}\n"
        "  why    its backward cannot be captured as a function of tensors\n"
        "  fix    give it every tensor as an argument, save those it needs, and write to none"
    )


def test_afterwards_functions_apply_as_before(captured):
    before = Function.apply.__func__.__code__
    captured(Model(INNER["two times three"]))
    assert Function.apply.__func__.__code__ is before
