"""An artifact read strictly: hashes, sizes, schema, parse, verify; nothing else in the folder is believed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import inf
from pathlib import Path

import safetensors.torch
from torch import Tensor

from autosp_aot import __version__
from autosp_aot.artifact.checkpoint_layout import Recipe, parse_recipe
from autosp_aot.artifact.config import BuildConfig, checked_config
from autosp_aot.artifact.manifest import (
    BODY,
    BUFFERS,
    CHECKPOINT,
    EVALUATE,
    FORMAT,
    MANIFEST,
    RANKS,
    READ_BY,
    REPORT,
    STEP,
    WEIGHTS,
    WHOLE,
    Json,
    Manifest,
    file_of,
    no_evaluation,
    sealed,
    sha256_of,
)
from autosp_aot.artifact.typed_json import typed
from autosp_aot.errors import ArtifactError, BuildError, Problem
from autosp_aot.ir.program import ITEMSIZE, Program, numbers_by_rank
from autosp_aot.ir.text import parse_program
from autosp_aot.ir.verify import verify
from autosp_aot.targets.table import TARGETS

SECTIONS = {STEP: ("forward", "backward", "sum_gradients"), EVALUATE: ("evaluate",)}
TEXT_LIMIT_BYTES = 512 * 2**20


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an artifact, with the hash of every file checked. Raises ArtifactError."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        why = f"it has no {MANIFEST}"
        raise _damaged("artifact-missing", f"{path} is not an artifact", why, "build one with autosp-aot build")
    try:
        _refuse_long(path / MANIFEST)
        text = (path / MANIFEST).read_text(encoding="utf-8")
        whole = json.loads(text)
        found = whole["manifest"]
        if text != sealed(found):
            raise ValueError("its own hash does not match")
        _check_format(path, found["format"], found["versions"]["autosp-aot"])
        manifest = _manifest(found)
    except (ValueError, KeyError, TypeError, AttributeError, BuildError, RecursionError) as error:
        raise _damaged("manifest-damaged", f"{path / MANIFEST} cannot be trusted", str(error)) from error
    _check_files(path, manifest)
    for kind in manifest.programs:
        if (count := len(_ranks(path, manifest, kind))) != manifest.ranks:
            what = f"{path / file_of(kind, RANKS)} has {count} ranks"
            raise _damaged("ranks-damaged", what, f"it is for {manifest.ranks}")
    return manifest


def _check_format(path: Path, number: object, writer: object) -> None:
    """Raise ArtifactError (`artifact-format`) for any format but this version's, with the version that reads it."""
    if type(number) is not int or type(writer) is not str:
        raise ValueError("format is no number, or the version that wrote it no text")
    if number == FORMAT:
        return
    # Of a later format only the artifact itself knows who reads it; of an earlier one, who was released since.
    reader = READ_BY.get(number, writer if number > FORMAT and writer != __version__ else None)
    what = f"{path} has format {number}, and autosp-aot {__version__} reads format {FORMAT}"
    why = f"autosp-aot {reader} reads format {number}" if reader else f"no released version reads format {number}"
    fix = f"use autosp-aot {reader}, or build the artifact again" if reader else "build the artifact again"
    raise _damaged("artifact-format", what, why, fix)


def _manifest(found: Json) -> Manifest:
    manifest: Manifest = typed(Manifest, found, "manifest")
    for spec in (*manifest.batch, *manifest.parameters, *manifest.buffers):
        if spec.dtype not in ITEMSIZE or min((*spec.shape, spec.vocabulary or 0)) < 0:
            raise ValueError(f"{spec.name} has no valid type")
    _check_config(manifest.config)
    if set(manifest.programs) not in ({STEP}, {STEP, EVALUATE}):
        raise ValueError("its programs are not a step, and an evaluation or none")
    if manifest.config.evaluation != (EVALUATE in manifest.programs):
        raise ValueError("its programs are not those that were to be built")
    parameters = {spec.name for spec in manifest.parameters}
    if not {*manifest.aliases.values(), *manifest.trainable} <= parameters:
        raise ValueError("an alias or a trainable name is no parameter")
    if parameters & manifest.aliases.keys():
        raise ValueError("an alias is the name of another parameter")
    dims = {spec.name: len(spec.shape) for spec in manifest.batch}
    if not all(dim in range(dims.get(name, 0)) for name, dim in manifest.sequence_dims.items()):
        raise ValueError("a sequence dim is no dim of the input")
    if not {"autosp-aot", "torch"} <= set(manifest.versions):
        raise ValueError("the versions of autosp-aot and torch are missing")
    # JSON's keys are sorted; the step comes first, as it is built, proved and run.
    programs = {name: manifest.programs[name] for name in (STEP, EVALUATE) if name in manifest.programs}
    return replace(manifest, programs=programs)


