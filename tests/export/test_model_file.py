import hashlib

import pytest
import torch

from autosp_aot.errors import BuildError
from autosp_aot.export.example_batch import guess_sequence_dims, make_batch
from autosp_aot.export.model_file import make_model, read_model_file

MODEL = """\
import torch
from torch import nn


def build_model(width=4, bias=True):
    return nn.Linear(width, width, bias=bias)


def example_batch(batch_size, seq_len):
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
    return {"tokens": tokens, "weights": torch.ones(batch_size), "table": torch.ones(3, batch_size, seq_len)}
"""


@pytest.fixture
def model_file(tmp_path):
    """Writes a model file, by default the good one, with pieces of its text replaced."""

    def write(*replaced: tuple[str, str], text: str = MODEL):
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "model.py").write_text(text)
        return tmp_path / "model.py"

    return write


def refusal(function, *args) -> str:
    with pytest.raises(BuildError) as caught:
        function(*args)
    return str(caught.value)


def batch_refusal(path) -> str:
    return refusal(make_batch, read_model_file(path), 2, 4)


def test_a_model_file_gives_its_functions_its_stem_and_the_hash_of_its_text(model_file):
    read = read_model_file(model_file())
    assert read.stem == "model"
    assert read.sha256 == hashlib.sha256(MODEL.encode()).hexdigest()
    assert set(read.example_batch(2, 4)) == {"tokens", "weights", "table"}


def test_a_model_file_may_import_its_neighbours(model_file, tmp_path):
    (tmp_path / "neighbour_of_the_model.py").write_text("WIDTH = 6")
    path = model_file(
        ("import torch\n", "import torch\nfrom neighbour_of_the_model import WIDTH\n"), ("width=4", "width=WIDTH")
    )
    assert make_model(read_model_file(path), {}).in_features == 6


def test_a_changed_file_is_read_anew(model_file):
    assert make_model(read_model_file(model_file()), {}).in_features == 4
    assert make_model(read_model_file(model_file(("width=4", "width=5"))), {}).in_features == 5


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(read_model_file, tmp_path / "model.py") == (
        "error[model-file-missing]: there is no model file model.py\n"
        f"  where  {tmp_path}/model.py\n"
        "  fix    give the path of a Python file with build_model and example_batch"
    )


