"""MODEL.py: the two functions a user writes, read from a file, and what they return, checked.

    def build_model(**options) -> nn.Module
    def example_batch(batch_size, seq_len) -> dict[str, Tensor]        the keyword inputs of forward

Which dim of which input is the sequence is found by asking for two lengths and comparing shapes.
"""

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.abc import ExecutionLoader
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from autosp_aot.artifact.batches import Constant, constants_of, flat, tensors_of
from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.fake import TooLarge, Weightless, at_most, weightless
from autosp_aot.export.keeping import tensors_of as attributes_of
from autosp_aot.export.user_code import FAILURES, defined_at, raised_at, said
from autosp_aot.export.watch import autocast_noted
from autosp_aot.ir.units import bytes_text

# Parameters that take more are never made while building.
WEIGHTS_LIMIT_BYTES = 10**9

STUBS = {
    "build_model": "def build_model(**options) -> torch.nn.Module:\n    return MyModel(**options)",
    "example_batch": "def example_batch(batch_size, seq_len) -> dict[str, torch.Tensor]:\n"
    "    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)\n"
    '    return {"input_ids": tokens, "labels": tokens}',
}


@dataclass(frozen=True)
class ModelFile:
    """The two functions of a model file, its name without suffix, and the SHA-256 of its text.

    `path` and `imported` say where it is, and what had been imported before it ran.
    """

    build_model: Callable[..., nn.Module]
    example_batch: Callable[[int, int], Mapping[str, Tensor]]
    stem: str
    sha256: str
    path: Path
    imported: frozenset[str]

    def again(self) -> "ModelFile":
        """The same run from its beginning, with the files of its folder that it imports: nothing has been built yet."""
        folder = str(self.path.resolve().parent) + os.sep
        for name in sys.modules.keys() - self.imported:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(folder) and f"{os.sep}site-packages{os.sep}" not in file:
                del sys.modules[name]
        return replace(read_model_file(self.path), imported=self.imported)


def read_model_file(path: str | Path) -> ModelFile:
    """Run the file under a private module name, its folder importable from then on. Raises BuildError."""
    path = Path(path)
    if not path.is_file():
        raise BuildError(
            Problem(
                "model-file-missing",
                f"there is no model file {path.name}",
                str(path),
                fix="give the path of a Python file with build_model and example_batch",
            )
        )
    source, imported = path.read_bytes(), frozenset(sys.modules)
    digest = hashlib.sha256(source).hexdigest()
    module = _run(path, source, f"_autosp_model_{digest[:16]}")
    missing = [name for name in STUBS if not callable(vars(module).get(name))]
    if missing:
        raise BuildError(
            Problem(
                "model-file-incomplete",
                f"{path.name} does not define {' or '.join(missing)}",
                path.name,
                "build calls build_model for the model and example_batch for the shapes of its inputs",
                "add\n" + "\n".join(["import torch", *(STUBS[name] for name in missing)]),
            )
        )
    return ModelFile(module.build_model, module.example_batch, path.stem, digest, path, imported)


def make_model(
    model_file: ModelFile, options: Mapping[str, object], seed: int = 0, weights: bool | None = None
) -> nn.Module:
    """`build_model(**options)`: with initial weights from `seed` if they are under 1 GB, else of meta tensors.

    With `weights` it has them whatever they take; with False only where building a small model reads them. Raises
    BuildError with the line where it fails.
    """
    build, place = model_file.build_model, defined_at(model_file.build_model)
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise BuildError(
            Problem(
                "option-unknown",
                f"build_model does not take these options: {error}",
                place,
                "each --set key=value is a keyword argument of build_model",
                "correct the name, or add the argument to build_model",
            )
        ) from error
    torch.manual_seed(seed)
    if weights:
        return _made(build, options, place)
    if weights is None:
        try:
            with at_most(WEIGHTS_LIMIT_BYTES):
                return _made(build, options, place)
        except TooLarge:
            build = model_file.again().build_model
    empty, counted, failure = _without_weights(build, options)
    reading = "" if empty is None else _read_weights(empty)
    if failure is None and not reading:
        return _checked_module(empty, place)
    if counted.nbytes <= WEIGHTS_LIMIT_BYTES and weights is False:
        return make_model(model_file.again(), options, seed)
    if failure is None or "meta" in str(failure):
        raise BuildError(_needs_weights(reading, failure, place)) from failure
    raise BuildError(_build_failed(failure, place)) from failure


