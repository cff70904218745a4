"""`check --numeric`: its limits by dtype, what it makes up, and what it refuses."""

import functools

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.manifest import EVALUATE
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.check.numeric import check_numeric, difference
from autosp_aot.commands.check.random_inputs import labels, made_up
from autosp_aot.commands.cli import main
from autosp_aot.errors import ArtifactError
from autosp_aot.export.fake import weightless
from autosp_aot.runtime.simulate import simulate
from examples import llama, plain
from tests.conftest import TINY
from tests.processes import ROOT
from tests.sealing import edit_text

REFERENCE = ROOT / "artifacts" / "reference"
DIMS = {"input_ids": 1, "labels": 1}
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def compiled(model, ranks=3, batch=None, dims=DIMS):
    torch.manual_seed(0)
    return compile_model(model, batch or llama.example_batch(2, 13), dims, BuildConfig(ranks), "")


@functools.cache
def llama_of(dtype):
    return compiled(llama.build_model(dtype, **SMALL))


def found(artifact):
    programs = [artifact.program.for_rank(rank) for rank in range(artifact.manifest.ranks)]
    return difference(artifact.whole, programs, made_up(artifact.whole) | artifact.buffers)


@pytest.mark.parametrize(("artifact", "limit"), [
    (lambda: compiled(plain.build_model(**TINY | {"max_length": 16}, dtype="float64")), 1e-12),
    (lambda: llama_of("float64"), 1e-6),
    (lambda: llama_of("float32"), 1e-5),
])  # fmt: skip
def test_the_limit_follows_the_dtypes_of_the_step(artifact, limit):
    result = found(artifact())
    assert result.limit == limit and not result.beyond
    assert 0 < max(result.errors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes_are_measured_against_the_same_step_in_fp32(dtype):
    result = found(llama_of(dtype))
    assert 1e-4 < result.limit < 0.2 and not result.beyond


def test_no_gradient_vanishes_on_the_inputs_made_up():
    whole = llama_of("float64")
    inputs = made_up(whole.whole) | whole.buffers
    (results,) = simulate([whole.whole], inputs, torch.ones((), dtype=torch.float32))
    assert all(tensor.norm() > 1e-2 for tensor in results.values())


def test_a_step_that_draws_draws_the_same_on_all_ranks_and_in_fp32():
    """bf16 draws have 8 digits: drawn in fp32 other elements would be dropped, and the limit would say nothing."""
    embedding, head = nn.Embedding(64, 32), nn.Linear(32, 64)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = embedding, head

        def forward(self, input_ids, labels):
            x = nn.functional.dropout(self.embedding(input_ids), 0.3)
            return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    assert not found(compiled(Model())).beyond
    result = found(compiled(Model().bfloat16()))
    assert result.limit < 0.1 and not result.beyond


class Dropping(nn.Module):
    """Dropout of hidden states, in the same tiles as other results, and of attention's weights."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        q = x.view(2, 13, 2, 4).transpose(1, 2)
        o = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.3).transpose(1, 2).reshape(2, 13, 8)
        x = x + nn.functional.dropout(o, 0.3)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_draws_in_tiles_and_in_attention_are_those_of_the_step_in_fp64_too(tmp_path):
    config = BuildConfig(2, tile=2)
    artifact = compile_model(Dropping(), llama.example_batch(2, 13), DIMS, config, "")
    assert any(instr.body and "seed" in instr.refs() for instr in artifact.program.instrs())
    artifact.save(tmp_path / "a")
    assert len(check_numeric(tmp_path / "a")) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_waits_in_host_memory_is_stored_in_the_wider_dtype_too(tmp_path, dtype):
    """There each value takes twice the place in the pool."""
    model = plain.build_model(layers=1, dtype=dtype)
    config = BuildConfig(2, offload="host")
    path = compile_model(model, plain.example_batch(2, 13), DIMS, config, "").save(tmp_path / "a")
    assert read_manifest(path).step.costs.host_bytes > 0
    assert len(check_numeric(path)) == 4


class Masked(nn.Module):
    """Tokens with a vocabulary, labels of fewer classes that are shifted and padded, and a mask."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

    def forward(self, tokens, targets, mask, scale):
        x = self.embedding(tokens) * mask.unsqueeze(-1) * scale.unsqueeze(-1)
        shifted = nn.functional.pad(targets, (0, 1), value=-7)[:, 1:]
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), shifted.flatten(), ignore_index=-7)


