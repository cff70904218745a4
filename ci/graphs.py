"""Reference artifacts: builds of the examples, committed as text, so that a change of any program is seen in review.

    python ci/graphs.py check     build them again and fail with what changed
    python ci/graphs.py accept    make what is built now the reference
"""

import sys
import tempfile
from pathlib import Path

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build_file
from autosp_aot.commands.diff import compare
from autosp_aot.errors import AutospError

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "artifacts" / "reference"
EXAMPLES = ("llama", "plain")
RANKS = (2, 4)


def main(command: str) -> int:
    if command == "accept":
        for path in build_all(REFERENCE):
            print(path.relative_to(ROOT))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return check(Path(scratch))
        except AutospError as error:
            print(error)
            return error.exit_code


def build_all(folder: Path) -> list[Path]:
    """Every reference artifact, built into `folder`; their paths."""
    return [build_example(name, ranks, folder / f"{name}.sp{ranks}") for name in EXAMPLES for ranks in RANKS]


def build_example(name: str, ranks: int, out: Path, weights: bool = False) -> Path:
    model = ROOT / "examples" / f"{name}.py"
    return build_file(model, BuildConfig(ranks), 64, out=out, weights=weights)


def check(scratch: Path) -> int:
    """Print how each build differs from its reference; 1 if any does."""
    changed = [path.name for path in build_all(scratch) if not same(REFERENCE / path.name, path)]
    if changed:
        print(f"{', '.join(changed)}: not the reference. If the change is wanted: ci/accept_graphs, and commit it.")
    return 1 if changed else 0


def same(reference: Path, built: Path) -> bool:
    comparison = compare(reference, built)
    if not comparison.same:
        print(f"--- {built.name}: a is the reference, b is built now\n{comparison.text}\n")
    return comparison.same


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
