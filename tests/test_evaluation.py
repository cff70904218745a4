"""The evaluation program: what eval mode computes, at any number of ranks, with nothing kept."""

import pytest
import torch
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import capture_model, compile_model
from autosp_aot.commands.check.proof import check
from autosp_aot.commands.show import show
from autosp_aot.errors import ArtifactError, BuildError
from autosp_aot.export.canonical.canonical import canonical_program, forward_part
from autosp_aot.export.joint import capture_exported, export_forward
from autosp_aot.export.subject import Subject
from autosp_aot.memory.costs import costs
from autosp_aot.ops.random import step_seed
from examples import llama, plain
from tests.draws import Draws
from tests.memory.test_memory import answers, compare
from tests.steps import built, eager_loss, evaluation, evaluations, losses
from tests.test_randomness import BATCH, Model, model_of

SEED = step_seed(3, 5)
DIMS = dict.fromkeys(BATCH, 1)


class Switching(nn.Module):
    """Normalizes by the batch in training and by what it holds in eval mode; each mode has a literal of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(8, dtype=torch.float64))
        self.register_buffer("late", torch.rand(8, dtype=torch.float64), persistent=False)

    def forward(self, x):
        if self.training:
            return (x - x.mean(1, keepdim=True)) * torch.tensor(0.5, dtype=torch.float64)
        return (x - self.mean) * self.late * torch.tensor(0.25, dtype=torch.float64)


class WithoutGradients(nn.Module):
    """Asks whether gradients are on."""

    def forward(self, x):
        return x * (2.0 if torch.is_grad_enabled() else 3.0)


class LossInTraining(Model):
    """Gives no loss in eval mode."""

    def forward(self, input_ids, labels):
        return super().forward(input_ids, labels) if self.training else {"ids": input_ids}


class Merging(nn.Module):
    """Adds its adapter to its weight in eval mode, in one of several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.weight, self.adapter = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.register_buffer("sign", torch.ones(()))
        self.way = way

    def train(self, mode=True):
        super().train(mode)
        if not mode and self.way == "written":
            self.weight.data += self.adapter.data
        if not mode and self.way == "replaced":
            self.weight.data = self.weight.data + self.adapter.data
        if not mode and self.way == "exchanged":
            self.weight = self.adapter
        if not mode and self.way == "buffer":
            self.sign.fill_(-1)
        return self

    def forward(self, x):
        return x @ self.weight * self.sign


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)


def small(dtype: str = "float64", **sizes) -> nn.Module:
    torch.manual_seed(0)
    return plain.build_model(32, 8, 1, 2, 1, 16, dtype=dtype, **sizes)


