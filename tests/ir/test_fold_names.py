"""Long lists of names are short and say the same."""

import pytest

from autosp_aot.ir.fold_names import folded


@pytest.mark.parametrize("names, said", [
    ([], []),
    (["a", "b"], ["a", "b"]),
    (["a.0.w", "a.1.w", "a.2.w", "head"], ["a.{0-2}.w", "head"]),
    (["a.0.w", "a.1.w", "a.7.w"], ["a.{0-1,7}.w"]),
    (["a.10.w", "a.9.w"], ["a.{9-10}.w"]),
    ([f"a.{i}.e.{j}.w{k}" for i in range(2) for j in range(3) for k in (1, 2)],
     ["a.{0-1}.e.{0-2}.w1", "a.{0-1}.e.{0-2}.w2"]),
    (["a.0.b.0", "a.1.b.0", "a.1.b.1"], ["a.0.b.0", "a.1.b.{0-1}"]),
    (["a.0", "a.0.b", "a.1"], ["a.{0-1}", "a.0.b"]),
    (["a.0", "a.0"], ["a.0"]),
])  # fmt: skip
def test_numbers_of_one_place_are_said_together(names, said):
    assert folded(names) == said
