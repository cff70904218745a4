"""Weights for an artifact: read, checked by name, shape and dtype, all offenders at once."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from autosp_aot.artifact import WEIGHTS, Manifest, TensorSpec
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.runtime.execute import DTYPES


def read_weights(path: Path, manifest: Manifest, init_from: Path | None) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, from `init_from` (a safetensors file or a folder) or the artifact.

    A tied weight may be given under any of its names, or under several with one value. Raises ArtifactError:
    `no-weights`, `weights-unreadable`, `weights-mismatch`.
    """
    if init_from is None and not manifest.has_weights:
        raise ArtifactError(Problem("no-weights", "the artifact has no stored weights", str(path),
                                    "it was built with --no-weights, or they are 1 GB or more",
                                    "give --init-from: a safetensors file or a folder of them"))  # fmt: skip
    files = [path / WEIGHTS] if init_from is None else _files(init_from)
    wanted = {spec.name: spec for spec in manifest.parameters}
    names = {name: name for name in wanted} | manifest.aliases
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name not in names:
                        problems.append(f"{name} is not the model's")
                        continue
                    tensor = tensors.get_tensor(name)
                    if not _same(found.setdefault(names[name], tensor), tensor):
                        problems.append(f"{name} is there twice, with different values")
        except (safetensors.SafetensorError, OSError) as error:
            raise _unreadable(file, str(error)) from error
    _check(wanted, found, problems, str(init_from or path))
    return found


def _files(init_from: Path) -> list[Path]:
    if not init_from.is_dir():
        return [init_from]
    files = sorted(init_from.glob("*.safetensors"))
    index = init_from / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({init_from / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(index, f"{type(error).__name__}: {error}") from error
    if not files:
        raise _unreadable(init_from, "it holds no safetensors file")
    return files


def _unreadable(file: Path, why: str) -> ArtifactError:
    return ArtifactError(Problem("weights-unreadable", f"{file} cannot be read", str(file), why,
                                 "give a safetensors file, or a folder of them"))  # fmt: skip


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def _check(wanted: Mapping[str, TensorSpec], found: Mapping[str, Tensor], problems: list[str], place: str) -> None:
    problems = [*(f"{name} is missing" for name in wanted if name not in found), *problems]
    for name, tensor in found.items():
        spec = wanted[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            wants = f"the model's is {spec.dtype} {list(spec.shape)}"
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, {wants}")
    if problems:
        raise ArtifactError(Problem("weights-mismatch", "the weights are not this model's", place, "\n".join(problems),
                                    "give weights saved from the model that was built"))  # fmt: skip
