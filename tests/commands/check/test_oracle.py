"""Steps of eager find what capture gets wrong, without the checks of capture: each of them is switched off here."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosp_aot.commands.build import eager_check
from autosp_aot.commands.build.builder import build
from autosp_aot.commands.check import oracle
from autosp_aot.commands.check.oracle import Built, compare
from autosp_aot.errors import BuildError
from autosp_aot.export import evaluation, joint
from autosp_aot.export.state import _Steps
from autosp_aot.ops.attention import contract
from tests import mutants
from tests.steps import half_labelled

V, H, N = 64, 16, 4
BATCH = half_labelled(9)


class Model(nn.Module):
    """Each test has its own `inner` between the embedding and the head."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(V, H), self.made(), nn.Linear(H, V)

    def made(self) -> nn.Module:
        return Inner()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.inner(self.tokens(input_ids))).flatten(0, 1), labels.flatten())


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.steps, self.memory, self.seen = nn.Linear(H, H), 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Memory(Inner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x if self.memory is None else x + self.memory)
        self.memory = x[:, -1:].detach()
        return x


class Count(Inner):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.linear(x) * min(1.0, self.steps / 10)


class Growing(Inner):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean())
        return self.linear(x) + torch.stack(self.seen).mean()


class Closing(Inner):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((H,), 1.5))
        self.scaled = lambda x: x * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.linear(x))


class Compiling(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(x, approximate="tanh" if torch.compiler.is_compiling() else "none"))


class HeadsOutside(Inner):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv1d(H, 3 * H, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.mT).unflatten(1, (3 * N, -1)).mT.chunk(3, 1)
        return self.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).mT.flatten(1, 2).mT)


class Viewing(Inner):
    """An attribute that lies in a weight: a constant, and stale from the second step on."""

    def __init__(self):
        super().__init__()
        self.transposed = None

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.transposed


def of(inner: type[nn.Module], dtype=torch.float64) -> Model:
    torch.manual_seed(0)
    model = type("Of", (Model,), {"made": lambda self: inner()})().to(dtype)
    if inner is Viewing:
        model.inner.transposed = model.inner.linear.weight.data.t()
    return model


def tied(dtype=torch.float64) -> Model:
    model = of(Inner, dtype)
    model.head.weight.data = model.tokens.weight.data
    return model


def first_step_only(subject):
    """Capture's own run of forward, once."""
    steps = _Steps(subject)
    return steps.step()[0], steps.model, None


OFF = {
    "state": lambda patch: [patch.setattr(part, "refuse_state", first_step_only) for part in (joint, evaluation)],
    "sharing": lambda patch: patch.setattr(joint, "refuse_shared", lambda model: None),
    "flags": lambda patch: patch.setattr(joint, "eager_flags", contextlib.nullcontext),
    "dense": lambda patch: patch.setattr(contract, "_readable", lambda tensor, alignment_bytes: True),
}  # fmt: skip


@pytest.mark.parametrize(("off", "make"), [
    ("state", lambda: of(Memory)), ("state", lambda: of(Count)), ("state", lambda: of(Growing)),
    ("sharing", tied), ("sharing", lambda: of(Viewing)),
    ("flags", lambda: of(Compiling)), ("dense", lambda: of(HeadsOutside)),
    ("state", lambda: of(Memory, torch.bfloat16)), ("sharing", lambda: tied(torch.bfloat16)),
    ("state", lambda: of(Count, torch.float32)), ("flags", lambda: of(Compiling, torch.float32)),
])  # fmt: skip
def test_eager_finds_what_capture_gets_wrong(monkeypatch, off, make):
    OFF[off](monkeypatch)
    with pytest.raises(BuildError) as caught:
        build(make(), BATCH, 1, target="cpu")
    assert {problem.code for problem in caught.value.problems} == {"differs-from-eager"}


class Detached(Closing):
    """What a copy of `Closing` would be whose function went on seeing the original."""

    def __init__(self):
        super().__init__()
        self.scaled = lambda x: x * self.gain.detach()


def test_a_parameter_that_lost_its_gradient_is_found():
    artifact = build(of(Detached), BATCH, 1, target="cpu")
    built = Built(artifact.whole, [artifact.program], None, artifact.buffers)
    outcome = compare(of(Closing), BATCH, built)
    assert outcome.beyond == {"grad.inner.gain": pytest.approx(1)} and outcome.module == "inner"


