"""Text and arrays of ids are read as what they are; what is neither is refused by name."""

import numpy as np
import pytest

from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.errors import ArtifactError
from autosp_aot.training.data import open_feed

INPUTS = (TensorSpec("input_ids", "i64", (3, 4), 256), TensorSpec("labels", "i64", (3, 4)))


def codes(error) -> list[str]:
    return [problem.code for problem in error.value.problems]


def test_a_window_of_a_folder_goes_on_in_the_next_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/empty", "sub/c"):
        (tmp_path / name).write_text("" if "empty" in name else name[-1] * 2)
    feed = open_feed(INPUTS, 0, tmp_path, None)
    windows = {bytes(row.tolist()) for step in range(20) for row in feed.at(step)["input_ids"]}
    assert windows == {b"aabb", b"abbc", b"bbcc"}


def test_of_a_folder_only_text_is_drawn(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\xff" * 500)
    (tmp_path / "b.txt").write_text("plaintext" * 10)
    rows = [row for step in range(10) for row in open_feed(INPUTS, 0, tmp_path, None).at(step)["input_ids"]]
    assert all(97 <= value <= 122 for row in rows for value in row.tolist())


def test_a_character_cut_through_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("äöü€😀" * 20)
    open_feed(INPUTS, 0, tmp_path, None).at(0)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, tmp_path, None).at(0)
    assert codes(error) == ["no-text"]


def test_token_ids_come_from_npy(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.uint16).reshape(5, 8))
    for row in open_feed(INPUTS, 0, tmp_path / "ids.npy", None).at(0)["input_ids"]:
        assert row.tolist() == list(range(row[0], row[0] + 4))


def test_a_window_lies_in_one_of_several_arrays_and_every_window_is_drawn(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.arange(10, 13, dtype=np.int32))  # shorter than a window
    np.save(tmp_path / "c.npy", np.arange(20, 25).reshape(5, 1))
    feed = open_feed(INPUTS, 0, tmp_path, None)
    starts = [row.tolist() for step in range(40) for row in feed.at(step)["input_ids"]]
    assert {row[0] for row in starts} == {0, 1, 2, 20, 21}
    assert all(row == list(range(row[0], row[0] + 4)) for row in starts)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.write_text("abc"), "data-too-short"),
        (lambda path: path.mkdir(), "data-too-short"),
        (lambda path: np.save(path.with_suffix(".npy"), np.zeros(9)), "bad-token-file"),
        (lambda path: path.with_suffix(".npy").write_text("nonsense"), "bad-token-file"),
        (lambda path: np.savez(path.with_suffix(".npy").open("wb"), np.zeros(9, int)), "bad-token-file"),
        (lambda path: path.with_suffix(".jsonl").write_text('{"text": "a"}' * 9), "data-format"),
        (lambda path: path.with_suffix(".GZ").write_bytes(bytes(99)), "data-format"),
        (lambda path: path.write_bytes("naïve café".encode("latin-1")), "data-not-text"),
        (lambda path: path.with_suffix(".bin").write_bytes(np.arange(99, dtype=np.uint16).tobytes()), "data-not-text"),
    ],
)
def test_data_that_cannot_serve_is_refused(make, code, tmp_path):
    make(tmp_path / "data")
    (path,) = tmp_path.iterdir()
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, path, None)
    assert codes(error) == [code]


def test_files_of_another_format_are_named(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.txt.gz", "d.parquet", "e.zst"):
        (tmp_path / name).write_text("text that is long enough")
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, tmp_path, None)
    assert str(error.value) == (
        "error[data-format]: run does not read a.jsonl, c.txt.gz, d.parquet and 1 more\n"
        f"  where  --data {tmp_path}\n"
        "  why    it reads UTF-8 text, a token a byte, and .npy files of token ids; a file of another format would be "
        "trained on as the bytes that it consists of\n"
        "  fix    write the text to .txt files, or its token ids with numpy.save('ids.npy', ids)"
    )


def test_arrays_and_text_are_not_mixed(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "b.txt").write_text("text that is long enough")
    with pytest.raises(ArtifactError, match="has .npy files and others\n"):
        open_feed(INPUTS, 0, tmp_path, None)


def test_of_a_file_that_is_text_in_parts_those_are_drawn(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 70000 + b"\xff" * 70000)
    feed = open_feed(INPUTS, 0, tmp_path / "a.txt", None)
    assert {int(token) for step in range(9) for token in feed.at(step)["input_ids"].flatten()} == {ord("a")}
