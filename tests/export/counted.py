"""State of a file that has no model in it."""

STEP = 0


class Counts:
    n = 0


def next_step() -> int:
    global STEP
    STEP += 1
    return STEP
