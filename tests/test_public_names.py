"""What `autosp_aot` itself offers: fast to import, and seen by tools that read and do not run."""

import ast
import inspect
import subprocess
import sys

import autosp_aot


def test_importing_the_package_imports_no_torch():
    code = "import sys, autosp_aot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tools_are_told_of_the_names_that_are_imported_late():
    (told,) = (node for node in ast.parse(inspect.getsource(autosp_aot)).body if isinstance(node, ast.If))
    names = {alias.name: line.module for line in told.body for alias in line.names}
    assert names == autosp_aot._PUBLIC
    assert autosp_aot.__all__ == sorted(names) and set(names) <= set(dir(autosp_aot))


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(autosp_aot, "laod")
