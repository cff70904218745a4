"""What the options of the command line take: sizes, lengths, tiles, and `key=value` pairs."""

import json
from collections.abc import Callable

import click

from autosp_aot.ir.units import bytes_of

CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


class Units(click.ParamType):
    """What `autosp_aot.ir.units` reads; with `many`, a list of it between commas, each once and in order."""

    def __init__(self, name: str, read: Callable[[str], object], many: bool = False):
        self.name, self.read, self.many = name, read, many

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            found = [self.read(text) for text in (value.split(",") if self.many else [value])]
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return tuple(sorted(set(found))) if self.many else found[0]


def tiles(text: str) -> str | int:
    if text in ("auto", "off"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not auto, off or a number of slices")
    return int(text)


def ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a number of ranks")
    return int(text)


SIZE = Units("size", bytes_of)


def pairs_to_options(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, object]:
    """`key=value` pairs; a value is a number, true, false, none or a JSON list where it reads as one, else text."""
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{pair!r} is not key=value")
        if key in options:
            raise click.BadParameter(f"{key!r} is given twice")
        options[key] = _value(text)
    return options


def _value(text: str) -> object:
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
