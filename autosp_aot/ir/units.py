"""Bytes, lengths and times as people write them: `70GiB`, `128k`."""

import re
from fractions import Fraction

_BYTES = {"": 1, "B": 1, **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)},
          **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}  # fmt: skip
_LENGTHS = {"": 1, "k": 2**10, "M": 2**20}


def bytes_of(text: str) -> int:
    """`65.7GiB` (2**30 each), `80GB` (10**9 each), `0`; whole bytes, rounded down. Raises ValueError for all else."""
    return int(_number(text, _BYTES, "a size like 70GiB, 80GB or 512MiB"))


def length_of(text: str) -> int:
    """Positions: `128k` is 131,072 and `1M` is 1,048,576; raises ValueError for anything else, and for less than 1."""
    wanted = "a length like 4096, 128k or 1M"
    number = _number(text, _LENGTHS, wanted)
    if number < 1 or number != int(number):
        raise ValueError(f"{text!r} is not {wanted}")
    return int(number)


def _number(text: str, units: dict[str, int], wanted: str) -> Fraction:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in units:
        raise ValueError(f"{text!r} is not {wanted}")
    return Fraction(match[1]) * units[match[2]]


def bytes_text(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def length_text(length: int) -> str:
    """A length as `length_of` reads it: the largest unit that divides it."""
    unit = next(unit for unit in reversed(_LENGTHS) if length % _LENGTHS[unit] == 0)
    return f"{length // _LENGTHS[unit]}{unit}"
