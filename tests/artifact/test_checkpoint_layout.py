"""checkpoint.json is read strictly: nothing in it reaches beyond a tensor, or leaves a part of one out."""

import json

import pytest
import torch

from autosp_aot.artifact.checkpoint_layout import Piece, Place, Recipe, Stored, parse_recipe, print_recipe
from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.artifact.read import read_recipe
from autosp_aot.errors import ArtifactError
from tests.sealing import reseal

SPECS = (TensorSpec("both", "f32", (2, 4, 3)), TensorSpec("norm", "f32", (3,)), TensorSpec("ids", "i64", (3,)))
ROWS = Stored("rows", (6, 2), (
    Piece("both", (2, 3, 2), Place((12, 1, 3)), Place((6, 2, 1))),
))  # fmt: skip
REST = Stored("rest", (2, 2, 3), (Piece("both", (2, 2, 3), Place((12, 3, 1), 6), Place((6, 3, 1))),))
RECIPE = Recipe({"config.json": {"a": [1]}}, "model", (r"\.bias$",), "", (ROWS, REST))


def test_text_and_recipe_are_the_same():
    text = print_recipe(RECIPE)
    assert parse_recipe(text, SPECS) == RECIPE
    assert print_recipe(parse_recipe(text, SPECS)) == text
    assert [line for line in text.splitlines() if '"rows"' in line] == [
        '{"name": "rows", "shape": [6, 2], "pieces": [{"name": "both", "sizes": [2, 3, 2], '
        '"here": {"strides": [12, 1, 3], "offset": 0}, "there": {"strides": [6, 2, 1], "offset": 0}}]},'
    ]
    assert parse_recipe(print_recipe(Recipe()), SPECS) == Recipe()


def test_a_piece_is_a_view_of_both_sides():
    both = torch.arange(24.0).view(2, 4, 3)
    (piece,) = ROWS.pieces
    rows = torch.zeros(6, 2)
    piece.there.of(rows, piece.sizes).copy_(piece.here.of(both, piece.sizes))
    assert torch.equal(rows, both[:, :2].transpose(1, 2).reshape(6, 2))


def test_every_tensor_of_the_checkpoint_comes_once_in_the_models_order():
    assert [stored.name for stored in RECIPE.all_tensors(SPECS)] == ["rows", "rest", "norm", "ids"]


PIECE = ("tensors", 0, "pieces", 0)
CHANGES = [
    (("surprise",), 1, "unexpected keyword argument 'surprise'"),
    (("prefix",), 1, "prefix, refused and ignored are texts"),
    (("ignored",), [1], "prefix, refused and ignored are texts"),
    (("ignored",), ["("], "'(' is no pattern"),
    (("configs",), {"../config.json": {}}, "a checkpoint has no other files than"),
    (("configs",), {"config.json": []}, "a checkpoint has no other files than"),
    (("tensors", 0, "name"), 1, "1 is no tensor"),
    (("tensors", 0, "name"), "norm", "two tensors of the checkpoint have one name"),
    (("tensors", 0, "shape"), [6, 3], "rows is not made up of its pieces"),
    (("tensors", 0, "shape"), [-6, -2], "no whole number"),
    (("tensors", 0, "pieces"), [], "rows is no tensor"),
    ((*PIECE, "name"), "other", "rows is a part of other, which the model has not"),
    ((*PIECE, "name"), "norm", "rows reaches beyond norm"),
    ((*PIECE, "sizes"), [2, 3, 0], "has no elements"),
    ((*PIECE, "sizes"), [2, 3], "has no stride for each size"),
    ((*PIECE, "sizes"), [2, 3, True], "no whole number"),
    ((*PIECE, "surprise"), 1, "unexpected keyword argument 'surprise'"),
    ((*PIECE, "here", "offset"), 12, "rows reaches beyond both"),
    ((*PIECE, "here", "offset"), -1, "no whole number"),
    ((*PIECE, "here", "strides"), [12, 1, 30], "rows reaches beyond both"),
    ((*PIECE, "there", "offset"), 1, "rows reaches beyond both"),
    ((*PIECE, "there", "more"), 1, "unexpected keyword argument 'more'"),
    (("tensors",), [None], "not subscriptable"),
]


def changed(keys: tuple, value: object) -> str:
    found = json.loads(print_recipe(RECIPE))
    at = found
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return json.dumps(found)


@pytest.mark.parametrize("keys, value, why", CHANGES)
def test_what_cannot_be_followed_is_refused(keys, value, why):
    with pytest.raises((ValueError, TypeError)) as caught:
        parse_recipe(changed(keys, value), SPECS)
    assert why in str(caught.value)


def test_a_tensor_left_out_in_part_is_refused():
    found = json.loads(print_recipe(RECIPE))
    del found["tensors"][1]
    with pytest.raises(ValueError, match="a tensor of the model is not made up of pieces"):
        parse_recipe(json.dumps(found), SPECS)


def test_two_dtypes_in_one_tensor_are_refused():
    pieces = tuple(Piece(name, (3,), Place((1,)), Place((1,), at)) for name, at in (("norm", 0), ("ids", 3)))
    with pytest.raises(ValueError, match="mixed has more than one dtype"):
        parse_recipe(print_recipe(Recipe(tensors=(Stored("mixed", (6,), pieces),))), SPECS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 1}'])
def test_a_damaged_file_is_refused(tiny2, tmp_path, text):
    path = tiny2.save(tmp_path / "a")
    (path / "checkpoint.json").write_text(text)
    reseal(path)
    with pytest.raises(ArtifactError) as caught:
        read_recipe(path, tiny2.manifest)
    assert str(caught.value).startswith(f"error[checkpoint-damaged]: {path / 'checkpoint.json'} cannot be followed\n")
