"""JSON as the types that dataclasses declare; what is of another type is said with its place."""

from dataclasses import dataclass

import pytest

from autosp_aot.artifact.typed_json import typed


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]
    note: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: dict[str, Inner]
    rate: float
    choice: str | int
    whole: bool


GIVEN = {"inner": {"a": {"sizes": [1, 2], "note": None}}, "rate": 1, "choice": 3, "whole": True}


def test_what_is_of_its_types_is_read():
    assert typed(Outer, GIVEN, "x") == Outer({"a": Inner((1, 2))}, 1, 3, True)


@pytest.mark.parametrize("changes, said", [
    ({"rate": "1"}, 'x.rate is "1", not a number'),
    ({"rate": True}, "x.rate is true, not a number"),
    ({"choice": None}, "x.choice is null, not a text or a whole number"),
    ({"choice": True}, "x.choice is true, not a text or a whole number"),
    ({"whole": 1}, "x.whole is 1, not true or false"),
    ({"inner": []}, "x.inner is [], not an object"),
    ({"inner": {"a": {"sizes": [1]}}}, 'x.inner.a is {"sizes": [1]}, not an object of sizes, note'),
    ({"inner": {"a": {"sizes": [1, "y"], "note": None}}}, 'x.inner.a.sizes[1] is "y", not a whole number'),
    ({"inner": {"a": {"sizes": "12", "note": None}}}, 'x.inner.a.sizes is "12", not a list'),
    ({"more": 1}, "x is "),
])  # fmt: skip
def test_what_is_not_is_said_with_its_place(changes, said):
    with pytest.raises(ValueError) as caught:
        typed(Outer, GIVEN | changes, "x")
    assert str(caught.value).startswith(said)


def test_of_a_type_that_may_be_missing_the_place_inside_is_said():
    @dataclass(frozen=True)
    class Maybe:
        inner: Inner | None

    with pytest.raises(ValueError, match=r"^x.inner.sizes is 5, not a list$"):
        typed(Maybe, {"inner": {"sizes": 5, "note": None}}, "x")
