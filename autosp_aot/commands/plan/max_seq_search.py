"""The longest sequence that fits, by asking for few lengths: what a step needs is nearly a line in its length.

A length that does not fit says what it needs, and the line from there to what a step of no length needs says where to
ask next. Lengths that are asked for have six leading bits and then zeros: neighbours are 1/32 to 1/64 apart.
"""

from collections.abc import Callable

OCTAVE = 32  # lengths asked for from one power of two to the next
LONGEST = 2**24


def longest(need: Callable[[int], int], room_bytes: int, fixed_bytes: int, start: int) -> int:
    """The longest length whose next does not fit; 0 where not even 32 do.

    `need` gives the bytes that a length takes, of which `fixed_bytes` do not depend on it; `start` is where to begin.
    """
    low, high = -1, _index(LONGEST)  # as indices: low fits, high does not
    at, fitted, stride = _index(start), True, OCTAVE // 2
    while high - low > 1:
        at = min(max(at, low + 1), high - 1)
        length = _length(at)
        needed = need(length)
        fits = needed <= room_bytes
        stride = 2 * stride if fits == fitted else 1
        fitted = fits
        if fits:
            low, at = at, at + stride
        else:
            line = (room_bytes - fixed_bytes) / (needed - fixed_bytes) * length
            high, at = at, min(_index(int(line)), at - stride)
    return _length(low) if low >= 0 else 0


def _length(index: int) -> int:
    return (OCTAVE + index % OCTAVE) << index // OCTAVE


def _index(length: int) -> int:
    """Of the longest length asked for that is no longer; negative below the shortest."""
    octave = max(length.bit_length() - OCTAVE.bit_length(), 0)
    return octave * OCTAVE + (length >> octave) - OCTAVE
