"""The tests of `ci/test --fast`: of every room, no processes, no package but torch's.

    python -m pytest -p tests.fast

Left out are files that import such a package or what starts processes, in themselves or in what they import from
`tests/` and `examples/`, and what `SLOW` names. A test that meets either all the same fails.
"""

import ast
import functools
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"transformers", "deepspeed", "onnx"}
PROCESSES = {"subprocess", "multiprocessing"}
# Files, and tests in them, that are left out for the builds they do one after the other, or for what the code starts.
SLOW = (
    "tests/commands/check/test_eager.py",
    "tests/commands/check/test_oracle.py",
    "tests/commands/check/test_proof.py::test_what_is_refused_is_exit_code_3",
    "tests/commands/plan/test_planning.py",
    "tests/commands/test_diff.py",
    "tests/commands/test_explain.py",
    "tests/export/canonical/test_decompose.py",
    "tests/export/canonical/test_indices.py",
    "tests/export/test_fake.py",
    "tests/export/test_fixes_files.py",
    "tests/export/test_fixes_steps.py",
    "tests/export/test_kept.py",
    "tests/export/test_reads.py",
    "tests/export/test_sharing.py",
    "tests/export/test_state.py",
    "tests/passes/test_early_backward.py",
    "tests/runtime/test_host_pool.py::test_two_real_ranks_train_to_the_gradients_of_eager",
    "tests/test_fallback.py",
    "tests/test_hidden_rows.py",
    "tests/test_module_names.py",
    "tests/test_plain_models.py",
    "tests/test_sequences.py",
    "tests/training/test_loss_targets.py",
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.suffix == ".py" and left_out(collection_path) else None


def pytest_collection_modifyitems(config, items) -> None:
    slow = [item for item in items if item.nodeid.startswith(SLOW)]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


@pytest.fixture(autouse=True)
def light():
    """Fails a test that started processes, or by whose end a package was imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    yield
    assert not PACKAGES & sys.modules.keys(), "not a fast test: it imports a package that need not be installed"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt == before, "not a fast test: it starts a process"


def left_out(path: Path) -> bool:
    """Whether nothing of a test file is in the fast run."""
    return path.relative_to(ROOT).as_posix() in SLOW or bool((PACKAGES | PROCESSES) & packages(path))


@functools.cache
def packages(path: Path) -> frozenset[str]:
    """Top-level names of all that a file imports, and that its imports from `tests/` and `examples/` do."""
    found = set()
    for name in imports(path):
        found.add(name.partition(".")[0])
        files = [ROOT / f"{module.replace('.', '/')}.py" for module in (name, name.rpartition(".")[0])]
        found.update(*(packages(file) for file in files if name.startswith(("tests.", "examples.")) and file.exists()))
    return frozenset(found)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports: modules, and names in modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
