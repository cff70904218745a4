"""No refusal of export/ without a test in this folder that applies its fix."""

import ast
from pathlib import Path

from autosp_aot import export

SOURCES = sorted(Path(export.__file__).parent.rglob("*.py"))
TESTS = [path.read_text() for path in sorted(Path(__file__).parent.rglob("test_*.py"))]


def problems(tree: ast.Module) -> list[ast.expr]:
    """The fixes that a file's problems are made with."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem"]
    return [next((word.value for word in call.keywords if word.arg == "fix"), call.args[-1]) for call in calls]


def test_the_fix_of_every_refusal_is_applied_in_a_test():
    fixes = [fix for path in SOURCES for fix in problems(ast.parse(path.read_text()))]
    texts = {fix.value for fix in fixes if isinstance(fix, ast.Constant)}
    assert len(texts) > 30
    strings = {node.value for text in TESTS for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert texts - strings == set()