def masked():
    ids = torch.zeros(2, 8, dtype=torch.long)
    batch = {"tokens": ids, "targets": ids.int().long(), "mask": torch.ones(2, 8, dtype=torch.bool)}
    return compiled(Masked(), 2, batch | {"scale": torch.ones(2, 8)}, dict.fromkeys([*batch, "scale"], 1))


def test_ids_labels_and_masks_are_made_up_as_the_step_reads_them():
    artifact = masked()
    made = made_up(artifact.whole)
    assert labels(artifact.whole)["targets"] == (5, -7)
    assert (made["targets"][0, :4] == -7).all() and 0 <= made["targets"][1].min() <= made["targets"][1].max() < 5
    assert 0 <= made["tokens"].min() < made["tokens"].max() < 9
    assert made["mask"].dtype == torch.bool and made["mask"].tolist() == [[True] * 6 + [False] * 2, [True] * 8]
    assert made["scale"].dtype == torch.float32 and made["scale"].std() > 0
    assert not found(artifact).beyond


def test_an_artifact_whose_numbers_differ_is_refused(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a")
    step, evaluation = check_numeric(path)
    assert step.startswith("numbers     loss and 17 gradients differ by")
    assert evaluation.startswith("evaluation  loss differs by")
    edit_text(path, "aten.slice.Tensor(%labels, 1, 1, 5, 1)", "aten.slice.Tensor(%labels, 1, 0, 4, 1)")
    with pytest.raises(ArtifactError) as caught:
        check_numeric(path)
    assert "error[numbers-differ]: 18 of 18 results differ from the unsharded step" in str(caught.value)


def test_so_is_one_whose_evaluation_differs(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a")
    edit_text(path, "aten.slice.Tensor(%labels, 1, 1, 5, 1)", "aten.slice.Tensor(%labels, 1, 0, 4, 1)", EVALUATE)
    with pytest.raises(ArtifactError, match="1 of 1 results differ from the unsharded evaluation"):
        check_numeric(path)


def test_in_bf16_a_mistake_that_rounding_would_hide_is_found_in_fp32(tmp_path):
    path = llama_of("bfloat16").save(tmp_path / "a")
    assert [line.split("loss")[0].strip() for line in check_numeric(path)] == [
        "numbers", "in fp32", "evaluation", "in fp32"
    ]  # fmt: skip
    edit_text(path, ", 1e-06", ", 1e-05")
    with pytest.raises(ArtifactError) as caught:
        check_numeric(path)
    assert "at most 1e-05 is rounding" in str(caught.value)


def test_what_is_too_large_for_one_process_is_refused_with_sizes(tmp_path):
    with weightless():
        model = plain.build_model(vocab_size=2**20, hidden_size=2**10, layers=1, heads=4)
    path = compile_model(model, plain.example_batch(1, 64), DIMS, BuildConfig(2), "").save(tmp_path / "a")
    with pytest.raises(ArtifactError) as caught:
        check_numeric(path)
    assert "error[numeric-too-large]: running 2 ranks in one process takes 64.4 GiB" in str(caught.value)
    assert "GiB, the unsharded step" in str(caught.value) and "a smaller --seq" in str(caught.value)


@pytest.mark.parametrize("path", sorted(REFERENCE.iterdir()), ids=lambda path: path.name)
def test_the_reference_artifacts_are_right_in_numbers(path):
    assert check_numeric(path)[0].startswith("numbers     loss and ")


class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, input_ids, labels):
        return (self.embedding(input_ids) * float("inf")).mean()


def test_a_step_without_finite_numbers_is_not_called_right():
    with pytest.raises(ArtifactError, match="numeric-not-finite"):
        found(compiled(Endless()))


def test_the_command_says_what_was_compared(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a")
    result = CliRunner().invoke(main, ["check", str(path), "--numeric"], catch_exceptions=False)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "files", "programs", "collectives", "evaluation", "operators", "numbers", "evaluation"
    ]  # fmt: skip