def test_a_file_without_the_functions_is_refused_with_a_stub_to_paste(model_file):
    assert refusal(read_model_file, model_file(text="x = 1\n")) == (
        "error[model-file-incomplete]: model.py does not define build_model or example_batch\n"
        "  where  model.py\n"
        "  why    build calls build_model for the model and example_batch for the shapes of its inputs\n"
        "  fix    add\n"
        "         import torch\n"
        "         def build_model(**options) -> torch.nn.Module:\n"
        "             return MyModel(**options)\n"
        "         def example_batch(batch_size, seq_len) -> dict[str, torch.Tensor]:\n"
        "             tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)\n"
        '             return {"input_ids": tokens, "labels": tokens}'
    )


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("import torch\nx = 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
        (
            "import torch\n\nimport no_such_module_at_all\n",
            3,
            "ModuleNotFoundError: No module named 'no_such_module_at_all'",
        ),
        ("x = (\n", 1, "SyntaxError: '(' was never closed (model.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_with_its_line(model_file, text, line, why):
    assert refusal(read_model_file, model_file(text=text)) == (
        "error[model-file-failed]: model.py cannot be imported\n"
        f"  where  model.py:{line}\n"
        f"  why    {why}\n"
        "  fix    correct it: python must be able to run the file"
    )


def test_a_model_is_made_without_its_weights(model_file):
    model = make_model(read_model_file(model_file()), {"width": 5, "bias": False}, weights=False)
    assert model.weight.is_meta
    assert model.weight.shape == (5, 5)
    assert model.bias is None


def test_an_option_that_build_model_does_not_take_is_refused(model_file):
    assert refusal(make_model, read_model_file(model_file()), {"depth": 3}) == (
        "error[option-unknown]: build_model does not take these options: got an unexpected keyword argument 'depth'\n"
        "  where  model.py:5\n"
        "  why    each --set key=value is a keyword argument of build_model\n"
        "  fix    correct the name, or add the argument to build_model"
    )


def test_an_exception_in_build_model_is_refused_with_its_line(model_file):
    assert refusal(make_model, read_model_file(model_file()), {"width": "wide"}).startswith(
        "error[build-model-failed]: build_model raised an exception\n  where  model.py:6\n  why    TypeError: "
    )


def test_something_other_than_a_module_is_refused(model_file):
    path = model_file(("return nn.Linear(width, width, bias=bias)", "return nn.Linear"))
    assert refusal(make_model, read_model_file(path), {}) == (
        "error[not-a-module]: build_model returned type\n"
        "  where  model.py:5\n"
        "  why    what is built is the forward of a torch.nn.Module\n"
        "  fix    return the model"
    )


def test_the_dim_that_changes_with_the_length_is_the_sequence(model_file):
    batch, sequence_dims = make_batch(read_model_file(model_file()), 2, 4)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "tokens": (2, 4), "weights": (2,), "table": (3, 2, 4),
    }  # fmt: skip
    assert sequence_dims == {"tokens": 1, "table": 2}


def test_a_batch_that_is_no_dict_is_refused(model_file):
    path = model_file(("return {", "return [tokens]\n    return {"))
    assert batch_refusal(path) == (
        "error[batch-not-tensors]: the batch is list\n"
        "  where  model.py:9\n"
        "  why    the batch is the keyword inputs of forward\n"
        "  fix    return a dict of tensors, or of dicts of them; None, flags, numbers and texts are constants of the "
        "build"
    )


def test_a_batch_with_something_other_than_tensors_is_refused(model_file):
    path = model_file(("torch.ones(batch_size)", "[1.0]"), ('"table": torch', "7: torch"))
    assert [line for line in batch_refusal(path).splitlines() if line.startswith("error")] == [
        "error[batch-not-tensors]: in the batch, 'weights' is list",
        "error[batch-not-tensors]: in the batch, the name 7 is no text without dots",
    ]


def test_an_exception_in_example_batch_is_refused_with_its_line(model_file):
    path = model_file(("torch.ones(batch_size)", "torch.ones(batch_size)[seq_len]"))
    assert batch_refusal(path) == (
        "error[example-batch-failed]: example_batch(2, 4) raised an exception\n"
        "  where  model.py:11\n"
        "  why    IndexError: index 4 is out of bounds for dimension 0 with size 2\n"
        "  fix    make it work for any batch size and length"
    )


def test_inputs_that_come_and_go_with_the_length_are_refused(model_file):
    path = model_file(('"weights"', "f'weights{seq_len}'"))
    assert batch_refusal(path) == (
        "error[batch-changes]: the inputs ['weights4', 'weights8'] come and go\n"
        "  where  model.py:9\n"
        "  why    a batch of another length differs in the sequence dim only\n"
        "  fix    return the same names, dtypes and numbers of dims for every length"
    )


@pytest.mark.parametrize(
    "made", ["torch.ones([1] * seq_len)", "torch.ones(1, dtype=[torch.int, torch.long][seq_len == 4])",
             "torch.ones(1) if seq_len == 4 else 1"]
)
def test_an_input_whose_dtype_or_dims_change_with_the_length_is_refused(model_file, made):
    path = model_file(("torch.ones(batch_size)", made))
    assert batch_refusal(path).startswith(
        "error[batch-changes]: input 'weights' changes its dtype or its number of dims\n"
    )


def test_a_batch_that_does_not_change_with_the_length_is_refused(model_file):
    assert batch_refusal(model_file(("seq_len, dtype", "8, dtype"), ("batch_size, seq_len)}", "8)}"))) == (
        "error[no-sequence-dim]: no input changes its shape with the length\n"
        "  where  model.py:9\n"
        "  why    the dim that changes is the sequence, which the ranks share\n"
        "  fix    use seq_len in example_batch"
    )


def test_an_input_with_two_dims_that_change_with_the_length_is_refused(model_file):
    path = model_file(("3, batch_size, seq_len", "seq_len, batch_size, seq_len"))
    assert batch_refusal(path) == (
        "error[sequence-dim-ambiguous]: dims [0, 2] of input 'table' change with the length\n"
        "  where  model.py:9\n"
        "  why    each input is cut along one sequence dim\n"
        "  fix    give one sequence dim, and make the rest in forward"
    )


def test_an_input_may_have_another_length_than_was_asked_for(model_file):
    batch, dims = make_batch(read_model_file(model_file(("seq_len, dtype", "seq_len + 1, dtype"))), 2, 4)
    assert batch["tokens"].shape == (2, 5) and dims["tokens"] == 1


def test_without_lengths_to_compare_dim_1_is_the_sequence():
    batch = {"tokens": torch.zeros(2, 4), "weights": torch.zeros(2), "table": torch.zeros(2, 4, 3)}
    assert guess_sequence_dims(batch) == {"tokens": 1, "table": 1}


def test_tokens_of_two_lengths_are_a_source_and_a_target():
    source, target = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
    assert guess_sequence_dims({"source": source, "target": target, "hidden": torch.zeros(2, 6, 3)}) == {
        "source": 1, "target": 1, "hidden": 1,
    }  # fmt: skip


def test_without_lengths_to_compare_unequal_dims_are_refused():
    assert refusal(guess_sequence_dims, {"tokens": torch.zeros(2, 4), "table": torch.zeros(3, 2, 4)}) == (
        "error[sequence-dim-unknown]: dim 1 of the inputs has no one size: tokens 4, table 2\n"
        "  where  batch\n"
        "  why    without two lengths to compare, the sequence is taken to be dim 1 of every input\n"
        '  fix    say which it is: sequence_dims={"input_ids": 1, ...}'
    )
