"""Folds indexed names: `layers.0.norm`, `layers.1.norm`, `layers.2.norm` are `layers.{0-2}.norm`."""

import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")


def folded(names: Iterable[str]) -> list[str]:
    """The names, those that differ in the numbers of one place only as one; in order of the first of each."""
    parts = [NUMBER.split(name) for name in dict.fromkeys(names)]
    for place in reversed(range(1, max(map(len, parts), default=0), 2)):
        alike: dict[tuple[str, ...], list[str]] = {}
        for part in parts:
            alike.setdefault((*part[:place], *part[place + 1 :]), []).extend(part[place : place + 1])
        parts = [[*key[:place], *_range(numbers), *key[place:]] for key, numbers in alike.items()]
    return ["".join(part) for part in parts]


def _range(numbers: list[str]) -> list[str]:
    """`{0-3,7}` of several numbers, or the one."""
    if len(numbers) < 2:
        return numbers
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ["{" + ",".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs) + "}"]
