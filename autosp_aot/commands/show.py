"""What an artifact is, as text and as JSON."""

from dataclasses import asdict
from pathlib import Path

from autosp_aot.artifact.read import read_manifest, read_program
from autosp_aot.artifact.tables import aligned, facts, fallbacks, replicated, traffic
from autosp_aot.ir.text import print_program
from autosp_aot.proof.collectives import collectives_of


def show(path: str | Path, rank: int, evaluation: bool = False) -> str:
    """Tables of what the artifact moves and keeps, then the program of a rank with its numbers filled in.

    With `evaluation` that is the program which gives the loss in eval mode.
    """
    manifest = read_manifest(path)
    text, _ = print_program(read_program(path, manifest, rank, evaluation))
    tables = [facts(manifest), traffic(manifest), *([replicated(manifest)] if fallbacks(manifest) else [])]
    return "\n\n".join([*map(aligned, tables), text])


def show_json(path: str | Path, rank: int, evaluation: bool = False) -> dict:
    """The manifest, the collectives of a rank and its program as text."""
    manifest = read_manifest(path)
    program = read_program(path, manifest, rank, evaluation)
    collectives = [asdict(collective) for collective in collectives_of(program, rank)]
    text, _ = print_program(program)
    return {"manifest": asdict(manifest), "rank": rank, "collectives": collectives, "program": text}
