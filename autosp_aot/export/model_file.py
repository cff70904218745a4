"""MODEL.py: the two functions a user writes, read from a file, and what they return, checked.

    def build_model(**options) -> nn.Module
    def example_batch(batch_size, seq_len) -> dict[str, Tensor]        the keyword inputs of forward
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
