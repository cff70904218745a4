"""Weights for an artifact: all of it checked by name, shape and dtype, then read into place a tensor at a time."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from autosp_aot.artifact.checkpoint_layout import Piece, Recipe, Stored, whole
from autosp_aot.artifact.manifest import WEIGHTS, Manifest, TensorSpec
from autosp_aot.artifact.read import read_recipe
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.fold_names import folded
from autosp_aot.runtime.execute import DTYPES

FLOATS = ("f64", "f32", "bf16", "f16")
FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Given:
    """A tensor of a file, under `name` there, that is all or a part of the model's tensors."""

    file: Path
    name: str
    stored: Stored


def read_weights(
    path: Path, manifest: Manifest, init_from: Path | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name on `device`, from `init_from` or the artifact.

    `init_from` is a safetensors file, or a folder of them as save_pretrained writes it. Names and layouts are those of
    the model's checkpoint, by the artifact's recipe, or the model's own; names of a base model lack its prefix. A tied
    weight has any of its names, or several with one value. Floating dtypes are cast as `.to` does: exactly into a wider
    one, else rounded to nearest. Each tensor is allocated once and filled from the mapped file.

    Raises ArtifactError with all offenders: `no-weights`, `weights-unreadable`, `weights-mismatch`.
    """
    if init_from is None and not manifest.has_weights:
        raise ArtifactError(Problem("no-weights", "the artifact has no stored weights", str(path),
                                    "it was built with --no-weights, or they are 1 GB or more",
                                    "give --init-from: a safetensors file or a folder of them"))  # fmt: skip
    files = [path / WEIGHTS] if init_from is None else _files(init_from)
    recipe = Recipe() if init_from is None else read_recipe(path, manifest)
    specs = {spec.name: spec for spec in manifest.parameters}
    casts = () if init_from is None else FLOATS
    given, odd = _given(files, _known(recipe, manifest), recipe, specs, casts)
    _refuse([*_incomplete(recipe, specs, {entry.stored for entry in given}), *odd], init_from or path, recipe)
    values = {spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device) for spec in specs.values()}
    _refuse(list(_fill(values, given)), init_from or path, recipe)
    return values


def _files(init_from: Path) -> list[Path]:
    """The file; of a folder what from_pretrained reads, or all there is."""
    if not init_from.is_dir():
        return [init_from]
    one, index = (init_from / name for name in FILES)
    files = [one] if one.is_file() else sorted(init_from.glob("*.safetensors"))
    if not one.is_file() and index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            outside = sorted(name for name in names if Path(name).is_absolute() or ".." in Path(name).parts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _unreadable(index, f"{type(error).__name__}: {error}") from error
        if outside:
            raise _unreadable(index, f"{', '.join(outside)} would be outside of the folder")
        files = [init_from / name for name in sorted(names)]
    if not files:
        raise _unreadable(init_from, "it holds no safetensors file")
    return files


def _known(recipe: Recipe, manifest: Manifest) -> dict[str, Stored]:
    """What a name in a file means: a tensor of the checkpoint, or the model's own under any of its names."""
    known = {stored.name: stored for stored in recipe.all_tensors(manifest.parameters)}
    own = {spec.name: whole(spec) for spec in manifest.parameters}
    own |= {alias: own[name] for alias, name in manifest.aliases.items()}
    known = own | known
    if recipe.prefix:
        start = f"{recipe.prefix}."
        known = {name.removeprefix(start): stored for name, stored in known.items()} | known
        known = {start + name: stored for name, stored in known.items()} | known
    return known


def _given(
    files: list[Path], known: dict[str, Stored], recipe: Recipe, specs: dict[str, TensorSpec], casts: tuple[str, ...]
) -> tuple[list[Given], list[tuple[str, str]]]:
    """What the files hold of the model, by their headers alone; and what is wrong in them, as (name, what).

    Dtypes in `casts` stand for each other.
    """
    ignored = [re.compile(pattern) for pattern in recipe.ignored]
    given, problems = [], []
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():
                stored = known.get(name)
                if stored is None:
                    if not any(pattern.search(name) for pattern in ignored):
                        problems.append((name, "is not the model's"))
                    continue
                header = tensors.get_slice(name)
                shape, dtype = tuple(header.get_shape()), _dtype(header.get_dtype())
                wanted = specs[stored.pieces[0].name].dtype
                if shape != stored.shape or (dtype != wanted and not {dtype, wanted} <= set(casts)):
                    said = f"is {dtype} {list(shape)}, the model's is {wanted} {list(stored.shape)}"
                    problems.append((name, said))
                given.append(Given(file, name, stored))
    return given, problems


def _dtype(code: str) -> str:
    """Our name of a dtype of safetensors."""
    return {"BOOL": "b8"}.get(code, code.lower())


def _incomplete(recipe: Recipe, specs: dict[str, TensorSpec], given: set[Stored]) -> Iterator[tuple[str, str]]:
    """A tensor of the model is given whole under its own name, or by all of the checkpoint that have a part of it."""
    parts: dict[str, list[Stored]] = {name: [] for name in specs}
    for stored in recipe.all_tensors(specs.values()):
        for name in dict.fromkeys(piece.name for piece in stored.pieces):
            parts[name].append(stored)
    for name, spec in specs.items():
        own = whole(spec)
        if own not in given:
            yield from ((part.name, "is missing") for part in parts[name] if part not in given)
        elif any(part in given and part.pieces != own.pieces for part in parts[name]):
            yield name, "is there whole, and in parts too"


def _fill(values: dict[str, Tensor], given: list[Given]) -> Iterator[tuple[str, str]]:
    """Copy what is given into place; what is given again has to be what is there."""
    filled: set[tuple[Piece, ...]] = set()
    for file in dict.fromkeys(entry.file for entry in given):
        with _opened(file) as tensors:
            for name, stored in ((entry.name, entry.stored) for entry in given if entry.file == file):
                if not _put(values, stored, tensors.get_tensor(name), stored.pieces in filled):
                    yield name, "is there twice, with different values"
                filled.add(stored.pieces)


def _put(values: dict[str, Tensor], stored: Stored, tensor: Tensor, again: bool) -> bool:
    """Copy a tensor of a file into place, or say whether it is there already."""
    for piece in stored.pieces:
        source, target = piece.there.of(tensor, piece.sizes), piece.here.of(values[piece.name], piece.sizes)
        if not again:
            target.copy_(source)
        elif not torch.equal(target, source.to(target)):
            return False
    return True


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(file, str(error)) from error


def _unreadable(file: Path, why: str) -> ArtifactError:
    return ArtifactError(Problem("weights-unreadable", f"{file} cannot be read", str(file), why,
                                 "give a safetensors file, or a folder of them"))  # fmt: skip


def _refuse(problems: Iterable[tuple[str, str]], place: Path, recipe: Recipe) -> None:
    """Raise ArtifactError (`weights-mismatch`) where there are problems: names of which the same is wrong, together."""
    names: dict[str, list[str]] = {}
    for name, said in problems:
        names.setdefault(said, []).append(name)
    lines = [f"{name} {said}" for said, named in names.items() for name in folded(named)]
    if lines and recipe.refused:
        lines.append(f"names can only be those of the module: no recipe was found at build ({recipe.refused})")
    if lines:
        raise ArtifactError(Problem("weights-mismatch", "the weights are not this model's", str(place),
                                    "\n".join(lines), "give weights saved from the model that was built"))  # fmt: skip
