"""What was computed with a guess of the loss's tangent, for the tangent that came.

    rescale(x, tangent, guess) = x * (tangent / guess)

`derive` takes it for `x`: a gradient is linear in the tangent.
"""

from torch import Tensor

from autosp_aot.ops.record import OwnOp


def rescale(x: Tensor, tangent: Tensor, guess: Tensor) -> Tensor:
    """`x`, computed with a guess of the loss's tangent, times tangent / guess."""
    return x * (tangent / guess)


def _workspace(x: Tensor, tangent: Tensor, guess: Tensor, target: str) -> tuple[list[Tensor], int]:
    return [rescale(x, tangent, guess)], tangent.itemsize


RESCALE = OwnOp(
    "autosp.rescale", "autosp.rescale(x, tangent, guess) -> x, times tangent / guess", rescale, _workspace, rule=None
)
