"""What a user can cause, said as what / where / why / fix with a stable code."""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Problem:
    """One offender: a stable code, what happened, where (the user's file and line), why, and how to fix it."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""


class AutospError(Exception):
    """Base of everything a user can cause: all offenders at once; `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(self, *problems: Problem):
        self.problems = problems
        super().__init__(render(problems))

    def __str__(self) -> str:
        """What it says, whatever torch has added on the way."""
        return render(self.problems)

    def __reduce__(self):
        """As it is made, so that it crosses to another process whole."""
        return type(self), self.problems


class BuildError(AutospError):
    """The model, the batch or the options cannot be built exactly (exit code 2)."""


class ArtifactError(AutospError):
    """An artifact is damaged, unsafe, or does not fit this machine, these weights or this batch (exit code 3)."""

    exit_code = 3


def render(problems: tuple[Problem, ...]) -> str:
    """The text of the problems, one block each, as the command line prints it to stderr."""
    blocks = []
    for problem in problems:
        lines = [f"error[{problem.code}]: {problem.what}"]
        for label in ("where", "why", "fix"):
            text = getattr(problem, label)
            if text:
                lines.append(f"  {label:<6} " + text.replace("\n", "\n         "))
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def need_package(name: str, what: str) -> None:
    """Raise BuildError (`package-missing`) unless an optional package, the name of its extra too, is installed."""
    if find_spec(name) is None:
        missing = f"{what} needs the package {name}, which is not installed"
        raise BuildError(Problem("package-missing", missing, fix=f"pip install autosp-aot[{name}]"))
