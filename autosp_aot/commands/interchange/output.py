"""Exporting a rank's program as a file for others: which rank, where to, and written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from autosp_aot.artifact.manifest import Manifest
from autosp_aot.artifact.read import read_manifest, read_program
from autosp_aot.errors import BuildError, Problem
from autosp_aot.ir.program import Program

# Writes a rank's program to a file: program, manifest, rank, the artifact's folder, the file.
Writer = Callable[[Program, Manifest, int, Path, Path], None]


def export_rank(path: Path, rank: int, evaluation: bool, out: Path | None, suffix: str, write: Writer) -> Path:
    """Write rank `rank`'s step, or its evaluation, to `out`; by default `<artifact>.rank<r>.<suffix>` beside it.

    Raises ArtifactError (`no-such-rank`, `no-evaluation`), BuildError (`output-inside`, `output-unwritable`) and what
    `write` raises.
    """
    manifest = read_manifest(path)
    program = read_program(path, manifest, rank, evaluation)
    whole = path.resolve()
    name = f"{whole.name}.rank{rank}{'.evaluation' if evaluation else ''}.{suffix}"
    out = whole.parent / name if out is None else out
    if whole in out.resolve().parents:
        raise BuildError(Problem("output-inside", f"{out} is in the artifact", str(out),
                                 "an artifact holds what its manifest lists and nothing else",
                                 "give a file beside the artifact with -o"))  # fmt: skip
    write(program, manifest, rank, path, out)
    return out


def write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside `out`, then put it in place in one step. Raises BuildError (`output-unwritable`)."""
    try:
        if out.exists() and not out.is_file():
            raise OSError("it is no file that could be replaced")
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=".", suffix=f".{out.name}")
        os.close(descriptor)
        try:
            write(Path(name))
            Path(name).chmod(0o644)
            Path(name).replace(out)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(Problem(
            "output-unwritable", f"{out} cannot be written", str(out), str(error),
            "give another file with -o, or make room there")) from error  # fmt: skip
