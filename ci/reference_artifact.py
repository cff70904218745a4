"""The reference artifact of the present format: tests/artifact/formats/v<FORMAT>, and its line in the README there."""

import sys
from datetime import date
from pathlib import Path

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.manifest import FORMAT
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build_file

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ROOT / "tests" / "artifact" / "formats"
CONFIG = BuildConfig(ranks=2, target="cpu", tile=2, offload="host")


def main() -> int:
    path = build_file(FORMATS / "model.py", CONFIG, 5, 2, out=FORMATS / f"v{FORMAT}", weights=False)
    versions = read_manifest(path).versions
    link = f"| [v{FORMAT}](v{FORMAT}) |"
    row = f"{link} {date.today()} | {versions['autosp-aot']} | {versions['torch']} |"
    readme = FORMATS / "README.md"
    others = [line for line in readme.read_text().splitlines() if not line.startswith(link)]
    readme.write_text("\n".join([*others, row]) + "\n")
    print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
