"""JSON read as the types that dataclasses declare: every field, nothing else, no default and no conversion.

    typed(TensorSpec, {"name": "x", "dtype": "f32", "shape": [2, "3"], "vocabulary": null}, "batch[0]")
        ValueError: batch[0].shape[1] is "3", not a whole number
"""

import json
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

SHOWN = 40  # characters of a value in a message
SCALARS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def typed(kind: Any, value: object, place: str) -> Any:
    """`value`, as json.loads gives it, as a `kind`: a dataclass, tuple[X, ...], dict[str, X], a scalar, or one of some.

    Raises ValueError, with the place of what is of another type.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise _wrong(place, value, f"an object of {', '.join(hints)}")
        return kind(**{name: typed(hint, value[name], f"{place}.{name}") for name, hint in hints.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _wrong(place, value, "a list")
        return tuple(typed(get_args(kind)[0], item, f"{place}[{at}]") for at, item in enumerate(value))
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _wrong(place, value, "an object")
        return {key: typed(get_args(kind)[1], item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(kind, UnionType):
        return _one_of(get_args(kind), value, place)
    if kind is float:
        if type(value) not in (int, float):
            raise _wrong(place, value, SCALARS[kind])
        return value
    if type(value) is not kind:
        raise _wrong(place, value, SCALARS[kind])
    return value


def _one_of(kinds: tuple[Any, ...], value: object, place: str) -> Any:
    """The value as the first kind that it is; what is said is of a kind with a place inside of it, if there is one."""
    said: list[ValueError] = []
    for kind in kinds:
        try:
            return typed(kind, value, place)
        except ValueError as error:
            said.append(error)
    inside = [error for error in said if not str(error).startswith(f"{place} is ")]
    if inside:
        raise inside[0]
    names = [SCALARS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds]
    raise _wrong(place, value, " or ".join(names))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _wrong(place: str, value: object, wanted: str) -> ValueError:
    text = json.dumps(value)
    return ValueError(f"{place} is {text if len(text) <= SHOWN else text[:SHOWN] + '...'}, not {wanted}")
