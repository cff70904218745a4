"""The loss's gradient with the loss: exact for any tangent, in the tiles that make the logits, refused where wrong."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model, model_values
from autosp_aot.commands.check.random_inputs import made_up
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.program import Program, Ref
from autosp_aot.ir.verify import verify
from autosp_aot.proof.derive import derive
from autosp_aot.runtime.simulate import simulate
from examples import plain
from tests.eager import difference, eager
from tests.edits import edit, named
from tests.steps import equal_to_eager

DIMS = {"input_ids": 1, "labels": 1}
TINY = dict(vocab_size=64, hidden_size=8, layers=1, heads=2, kv_heads=1, max_length=16, dtype="float64")


def built(ranks: int = 2, **options):
    torch.manual_seed(0)
    return compile_model(plain.build_model(**TINY), plain.example_batch(2, 13), DIMS, BuildConfig(ranks, **options), "")


def early(program: Program) -> list[str]:
    return [entry.value.name for entry in program.inputs if entry.kind == "guess"]


@pytest.fixture(scope="module")
def by_ranks():
    return {ranks: built(ranks, tile=3) for ranks in (1, 2, 3)}


@pytest.fixture
def sliced(by_ranks):
    return by_ranks[2]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tangent, guess", [(1.0, 1.0), (3.0, 1.0), (0.7, 0.3), (-2.0, 4.0)])
def test_gradients_follow_the_tangent_whatever_was_guessed(by_ranks, ranks, tangent, guess):
    torch.manual_seed(0)
    model, artifact = plain.build_model(**TINY), by_ranks[ranks]
    assert early(artifact.program) == ["early.grad_loss"]
    batch = {name: made_up(artifact.whole)[name] for name in DIMS}
    loss, gradients = eager(model, batch)
    programs = [artifact.program.for_rank(rank) for rank in range(ranks)]
    numbers = [torch.tensor(number, dtype=loss.dtype) for number in (tangent, guess)]
    for result in simulate(programs, model_values(model) | artifact.buffers | batch, *numbers):
        found = {name.removeprefix("grad."): g for name, g in result.items() if name != "loss"}
        wanted = {name: tangent * g for name, g in gradients.items()}
        assert difference((loss, wanted), result["loss"], found) <= 1e-12


def test_backward_reads_no_logits(sliced):
    """Nothing with an element a class is alive after forward but the weight and its gradient."""
    taken = [sliced.program.values()[name] for name in sliced.program.section("backward").takes]
    assert [value.name for value in taken if 64 in value.shape] == ["early.grad.head.mm"]
    assert not [i for i in sliced.program.section("backward").instrs for out in i.values() if "softmax" in out.name]


def test_logits_are_made_once_in_tiles(sliced):
    loops = [i for i in sliced.program.section("forward").instrs if i.op == "tiles"]
    calls = [inner.op for loop in loops for inner in loop.body.instrs]
    assert calls.count("aten._log_softmax.default") == calls.count("aten._log_softmax_backward_data.default") == 1


@pytest.mark.parametrize("options", [dict(tile="off"), dict(tile="auto")])
def test_a_small_loss_stays_where_it_is(options):
    assert early(built(**options).program) == []


class Saturated(nn.Module):
    """A loss whose gradient does not scale with the tangent: it is clamped on the way."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 64, bias=False)

    def forward(self, x, labels):
        logits = Clamped.apply(self.head(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.01, 0.01)


def test_what_is_not_homogeneous_is_left_in_backward():
    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 13, 8, dtype=torch.float64), "labels": torch.randint(64, (2, 13))}
    compiled = equal_to_eager(Saturated().double(), batch, 2, tile=3)
    assert early(compiled.program) == []


RESCALE = named("autosp.rescale")


@pytest.mark.parametrize("change, said", [
    (lambda i: [replace(i, args=(i.args[0], i.args[2], i.args[1]))], "cannot be rescaled"),
    (lambda i: [replace(i, args=(i.args[0], i.args[1], i.args[1]))], "cannot be rescaled"),
    (lambda i: [i, *_again(i)], "cannot be rescaled"),
    (lambda i: [replace(i, op="aten.mul.Tensor", args=i.args[:2])], "has no aten.mul.Tensor that makes"),
])  # fmt: skip
def test_a_wrong_rescaling_is_refused(sliced, change, said):
    program = edit(sliced.program, RESCALE, change)
    with pytest.raises(ArtifactError, match=said):
        verify(program)
        derive(program, sliced.whole)


def _again(instr):
    (out,) = instr.outs
    return [replace(instr, outs=(replace(out, name=f"{out.name}.again"),), args=(Ref(out.name), *instr.args[1:]))]


def test_an_early_gradient_given_as_it_is_is_refused(sliced):
    backward, sums = sliced.program.section("backward"), sliced.program.section("sum_gradients")
    given = lambda section: tuple((label, _early_name(name)) for label, name in section.gives)  # noqa: E731
    program = sliced.program.with_section(replace(backward, gives=given(backward)))
    program = program.with_section(replace(sums, instrs=(), gives=given(backward)))
    with pytest.raises(ArtifactError, match="computed with a guess of the tangent"):
        derive(program, sliced.whole)


def _early_name(name: str) -> str:
    return f"early.{name}" if name == "grad.head.mm" else name