def _made(build: Callable, options: Mapping[str, object], place: str) -> nn.Module:
    try:
        with autocast_noted():
            return _checked_module(build(**options), place)
    except FAILURES as error:
        raise BuildError(_build_failed(error, place)) from error


def _build_failed(error: Exception, place: str) -> Problem:
    return Problem(
        "build-model-failed",
        "build_model raised an exception",
        raised_at(error, inside=place) or place,
        said(error),
        "correct build_model or the options given with --set",
    )


def _without_weights(build: Callable, options: Mapping[str, object]) -> tuple[object, Weightless, Exception | None]:
    """What build_model makes of parameters without values, the bytes they stand for, and what it raised instead."""
    with weightless() as counted, autocast_noted():
        try:
            return build(**options), counted, None
        except FAILURES as error:
            return None, counted, error


def _read_weights(model: object) -> str:
    """A buffer or tensor that a model has computed of parameters, by name; "" where there is none."""
    if not isinstance(model, nn.Module):
        return ""
    own = {id(parameter) for parameter in model.parameters()}
    tensors = (*model.named_buffers(), *attributes_of(model))
    return next((name for name, tensor in tensors if tensor.is_meta and id(tensor) not in own), "")


def _needs_weights(reading: str, failure: Exception | None, place: str) -> Problem:
    why = f"models whose parameters take more than {bytes_text(WEIGHTS_LIMIT_BYTES)} are built without weights"
    if failure is None:
        return Problem("build-needs-weights", f"build_model computes {reading!r} of weights", place, why,
                       "compute it in forward")  # fmt: skip
    return Problem("build-needs-weights", "build_model reads weights", raised_at(failure) or place,
                   f"{why}\n{said(failure)}", "leave that line out where weight.is_meta, as it is here")  # fmt: skip


