"""Build the examples in fresh processes: random hash seeds, other folders, other paths of the model, one hash."""

import hashlib
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDS = {"llama": ["--no-weights", "--no-weights"], "plain": ["--batch=2", "--batch=2", "--batch=2"]}


def main() -> int:
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in BUILDS.items():
            built = [build(name, option, Path(scratch, name, str(at))) for at, option in enumerate(options)]
            for other in built[1:]:
                for line in differences(built[0], other):
                    failed = True
                    print(f"{name}: {line}")
    return 1 if failed else 0


def build(name: str, option: str, folder: Path) -> Path:
    """An artifact built by a process of its own in `folder`, from a copy of the example there."""
    folder.mkdir(parents=True)
    model = folder / f"{name}.py"
    shutil.copy(ROOT / "examples" / model.name, model)
    seed = str(random.randrange(2**32))
    command = ["autosp-aot", "build", str(model), "--sp=3", "--seq=65", "--target=cpu", option]
    done = subprocess.run(
        [*command, "--out=built"], cwd=folder, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{name} was not built with PYTHONHASHSEED={seed}\n{done.stderr}")
    return folder / "built"


def differences(a: Path, b: Path) -> list[str]:
    first, second = contents(a), contents(b)
    names = sorted({*first, *second})
    return [f"{name} is not the same in two builds" for name in names if first.get(name) != second.get(name)]


def contents(path: Path) -> dict[str, tuple[str, int]]:
    """Hash and mode of every file."""
    return {
        str(file.relative_to(path)): (hashlib.sha256(file.read_bytes()).hexdigest(), stat.S_IMODE(file.stat().st_mode))
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


if __name__ == "__main__":
    sys.exit(main())
