"""The longest sequence that fits, by asking for few lengths: what a step needs is nearly a line in the length.

A length that does not fit says what it would need, and the line from there to what a step of no length needs says where
to ask next. Lengths asked for have six leading bits and zeros, so that neighbours differ by 1/32 to 1/64.
"""

from collections.abc import Callable

LEADING_BITS = 6
SHORTEST, LONGEST = 64, 2**26


def longest(need: Callable[[int], int], room_bytes: int, fixed_bytes: int, start: int) -> int:
    """The longest length of those that are asked for that needs at most `room_bytes`; 0 where SHORTEST does not fit.

    `need` is asked what a length takes; `fixed_bytes` of it do not depend on the length; `start` is a length to begin
    with. Nothing above LONGEST is asked.
    """
    low, high = 0, 0  # low fits, high does not; 0 where none is known
    length, stride = rounded(start), 1
    while True:
        needed = need(length)
        if needed <= room_bytes:
            stride = 2 * stride if low else 1
            low = length
            if length >= LONGEST:
                return low
        else:
            high, line = length, (room_bytes - fixed_bytes) / (needed - fixed_bytes) * length
            stride = 1
        if not high:
            length = 2 * low
            continue
        lowest = grown(low, 1) if low else SHORTEST
        if lowest >= high:
            return low
        guess = rounded(int(line)) if line > lowest else grown(lowest, stride - 1)
        length = min(max(guess, lowest), rounded(high - 1))


def rounded(length: int) -> int:
    """The nearest length below or at `length` that is asked for."""
    zeros = max(length.bit_length() - LEADING_BITS, 0)
    return max(length >> zeros << zeros, SHORTEST)


def grown(length: int, steps: int) -> int:
    """The length so many neighbours further."""
    for _ in range(steps):
        length += 1 << max(length.bit_length() - LEADING_BITS, 0)
    return length
