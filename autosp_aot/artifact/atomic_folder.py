"""A folder is whole or not there: written beside its place, and moved to it in one step."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from autosp_aot.errors import AutospError, Problem


def refuse_unwritable(path: Path) -> None:
    """Raise AutospError (`output-unwritable`) where `replacing` could not make a folder; leaves nothing behind."""
    with _said(path):
        there = next(parent for parent in _target(path).parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{path.name}."):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `path` if the block ends without an error, and is deleted if not.

    A link is followed, so that what it points to is replaced. Raises AutospError (`output-unwritable`).
    """
    with _said(path):
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            made = Path(scratch, "new")
            made.mkdir()
            yield made
            _put(made, target, Path(scratch, "old"))


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise AutospError(
            Problem("output-unwritable", f"{path} cannot be written", str(path), str(error),
                    "give another folder, or make room there")
        ) from error  # fmt: skip


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


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
