"""Names as the text of a program has them: a character that would end one is written by its number."""

import re

ESCAPED = re.compile(r"[\s,:;=()\[\]{}@#%$\"\\]")  # in a name
SPACES = re.compile(r"[\s\\]")  # in where an instruction comes from
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def escaped(text: str, characters: re.Pattern[str] = ESCAPED) -> str:
    """A name as the text has it."""
    return characters.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def unescaped(text: str, characters: re.Pattern[str] = ESCAPED) -> str:
    """The name that `escaped` has made a text of. Raises ValueError for a text that it does not make."""
    name = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    if escaped(name, characters) != text:
        raise ValueError(f"not a name: {text!r}")
    return name
