"""A folder is whole or not there: written beside its place, and moved to it in one step."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from autosp_aot.errors import AutospError, Problem


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `path` if the block ends without an error, and is deleted if not.

    Raises AutospError (`output-unwritable`).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            made = Path(scratch, "new")
            made.mkdir()
            yield made
            _put(made, path, Path(scratch, "old"))
    except (OSError, SafetensorError) as error:
        raise AutospError(
            Problem("output-unwritable", f"{path} cannot be written", str(path), str(error),
                    "give another folder, or make room there")
        ) from error  # fmt: skip


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
