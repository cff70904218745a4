"""How the tensors of a checkpoint lie in those of the model: one list of moves, to read by and to write by.

    checkpoint  experts.3.w1.weight [F, H]   <-   piece   ->   model  experts.gate_up_proj [E, 2F, H]

A piece is a set of elements as both sides see it: sizes, and for each side strides and an offset in its contiguous
memory. Nothing is computed. `checkpoint.json` of an artifact holds it, a line for each tensor of the checkpoint that is
not simply one of the model's under its own name.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from autosp_aot.artifact.manifest import Json, TensorSpec

CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Place:
    """Where the elements of a piece are in a contiguous tensor, counted in elements."""

    strides: tuple[int, ...]
    offset: int = 0

    def end(self, sizes: tuple[int, ...]) -> int:
        """One past the last element."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(sizes, self.strides)) + 1

    def of(self, tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The elements of a contiguous tensor, as a view."""
        return tensor.as_strided(sizes, self.strides, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Piece:
    """Elements that are the same in a tensor of the checkpoint (`there`) and in the model's tensor `name` (`here`)."""

    name: str
    sizes: tuple[int, ...]
    here: Place
    there: Place


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its whole shape, and the pieces it consists of."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint of the model is.

    configs    JSON files of the folder that are no weights, by name
    prefix     what names of a base model lack or have more: `model` of `model.layers.0`
    ignored    patterns (re.search) of names that a checkpoint may hold and the model does not
    refused    why there is no recipe; else empty
    tensors    of the checkpoint, but those that are the model's own under their own names
    """

    configs: Mapping[str, Json] = field(default_factory=dict)
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    refused: str = ""
    tensors: tuple[Stored, ...] = ()

    def all_tensors(self, parameters: Iterable[TensorSpec]) -> list[Stored]:
        """Every tensor of a checkpoint: the model's in their order, each where it is first needed."""
        moved: dict[str, list[Stored]] = {}
        for stored in self.tensors:
            for piece in stored.pieces:
                moved.setdefault(piece.name, []).append(stored)
        found = [stored for spec in parameters for stored in moved.get(spec.name, [whole(spec)])]
        return list({stored.name: stored for stored in found}.values())


def whole(spec: TensorSpec) -> Stored:
    """One of the model's tensors as it is, under its own name."""
    place = Place(contiguous(spec.shape))
    return Stored(spec.name, spec.shape, (Piece(spec.name, spec.shape, place, place),))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def print_recipe(recipe: Recipe) -> str:
    """The text of checkpoint.json: a line a tensor."""
    head = json.dumps({key: value for key, value in vars(recipe).items() if key != "tensors"}, indent=1)
    lines = [json.dumps(stored, default=vars) for stored in recipe.tensors]
    return head.removesuffix("\n}") + ',\n "tensors": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def parse_recipe(text: str, parameters: Iterable[TensorSpec]) -> Recipe:
    """Read checkpoint.json of a model with these parameters; raises ValueError for what cannot be followed safely."""
    found = json.loads(text)
    tensors = tuple(_stored(entry) for entry in found.pop("tensors"))
    recipe = Recipe(**found | {"ignored": tuple(found["ignored"])}, tensors=tensors)
    if not set(recipe.configs) <= set(CONFIGS) or not all(type(config) is dict for config in recipe.configs.values()):
        raise ValueError(f"a checkpoint has no other files than {', '.join(CONFIGS)}")
    if not all(type(text) is str for text in (recipe.prefix, recipe.refused, *recipe.ignored)):
        raise ValueError("prefix, refused and ignored are texts")
    for pattern in recipe.ignored:
        _check_pattern(pattern)
    check_recipe(recipe, parameters)
    return recipe


def check_recipe(recipe: Recipe, parameters: Iterable[TensorSpec]) -> None:
    """Raise ValueError unless each tensor, of checkpoint and model, is made up of pieces, all inside of both."""
    specs = {spec.name: spec for spec in parameters}
    left = {name: prod(spec.shape) for name, spec in specs.items()}
    for stored in recipe.tensors:
        for piece in stored.pieces:
            if piece.name not in specs:
                raise ValueError(f"{stored.name} is a part of {piece.name}, which the model has not")
            shapes = (specs[piece.name].shape, piece.here), (stored.shape, piece.there)
            if not all(place.end(piece.sizes) <= prod(shape) for shape, place in shapes):
                raise ValueError(f"{stored.name} reaches beyond {piece.name}")
            left[piece.name] -= prod(piece.sizes)
        if sum(prod(piece.sizes) for piece in stored.pieces) != prod(stored.shape):
            raise ValueError(f"{stored.name} is not made up of its pieces")
        if len({specs[piece.name].dtype for piece in stored.pieces}) != 1:
            raise ValueError(f"{stored.name} has more than one dtype")
    moved = {piece.name for stored in recipe.tensors for piece in stored.pieces}
    if any(left[name] for name in moved):
        raise ValueError("a tensor of the model is not made up of pieces")
    names = [stored.name for stored in recipe.tensors] + [name for name in specs if name not in moved]
    if len(set(names)) != len(names):
        raise ValueError("two tensors of the checkpoint have one name")


def _stored(entry: Json) -> Stored:
    stored = Stored(**entry | {"shape": _numbers(entry["shape"]), "pieces": tuple(map(_piece, entry["pieces"]))})
    if type(stored.name) is not str or not stored.pieces:
        raise ValueError(f"{stored.name} is no tensor")
    return stored


def _piece(entry: Json) -> Piece:
    places = {side: _place(entry[side]) for side in ("here", "there")}
    piece = Piece(**entry | {"sizes": _numbers(entry["sizes"])} | places)
    if 0 in piece.sizes:
        raise ValueError(f"a piece of {piece.name} has no elements")
    if not len(piece.sizes) == len(piece.here.strides) == len(piece.there.strides):
        raise ValueError(f"a piece of {piece.name} has no stride for each size")
    return piece


def _place(entry: Json) -> Place:
    return Place(**entry | {"strides": _numbers(entry["strides"]), "offset": _numbers([entry["offset"]])[0]})


def _numbers(numbers: list[Any]) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a size, stride or offset is no whole number")
    return tuple(numbers)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from error