def _checked_module(model: object, place: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise BuildError(
            Problem(
                "not-a-module",
                f"build_model returned {type(model).__name__}",
                place,
                "what is built is the forward of a torch.nn.Module",
                "return the model",
            )
        )
    return model


def make_batch(
    model_file: ModelFile, batch_size: int, seq_len: int
) -> tuple[dict[str, Tensor | Constant], dict[str, int]]:
    """The example batch, flat, and which dim of an input is the sequence. Raises BuildError naming all offenders."""
    place = defined_at(model_file.example_batch)
    # Twice the length, not one more: an example_batch may insist on a multiple of something.
    batch, longer = (ask_batch(model_file, batch_size, length) for length in (seq_len, 2 * seq_len))
    if batch.keys() != longer.keys():
        raise BuildError(_changes(f"the inputs {sorted(batch.keys() ^ longer.keys())} come and go", place))
    problems, sequence_dims, constants = [], {}, constants_of(batch)
    if any(type(longer[name]) is not type(value) or longer[name] != value for name, value in constants.items()):
        raise BuildError(_changes(f"one of the constants {sorted(constants)} changes", place))
    for name, tensor in tensors_of(batch).items():
        other = longer[name]
        if not isinstance(other, Tensor) or tensor.dtype != other.dtype or tensor.dim() != other.dim():
            problems.append(_changes(f"input {name!r} changes its dtype or its number of dims", place))
            continue
        before, after = tensor.shape, other.shape
        changed = [dim for dim in range(len(before)) if before[dim] != after[dim]]
        if len(changed) > 1:
            problems.append(
                Problem(
                    "sequence-dim-ambiguous",
                    f"dims {changed} of input {name!r} change with the length",
                    place,
                    "each input is cut along one sequence dim",
                    "give one sequence dim, and make the rest in forward",
                )
            )
        elif changed:
            sequence_dims[name] = changed[0]
    if not problems and not sequence_dims:
        problems.append(
            Problem(
                "no-sequence-dim",
                "no input changes its shape with the length",
                place,
                "the dim that changes is the sequence, which the ranks share",
                "use seq_len in example_batch",
            )
        )
    if problems:
        raise BuildError(*problems)
    return batch, sequence_dims


def guess_sequence_dims(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Dim 1 of every input with at least two dims.

    Integers [B, S] are tokens, whatever their length: a source's and a target's differ. Raises BuildError where dim 1
    of another input has no such length, unless all inputs agree.
    """
    sizes = {name: tensor.shape[1] for name, tensor in batch.items() if tensor.dim() >= 2}
    tokens = {t.shape[1] for t in batch.values() if t.dim() == 2 and not t.dtype.is_floating_point}
    if not sizes or (len(set(sizes.values())) > 1 and not tokens.issuperset(sizes.values())):
        said_sizes = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise BuildError(
            Problem(
                "sequence-dim-unknown",
                f"dim 1 of the inputs has no one size: {said_sizes or 'no input has it'}",
                "batch",
                "without two lengths to compare, the sequence is taken to be dim 1 of every input",
                'say which it is: sequence_dims={"input_ids": 1, ...}',
            )
        )
    return dict.fromkeys(sizes, 1)


def checked_sequence_dims(batch: Mapping[str, Tensor], dims: Mapping[str, int]) -> dict[str, int]:
    """The dims that were given, counted from the front. Raises BuildError unless they are there and of one size."""
    depth = {name: tensor.dim() for name, tensor in batch.items()}
    wrong = [name for name, dim in dims.items() if name not in batch or not -depth[name] <= dim < depth[name]]
    found = {name: dim % batch[name].dim() for name, dim in dims.items() if name not in wrong}
    sizes = {name: batch[name].shape[dim] for name, dim in found.items()}
    if wrong or len(set(sizes.values())) != 1:
        said = f"the batch has no dim {dims[wrong[0]]} of {wrong[0]!r}" if wrong else f"the sequence is {sizes} long"
        raise BuildError(
            Problem(
                "sequence-dim-unknown",
                said if dims else "no input has a sequence dim",
                "sequence_dims",
                "the ranks share one sequence, which is a dim of at least one input",
                'say which it is: sequence_dims={"input_ids": 1, ...}',
            )
        )
    return found


class _Text(ExecutionLoader):
    """Runs the very text whose hash is stored: a cached .pyc can be older."""

    def __init__(self, path: Path, source: bytes):
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.source)


def _run(path: Path, source: bytes, name: str) -> ModuleType:
    loader = _Text(path, source)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, "there is a loader"
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with autocast_noted():
            loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        raise BuildError(
            Problem(
                "model-file-failed",
                f"{path.name} cannot be imported",
                raised_at(error) or path.name,
                said(error),
                "correct it: python must be able to run the file",
            )
        ) from error
    return module


def ask_batch(model_file: ModelFile, batch_size: int, seq_len: int) -> dict[str, Tensor | Constant]:
    """`example_batch(batch_size, seq_len)`, flat. Raises BuildError."""
    place = defined_at(model_file.example_batch)
    try:
        batch = model_file.example_batch(batch_size, seq_len)
    except FAILURES as error:
        raise BuildError(
            Problem(
                "example-batch-failed",
                f"example_batch({batch_size}, {seq_len}) raised an exception",
                raised_at(error, inside=place) or place,
                said(error),
                "make it work for any batch size and length",
            )
        ) from error
    return flat_batch(batch, place)


def flat_batch(batch: Mapping, place: str) -> dict[str, Tensor | Constant]:
    """A batch by flat names. Raises BuildError, at `place`, naming all that cannot be part of one."""
    if not isinstance(batch, Mapping):
        raise BuildError(_not_tensors(f"the batch is {type(batch).__name__}", place))
    try:
        return flat(batch)
    except ValueError as error:
        raise BuildError(*(_not_tensors(f"in the batch, {line}", place) for line in str(error).splitlines())) from error


def _not_tensors(what: str, place: str) -> Problem:
    return Problem(
        "batch-not-tensors",
        what,
        place,
        "the batch is the keyword inputs of forward",
        "return a dict of tensors, or of dicts of them; None, flags, numbers and texts are constants of the build",
    )


def _changes(what: str, place: str) -> Problem:
    return Problem(
        "batch-changes",
        what,
        place,
        "a batch of another length differs in the sequence dim only",
        "return the same names, dtypes and numbers of dims for every length",
    )
