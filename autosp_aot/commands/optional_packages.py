"""Packages that are extras of this one: `pip install autosp-aot[onnx]`."""

from importlib.util import find_spec

from autosp_aot.errors import BuildError, Problem


def need_package(name: str, what: str) -> None:
    """Raise BuildError (`package-missing`) unless an optional package, the name of its extra too, is installed."""
    if find_spec(name) is None:
        missing = f"{what} needs the package {name}, which is not installed"
        raise BuildError(Problem("package-missing", missing, fix=f"pip install autosp-aot[{name}]"))
