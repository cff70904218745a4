"""The artifact: a folder of text and safetensors, written at once and read strictly.

    manifest.json        what it is, what it was built from, inputs, parameters, costs, hashes of all other files
    whole.program        the canonical unsharded step
    body.0.program       the text that ranks of one structure share
    ranks.json           by rank: its body, and the constants that differ
    buffers.safetensors  values that a checkpoint does not hold
    weights/             optional: initial weights
    report.html          the same facts for people

No pickle, no eval; the same build gives the same bytes anywhere.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from autosp_aot.config import checked_config
from autosp_aot.errors import ArtifactError, BuildError, Problem
from autosp_aot.program import ITEMSIZE, Program, Value
from autosp_aot.program_text import parse_program, print_program
from autosp_aot.verify import verify

FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "weights/model.safetensors"
BUFFERS = "buffers.safetensors"
WHOLE = "whole.program"
RANKS = "ranks.json"
REPORT = "report.html"
REQUIRED = frozenset({WHOLE, RANKS, BUFFERS, REPORT})
BODY = re.compile(r"body\.\d+\.program")
TARGETS = ("cpu", "cuda", "rocm")
RANK_SECTIONS = ("forward", "backward", "sum_gradients")
TEXT_LIMIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, dtype (`f32`) and whole shape; `vocabulary` is the number of ids it may hold, where known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    vocabulary: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    versions      of the packages that decide the bytes: torch, and those the model's classes come from
    source        sha256 of the model file, its options and the build's options ("" for a model built in Python)
    aliases       further names of parameters and buffers (tied weights): name -> name it is stored under
    trainable     names of the parameters that get gradients
    operators     schema of every operator of the programs
    cuts          intervals of all ranks, by the name that decisions use
    decisions     the strategy of each call that is not computed whole on every rank, by its first result
    """

    format: int
    versions: dict[str, str]
    source: str
    ranks: int
    target: str
    recompute: str
    memory_budget_bytes: int | None
    tile: str | int
    offload: str
    sequence_dims: dict[str, int]
    batch: tuple[TensorSpec, ...]
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    aliases: dict[str, str]
    trainable: tuple[str, ...]
    operators: dict[str, str]
    costs: dict
    fallbacks: tuple[dict, ...]
    cuts: dict[str, str]
    decisions: dict[str, str]
    files: dict[str, str]

    @property
    def has_weights(self) -> bool:
        return WEIGHTS in self.files

    @property
    def vocabulary(self) -> int | None:
        """How many token ids there are; None where no input is looked up in an embedding."""
        return min((spec.vocabulary for spec in self.batch if spec.vocabulary is not None), default=None)


@dataclass(frozen=True)
class Artifact:
    """A build in memory: its manifest (without file hashes until it is written), programs and values."""

    manifest: Manifest
    whole: Program
    program: Program
    buffers: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    report: str

    def save(self, path: str | Path) -> Path:
        """Write the artifact, replacing one that is there; raises BuildError for any other existing path."""
        return write_artifact(self, Path(path))


# --- write --------------------------------------------------------------------------------------------------------


def refuse_existing(path: Path) -> None:
    """Raise BuildError (`output-exists`) where something that is no artifact stands at `path`."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise BuildError(
            Problem("output-exists", f"{path} exists and is not an artifact", str(path),
                    "only an artifact is ever replaced", "give another folder with -o, or move it away")
        )  # fmt: skip


def write_artifact(artifact: Artifact, path: Path) -> Path:
    """Write all files beside `path` and put them in place in one step: an artifact is whole or not there."""
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            made = Path(scratch, "new")
            made.mkdir()
            _write_files(artifact, made)
            _put(made, path, Path(scratch, "old"))
    except OSError as error:
        raise BuildError(
            Problem("output-unwritable", f"{path} cannot be written", str(path), str(error),
                    "give another folder with -o, or make room there")
        ) from error  # fmt: skip
    return path


def _put(made: Path, path: Path, old: Path) -> None:
    """Move `made` to `path`; what was there goes to `old`, and back if the move fails."""
    if not path.exists():
        os.rename(made, path)
        return
    os.rename(path, old)
    try:
        os.rename(made, path)
    except OSError:
        os.rename(old, path)
        raise


def _write_files(artifact: Artifact, path: Path) -> None:
    body, constants = print_program(artifact.program)
    whole, _ = print_program(artifact.whole)
    ranks = artifact.manifest.ranks
    entries = [
        {"body": "body.0.program", "constants": {name: _own(values, rank, ranks) for name, values in constants.items()}}
        for rank in range(ranks)
    ]
    texts = {WHOLE: whole, "body.0.program": body, RANKS: _ranks_text(entries), REPORT: artifact.report}
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    _write_tensors(artifact.buffers, path / BUFFERS)
    if artifact.weights is not None:
        (path / WEIGHTS).parent.mkdir()
        _write_tensors(artifact.weights, path / WEIGHTS)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    manifest = asdict(artifact.manifest) | {"files": {name: _sha256(path / name) for name in names}}
    (path / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    safetensors.torch.save_file(apart, path)
    path.chmod(0o644)  # safetensors makes it readable for its owner only


def _own(values: tuple[int, ...], rank: int, ranks: int) -> int | tuple[int, ...]:
    """A rank's number of a constant, or its numbers of all tiles."""
    tiles = len(values) // ranks
    return values[rank] if tiles == 1 else values[rank * tiles : (rank + 1) * tiles]


