from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from autosp_aot.export.joint import Joint
from autosp_aot.export.loss import LOSS, PARTS


class Model(nn.Module):
    """Tied embedding and head, a parameter that is never used, one that is frozen, and a buffer."""

    def __init__(self, give=lambda loss: loss):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.register_buffer("factor", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.give = give

    def forward(self, tokens, labels):
        x = self.embedding(tokens) * self.factor + self.frozen
        return self.give(cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


class Autocast(Model):
    def forward(self, tokens, labels):
        # With the cache, eager casts a weight once and adds the gradients of its uses in bf16; captured, in fp32.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            x = self.head(self.embedding(tokens)) @ self.head.weight
            with torch.autocast("cpu", enabled=False):
                x = x.float() @ self.embedding.weight.T
            return super().forward(tokens, labels) + cross_entropy(x.flatten(0, 1), labels.flatten())


class NoGrad(Model):
    def forward(self, tokens, labels):
        with torch.no_grad():
            scale = self.embedding(tokens).mean()
        return super().forward(tokens, labels) * scale


class NoGradInAutocast(Model):
    def forward(self, tokens, labels):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                scale = self.head(self.embedding(tokens)).mean()
            return super().forward(tokens, labels) * scale


def run(joint: Joint, model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """The captured graph on real tensors: its results by label."""
    given = {
        "parameter": dict(model.named_parameters()), "batch": batch,
        "buffer": dict(model.named_buffers()) | dict(joint.constants), "tangent": {"grad_loss": torch.ones(())},
    }  # fmt: skip
    values = [given[kind][name] for kind, name in joint.inputs]
    with torch.no_grad():
        results = torch.fx.Interpreter(joint.graph_module).run(*values, enable_io_processing=False)
    return {label: result for label, result in zip(joint.outputs, results) if label}


def eager(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    loss = model(**batch)
    loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("make", [Model, NoGrad, Autocast, NoGradInAutocast])
def test_the_captured_step_gives_bitwise_the_loss_and_gradients_of_eager(captured, batch, make):
    torch.manual_seed(0)
    model = make()
    found, expected = run(captured(model), model, batch), eager(model, batch)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_tied_weights_are_one_parameter_and_unused_and_frozen_ones_have_no_gradient(captured):
    joint = captured(Model())
    assert [name for kind, name in joint.inputs if kind == "parameter"] == [
        "unused", "frozen", "embedding.weight", "head.bias",
    ]  # fmt: skip
    assert [label for label in joint.outputs if label] == ["loss", "grad.embedding.weight", "grad.head.bias"]


def test_capture_leaves_the_module_alone(captured):
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embedding.weight and not model.head.weight.is_meta


Output = namedtuple("Output", "loss logits")


@pytest.mark.parametrize(
    "give",
    [
        lambda loss: SimpleNamespace(loss=loss),
        lambda loss: {"logits": loss + 1, "loss": loss},
        lambda loss: (loss, loss + 1),
        lambda loss: [loss],
        lambda loss: Output(loss, loss + 1),
        lambda loss: (loss.expand(2, 3), loss),
        lambda loss: {"logits": loss.expand(2), "total": loss, "ids": loss.long()},
        lambda loss: SimpleNamespace(logits=None, total=loss),
        lambda loss: (loss.expand(2), {"deep": [loss]}),
    ],
)
def test_the_loss_is_found_in_what_forward_returns(captured, batch, give):
    torch.manual_seed(0)
    model = Model(give)
    model.give = lambda loss: loss
    plain = run(captured(model), model, batch)["loss"]
    model.give = give
    assert torch.equal(run(captured(model), model, batch)["loss"], plain)


FORWARD = f"test_joint.py:{Model.forward.__code__.co_firstlineno}"


@pytest.mark.parametrize(("give", "what", "fix"), [
    (lambda loss: None, "no floating scalar: NoneType()", LOSS),
    (lambda loss: (), "no floating scalar: tuple()", LOSS),
    (lambda loss: loss.expand(3), "no floating scalar: float32 [3]", PARTS),
    (lambda loss: loss.long(), "no floating scalar: int64 []", LOSS),
    (lambda loss: {"logits": loss[None]}, "no floating scalar: dict(float32 [1])", LOSS),
    (lambda loss: (loss[None], loss, loss + 1), "2 scalars, and calls none of them loss", LOSS),
    (lambda loss: {"loss": loss[None], "other": loss}, "as its loss float32 [1]", PARTS),
    (lambda loss: SimpleNamespace(loss=None, other=loss), "as its loss NoneType()", LOSS),
])  # fmt: skip
def test_a_result_in_which_the_loss_is_not_clear_is_refused(refusal, give, what, fix):
    assert refusal(Model(give)) == (
        f"error[no-loss]: forward returns {what}\n"
        f"  where  {FORWARD}\n"
        "  why    training needs one number to differentiate\n"
        f"  fix    {fix}"
    )

