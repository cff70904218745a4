"""A batch as people give it, and flat: tensors and constants of the build by name.

    {"input_ids": ids, "mask": None, "image": {"pixels": pixels, "size": 8}}
    {"input_ids": ids, "mask": None, "image.pixels": pixels, "image.size": 8}

The names of a flat batch are those of the program's inputs. None, flags, numbers and texts are constants: what is built
holds for them alone.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Constant = None | bool | int | float | str
CONSTANTS = (type(None), bool, int, float, str)
DICTS = (dict, OrderedDict)


def flat(batch: Mapping[Any, Any]) -> dict[str, Tensor | Constant]:
    """A batch by names with dots. Raises ValueError for what is no part of a batch, naming all of it, a line each."""
    found: dict[str, Tensor | Constant] = {}
    wrong: list[str] = []
    for name, value in batch.items():
        if not isinstance(name, str) or "." in name or not name:
            wrong.append(f"the name {name!r} is no text without dots")
        elif type(value) in DICTS and not value:
            wrong.append(f"{name!r} is an empty dict, where None would be a constant")
        elif type(value) in DICTS:
            try:
                found |= {f"{name}.{inner}": part for inner, part in flat(value).items()}
            except ValueError as error:
                wrong += [f"of {name!r}, {line}" for line in str(error).splitlines()]
        elif isinstance(value, Tensor) or type(value) in CONSTANTS:
            found[name] = value
        else:
            wrong.append(f"{name!r} is {type(value).__name__}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return found


def nested(batch: Mapping[str, Tensor | Constant]) -> dict[str, Any]:
    """The batch of which `flat` made this one."""
    found: dict[str, Any] = {}
    for name, value in batch.items():
        *path, last = name.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found


def tensors_of(batch: Mapping[str, Tensor | Constant]) -> dict[str, Tensor]:
    """The tensors of a flat batch."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def constants_of(batch: Mapping[str, Tensor | Constant]) -> dict[str, Constant]:
    """The constants of a flat batch."""
    return {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