def _ranks_text(ranks: list[dict]) -> str:
    """One line a rank, so that a changed constant is a changed line."""
    return "[\n" + ",\n".join(json.dumps(rank) for rank in ranks) + "\n]\n"


def sealed(manifest: dict) -> str:
    """The text of manifest.json: the manifest and its own hash."""
    whole = {"sha256": _seal(manifest), "manifest": manifest}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- read ---------------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an artifact, with the hash of every file checked. Raises ArtifactError."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        why = f"it has no {MANIFEST}"
        raise _damaged("artifact-missing", f"{path} is not an artifact", why, "build one with autosp-aot build")
    try:
        text = _text(path / MANIFEST)
        whole = json.loads(text)
        found = whole["manifest"]
        if text != sealed(found):
            raise ValueError("its own hash does not match")
        if found.get("format") != FORMAT:
            raise ValueError(f"format {found.get('format')}, this version reads {FORMAT}")
        manifest = _manifest(found)
    except (ValueError, KeyError, TypeError, AttributeError, BuildError) as error:
        raise _damaged("manifest-damaged", f"{path / MANIFEST} cannot be trusted", str(error)) from error
    _check_files(path, manifest)
    if len(_ranks(path)) != manifest.ranks:
        raise _damaged("ranks-damaged", f"{path / RANKS} has {len(_ranks(path))} ranks", f"it is for {manifest.ranks}")
    return manifest


def _manifest(found: dict) -> Manifest:
    names = {field.name for field in fields(Manifest)}
    if set(found) != names:
        raise ValueError(f"unexpected or missing keys: {sorted(set(found) ^ names)}")
    for key in ("batch", "parameters", "buffers"):
        found[key] = tuple(_tensor_spec(entry) for entry in found[key])
    for key in ("trainable", "fallbacks"):
        found[key] = tuple(found[key])
    found["costs"]["moved"] = tuple(found["costs"]["moved"])
    if not isinstance(found["ranks"], int) or found["ranks"] < 1:
        raise ValueError("ranks is not a positive number")
    if found["target"] not in TARGETS:
        raise ValueError("no such target")
    options = (found[key] for key in ("recompute", "memory_budget_bytes", "tile", "offload"))
    checked_config(found["ranks"], found["target"], *options)
    stored = {spec.name for spec in found["parameters"]}
    if not {*found["aliases"].values(), *found["trainable"]} <= stored:
        raise ValueError("an alias or a trainable name is no parameter")
    dims = {spec.name: len(spec.shape) for spec in found["batch"]}
    if not all(dim in range(dims[name]) for name, dim in found["sequence_dims"].items()):
        raise ValueError("a sequence dim is no dim of the input")
    for key in ("versions", "cuts", "decisions"):
        if not all(isinstance(text, str) for text in found[key].values()):
            raise ValueError(f"{key} are not texts")
    if not {"autosp-aot", "torch"} <= set(found["versions"]):
        raise ValueError("the versions of autosp-aot and torch are missing")
    return Manifest(**found)


def _tensor_spec(entry: dict) -> TensorSpec:
    spec = TensorSpec(**{**entry, "shape": tuple(entry["shape"])})
    if spec.dtype not in ITEMSIZE or not all(isinstance(n, int) and n >= 0 for n in spec.shape):
        raise ValueError(f"{spec.name} has no valid type")
    return spec


def _check_files(path: Path, manifest: Manifest) -> None:
    strange = sorted(name for name in manifest.files if name not in REQUIRED | {WEIGHTS} and not BODY.fullmatch(name))
    if strange:
        raise _damaged("artifact-files", f"{path} lists {', '.join(strange)}", "no artifact has a file of that name")
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    odd = there ^ (REQUIRED | set(manifest.files))
    if odd:
        what = f"{path} has missing or unexpected files: {', '.join(sorted(odd))}"
        raise _damaged("artifact-files", what, "the manifest lists all files")
    for name, digest in manifest.files.items():
        if _sha256(path / name) != digest:
            raise _damaged("file-changed", f"{path / name} is not what was built", "its hash is not the manifest's")


