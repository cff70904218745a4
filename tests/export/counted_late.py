"""State of a file that is imported by a function alone."""

STEP = 0