def _check_config(config: BuildConfig) -> None:
    """ValueError, or BuildError, for options that no build has."""
    device = config.device
    if config.ranks < 1:
        raise ValueError("ranks is not a positive number")
    if config.target not in TARGETS:
        raise ValueError("no such target")
    rates = [] if device is None else [value for name, value in vars(device).items() if name != "kind"]
    if device is not None and (device.kind != config.target or not all(0 < rate < inf for rate in rates)):
        raise ValueError("the device is not one of the target, with a memory and rates")
    if config.memory_budget_bytes is not None and config.memory_budget_bytes < 1:
        raise ValueError("the memory budget is not a positive number")
    budget_bytes = config.memory_budget_bytes
    checked_config(config.ranks, config.target, config.recompute, budget_bytes, config.tile, config.offload)


def _check_files(path: Path, manifest: Manifest) -> None:
    own = {file_of(kind, name) for kind in manifest.programs for name in (WHOLE, RANKS)}
    required = {CHECKPOINT, BUFFERS, REPORT} | own
    bodies = {name for name in manifest.files for kind in manifest.programs if _is_body(kind, name)}
    strange = sorted(set(manifest.files) - required - bodies - {WEIGHTS})
    if strange:
        raise _damaged("artifact-files", f"{path} lists {', '.join(strange)}", "no artifact has a file of that name")
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    odd = there ^ (required | set(manifest.files))
    if odd:
        what = f"{path} has missing or unexpected files: {', '.join(sorted(odd))}"
        raise _damaged("artifact-files", what, "the manifest lists all files")
    special = sorted(name for name in manifest.files if not (path / name).is_file())  # a link to a file is one
    if special:
        what = f"{path / special[0]} is no regular file"
        raise _damaged("artifact-files", what, "reading a pipe or a device might never end")
    for name, digest in manifest.files.items():
        if name not in (BUFFERS, WEIGHTS):
            _refuse_long(path / name)
        if sha256_of(path / name) != digest:
            raise _changed(path / name)


def _is_body(kind: str, name: str) -> bool:
    prefix = file_of(kind, "")
    return name.startswith(prefix) and bool(BODY.fullmatch(name.removeprefix(prefix)))


def _refuse_long(path: Path) -> None:
    if path.stat().st_size > TEXT_LIMIT_BYTES:
        raise _damaged("artifact-size", f"{path} is over {TEXT_LIMIT_BYTES} bytes", "no artifact has so long a text")


def _content(path: Path, manifest: Manifest, name: str) -> bytes:
    """What is in a file, read once: these bytes have the manifest's hash, whatever is put in their place meanwhile."""
    found = (path / name).read_bytes()
    if hashlib.sha256(found).hexdigest() != manifest.files[name]:
        raise _changed(path / name)
    return found


def read_whole(path: str | Path, manifest: Manifest, kind: str = STEP) -> Program:
    """The unsharded step of an artifact, or its unsharded evaluation."""
    return _parsed(Path(path), manifest, file_of(kind, WHOLE), {}, 1)


def read_recipe(path: str | Path, manifest: Manifest) -> Recipe:
    """How a checkpoint of the model is read and written. Raises ArtifactError (`checkpoint-damaged`)."""
    try:
        return parse_recipe(_content(Path(path), manifest, CHECKPOINT).decode(), manifest.parameters)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{Path(path) / CHECKPOINT} cannot be followed"
        raise _damaged("checkpoint-damaged", what, str(error)) from error


def read_rank(path: str | Path, manifest: Manifest, rank: int, kind: str = STEP) -> Program:
    """One rank's program, every constant filled in; verified. Raises ArtifactError."""
    entries = _ranks(Path(path), manifest, kind)
    program = _parsed(Path(path), manifest, entries[rank]["body"], entries[rank]["constants"], len(entries))
    _check_numbers(program, 1)
    _verify_rank(program, kind)
    return program


def read_program(path: str | Path, manifest: Manifest, rank: int, evaluation: bool = False) -> Program:
    """The program of a rank that someone asked for. Raises ArtifactError (`no-such-rank`, `no-evaluation`)."""
    if rank >= manifest.ranks:
        why = f"the artifact has ranks 0 to {manifest.ranks - 1}"
        raise ArtifactError(Problem("no-such-rank", f"there is no rank {rank}", str(path), why, "give another --rank"))
    if evaluation and manifest.evaluation is None:
        raise ArtifactError(no_evaluation(str(path)))
    return read_rank(path, manifest, rank, EVALUATE if evaluation else STEP)