def _text(path: Path) -> str:
    if path.stat().st_size > TEXT_LIMIT_BYTES:
        raise _damaged("artifact-size", f"{path} is over {TEXT_LIMIT_BYTES} bytes", "no artifact has so long a text")
    return path.read_text(encoding="utf-8")


def read_whole(path: str | Path) -> Program:
    """The unsharded step of an artifact."""
    return _parsed(Path(path) / WHOLE, {}, 1)


def read_rank(path: str | Path, rank: int) -> Program:
    """One rank's program, every constant filled in; verified. Raises ArtifactError."""
    entries = _ranks(Path(path))
    program = _parsed(Path(path) / entries[rank]["body"], entries[rank]["constants"], len(entries))
    _verify_rank(program)
    return program


def read_bodies(path: str | Path) -> list[tuple[tuple[int, ...], Program]]:
    """Each body with the ranks that run it; a constant holds the numbers of all ranks (of its own ranks, repeated)."""
    entries = _ranks(Path(path))
    bodies: dict[str, list[int]] = {}
    for rank, entry in enumerate(entries):
        bodies.setdefault(entry["body"], []).append(rank)
    found = []
    for body, ranks in bodies.items():
        names = entries[ranks[0]]["constants"]
        if any(set(entries[rank]["constants"]) != set(names) for rank in ranks):
            raise _damaged("ranks-damaged", f"ranks of {body} have different constants", "they share its names")
        spread = [entries[rank if rank in ranks else ranks[0]]["constants"] for rank in range(len(entries))]
        constants = {name: _of_all([constant[name] for constant in spread]) for name in names}
        program = _parsed(Path(path) / body, constants, len(entries))
        _verify_rank(program)
        found.append((tuple(ranks), program))
    return found


def _of_all(numbers: list[int | tuple[int, ...]]) -> tuple[int, ...]:
    """A constant's numbers of all ranks, or of all their tiles."""
    return tuple(n for own in numbers for n in (own if isinstance(own, tuple) else (own,)))


def _verify_rank(program: Program) -> None:
    verify(program)
    if tuple(section.name for section in program.sections) != RANK_SECTIONS:
        raise _damaged("program-illegal", "a rank's program lacks a section", f"it has {', '.join(RANK_SECTIONS)}")


def read_tensors(path: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file of an artifact. Raises ArtifactError."""
    try:
        return safetensors.torch.load_file(Path(path) / name)
    except safetensors.SafetensorError as error:
        raise _damaged("tensors-unreadable", f"{Path(path) / name} cannot be read", str(error)) from error


def _ranks(path: Path) -> list[dict]:
    try:
        entries = json.loads(_text(path / RANKS))
        if not isinstance(entries, list):
            raise ValueError("it is no list of ranks")
        for entry in entries:
            if set(entry) != {"body", "constants"}:
                raise ValueError("a rank has a body and constants")
            entry["constants"] = {name: _number(n) for name, n in entry["constants"].items()}
            if not BODY.fullmatch(entry["body"]) or not (path / entry["body"]).is_file():
                raise ValueError(f"no body {entry['body']!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged("ranks-damaged", f"{path / RANKS} cannot be read", str(error)) from error
    return entries


def _number(number: object) -> int | tuple[int, ...]:
    """A constant as it is read: a number, or one for each tile."""
    numbers = number if isinstance(number, list) else [number]
    if not numbers or not all(type(n) is int for n in numbers):
        raise ValueError("a constant is a whole number, or one for each tile")
    return tuple(numbers) if isinstance(number, list) else number


def _parsed(path: Path, constants: Mapping, ranks: int) -> Program:
    try:
        text = _text(path)
    except UnicodeDecodeError as error:
        raise _damaged("program-unreadable", f"{path} cannot be read", str(error)) from error
    program = parse_program(text, constants)
    if program.ranks != ranks:
        raise _damaged("ranks-damaged", f"{path} is for {program.ranks} ranks", f"{RANKS} has {ranks}")
    return program


def specs(values: list[Value], vocabularies: Mapping[str, int] | None = None) -> tuple[TensorSpec, ...]:
    """Tensor specs of whole values."""
    known = vocabularies or {}
    return tuple(TensorSpec(v.name, v.dtype, v.shape, known.get(v.name)) for v in values)


def _damaged(code: str, what: str, why: str, fix: str = "build the artifact again") -> ArtifactError:
    return ArtifactError(Problem(code, what, why=why, fix=fix))
