"""README and docs against the repository: widths, links, paths, diffs, and every `autosp-aot` command.

All commands are parsed as the command line would. README's are also run, in order, in a folder where `model.py` is
examples/llama.py; what would take minutes is made smaller (`SMALLER`).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from autosp_aot.commands.cli import main as command_line

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WIDTH = 120
PATHS = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|txt|toml))(?:::\w+)?`|`((?:ci|benchmarks|tests)/[\w/.-]+)`")
IN_BLOCKS = re.compile(r"^    +(?:\| +)?((?:\w+/)+\w+\.py)", re.MULTILINE)
MODULES = re.compile(r"python -m ((?:benchmarks|tests)\.\w+)")
WRITTEN = ("weights/", "build/")  # paths in an artifact, and what a command of the page makes
SMALLER = {
    "--seq 4096": "--seq 64", "--seq 256": "--seq 64", "--seq 32k,128k": "--seq 64,128", "--seq 128k": "--seq 128",
    "--max-seq": "", "--sp 2,4,8": "--sp 2,4", "--sp 8": "--sp 2", "--sp 4": "--sp 2", ".sp4": ".sp2",
    "66GiB": "64MiB", "--dump passes/": "--seq 64 --dump passes/", "--accumulate 4": "--accumulate 2",
    "--data corpus/": "--data corpus --steps 2", "build/stdlib.txt": "corpus/text.txt --steps 2",
    "model_type=mistral": "model_type=mistral --set hidden_size=64 --set intermediate_size=64 --set vocab_size=64",
    "a.sp2 b.sp2": "model.sp2 model.sp2",
}  # fmt: skip


def main() -> int:
    checks = (widths, links, paths, diffs, parsed)
    problems = [problem for path in DOCS for check in checks for problem in check(path)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems or not run() else 0


def widths(path: Path) -> Iterator[str]:
    for at, line in enumerate(path.read_text().splitlines(), 1):
        if len(line) > WIDTH:
            yield f"{path.name}:{at}: {len(line)} columns"


def links(path: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", path.read_text()):
        if not (path.parent / target).exists():
            yield f"{path.name}: the link to {target} leads nowhere"


def paths(path: Path) -> Iterator[str]:
    """Files that are named, from the root, the package or the page's folder, and modules that are run."""
    text = path.read_text()
    named = [match[1] or match[2] for match in PATHS.finditer(text)]
    for name in [*named, *IN_BLOCKS.findall(text)]:
        places = (ROOT, ROOT / "autosp_aot", path.parent)
        if not name.startswith(WRITTEN) and not any((place / name).exists() for place in places):
            yield f"{path.name}: there is no {name}"
    for name in MODULES.findall(text):
        if not (ROOT / (name.replace(".", "/") + ".py")).exists():
            yield f"{path.name}: there is no module {name}"


def diffs(path: Path) -> Iterator[str]:
    """Lines that a diff adds to a file which has no such line."""
    for block in re.findall(r"^```diff\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        lines: list[str] = []
        for line in block.splitlines():
            if line.startswith("+++ b/"):
                file = line.removeprefix("+++ b/")
                lines = (ROOT / file).read_text().splitlines() if (ROOT / file).exists() else []
            elif line.removeprefix("+") not in lines:
                yield f"{path.name}: {file} has no line {line.removeprefix('+')!r}"


def commands(text: str) -> list[str]:
    """The `autosp-aot` commands of blocks and of code in lines; comments are left out, continued lines joined."""
    blocks = re.sub(r"\\\n\s*", "", text)
    found = [line.strip().removeprefix("+ ") for line in blocks.splitlines() if line.startswith("    ")]
    found += [" ".join(code.split()) for code in re.findall(r"`(autosp-aot [^`]+)`", text)]
    return [line.partition("  #")[0].strip() for line in found if line.startswith("autosp-aot ")]


def parsed(path: Path) -> Iterator[str]:
    """Commands that the command line would not take. Files that they name need not exist."""
    for command in commands(path.read_text()):
        name, *rest = shlex.split(command)[1:]
        known = command_line.commands.get(name)
        if known is None:
            yield f"{path.name}: {command}: there is no such command"
        elif rest:
            try:
                with existing(known):
                    known.make_context(name, rest, resilient_parsing=False)
            except click.ClickException as error:
                yield f"{path.name}: {command}: {error.format_message()}"


class existing:
    """While it holds, a command's paths need not exist."""

    def __init__(self, command: click.Command):
        self.types = [param.type for param in command.params if isinstance(param.type, click.Path)]

    def __enter__(self):
        self.before = [kind.exists for kind in self.types]
        for kind in self.types:
            kind.exists = False

    def __exit__(self, *_):
        for kind, exists in zip(self.types, self.before):
            kind.exists = exists


def run() -> bool:
    """Whether README's commands run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copy(ROOT / "examples" / "llama.py", folder / "model.py")
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / "corpus").mkdir()
        shutil.copy(README, folder / "corpus" / "text.txt")
        for command in commands(README.read_text()):
            for long, short in SMALLER.items():
                command = command.replace(long, short)
            done = subprocess.run(command, shell=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
            if done.returncode:
                print(f"README.md: {command}: exit code {done.returncode}\n{done.stdout}")
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
