import pytest

from autosp_aot.ir.units import bytes_of, bytes_text, length_of, length_text


@pytest.mark.parametrize("text, count", [
    ("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5KiB", 1536), ("7", 7), ("7 B", 7), ("2TiB", 2 * 2**40),
    ("0", 0), ("0MiB", 0),
])  # fmt: skip
def test_sizes_are_powers_of_1024_or_of_1000_as_the_unit_says(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text, count", [
    ("65.7GiB", 657 * 2**30 // 10), ("0.3B", 0), ("0.001GB", 10**6), ("9007199254740993.9B", 2**53 + 1),
])  # fmt: skip
def test_a_part_of_a_byte_is_left_out_exactly(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80G", "80gib", "1e3", "nan", "1/2GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size like 70GiB"):
        bytes_of(text)


@pytest.mark.parametrize("text, length", [("4096", 4096), ("128k", 131072), ("1M", 2**20), ("1.5k", 1536)])
def test_lengths_count_in_powers_of_two(text, length):
    assert length_of(text) == length


@pytest.mark.parametrize("text", ["", "0", "k", "128K", "128kB", "0.3", "0x10"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match="is not a length like 4096, 128k or 1M"):
        length_of(text)


@pytest.mark.parametrize("length", [1, 13, 1024, 1536, 131072, 2**20, 2**20 + 1024])
def test_a_length_is_written_so_that_it_reads_as_itself(length):
    assert length_of(length_text(length)) == length


@pytest.mark.parametrize("count, text", [(5, "5 B"), (2048, "2.00 KiB"), (3 * 2**40, "3072.00 GiB")])
def test_bytes_in_the_unit_that_suits_them(count, text):
    assert bytes_text(count) == text
