"""Weights for an artifact: read, checked by name, shape and dtype, all offenders at once."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors import safe_open
from torch import Tensor

from autosp_aot.artifact import WEIGHTS, Manifest, TensorSpec
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.runtime.execute import DTYPES


def read_weights(path: Path, manifest: Manifest, init_from: Path | None) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, from `init_from` (a safetensors file or a folder of them) or the artifact.

    A tied weight may be given under any of its names. Raises ArtifactError: `no-weights`, `weights-unreadable`,
    `weights-mismatch`.
    """
    if init_from is None and not manifest.has_weights:
        raise ArtifactError(Problem("no-weights", "the artifact has no stored weights", str(path),
                                    "it was built with --no-weights, or they are 1 GB or more",
                                    "give --init-from: a safetensors file or a folder of them"))  # fmt: skip
    files = [path / WEIGHTS] if init_from is None else _files(init_from)
    wanted = {spec.name: spec for spec in manifest.parameters}
    names = {name: name for name in wanted} | manifest.aliases
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name not in names:
                        unexpected.append(name)
                    elif names[name] not in found or name == names[name]:
                        found[names[name]] = tensors.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ArtifactError(Problem("weights-unreadable", f"{file} cannot be read", str(file), str(error),
                                        "give a safetensors file, or a folder of them")) from error  # fmt: skip
    _check(wanted, found, unexpected, str(init_from or path))
    return found


def _files(init_from: Path) -> list[Path]:
    if not init_from.is_dir():
        return [init_from]
    files = sorted(init_from.glob("*.safetensors"))
    index = init_from / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({init_from / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not files:
        raise ArtifactError(Problem("weights-unreadable", f"{init_from} holds no safetensors file", str(init_from),
                                    fix="give a safetensors file, or a folder of them"))  # fmt: skip
    return files


def _check(wanted: Mapping[str, TensorSpec], found: Mapping[str, Tensor], unexpected: list[str], place: str) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not the model's" for name in unexpected]
    for name, tensor in found.items():
        spec = wanted[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, the model's is {spec.dtype} {list(spec.shape)}")
    if problems:
        raise ArtifactError(Problem("weights-mismatch", "the weights are not this model's", place, "\n".join(problems),
                                    "give weights saved from the model that was built"))  # fmt: skip
