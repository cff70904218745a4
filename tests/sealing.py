"""Artifacts changed on disk and sealed again, as someone would who wants them to be believed."""

import hashlib
import json
from pathlib import Path

from autosp_aot.artifact.manifest import MANIFEST, STEP, file_of, sealed

FILES = (
    "body.0.program", "buffers.safetensors", "checkpoint.json", "evaluate.body.0.program", "evaluate.ranks.json",
    "evaluate.whole.program", "manifest.json", "ranks.json", "report.html", "weights/model.safetensors",
    "whole.program",
)  # fmt: skip


def reseal(path: Path, **changes) -> None:
    """Write a manifest with `changes` and the hashes of the files that are there now."""
    manifest = json.loads((path / MANIFEST).read_text())["manifest"]
    files = [file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST]
    hashes = {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / MANIFEST).write_text(sealed(manifest | {"files": hashes} | changes))


def edit_ranks(path: Path, change, kind: str = STEP) -> None:
    """Apply `change` to the table of ranks, and seal."""
    table = path / file_of(kind, "ranks.json")
    ranks = json.loads(table.read_text())
    change(ranks)
    table.write_text(json.dumps(ranks))
    reseal(path)


def edit_text(path: Path, old: str, new: str, kind: str = STEP) -> None:
    """Replace the first `old` in the body, and seal."""
    body = path / file_of(kind, "body.0.program")
    assert old in body.read_text()
    body.write_text(body.read_text().replace(old, new, 1))
    reseal(path)
