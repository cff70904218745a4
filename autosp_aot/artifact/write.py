"""An artifact in memory, and how it is written: whole or not at all, and the same bytes for the same build."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from autosp_aot.artifact.atomic_folder import replacing
from autosp_aot.artifact.checkpoint_layout import Recipe, print_recipe
from autosp_aot.artifact.html.page import artifact_page
from autosp_aot.artifact.manifest import (
    BUFFERS,
    CHECKPOINT,
    EVALUATE,
    MANIFEST,
    RANKS,
    REPORT,
    STEP,
    WEIGHTS,
    WHOLE,
    Json,
    Manifest,
    file_of,
    sealed,
    sha256_of,
)
from autosp_aot.errors import BuildError, Problem
from autosp_aot.ir.program import Program
from autosp_aot.ir.text import print_program


@dataclass(frozen=True)
class Programs:
    """The same for one device, and for all ranks."""

    whole: Program
    program: Program


@dataclass(frozen=True, repr=False)
class Artifact:
    """A build in memory: its manifest (without file hashes until it is written), programs and values.

    `whole` and `program` are the step; `evaluation`, where it was built, is what gives the loss in eval mode.
    """

    manifest: Manifest
    whole: Program
    program: Program
    evaluation: Programs | None
    recipe: Recipe
    buffers: dict[str, Tensor]
    weights: dict[str, Tensor] | None

    def __repr__(self) -> str:
        built = self.manifest
        return f"<Artifact of {built.ranks} ranks on {built.target}, compared with eager: {built.compared}>"

    def save(self, path: str | Path, proved: Callable[[Path], object] = lambda path: None) -> Path:
        """Write the artifact, replacing one that is there; raises AutospError for any other existing path.

        `proved` is given what was written before it is put in place, and what it raises leaves nothing behind.
        """
        return write_artifact(self, Path(path), proved)


def refuse_existing(path: Path) -> None:
    """Raise BuildError (`output-exists`) where something that is no artifact stands at `path`."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise BuildError(
            Problem("output-exists", f"{path} exists and is not an artifact", str(path),
                    "only an artifact is ever replaced", "give another folder with -o, or move it away")
        )  # fmt: skip


def write_artifact(artifact: Artifact, path: Path, proved: Callable[[Path], object]) -> Path:
    """Write all files, prove them, put them in place in one step. Raises BuildError (`output-exists`), AutospError."""
    refuse_existing(path)
    with replacing(path) as made:
        _write_files(artifact, made)
        proved(made)
    return path


def _write_files(artifact: Artifact, path: Path) -> None:
    texts = _texts(STEP, artifact.whole, artifact.program) | {CHECKPOINT: print_recipe(artifact.recipe)}
    texts[REPORT] = artifact_page(artifact.manifest, artifact.program)
    if artifact.evaluation is not None:
        texts |= _texts(EVALUATE, artifact.evaluation.whole, artifact.evaluation.program)
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    _write_tensors(artifact.buffers, path / BUFFERS)
    if artifact.weights is not None:
        (path / WEIGHTS).parent.mkdir()
        _write_tensors(artifact.weights, path / WEIGHTS)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    manifest = asdict(artifact.manifest) | {"files": {name: sha256_of(path / name) for name in names}}
    (path / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def _texts(kind: str, whole: Program, program: Program) -> dict[str, str]:
    """The files of one program, whole and of all ranks."""
    (text, _), (body, constants) = print_program(whole), print_program(program)
    own = [{name: _own(n, rank, program.ranks) for name, n in constants.items()} for rank in range(program.ranks)]
    first = file_of(kind, "body.0.program")
    entries = [{"body": first, "constants": numbers} for numbers in own]
    return {file_of(kind, WHOLE): text, first: body, file_of(kind, RANKS): _ranks_text(entries)}


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    safetensors.torch.save_file(apart, path)
    path.chmod(0o644)  # safetensors makes it readable for its owner only


def _own(values: tuple[int, ...], rank: int, ranks: int) -> int | tuple[int, ...]:
    """A rank's number of a constant, or its numbers of all tiles."""
    tiles = len(values) // ranks
    return values[rank] if tiles == 1 else values[rank * tiles : (rank + 1) * tiles]


def _ranks_text(ranks: list[Json]) -> str:
    """One line a rank, so that a changed constant is a changed line."""
    return "[\n" + ",\n".join(json.dumps(rank) for rank in ranks) + "\n]\n"
