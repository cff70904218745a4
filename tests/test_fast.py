"""What `ci/test --fast` leaves out, of the files as they are."""

import pytest

from tests.fast import ROOT, SLOW, left_out

TESTS = ROOT / "tests"
ROOMS = sorted(folder.name for folder in TESTS.iterdir() if any(folder.rglob("test_*.py")))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_fast_tests(room):
    assert not all(map(left_out, (TESTS / room).rglob("test_*.py")))


@pytest.mark.parametrize("file", ["test_mixtures.py", "runtime/test_streaming.py", "test_architectures.py"])
def test_a_file_that_imports_what_a_fast_run_may_not_is_left_out(file):
    assert left_out(TESTS / file)


def test_what_is_left_out_is_there():
    assert [name for name in SLOW if not (ROOT / name.partition("::")[0]).exists()] == []
