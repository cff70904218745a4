"""A folder is replaced as a whole, or stays as it was."""

import os

import pytest

from autosp_aot.artifact.atomic_folder import refuse_unwritable, replacing
from autosp_aot.errors import AutospError


def test_it_is_there_when_all_is_written(tmp_path):
    path = tmp_path / "new" / "a"
    with replacing(path) as made:
        (made / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    assert os.listdir(path.parent) == ["a"]


def test_what_was_there_is_replaced_with_all_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("0")
    with replacing(tmp_path / "a") as made:
        (made / "x").write_text("1")
    assert os.listdir(tmp_path / "a") == ["x"]
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("0")
    with pytest.raises(RuntimeError, match="stop"), replacing(tmp_path / "a") as made:
        (made / "x").write_text("1")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path / "a") == ["old"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AutospError) as caught, replacing(tmp_path / "file" / "a"):
        raise AssertionError("it was never to get here")
    assert str(caught.value).startswith(f"error[output-unwritable]: {tmp_path / 'file' / 'a'} cannot be written\n")


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_followed(tmp_path, there):
    if there:
        (tmp_path / "far").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "far")
    with replacing(tmp_path / "a") as made:
        (made / "x").write_text("1")
    assert (tmp_path / "a").is_symlink()
    assert os.listdir(tmp_path / "far") == ["x"]
    assert sorted(os.listdir(tmp_path)) == ["a", "far"]


def test_a_place_that_could_not_be_written_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 250)):
        with pytest.raises(AutospError, match=r"error\[output-unwritable\]"):
            refuse_unwritable(path)
    refuse_unwritable(tmp_path / "new" / "a")
    assert os.listdir(tmp_path) == ["file"]