def wrapped(inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Model(inner).double().train()


@pytest.mark.parametrize(("model", "limit"), [
    (lambda: model_of("gpt2"), 1e-6),
    (lambda: model_of("bloom"), 1e-6),
    (lambda: model_of("mlp"), 1e-12),
    (lambda: model_of("attention"), 1e-12),
    (lambda: wrapped(Switching()), 1e-12),
    (lambda: wrapped(WithoutGradients()), 1e-12),
    (lambda: wrapped(encoder()), 1e-12),
    (lambda: small(), 1e-12),
], ids=["gpt2", "bloom", "mlp", "attention", "switching", "without gradients", "encoder", "plain"])  # fmt: skip
def test_the_loss_is_eager_s_in_eval_mode_at_any_number_of_ranks(model, limit):
    model = model()
    step, wanted = capture_model(Subject(model, BATCH, "cpu")), eager_loss(model, BATCH)
    for compiled, inputs in evaluations(model, BATCH, (1, 2, 3, 4), step):
        assert not compiled.fallbacks
        found = losses(compiled, inputs)
        assert all((loss - wanted).abs() <= limit * wanted.abs() for loss in found)
        assert len({loss.item() for loss in found}) == 1


def test_it_does_not_draw_what_training_alone_draws():
    model = model_of("gpt2")
    step = capture_model(Subject(model, BATCH, "cpu"))
    compiled, _ = evaluation(model, BATCH, 2, step)
    assert "seed" in {entry.kind for entry in step.whole.inputs}
    assert {entry.kind for entry in compiled.program.inputs} <= {"parameter", "buffer", "batch"}


@pytest.mark.parametrize("name", ["noise", "gumbel softmax", "masked tokens"])
def test_what_eval_mode_draws_too_is_drawn_by_position(name):
    model = model_of(name)
    with Draws(SEED):
        wanted = eager_loss(model, BATCH)
    for ranks in (1, 3):
        compiled, inputs = evaluation(model, BATCH, ranks)
        for loss in losses(compiled, inputs | {"seed": SEED}):
            assert (loss - wanted).abs() <= 1e-12 * wanted.abs()


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_the_part_of_the_step_that_the_loss_needs_is_what_is_captured_without_gradients(name):
    model = small() if name == "plain" else llama.build_model(num_hidden_layers=1)
    with torch.no_grad():
        captured = capture_exported(export_forward(Subject(model, BATCH, "cpu", nn.Module.eval)))
    assert canonical_program(captured)[0] == forward_part(capture_model(Subject(model, BATCH, "cpu")).whole)


def test_a_mode_s_own_literals_and_buffers_are_in_the_artifact(tmp_path):
    model = wrapped(Switching())
    artifact = compile_model(model, BATCH, DIMS, BuildConfig(2), "")
    assert {name: value.tolist() for name, value in artifact.buffers.items() if not value.dim()} == {
        "inner.lifted_tensor_0": 0.5, "evaluate.inner.lifted_tensor_0": 0.25
    }  # fmt: skip
    assert torch.equal(artifact.buffers["inner.late"], model.inner.late)
    assert "inner.mean" in {spec.name for spec in artifact.manifest.parameters}
    check(artifact.save(tmp_path / "a"))


def test_nothing_is_kept_and_tiles_hold_slices():
    model = small()
    step = capture_model(Subject(model, BATCH, "cpu"))
    (wanted,) = losses(*evaluation(model, BATCH, 1, step, tile="off"))
    for ranks, tile in ((1, 3), (3, 2)):
        compiled, inputs = evaluation(model, BATCH, ranks, step, tile=tile)
        assert any(instr.body is not None and instr.body.tiles == tile for instr in compiled.program.instrs())
        assert [section.name for section in compiled.program.sections] == ["evaluate"]
        assert costs(compiled.program, "cpu").kept_bytes == 0
        assert all((loss - wanted).abs() <= 1e-12 * wanted for loss in losses(compiled, inputs))


@pytest.mark.parametrize(("ranks", "tile", "dtype"), [(1, "off", "float32"), (2, 3, "bfloat16"), (3, "off", "float64")])
def test_the_measured_peak_is_the_planned_one_and_below_the_step_s(ranks, tile, dtype):
    model = small(dtype)
    step = capture_model(Subject(model, BATCH, "cpu"))
    compiled, inputs = evaluation(model, BATCH, ranks, step, tile=tile)
    heard = answers(compiled.program, inputs)
    assert not compare(compiled.program, ranks - 1, inputs, heard[ranks - 1])
    training, _ = built(model, BATCH, ranks, step=step, tile=tile)
    assert costs(compiled.program, "cpu").peak_bytes < costs(training.program, "cpu").peak_bytes


def test_a_model_without_a_loss_in_eval_mode_is_refused_unless_no_evaluation_is_asked_for(tmp_path):
    model = LossInTraining(nn.Identity()).train()
    with pytest.raises(BuildError) as caught:
        compile_model(model, BATCH, DIMS, BuildConfig(2), "")
    what = "in eval mode, forward returns no floating scalar: dict(int64 [2, 13])"
    assert str(caught.value).splitlines()[0] == f"error[no-loss]: {what}"
    assert str(caught.value).endswith("; or build without the evaluation program: --no-evaluation (evaluation=False)")
    path = compile_model(model, BATCH, DIMS, BuildConfig(2, evaluation=False), "").save(tmp_path / "a")
    assert not list(path.glob("evaluate*"))
    assert [line.split()[0] for line in check(path)] == ["files", "programs", "collectives", "operators"]
    with pytest.raises(ArtifactError) as refused:
        show(path, 0, evaluation=True)
    assert str(refused.value) == (
        "error[no-evaluation]: the artifact has no evaluation program\n"
        f"  where  {path}\n"
        "  why    it was built with --no-evaluation\n"
        "  fix    build it without that option"
    )


def test_a_loss_in_eval_mode_that_nothing_computes_is_refused():
    class Constant(Model):
        def forward(self, input_ids, labels):
            return super().forward(input_ids, labels) if self.training else torch.tensor(0.0)

    with pytest.raises(BuildError) as caught:
        compile_model(Constant(nn.Identity()).train(), BATCH, DIMS, BuildConfig(2), "")
    place = Constant.forward.__code__.co_firstlineno
    assert str(caught.value) == (
        "error[no-loss]: in eval mode, forward computes no loss\n"
        f"  where  test_evaluation.py:{place}\n"
        "  why    what it returns is a constant or one of its inputs\n"
        "  fix    return the loss in eval mode as well;"
        " or build without the evaluation program: --no-evaluation (evaluation=False)"
    )


def test_the_model_keeps_its_modes():
    model = wrapped(nn.Sequential(nn.Dropout(), nn.Dropout().eval()))
    before = {name: module.training for name, module in model.named_modules()}
    compile_model(model, BATCH, DIMS, BuildConfig(2), "")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_what_eval_mode_computes_follows_from_the_user_s_own_eval():
    class Frozen(nn.Dropout):
        def train(self, mode=True):
            return super().train(False)

    model = wrapped(nn.Sequential(Frozen(), nn.Linear(8, 8)))
    step = capture_model(Subject(model, BATCH, "cpu"))
    assert evaluation(model, BATCH, 1, step)[0].whole == forward_part(step.whole)


@pytest.mark.parametrize(("way", "name"), [
    ("written", "weight"), ("replaced", "weight"), ("exchanged", "weight"), ("buffer", "sign"),
])  # fmt: skip
def test_a_model_whose_weights_are_others_in_eval_mode_is_refused(way, name):
    model = wrapped(Merging(way))
    place = Merging.train.__code__.co_firstlineno
    with pytest.raises(BuildError) as caught:
        compile_model(model, BATCH, DIMS, BuildConfig(2), "")
    assert str(caught.value) == (
        f"error[state-mutated]: in eval mode, the model changes inner.{name}\n"
        f"  where  test_evaluation.py:{place}\n"
        "  why    an artifact holds weights and buffers once, for training and evaluation\n"
        "  fix    let train() and eval() leave parameters and buffers alone;"
        " or build without the evaluation program: --no-evaluation (evaluation=False)"
    )
    compile_model(model, BATCH, DIMS, BuildConfig(2, evaluation=False), "")
