"""`check --eager`: an artifact against steps of the model file's own module, with its weights."""

import pytest
from click.testing import CliRunner

from autosp_aot.artifact import write as artifact_write
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build_file
from autosp_aot.commands.cli import main
from autosp_aot.errors import ArtifactError

MODEL = """\
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, width), nn.Linear(width, width), dropout

    def forward(self, x):
        x = nn.functional.dropout(x, self.dropout)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, width), nn.Linear(width, 64)
        self.layers = nn.Sequential(Layer(width, dropout), Layer(width, dropout))

    def forward(self, input_ids, labels, scale):
        x = self.layers(self.embedding(input_ids)) * scale["by"]
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def build_model(width=8, dropout=0.0):
    return Model(width, dropout)


def example_batch(batch_size, seq_len):
    tokens = torch.arange(batch_size * (seq_len + 1)).view(batch_size, seq_len + 1) * 5 % 64
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "scale": {"by": 2.0}}
"""


@pytest.fixture
def written(tmp_path):
    """Writes the model file, with pieces replaced, and builds it for 3 ranks as `name`."""

    def write(name: str, *replaced: tuple[str, str], **options):
        text = MODEL
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        build_file(path, BuildConfig(3), 7, batch_size=2, options=options, out=tmp_path / name)
        return path, tmp_path / name

    return write


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_it_says_how_far_apart_they_are(written):
    model, artifact = written("model")
    result = call("check", artifact, "--eager", model, "--steps", 3)
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    compared = "eager       3 steps of SGD: loss, gradients and parameters, and the evaluation differ by at most "
    assert lines[-2].startswith(compared)
    assert lines[-1].startswith("            nearest to its limit is ")


def test_dropout_is_off_and_said_to_be(written):
    model, artifact = written("model", dropout=0.2)
    result = call("check", artifact, "--eager", model, "--set", "dropout=0.2")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "            with dropout off: eager draws from another generator"


def test_another_model_of_the_same_parameters_is_told_from_it_by_its_first_module(written):
    _, artifact = written("model")
    other, _ = written("other", ("functional.gelu(", "functional.silu("))
    result = call("check", artifact, "--eager", other)
    assert result.exit_code == 3
    assert "error[differs-from-eager]: " in result.stderr
    assert "  where  step 1, first in layers.0.down (linear.py:" in result.stderr


@pytest.mark.parametrize(("replaced", "options", "what"), [
    ((), ("--set", "width=16"), "the model has other parameters than the artifact: embedding.weight"),
    (('"by": 2.0', '"by": 3.0'), (), "example_batch does not make the batch that the artifact was built for"),
    (("* 5 % 64", "* 5.0"), (), "example_batch does not make the batch that the artifact was built for"),
])  # fmt: skip
def test_what_the_artifact_was_not_built_from_is_refused(written, replaced, options, what):
    model, artifact = written("model")
    if replaced:
        model.write_text(MODEL.replace(*replaced))
    result = call("check", artifact, "--eager", model, *options)
    assert result.exit_code == 3
    assert f"error[model-mismatch]: {what}" in result.stderr
    assert "fix    give the model file and the --set options that it was built with" in result.stderr


def test_a_model_that_fails_is_refused_with_its_line(written):
    model, artifact = written("model")
    first = "        x = nn.functional.dropout(x, self.dropout)\n"
    model.write_text(MODEL.replace(first, f"        raise ValueError('no')\n{first}"))
    result = call("check", artifact, "--eager", model)
    assert result.exit_code == 2
    assert "error[eager-failed]: the model cannot run a step itself\n  where  model.py:11\n" in result.stderr


def test_what_eager_draws_in_another_way_cannot_be_compared(written):
    model, artifact = written("model")
    drawn = MODEL.replace("x = nn.functional.dropout(x, self.dropout)", "x = x * torch.randperm(1)[0].add(1)")
    model.write_text(drawn)
    result = call("check", artifact, "--eager", model)
    assert result.exit_code == 3 and "error[eager-not-comparable]: " in result.stderr


def test_what_was_written_wrongly_is_not_renamed_into_place(monkeypatch, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    printed = artifact_write.print_program

    def wrong(program):
        text, constants = printed(program)
        return text.replace("aten.mul", "aten.add") if program.ranks > 1 else text, constants

    monkeypatch.setattr(artifact_write, "print_program", wrong)
    with pytest.raises(ArtifactError):
        build_file(tmp_path / "model.py", BuildConfig(2), 7, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.py"]