@pytest.mark.parametrize(("limit", "factor", "found"), [(1e-7, 1.0, False), (1e-6, 1 + 1e-5, True)])
def test_what_is_somewhat_beyond_its_limit_in_fp32_is_judged_in_fp64(monkeypatch, limit, factor, found):
    """Rounding beyond the limit is gone in fp64; an attention scale that is a little off is not."""
    monkeypatch.setitem(oracle.LIMITS, ("f32",), limit)
    monkeypatch.setattr(oracle, "_perturbed_step", lambda *_: {})
    asked = []
    judge = oracle._same_in_fp64
    monkeypatch.setattr(oracle, "_same_in_fp64", lambda *given: asked.append(judge(*given)) or asked[-1])
    scaled = mutants.option(lambda instr: instr.op == "autosp.attention", "scale", lambda scale: scale * factor)
    built = eager_check._built
    planted = lambda artifact: built(replace(artifact, program=scaled(artifact.program)))  # noqa: E731
    monkeypatch.setattr(eager_check, "_built", planted)
    with pytest.raises(BuildError, match="differs-from-eager") if found else contextlib.nullcontext():
        build(of(HeadsOutside, torch.float32), BATCH, 2, target="cpu", evaluation=False)
    assert asked and asked[0] is not found


def test_fp64_does_not_forgive_a_buffer_that_steps_change(monkeypatch):
    """From the second step on eager has another buffer than the programs, by little more than rounding."""

    class Creeping(Inner):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if type(x) is Tensor and self.training and not torch.compiler.is_compiling():
                x.register_hook(lambda grad: (self.scale.mul_(1 + 4e-5), None)[1])
            return self.linear(x) * self.scale

    with pytest.raises(BuildError, match="differs-from-eager"):
        build(of(Creeping, torch.float32), BATCH, 2, target="cpu", evaluation=False)


def test_a_difference_is_named_with_the_module_where_it_first_shows(monkeypatch):
    OFF["flags"](monkeypatch)
    model = of(Compiling)
    with pytest.raises(BuildError) as caught:
        build(model, BATCH, 1, target="cpu")
    (problem,) = caught.value.problems
    assert problem.where == f"step 1, first in inner.linear (linear.py:{nn.Linear.forward.__code__.co_firstlineno})"
    assert problem.why.count("\n") == 4 and "at most 1e-12 is rounding" in problem.why


class Logging(Inner):
    """Keeps what it saw, for a log."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean())
        self.last = x.detach()
        return self.linear(x)


def test_the_module_is_left_as_it_was():
    model = of(Logging).eval()
    model.head.train()
    model.head.weight.grad = torch.ones(V, H, dtype=torch.float64)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    build(model, BATCH, 1, target="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.inner.seen == [] and not hasattr(model.inner, "last")
    assert model.head.weight.grad.sum() == V * H and model.tokens.weight.grad is None
    assert model.head.training and not model.inner.training


@pytest.mark.parametrize("inner", [Inner, Closing, Compiling, HeadsOutside])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_captured_right_is_like_eager(inner, dtype):
    artifact = build(of(inner, dtype), BATCH, 2, target="cpu")
    assert artifact.manifest.compared == "2 steps of SGD, 9 positions, 2 ranks"


class Dropping(Inner):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.linear(x), 0.3) + torch.randn_like(x)
        x = x + torch.rand(H).exponential_() + torch.randint(2, 5, (H,))
        q = F.alpha_dropout(x, 0.2).unflatten(-1, (N, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.4, is_causal=True).transpose(1, 2).flatten(2)


def test_what_draws_is_compared_with_nothing_drawn():
    artifact = build(of(Dropping), BATCH, 2, target="cpu")
    assert artifact.manifest.compared == "2 steps of SGD, 9 positions, 2 ranks, dropout off"


def test_a_model_that_fails_in_eager_is_refused_with_its_line():
    class Failing(Inner):
        def forward(self, x: Tensor) -> Tensor:
            return Backwards.apply(self.linear(x))

    with pytest.raises(BuildError) as caught:
        build(of(Failing), BATCH, 1, target="cpu")
    place = Backwards.backward.__code__.co_firstlineno
    assert str(caught.value).startswith("error[") and f"test_oracle.py:{place + 2}" in str(caught.value)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("not today")


def test_a_large_step_is_compared_at_a_short_length(monkeypatch):
    monkeypatch.setattr(eager_check, "FLOPS_LIMIT", 10**6)
    artifact = build(of(Inner), half_labelled(256), 3, target="cpu")
    assert artifact.manifest.compared == "2 steps of SGD, 32 positions, 2 ranks"
    monkeypatch.setattr(eager_check, "FLOPS_LIMIT", 10**4)
    artifact = build(of(Inner), half_labelled(256), 3, target="cpu")
    assert artifact.manifest.compared.startswith("nothing: a step of 32 positions takes ")


def test_nothing_is_compared_that_nobody_asked_for():
    assert build(of(Inner), BATCH, 1, target="cpu", eager_check=False).manifest.compared.startswith("nothing: ")
