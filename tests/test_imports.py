"""What tests import from each other."""

from tests.fast import ROOT, imports


def test_no_folder_is_imported_for_a_helper():
    """`from tests import training` is an empty package where the folder has that name, and the helper is no more."""
    names = {(path.name, name) for path in (ROOT / "tests").rglob("*.py") for name in imports(path)}
    ours = sorted((file, name) for file, name in names if name.startswith("tests."))
    assert ours and [(file, name) for file, name in ours if (ROOT / name.replace(".", "/")).is_dir()] == []
