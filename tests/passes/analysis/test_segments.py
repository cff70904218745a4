"""Where the forward pass is cut: between layers, whatever else crosses them."""

from autosp_aot.ir.text import parse_program
from autosp_aot.passes.analysis.segments import numbered, segments

HEAD = """\
autosp program 1
ranks 1
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
"""


def program(forward: str):
    lines = "".join(f"  {line.strip()}\n" for line in forward.splitlines() if line.strip())
    sections = "section backward takes ()\ngives ()\nsection sum_gradients takes ()\ngives ()\n"
    return parse_program(f"{HEAD}section forward takes ()\n{lines}gives ()\n{sections}", {})


def layer(given: str, made: str) -> str:
    """Six times as much is alive inside as between."""
    return f"""
        %{made}.a: f32[8, 4] @ Replicate = aten.cat.default([%{given}, %{given}], 0)
        %{made}.b: f32[24, 4] @ Replicate = aten.cat.default([%{made}.a, %{made}.a, %{made}.a], 0)
        %{made}.c: f32[4, 4] @ Replicate = aten.slice.Tensor(%{made}.b, 0, 0, 4)
        %{made}: f32[4, 4] @ Replicate = aten.mm.default(%{made}.c, %w)
    """


FIRST = "%h: f32[4, 4] @ Replicate = aten.mm.default(%x, %w)"
END = "%loss: f32[] @ Replicate = aten.sum.default(%h2)"


def boundaries(text: str) -> list[tuple[str, ...]]:
    return [segment.boundary for segment in segments(program(text))]


def test_cuts_are_where_least_is_alive():
    assert boundaries(FIRST + layer("h", "h1") + layer("h1", "h2") + END) == [("h",), ("h1",), ()]


def test_what_is_read_far_below_belongs_to_every_boundary_it_crosses():
    side = "\n%side: f32[1, 4] @ Replicate = aten.slice.Tensor(%h, 0, 0, 1)\n"
    last = "\n%sum: f32[4] @ Replicate = aten.mv.default(%h3, %side)\n"
    found = boundaries(FIRST + side + layer("h", "h1") + layer("h1", "h2") + layer("h2", "h3") + last)
    assert found == [("h",), ("side", "h1"), ("side", "h2"), ()]


def test_what_depends_on_weights_or_batch_alone_is_of_no_segment():
    found = program(FIRST + "\n%t: f32[4, 4] @ Replicate = aten.neg.default(%x)" + layer("h", "h2") + END)
    assert "t" not in numbered(found, segments(found)) and numbered(found, segments(found))["h2.a"] == 1


def test_a_program_that_never_grows_is_one_segment():
    assert boundaries("%loss: f32[] @ Replicate = aten.sum.default(%x)") == [()]