def read_bodies(path: str | Path, manifest: Manifest, kind: str = STEP) -> list[tuple[tuple[int, ...], Program]]:
    """Each body with the ranks that run it; a constant holds the numbers of all ranks (of its own ranks, repeated)."""
    entries = _ranks(Path(path), manifest, kind)
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
        program = _parsed(Path(path), manifest, body, constants, len(entries))
        _check_numbers(program, len(entries))
        _verify_rank(program, kind)
        found.append((tuple(ranks), program))
    return found


def _check_numbers(program: Program, ranks: int) -> None:
    """Every number that differs has one value for each of `ranks` ranks, in a body one for each of their tiles."""
    for instr in (instr for section in program.sections for instr in section.instrs):
        outside = [n for n in numbers_by_rank(instr) if ranks == 1 or len(n.values) != ranks]
        body, count = (instr.body.instrs, ranks * instr.body.tiles) if instr.body else ((), 0)
        if outside or any(len(n.values) != count for inner in body for n in numbers_by_rank(inner)):
            name = next((out.name for out in instr.values()), instr.op)
            raise _damaged("ranks-damaged", f"a constant of {name} has too few or too many numbers",
                           "it has one for each rank, or for each of a rank's tiles")  # fmt: skip


def _of_all(numbers: list[int | tuple[int, ...]]) -> tuple[int, ...]:
    """A constant's numbers of all ranks, or of all their tiles."""
    return tuple(n for own in numbers for n in (own if isinstance(own, tuple) else (own,)))


def _verify_rank(program: Program, kind: str) -> None:
    verify(program)
    if tuple(section.name for section in program.sections) != SECTIONS[kind]:
        raise _damaged("program-illegal", "a rank's program lacks a section", f"it has {', '.join(SECTIONS[kind])}")


def read_tensors(path: str | Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file of an artifact. Raises ArtifactError."""
    try:
        return safetensors.torch.load(_content(Path(path), manifest, name))
    except safetensors.SafetensorError as error:
        raise _damaged("tensors-unreadable", f"{Path(path) / name} cannot be read", str(error)) from error


def _ranks(path: Path, manifest: Manifest, kind: str) -> list[Json]:
    try:
        entries: list[Json] = json.loads(_content(path, manifest, file_of(kind, RANKS)).decode())
        if not isinstance(entries, list):
            raise ValueError("it is no list of ranks")
        for entry in entries:
            if set(entry) != {"body", "constants"}:
                raise ValueError("a rank has a body and constants")
            entry["constants"] = {name: _number(n) for name, n in entry["constants"].items()}
            if not _is_body(kind, entry["body"]) or entry["body"] not in manifest.files:
                raise ValueError(f"no body {entry['body']!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged("ranks-damaged", f"{path / file_of(kind, RANKS)} cannot be read", str(error)) from error
    return entries


def _number(number: object) -> int | tuple[int, ...]:
    """A constant as it is read: a number, or one for each tile."""
    if type(number) is int:
        return number
    if not isinstance(number, list) or len(number) < 2 or not all(type(n) is int for n in number):
        raise ValueError("a constant is a whole number, or one for each tile")
    return tuple(number)


def _parsed(
    path: Path, manifest: Manifest, name: str, constants: Mapping[str, int | tuple[int, ...]], ranks: int
) -> Program:
    try:
        text = _content(path, manifest, name).decode()
    except UnicodeDecodeError as error:
        raise _damaged("program-unreadable", f"{path / name} cannot be read", str(error)) from error
    program = parse_program(text, constants) if constants else _without_constants(text)
    if program.ranks != ranks:
        raise _damaged("ranks-damaged", f"{path / name} is for {program.ranks} ranks", f"there are {ranks}")
    return program


@lru_cache(maxsize=4)
def _without_constants(text: str) -> Program:
    """A program of which all ranks have the same numbers: the unsharded one is asked for by several readers."""
    return parse_program(text, {})


def _changed(path: Path) -> ArtifactError:
    return _damaged("file-changed", f"{path} is not what was built", "its hash is not the manifest's")


def _damaged(code: str, what: str, why: str, fix: str = "build the artifact again") -> ArtifactError:
    return ArtifactError(Problem(code, what, why=why, fix=fix))
