import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout

from autosp_aot.errors import BuildError
from autosp_aot.export.diagnose import refuse_other_gradients
from autosp_aot.export.watch import refuse_hooks


@torch.library.custom_op("autosp_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)
LIBRARY = torch.library.Library("autosp_test", "FRAGMENT")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", torch.clone, "CPU")


class Model(nn.Module):
    """Each test has its own module between the embedding and the head."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)
        self.inner = inner

    def forward(self, tokens, labels):
        x = self.inner(self.embedding(tokens), labels)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def line(inner: type[nn.Module], offset: int = 1) -> str:
    """A line in the body of forward."""
    return f"test_diagnose.py:{inner.forward.__code__.co_firstlineno + offset}"


FORWARD = line(Model, 0)


class Data(nn.Module):
    def forward(self, x, labels):
        return x.data * 2


def test_a_tensor_read_with_data_is_refused(refusal):
    assert refusal(Model(Data())) == (
        "error[data-dependent]: a computed tensor becomes a constant\n"
        f"  where  {line(Data)}\n"
        "  why    torch.export does not follow a tensor read with .data\n"
        "  fix    use .detach() instead of .data"
    )


class Known(nn.Module):
    def forward(self, x, labels):
        x = doubled(x)
        x = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        with torch.no_grad():
            y = doubled(x)
        return x + y


class Opaque(nn.Module):
    def forward(self, x, labels):
        return torch.ops.autosp_test.opaque(x)


UNKNOWN = """\
error[operator-unknown]: {name} is not an operator we can see into
  where  {line}
  why    its effect on a part of the sequence is unknown
  fix    write it with torch operators"""


def test_custom_and_control_flow_operators_are_refused_all_at_once(refusal):
    named = {1: "autosp_test.doubled.default", 2: "cond", 4: "autosp_test.doubled.default"}
    assert refusal(Model(Known())) == "\n".join(
        UNKNOWN.format(name=name, line=line(Known, offset)) for offset, name in named.items()
    )


def test_an_operator_without_fake_implementation_is_refused(refusal):
    assert refusal(Model(Opaque())) == UNKNOWN.format(name="autosp_test.opaque.default", line=line(Opaque))


class Misshapen(nn.Module):
    def forward(self, x, labels):
        return x.view(2, 17)


class Mistaken(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens).sum()


def test_what_torch_cannot_do_is_said_with_the_models_line(refusal):
    assert refusal(Model(Misshapen())) == (
        "error[capture-failed]: the step cannot be captured\n"
        f"  where  {line(Misshapen)}\n"
        "  why    RuntimeError: shape '[2, 17]' is invalid for input of size 32\n"
        "  fix    correct that line; if forward(**example_batch) runs in Python, write it with torch operators"
    )


def test_an_input_that_forward_does_not_take_is_said_with_the_line_of_forward(refusal):
    assert refusal(Mistaken(8, 4)) == (
        "error[capture-failed]: the step cannot be captured\n"
        f"  where  {line(Mistaken, 0)}\n"
        "  why    TypeError: Mistaken.forward() got an unexpected keyword argument 'labels'\n"
        "  fix    correct that line; if forward(**example_batch) runs in Python, write it with torch operators"
    )


class Random(nn.Module):
    def forward(self, x, labels):
        x = dropout(x, 0.5)
        x = x[:, torch.randperm(4)]
        return x * torch.multinomial(labels.float(), 1)[..., None] + torch.empty(4).geometric_(0.5)


RANDOM = """\
error[random-operator]: {name} draws random numbers
  where  {line}
  why    the draws would have to be the same at every number of ranks
  fix    draw with dropout, bernoulli, rand, randn, uniform, normal, exponential or randint"""


def test_draws_that_have_no_lowering_are_refused_all_at_once(refusal):
    named = [("aten.randperm.default", 2), ("aten.multinomial.default", 3), ("aten.geometric.default", 3)]
    assert refusal(Model(Random())) == "\n".join(
        RANDOM.format(name=name, line=line(Random, offset)) for name, offset in named
    )


class Generator(nn.Module):
    def forward(self, x, labels):
        generator = torch.Generator().manual_seed(0)
        return x * torch.rand(4, generator=generator)


def test_a_draw_from_a_generator_is_refused(refusal):
    assert refusal(Model(Generator())) == (
        "error[random-operator]: aten.rand.generator draws from a generator of its own\n"
        f"  where  {line(Generator, 2)}\n"
        "  why    its state outlives the step\n"
        "  fix    leave the generator out: draws follow from the run's seed and the number of the step"
    )


class Mutating(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x, labels):
        self.count += 1
        labels.masked_fill_(labels == 3, -100)
        return self.norm(x.mT).mT


CHANGED = """\
error[state-mutated]: the step changes {what}
  where  {line}
  why    state that outlives the step is not part of the program
  fix    {fix}"""
ANEW = "compute it anew in each step, or leave it out, as with track_running_stats=False in a batch norm"


def test_everything_the_step_writes_that_outlives_it_is_refused_at_once(refusal):
    named = {
        "buffer 'inner.count'": (1, ANEW),
        "batch 'labels'": (2, "change a copy of it, as in labels = labels.clone()"),
        "buffer 'inner.norm.num_batches_tracked'": (3, ANEW),
        "buffer 'inner.norm.running_mean'": (3, ANEW),
        "buffer 'inner.norm.running_var'": (3, ANEW),
    }
    assert refusal(Model(Mutating())) == "\n".join(
        CHANGED.format(what=what, line=line(Mutating, at), fix=fix) for what, (at, fix) in named.items()
    )


class WrittenAndForgotten(nn.Module):
    def forward(self, x, labels):
        y = x + 1
        y[:, 0] = 0
        return y.mul_(2)


def test_writes_that_end_with_the_step_are_captured(captured):
    assert captured(Model(WrittenAndForgotten())).outputs[:2] == ("loss", "grad.embedding.weight")


class Negated(nn.Module):
    def forward(self, x, labels):
        return -x


class Detached(nn.Module):
    def forward(self, x, labels):
        return x.detach()


class Inference(nn.Module):
    def forward(self, x, labels):
        with torch._C._InferenceMode(True):
            y = x * 1
        return y * 1


def test_a_parameter_that_eager_gives_no_gradient_has_none(captured):
    assert {label for label in captured(Model(Detached())).outputs if label} == {
        "loss",
        "grad.head.weight",
        "grad.head.bias",
    }


def test_a_gradient_that_eager_does_not_have_is_refused(refusal):
    assert refusal(Model(Inference())) == (
        "error[gradient-gained]: parameter 'embedding.weight' has no gradient in eager and one in the captured step\n"
        f"  where  {FORWARD}\n"
        "  why    capture does not see what keeps the gradient away\n"
        "  fix    use torch.no_grad() or .detach()"
    )


def test_every_gradient_that_eager_has_and_the_captured_step_lacks_is_refused(batch):
    model = Model(Negated())
    with pytest.raises(BuildError) as caught:
        refuse_other_gradients(model(**batch), model, {"head.weight"}, FORWARD)
    block = (
        "error[gradient-lost]: parameter '{}' has a gradient in eager and none in the captured step\n"
        f"  where  {FORWARD}\n"
        "  why    capture lost the way from the parameter to the loss\n"
        "  fix    compute the loss with torch operators on tensors"
    )
    assert str(caught.value) == block.format("embedding.weight") + "\n" + block.format("head.bias")


def test_hooks_on_parameters_are_refused():
    model = Model(Negated())
    model.head.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(BuildError, match=r"parameter 'head.weight' has a hook on a gradient"):
        refuse_hooks(model)
