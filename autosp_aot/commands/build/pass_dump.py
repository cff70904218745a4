"""What each pass of a build made, as text to look at."""

import json
from pathlib import Path

from autosp_aot.errors import BuildError, Problem
from autosp_aot.ir.program import Program
from autosp_aot.ir.text import print_program


class Dump:
    """Writes `00-capture.program`, `01-<pass>.program` and so on; numbers that differ between ranks stand beside it."""

    def __init__(self, folder: Path, out: Path):
        """Raise BuildError where `folder` is not empty, or inside the artifact `out` that is being built."""
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise _refused(folder, "it exists and is not an empty folder")
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise _refused(folder, f"it is in the artifact {out}, which holds nothing else")
        self.folder, self.count = folder, 0

    def __call__(self, name: str, program: Program) -> None:
        """Write what the pass `name` made. Raises BuildError where that cannot be."""
        text, constants = print_program(program)
        stem = f"{self.count:02}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{stem}.program").write_text(text, encoding="utf-8")
            if constants:
                (self.folder / f"{stem}.constants.json").write_text(json.dumps(constants) + "\n")
        except OSError as error:
            raise _refused(self.folder, str(error)) from error
        self.count += 1


def _refused(folder: Path, why: str) -> BuildError:
    what = f"programs cannot be dumped into {folder}"
    return BuildError(Problem("dump-refused", what, str(folder), why, "give --dump a folder of its own"))
